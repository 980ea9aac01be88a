"""Attention transfer: every converted layer learns to imitate the softmax attention that it replaces.

Teacher and student run in one forward pass over the same frozen projections. The teacher's output goes on, so a
layer's loss depends on its own mixer alone, and its gradient is taken inside the pass, before the next layer runs:
no graph spans layers, and memory is that of one layer (Zhang et al. 2024, arXiv 2410.10254, section 3.1, without its
quadratic memory).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from linearize import objectives, surgery
from linearize.distill import shards, window_dropout
from linearize.distill.blocks import Place, around_attention, rotary
from linearize.distill.stage import StageTrainer
from linearize.errors import RecipeError
from linearize.mixers import shown


class _Enough(Exception):
    """Every converted layer has been seen, and nobody reads what the model would go on to compute."""


class TransferTrainer(StageTrainer):
    """A stage whose objectives are of the level "layer"."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        converted: list[Any] = surgery.converted(model)
        self.layers: list[int] = [module.layer_idx for module in converted]
        super().__init__(model, **settings)

    def compiled_parts(self) -> Sequence[nn.Module | Place]:
        around = around_attention(self.trained_model, softmax=self.sequences.size > 1)
        return [*around, *self.functions()]

    def functions(self) -> list[Place]:
        """What is compiled by itself inside the attention."""
        # an output projection is called as a module, which is not the loss's to compile
        plain = not any(objectives.get(name).projects for name in self.stage.objective)
        own = [(objectives.layer, "joined")] * plain + [(shown, "column_rows")]
        return rotary(self.trained_model) + own

    @property
    def count(self) -> int:
        """Converted layers of the model, over which the loss is a mean."""
        return len(self.layers)

    def clip(self, norm: Tensor) -> None:
        if self.stage.clip_by != "layer":
            return super().clip(norm)
        most = self.args.max_grad_norm / math.sqrt(self.count)
        for layer in surgery.converted(self.trained_model):
            own: Any = list(layer.mixer.parameters())
            gradients = [p.grad for p in own if p.grad is not None]
            if gradients:
                shards.clip(own, most, shards.total_norm(gradients))

    @property
    def pass_on(self) -> Callable[[nn.Module, dict[str, Tensor]], Any] | None:
        """The teacher's pass over a batch, see `transfer_step`."""
        return None

    def micro_step(self, model: nn.Module, batch: dict[str, Tensor], count: Tensor | None) -> Tensor:
        """Losses [L] in layer order; see `transfer_step`."""
        rows = len(batch["input_ids"])
        # a loss is a mean over a process's own tokens
        share = rows / self.course.phase(self.state.global_step).batch / self.sequences.size
        with self.computing(), self.sequences.spread(batch, [model]) as (own, _):
            losses = transfer_step(
                model,
                own,
                self.stage.objective,
                scale=share,
                window_off=self.off,
                layers=self.count,
                run=self.pass_on,
            )
        if all(parameter.grad is None for parameter in self.parameters.values()):
            raise RecipeError(
                [
                    f"stages.{self.stage_name}.objective: {', '.join(self.stage.objective)} reaches no parameter that "
                    "trains, so the stage would do nothing; compare outputs (attention_output), or remove the stage"
                ]
            )
        return share * losses

    def where_not_finite(self, values: list[float]) -> str:
        bad = [
            f"{layer} is {value}"
            for layer, value in zip(self.layers, values, strict=True)
            if not math.isfinite(value)
        ]
        more = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        return f"the loss of layer {bad[0]}{more}"

    def describe(self, values: list[float]) -> dict[str, Any]:
        return {"layers": values}


def transfer_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    objective: dict[str, float],
    *,
    scale: float = 1.0,
    window_off: Sequence[window_dropout.Off] = (),
    layers: int | None = None,
    run: Callable[[nn.Module, dict[str, Tensor]], Any] | None = None,
) -> Tensor:
    """One pass of attention transfer: adds the gradient of ``scale * mean over layers of the layer's loss``.

    Args:
        model: a converted model or a PeftModel around one.
        batch: input_ids [B, T] and, for packed documents, position_ids [B, T].
        objective: layer objective -> weight.
        scale: factor on the gradient, not on what is returned.
        window_off: whether each layer trains its recurrent branch alone, or a [] bool tensor that says so on the
            device; none does by default.
        layers: of the mean, where `model` is a part of a model.
        run: the teacher's pass; by default `run_teacher`, as far as the last converted layer's attention.

    Returns:
        [L] detached losses of the converted layers, in layer order.
    """
    converted: list[Any] = surgery.converted(model)
    off = {module.layer_idx: drawn for module, drawn in zip(converted, window_off, strict=False)}
    losses: dict[int, Tensor] = {}

    ends = run is None and _may_end(model)

    def observe(call: Any) -> None:
        alone = window_dropout.window_off(call, off.get(call.layer_idx, False))
        with torch.enable_grad(), alone as call:
            losses[call.layer_idx] = objectives.layer_backward(
                call, objective, scale / (layers or len(converted))
            )
        if ends and len(losses) == len(converted):
            raise _Enough

    model.eval()  # the teacher that is imitated has no dropout
    # Without gradient: only `observe` takes some.
    with torch.no_grad(), surgery.observe(model, observe), suppress(_Enough):
        (run or run_teacher)(model, batch)
    return torch.stack([losses[index] for index in sorted(losses)])


def _may_end(model: nn.Module) -> bool:
    """Whether a pass may be left in its middle: nobody listens to its end, or gathers weights for it."""
    heard = (part._forward_hooks or hasattr(part, "_hf_hook") for part in model.modules())
    return not shards.in_shards(model) and not any(heard)


def run_teacher(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """The model on a batch of token ids, but for its logits."""
    shards.run_body(
        model,
        input_ids=batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
        use_cache=False,
    )
