"""Passes of placements that begin behind the blocks which they share with one that has run before.

Scores change one layer at a time, so what stands in front of that layer computes what it has computed already: half of
all blocks, on average. A pass of the first placement keeps what each block gave; in another one the blocks up to the
first layer that differs give that again. Before the first pass of this kind one of the same placement is held against
its whole one, and where the two are not the same (a model that hands something past its blocks), all passes are whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linearize import surgery
from linearize.distill.blocks import repeated
from linearize.errors import LinearizeError
from linearize.eval.token_scores import Predictor
from linearize.select.placement import Kept
from linearize.surgery import LinearizedAttention

log = logging.getLogger(__name__)

MOST = 2 << 30
"""Bytes that are kept of a placement; windows beyond that run whole."""
LOOKED_AT = 64
"""Tokens whose predictions are compared."""
NEAR = 1e-4
"""Of log-probabilities; equal on a CPU, and on a GPU where the same kernels are chosen."""


class Shortened(Predictor):
    """Predictions of a converted model some of whose layers are the teacher's, a placement after the other.

    Args:
        model: converted in all layers that can be chosen, in evaluation mode.
        autocast: dtype for torch.autocast on the model's device, or None.

    Attributes:
        kept: the layers that are the teacher's in the next passes.
        obstacle: why passes are whole ones, or None.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, autocast)
        self.kept: Kept = ()
        self.blocks = repeated(model)
        self.obstacle = (
            None if self.blocks and self.head is not None else "its blocks are no list of their own"
        )
        self._numbers = [
            {part.layer_idx for part in block.modules() if isinstance(part, LinearizedAttention)}
            for block in self.blocks
        ]
        self._base: Kept | None = None
        self._given: dict[bytes, list[Any]] = {}
        self._bytes, self._looked = 0, False

    def begin(self, kept: Kept) -> None:
        """From now on, passes begin behind what they share with this placement."""
        self._base, self._bytes = kept, 0
        self._given.clear()

    def end(self) -> None:
        """Passes are whole ones again, and what was kept is gone."""
        self._base = None
        self._given.clear()

    def windows(self, ids: Tensor, *, keep: bool = False) -> Any:
        """As `Predictor.windows`, of the placement `kept`."""
        shared = self._shared()
        given = self._given_of(ids) if shared else None
        return self._whole_windows(ids) if given is None else self._behind(ids, given[:shared])

    def _behind(self, ids: Tensor, given: list[Any]) -> Any:
        """A pass whose first blocks compute nothing."""
        with surgery.as_teacher_layers(self.model, self.kept), _giving(self.blocks[: len(given)], given):
            return super().windows(ids)

    def _whole_windows(self, ids: Tensor) -> Any:
        with surgery.as_teacher_layers(self.model, self.kept):
            return super().windows(ids)

    def _shared(self) -> int:
        """How many first blocks compute what those of the placement that was kept did."""
        if self._base is None or self.obstacle is not None:
            return 0
        differ = set(self._base) ^ set(self.kept)
        return next((place for place, own in enumerate(self._numbers) if own & differ), 0)

    def _given_of(self, ids: Tensor) -> list[Any] | None:
        """What the blocks of the first placement give for these windows; None where there is no room for it."""
        name = ids.numpy().tobytes()
        if name not in self._given:
            if self._bytes > MOST:
                return None
            given: list[Any] = []
            kept, self.kept = self.kept, self._base or ()
            hooks = [
                block.register_forward_hook(lambda block, args, output: given.append(output))
                for block in self.blocks
            ]
            try:
                whole = self._whole_windows(ids)
                for hook in hooks:
                    hook.remove()
                if not self._looked:
                    self._look(ids, given, whole)
            finally:
                self.kept = kept
                for hook in hooks:
                    hook.remove()
            if self.obstacle is not None:
                return None
            self._given[name] = given
            self._bytes += sum(tensor.nbytes for output in given for tensor in _tensors(output))
        return self._given[name]

    def _look(self, ids: Tensor, given: list[Any], whole: Any) -> None:
        """Whether the same placement, begun late, predicts the same."""
        self._looked, part = True, slice(0, min(LOOKED_AT, ids.shape[1]))
        if len(given) != len(self.blocks):
            self.obstacle = "its blocks do not run once each"
        for shared in (len(given) // 2, len(given) - 1):
            if self.obstacle is not None:
                break
            try:
                short = self._behind(ids, given[:shared])
            except (LinearizeError, LookupError, AttributeError, TypeError, RuntimeError) as error:
                self.obstacle = f"a block needs what those before it hand on ({type(error).__name__})"
                break
            apart = max(float((a(part) - b(part)).abs().max()) for a, b in zip(short, whole, strict=True))
            if not apart <= NEAR:
                self.obstacle = f"predictions would differ by {apart:.2g}"
        if self.obstacle is not None:
            log.info("scores take whole passes, about half as many again: %s", self.obstacle)


@contextmanager
def _giving(blocks: list[nn.Module], given: list[Any]) -> Iterator[None]:
    """Inside, blocks compute nothing and give what they gave before."""
    try:
        for block, output in zip(blocks, given, strict=False):
            block.forward = partial(_again, output)  # type: ignore[method-assign]
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _again(output: Any, *args: Any, **kwargs: Any) -> Any:
    """A copy: what comes behind may write into it."""
    if isinstance(output, tuple):
        return tuple(part.clone() if isinstance(part, Tensor) else part for part in output)
    return output.clone() if isinstance(output, Tensor) else output


def _tensors(output: Any) -> list[Tensor]:
    return [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
