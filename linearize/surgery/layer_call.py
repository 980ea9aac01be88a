"""What attention transfer sees of a converted layer in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.mixers import Mixer
from linearize.surgery.projections import output_projection

if TYPE_CHECKING:
    from linearize.surgery.attention import LinearizedAttention

Triple = tuple[Tensor, Tensor, Tensor]
"""q [B, T, H, K], k [B, T, N, K] and v [B, T, N, V]."""


@dataclass
class LayerCall:
    """One converted layer's inputs and the teacher's answer, as attention transfer sees them; no tensor has a graph.

    Attributes:
        layer_idx: the layer's number.
        module: the attention module.
        q, k, v: [B, T, H, K], [B, T, N, K], [B, T, N, V], after q/k norm and RoPE.
        hidden_states: [B, T, D], the module's input.
        valid, starts: [B, T] bool or None: not padding, begins a document.
        teacher: [B, T, H, V], softmax output before the output projection.
        gaps: whether padding stands between tokens; None: nobody has looked.
        context: what else the mixer reads, see `context`.
        shifted: makes the mixer's own q, k, v and, where it reads them, `plain`, anew at each call and with a graph to
            the mixer's parameters, where the projections' inputs are shifted; None: they are those above.
    """

    layer_idx: int
    module: LinearizedAttention
    q: Tensor
    k: Tensor
    v: Tensor
    hidden_states: Tensor
    valid: Tensor | None
    starts: Tensor | None
    teacher: Tensor
    gaps: bool | None = None
    context: dict[str, Any] = field(default_factory=dict)
    shifted: Callable[[], tuple[Any, ...]] | None = None

    @property
    def mixer(self) -> Mixer:
        return self.module.mixer

    def student(self) -> Tensor:
        """The mixer's output [B, T, H, V] in its chunked form, with a graph to the mixer's parameters."""
        masks: dict[str, Any] = {"valid": self.valid, "starts": self.starts, "gaps": self.gaps}
        (q, k, v), given = self._inputs()
        return self.module.linearize_switch.chunked(self.mixer, q, k, v, **masks, **given)

    def _inputs(self) -> tuple[Triple, dict[str, Any]]:
        """What the mixer reads."""
        if self.shifted is None:
            return (self.q, self.k, self.v), self.context
        q, k, v, plain = self.shifted()
        return (q, k, v), self.context if plain is None else {**self.context, "plain": plain}

    def project(self, y: Tensor) -> Tensor:
        """Heads [B, T, H, V] -> the layer's output [B, T, D], through the model's own output projection."""
        output = output_projection(self.module)
        return output(y.flatten(2).to(next(output.parameters()).dtype))

    def weights(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Normalized attention weights of teacher and student for some query rows, each [B, H, R, T]."""

        masks: dict[str, Any] = {"valid": self.valid, "starts": self.starts, "rows": rows}
        with torch.no_grad():
            softmax = teacher_mixer(self.mixer)
            teacher = softmax.parallel(self.q, self.k, None, **masks, sink=self.context.get("sink"))
        (q, k, _), given = self._inputs()
        student = self.mixer.parallel(q, k, None, **masks, **given)
        return teacher.transpose(1, 2), student.transpose(1, 2)


def teacher_mixer(mixer: Mixer) -> Mixer:
    """The softmax mixer of the same layer: the teacher's attention in our own form, which can give its weights."""
    from linearize.mixers import build

    return build({"window": {"name": "full"}}, mixer.shape)
