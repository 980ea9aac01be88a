"""Models on the Hugging Face hub: only config, tokenizer and safetensors files are fetched, and no code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from linearize.errors import CheckpointError, ModelNotFoundError
from linearize.models.check import check_checkpoint, check_config, has_tokenizer, is_whole

log = logging.getLogger(__name__)

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
FILES = ["*.safetensors", *SMALL_FILES]
IGNORED = ["*/*", "consolidated*.safetensors", "*.bin.index.json"]
"""Not the model itself: other frameworks' folders, the original weights beside the converted ones."""


def fetch(name: str) -> Path:
    """The folder of a hub model's files, downloaded unless they are there already.

    A complete download is used as it is, without asking the hub whether the branch has moved on; pin
    `@revision` for reproducibility, or delete the model from the hub's cache to get the newest.

    Args:
        name: ``owner/model`` or ``owner/model@revision``.

    Raises:
        ModelNotFoundError: no such model or revision, no access, no network.
        CheckpointError: the model has no safetensors weights, or the download is damaged.
    """
    local = _local(name, FILES)
    if local is not None and is_whole(local) and has_tokenizer(local):
        return local
    try:
        folder = _snapshot(name, FILES)
    except ModelNotFoundError:
        if local is not None and is_whole(local):  # offline, and nothing but a tokenizer could be missing
            return local
        raise
    try:
        check_checkpoint(folder)
    except (CheckpointError, ModelNotFoundError) as error:
        raise type(error)(f"hub model '{name}': {error}") from error
    return folder


def cached(name: str) -> bool:
    """Whether some of a hub model's files are here already; the hub is not asked."""
    return _local(name, ["config.json"]) is not None


def fetch_config(name: str) -> Path:
    """The folder of a hub model's config.json, without its weights. Raises as `fetch`."""
    local = _local(name, ["config.json"])
    if local is not None and (local / "config.json").is_file():
        return local
    folder = _snapshot(name, ["config.json"])
    check_config(folder)
    return folder


def _split(name: str) -> dict[str, Any]:
    repo, _, revision = name.partition("@")
    return {"repo_id": repo, "revision": revision or None}


def _local(name: str, patterns: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                **_split(name), allow_patterns=patterns, ignore_patterns=IGNORED, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _snapshot(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause: Exception
    log.info("fetching '%s' from the Hugging Face hub", name)
    try:
        return Path(snapshot_download(**_split(name), allow_patterns=patterns, ignore_patterns=IGNORED))
    except GatedRepoError as error:
        problem, cause = (
            f"hub model '{name}' is gated; accept its terms and log in with `hf auth login`",
            error,
        )
    except RevisionNotFoundError as error:
        problem, cause = f"hub model '{name}' has no such revision; look at its branches and tags", error
    except RepositoryNotFoundError as error:
        problem, cause = (
            f"no model '{name}' on the Hugging Face hub, or it is private (`hf auth login`)",
            error,
        )
    except HFValidationError as error:
        problem, cause = f"'{name}' is not a hub id ({_first_line(error)}); write owner/model", error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        reason = _first_line(error)
        problem, cause = (
            f"cannot reach the Hugging Face hub for '{name}' ({reason}); connect to a network",
            error,
        )
    raise ModelNotFoundError(
        f"{problem}, or give a local checkpoint folder, a GGUF file or an alias"
    ) from cause


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
