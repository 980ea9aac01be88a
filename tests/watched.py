"""Looking at what mixers do, operation by operation: what they widen, which kernels they call, how many there are."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.mixers.mixer import Mixer

NARROW = (torch.bfloat16, torch.float16)
SUMMED = ("conjugate_step x", "conjugate_step rest")
"""What a kernel adds to from one launch to the next, which is no copy of the text."""
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution")


class Watched(TorchDispatchMode):
    """Counts what happens inside mixers' forms, part by part, and what is done in float32 there.

    Args:
        tokens: T; a tensor without such a size is no text, but a state, say.
        least: numbers of the smallest tensor that counts, such as all keys of a text.

    Attributes:
        operations: in all, mixers or not.
        inside: in mixers' forms.
        kernels: name -> calls of the project's own operators, wherever.
        casts: place -> tensors of that size that were widened there. A compiler fuses a cast with what is done number
            by number behind it; what it cannot fuse is in `wide`.
        wide: "operator argument" -> float32 tensors of that size that a kernel or a product was given inside a mixer.
    """

    def __init__(self, tokens: int, least: int) -> None:
        super().__init__()
        self.tokens, self.least = tokens, least
        self.operations = self.inside = 0
        self.kernels: Counter[str] = Counter()
        self.casts: Counter[str] = Counter()
        self.wide: Counter[str] = Counter()
        self._depth = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        space, _, name = function._schema.name.partition("::")
        self.operations += 1
        if space == "linearize":
            self.kernels[name] += 1
        if self._depth:
            self.inside += 1
            if name == "_to_copy" and args[0].dtype in NARROW and self._is_wide(made):
                self.casts[place()] += 1
            if space == "linearize" or name in PRODUCTS:
                for key, value in named(function, args, kwargs or {}):
                    if self._is_wide(value) and f"{name} {key}" not in SUMMED:
                        self.wide[f"{name} {key}"] += 1
        return made

    def _is_wide(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return False
        return x.numel() >= self.least and any(size and size % self.tokens == 0 for size in x.shape)

    @contextmanager
    def mixers(self) -> Iterator[Watched]:
        """Inside, every mixer's forms are told from the rest of the model."""
        own = {name: getattr(Mixer, name) for name in ("chunked", "step")}

        def within(form: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                self._depth += 1
                try:
                    return form(*args, **kwargs)
                finally:
                    self._depth -= 1

            return call

        try:
            for name, form in own.items():
                setattr(Mixer, name, within(form))
            with self:
                yield self
        finally:
            for name, form in own.items():
                setattr(Mixer, name, form)


def named(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments of an operator by their names, lists taken apart."""
    names = [argument.name for argument in function._schema.arguments]
    found: list[tuple[str, Any]] = []
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        found += [(name, x) for x in value] if isinstance(value, list | tuple) else [(name, value)]
    return found


def place() -> str:
    """The innermost function of a mixer's part that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "mixers" in path.parts and frame.f_code.co_name not in ("wide", "product"):
            inside = path.parts[path.parts.index("mixers") + 1 :]
            return f"{'/'.join(inside).removesuffix('.py')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
