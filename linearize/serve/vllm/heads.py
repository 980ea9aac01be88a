"""A mixer's share of its layer's heads, where vLLM's tensor parallelism gives each process some of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from linearize.errors import UnsupportedModelError
from linearize.mixers import LayerShape, Mixer, build
from linearize.mixers.base import Part


def problem(shape: LayerShape, ranks: int) -> str | None:
    """Why a layer's heads cannot be shared out over so many processes, as a sentence with its remedy, or None."""
    if shape.heads % ranks == 0 and (shape.kv_heads % ranks == 0 or ranks % shape.kv_heads == 0):
        return None
    fitting = [
        n
        for n in range(1, shape.heads + 1)
        if shape.heads % n == 0 and (shape.kv_heads % n == 0 or n % shape.kv_heads == 0)
    ]
    *most, last = map(str, fitting)
    named = f"{', '.join(most)} or {last}" if most else last
    return (
        f"tensor_parallel_size is {ranks}, and {shape.heads} query heads over {shape.kv_heads} of keys and values "
        f"cannot be shared out evenly; take {named}"
    )


def share(shape: LayerShape, ranks: int) -> LayerShape:
    """The numbers of one process's part of a layer: whole query heads, and the key-value heads that they look at.

    Where there are fewer key-value heads than processes, several hold the same one, as vLLM's own layers do.

    Raises:
        UnsupportedModelError: see `problem`.
    """
    why = problem(shape, ranks)
    if why is not None:
        raise UnsupportedModelError(why)
    return replace(shape, heads=shape.heads // ranks, kv_heads=max(1, shape.kv_heads // ranks))


def cut(whole: Tensor, shape: tuple[int, ...], rank: int, ranks: int, runs: int = 1) -> Tensor:
    """What one process holds of a tensor: along each axis that is shorter in `shape`, its heads.

    Args:
        whole: of all heads, heads in order along an axis, and what belongs to a head together.
        shape: of the part.
        rank, ranks: which process, of how many.
        runs: how often all heads stand along such an axis, one after another; see `Part.runs`.
    """
    for axis, (total, own) in enumerate(zip(whole.shape, shape, strict=True)):
        if total == own:
            continue
        parts, left = divmod(total, own)
        assert left == 0, "heads were shared out evenly"
        # fewer parts than processes: key-value heads, each held by several neighbours
        first = rank * parts // ranks * (own // runs)
        each = whole.unflatten(axis, (runs, total // runs))
        whole = each.narrow(axis + 1, first, own // runs).flatten(axis, axis + 1)
    return whole


def repeated(mixer: Mixer) -> dict[str, int]:
    """`Part.runs` of all parts, by the parameters' names in the mixer."""
    return {
        f"{path}.{name}": times
        for path, part in mixer.named_modules()
        if isinstance(part, Part)
        for name, times in part.runs().items()
    }


def shared_out(section: dict[str, Any], whole: Mixer, rank: int, ranks: int) -> Mixer:
    """The mixer of one process's heads; parameters fresh, to be filled with what `cut` takes of the whole one's.

    Args:
        section: of the plan, from which `whole` was built.
        whole: of all heads.
        rank, ranks: which process, of how many.
    """
    made = build(section, share(whole.shape, ranks))
    for part, of in zip(made.modules(), whole.modules(), strict=True):
        for name, buffer in of.named_buffers(recurse=False):
            part.register_buffer(name, cut(buffer, tuple(getattr(part, name).shape), rank, ranks).clone())
        if isinstance(part, Part):
            assert isinstance(of, Part)
            part.take(of, rank, ranks)
    return made
