"""Which tensors of a GGUF file the model was made of: transformers passes over every one that it has no place for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from linearize.errors import UnsupportedModelError
from linearize.models.gguf_config import ELSEWHERE
from linearize.patch import changed

SHOWN = 4
"""Names of a message."""


@contextmanager
def recording(reader: Any) -> Iterator[set[str]]:
    """Inside the block, the names of the tensors that transformers' reader of GGUF files puts to use.

    Args:
        reader: its module; where it works in another way, nothing is recorded, and `check_used` refuses every file.
    """
    used: set[str] = set()
    find = getattr(reader, "get_gguf_hf_weights_map", None)

    def mapped(model: Any, processor: Any, *args: Any, **options: Any) -> Any:
        places = find(model, processor, *args, **options) if find else {}
        known.update(places)
        if "process" not in vars(processor):  # the search calls itself for each submodule
            processor.process = partial(_process, processor.process, known, used)
        return places

    known: set[str] = set()
    with changed(reader, "get_gguf_hf_weights_map", mapped):
        yield used


def check_used(file: Path, tensors: Iterable[str], used: set[str]) -> None:
    """Refuse a file some of whose tensors went nowhere: without them it would be another model.

    Args:
        file: for the message.
        tensors: names of the file's tensors.
        used: what `recording` gave.

    Raises:
        UnsupportedModelError: names them.
    """
    # factors of the rotary frequencies are the config's matter, and checked with it
    unused = [name for name in tensors if name not in used and not name.startswith("rope_")]
    if unused:
        more = f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else ""
        raise UnsupportedModelError(
            f"{file}: transformers has no place for {len(unused)} of its tensors ({', '.join(unused[:SHOWN])}{more}), "
            f"so it would be another model; {ELSEWHERE}"
        )


def _process(process: Any, known: set[str], used: set[str], *args: Any, **options: Any) -> Any:
    result = process(*args, **options)
    # no name in the result: the processor has put the tensor in its place itself
    if result.name is None or result.name in known:
        used.add(options["name"] if "name" in options else args[1])
    return result
