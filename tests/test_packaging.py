"""Every way to install gives the same package: wheel, sdist to wheel, editable, and uninstalled from the root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import importlib, pkgutil, sys
from pathlib import Path
import linearize, linearize.kernels.linear, linearize.eval.tables, linearize.recipes
from linearize.config import list_recipes, compose
from linearize.config.compose import _load
from linearize import data
home = Path(linearize.__file__).resolve().parent
assert home == Path(sys.argv[1]).resolve(), home
assert {"lolcats", "hedgehog", "softmax", "demo"} <= {name for name, _ in list_recipes()}
assert _load("demo")[0]["data"]["length"]
assert list((home / "eval" / "tasks").glob("*.yaml"))
assert list((home / "eval" / "suites").glob("*.yaml"))
assert (home / "eval" / "page" / "page.html.jinja").is_file()
assert {path.stem for path in (home / "data" / "sample").glob("*.parquet")} == {"train", "validation"}
assert importlib.util.find_spec("kernels") is None or "linearize" not in str(importlib.util.find_spec("kernels").origin)
"""


def files() -> list[str]:
    """What a checkout holds: tracked, and new files that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if os.path.lexists(ROOT / name)]


def call(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(list(map(str, arguments)), cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A clean copy of the repository, links kept."""
    copy = tmp_path_factory.mktemp("packaging") / "linearize"
    for name in files():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An interpreter that sees this one's packages by PYTHONPATH, but none of its editable installs."""
    folder = tmp_path_factory.mktemp("bare")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    return folder / "bin" / "python"


def environment(*paths: Path) -> dict[str, str]:
    entries = [*map(str, paths), sysconfig.get_paths()["purelib"]]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entries), "PYTHONDONTWRITEBYTECODE": "1"}


def build(source: Path, out: Path, kind: str) -> Path:
    """Build with the setuptools that is installed here, so that no index is asked."""
    call(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, cwd=source)
    (built,) = out.iterdir()
    return built


def missing_from(wheel: Path) -> set[str]:
    """Files of the checkout that an installed package should hold and the wheel lacks."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for name in files():
        top = name.split("/", 1)[0]
        if name.endswith((".py", ".yaml", ".parquet", ".typed", ".jinja")):
            if top == "linearize":
                expected.add(name)
            elif top in ("kernels", "eval", "recipes"):
                expected.add(f"linearize/{name}")
    return expected - names


def test_the_root_works_uninstalled(checkout, python, tmp_path):
    call(python, "-c", PROBE, checkout / "linearize", cwd=checkout, env=environment(checkout))


@pytest.mark.job
def test_wheel(checkout, python, tmp_path):
    wheel = build(checkout, tmp_path / "dist", "wheel")
    assert missing_from(wheel) == set()
    target = tmp_path / "installed"
    call(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    call(python, "-c", PROBE, target / "linearize", cwd=tmp_path, env=environment(target))
    assert (target / "bin" / "linearize").is_file()


@pytest.mark.job
def test_sdist_then_wheel(checkout, python, tmp_path):
    sdist = build(checkout, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert (source / "LICENSE").is_file()
    wheel = build(source, tmp_path / "dist", "wheel")
    assert missing_from(wheel) == set()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    call(
        python,
        "-c",
        PROBE,
        tmp_path / "installed" / "linearize",
        cwd=tmp_path,
        env=environment(tmp_path / "installed"),
    )


@pytest.mark.job
def test_editable(checkout, tmp_path):
    folder = tmp_path / "environment"
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    options = ("install", "--no-deps", "--no-build-isolation", "-e", checkout)
    call(sys.executable, "-m", "pip", "--python", python, *options, cwd=tmp_path, env=environment())
    # Its own site-packages first: both environments hold a finder module of the same name.
    own = environment(next(folder.glob("lib/python*/site-packages")))
    call(python, "-c", PROBE, checkout / "linearize", cwd=tmp_path, env=own)
    (checkout / "kernels" / "newcomer.py").write_text("value = 1\n")
    try:
        call(python, "-c", "import linearize.kernels.newcomer", cwd=tmp_path, env=own)
    finally:
        (checkout / "kernels" / "newcomer.py").unlink()
