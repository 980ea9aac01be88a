"""A prefix in a file: one safetensors file with the tensors of all layers and, as plain text, whose they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from linearize.decode.identity import READ_AGAIN, checksum
from linearize.decode.prefix import Prefix
from linearize.errors import CheckpointError, LinearizeError
from linearize.models.files import instead_of_file
from linearize.storing import ONCE_MORE, check_place, write_tensors_file

KIND = "linearize state"
FORMAT = 1
"""Of the file; a newer one is refused."""
MOST = 2**31 - 1
"""Tokens of a text, and the largest id."""
FACTS = {"tokens": int, "last": int, "digest": str, "identity": dict}
"""What a prefix says of itself, and of which type."""


def save_state(prefix: Prefix, path: str | Path) -> Path:
    """Write a prefix as one safetensors file, whole or not at all; a state of that name is replaced.

    Args:
        prefix: of `read_ids`.
        path: the file.

    Raises:
        CheckpointError: the disk is full or refuses, or something else has the name.
    """
    path = Path(path)
    check_target(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in prefix.tensors.items()}
    facts = {name: getattr(prefix, name) for name in FACTS}
    metadata = {
        "kind": KIND,
        "format": str(FORMAT),
        "facts": json.dumps(facts, sort_keys=True),
        "checksum": checksum(tensors, facts),
    }
    write_tensors_file(path, tensors, metadata, again=ONCE_MORE)
    return path


def check_target(path: str | Path) -> None:
    """Refuse a path that a state cannot be written to without losing something else.

    Raises:
        CheckpointError: its folder is missing or refuses, or a file that is no state, or no file, has the name.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path}: there is no folder {path.parent}; make it first, or give another path"
        )
    other = instead_of_file(path)
    if other is None and path.exists():
        try:
            _metadata(path)
        except CheckpointError:
            other = "a file that is no state"
    if other is not None:
        raise CheckpointError(f"{path} is {other}, which would be lost; give the state another name")
    check_place(path, "give another path")


def load_state(path: str | Path, model: Any = None, tokenizer: Any = None) -> Prefix:
    """Read a prefix from a file that `save_state` wrote.

    Args:
        path: the file.
        model: which is to go on; None puts the check off until it does.
        tokenizer: of the model.

    Returns:
        Its tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, it is no state, damaged, cut short, or of a newer format.
        LinearizeError: it is another model's, in another dtype, or its text was split by another tokenizer.
    """
    path = Path(path)
    metadata = _metadata(path)
    facts = _facts(path, metadata)
    tensors = _tensors(path)
    wrong = [name for name in tensors if re.fullmatch(r"[0-9]{1,6}\.\w+", name, re.ASCII) is None]
    if wrong:
        raise _damaged(path, f"a tensor is called {wrong[0][:80]!r}, and should be LAYER.NAME")
    if checksum(tensors, facts) != metadata.get("checksum"):
        raise _damaged(path, "its bytes are not those that were written")
    prefix = Prefix(tensors, **facts)
    if model is not None:
        prefix.check(model, tokenizer)
    return prefix


def _metadata(path: Path) -> dict[str, str]:
    """What a state's header says, its format known.

    Raises:
        CheckpointError: see `load_state`.
    """
    other = instead_of_file(path)
    if other is not None or not path.exists():
        what = f"is {other}" if other is not None else "does not exist"
        raise CheckpointError(f"{path} {what}; give a file that --save-state (or save_state) wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if metadata.get("kind") != KIND:
        raise CheckpointError(
            f"{path} is a safetensors file but no state; give one that --save-state (or save_state) wrote"
        )
    number = metadata.get("format", "")
    if re.fullmatch("[1-9][0-9]{0,9}", number) is None:
        raise _damaged(path, f"its format is {number[:20]!r}")
    if int(number) > FORMAT:
        raise CheckpointError(
            f"{path} is of format {number[:20]}, written by a newer linearize than this one, which knows {FORMAT}; "
            f"upgrade linearize, or {READ_AGAIN}"
        )
    return metadata


def _facts(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        facts = json.loads(metadata.get("facts", ""))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its description cannot be read ({error})") from error
    fits = isinstance(facts, dict) and set(facts) == set(FACTS)
    if not fits or not all(type(facts[name]) is kind for name, kind in FACTS.items()):
        raise _damaged(path, "its description lacks something")
    for name, least in (("tokens", 1), ("last", 0)):
        if not least <= facts[name] <= MOST:
            raise _damaged(path, f"its {name} are {facts[name]}, and can be {least} to {MOST}")
    if re.fullmatch("[0-9a-f]{64}", facts["digest"]) is None:
        raise _damaged(path, "its digest of the text is none")
    if not all(isinstance(value, str) for value in facts["identity"].values()):
        raise _damaged(path, "its description of the model is none")
    return facts


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> LinearizeError:
    return CheckpointError(
        f"{path} is no state, cut short or damaged ({why[:200]}); copy it again, or {READ_AGAIN}"
    )
