"""Packed text on disk: tokenized once, mapped into memory ever after.

A folder under `cache_dir()/packed` holds what one recipe's text came to under one tokenizer: `tokens.npy`, `flags.npy`,
and `about.json` with their checksums. Its name is a hash of everything that decides them, content of files included, so
that nothing in it can be stale. It appears whole or not at all, and a damaged one is made again. It may be deleted at
any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from linearize.data import builtin, hub
from linearize.data.files import local_files
from linearize.errors import CheckpointError
from linearize.models.cache import build_once, cache_dir, content_hash, sha256

if TYPE_CHECKING:
    from linearize.config.schema import DataConfig

log = logging.getLogger(__name__)

FORMAT = 1
"""Goes up with any change of how text becomes tokens, so that older folders are not taken for it."""
ARRAYS = ("tokens", "flags")
ABOUT = "about.json"


@dataclass(frozen=True)
class Taken:
    """What a text came to.

    Attributes:
        tokens, flags: [N * T]; mapped from disk or in memory.
        dropped: sequences that were left out.
    """

    tokens: np.ndarray
    flags: np.ndarray
    dropped: int = 0


def stored(key: str | None, take: Callable[[], Taken]) -> Taken:
    """The text of a key, from the disk where it is there, else made and kept there.

    Where it cannot be kept (a full disk, no permission), a warning says so and it stays in memory.

    Args:
        key: of `key_of`; None keeps nothing.
        take: reads and tokenizes.
    """
    if key is None:
        return take()
    folder = cache_dir() / "packed" / key
    made: list[Taken] = []
    failed: list[Exception] = []

    def build(partial: Path) -> None:
        try:
            made.append(take())
        except Exception as error:
            failed.append(error)
            raise
        for name in ARRAYS:
            np.save(partial / f"{name}.npy", getattr(made[0], name))
        sums = {name: sha256(partial / f"{name}.npy") for name in ARRAYS}
        (partial / ABOUT).write_text(json.dumps({"dropped": made[0].dropped, "sha256": sums}))

    try:
        build_once(folder, build, usable=_whole)
        dropped = json.loads((folder / ABOUT).read_text())["dropped"]
        tokens, flags = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
    except (CheckpointError, OSError) as error:
        if failed:  # the text's own failure, which is no reason to read half of it again
            raise failed[0] from None
        log.warning("the tokenized text is not kept: %s", str(error).replace("the model cache", "its cache"))
        return made[0] if made else take()
    return Taken(tokens, flags, dropped)


def _whole(folder: Path) -> bool:
    """Whether a folder holds what was written into it."""
    try:
        sums = json.loads((folder / ABOUT).read_text())["sha256"]
        return all(sums[name] == sha256(folder / f"{name}.npy") for name in ARRAYS)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def key_of(
    tokenizer: Any, config: DataConfig, source: Any, *, wanted: int, seed: int, split: str
) -> str | None:
    """A name for what decides the packed text, or None where a part of it cannot be told.

    Args:
        tokenizer: of transformers.
        config: template, column, length and boundaries.
        source: one name or several.
        wanted: tokens.
        seed: of the order.
        split: of the sample and of hub datasets.

    Raises:
        DataError: a file is not there.
    """
    names = source if isinstance(source, (list, tuple)) else [source]
    parts: list[Any] = [FORMAT, tokenizer_digest(tokenizer), *(_source(str(name), split) for name in names)]
    if any(part is None for part in parts):
        return None
    parts += [split, config.text_field, config.template, config.length, config.boundaries, wanted, seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _source(name: str, split: str) -> Any:
    """A source by its content: hashes of its files in their order, or the revision of a hub dataset."""
    if name == builtin.NAME:
        return content_hash(builtin.sample(split))
    files = local_files(name)
    if files is None:
        revision = hub.revision(name)
        return None if revision is None else [name, revision]
    try:
        return [["".join(path.suffixes), content_hash(path)] for path in files]
    except OSError:
        return None  # the reader says what is wrong with it


def tokenizer_digest(tokenizer: Any) -> str | None:
    """All that decides a fast tokenizer's ids; None for a slow one, whose files are not known here."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    for state in ("padding", "truncation"):  # of the last batch
        rules.pop(state, None)
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    own = [
        type(tokenizer).__name__,
        rules,
        special,
        tokenizer.eos_token_id,
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
