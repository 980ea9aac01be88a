"""A loss or gradient that is not finite: what it comes from, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from linearize.config.schema import StageConfig
from linearize.distill import shards


def in_gradients(parameters: Mapping[str, nn.Parameter]) -> str:
    """What is wrong with the gradients of a step whose losses are finite, in words."""
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not _finite(gradient)]
    return f"the gradient of {bad[0]} is not finite" if bad else "the gradient's norm overflows"


def _finite(tensor: Tensor) -> bool:
    """Whether it is, all of it; all processes ask where it is sharded."""
    return bool(shards.whole(tensor.detach().isfinite().all()))


def _largest(model: nn.Module) -> tuple[str, float]:
    """The weight of the largest magnitude: its name and its size."""
    sizes = {
        key: float(shards.whole(p.detach().abs().max())) for key, p in model.named_parameters() if p.numel()
    }
    key = max(sizes, key=sizes.__getitem__)
    return key, sizes[key]


def advice(model: nn.Module, name: str, stage: StageConfig, steps: int) -> str:
    """What to try, as a sentence: it depends on whose weights train, whether frozen ones are finite, and on the step.

    Args:
        model: as it was in the step.
        name: of the stage.
        stage: its settings.
        steps: that the stage has taken.
    """
    frozen = [
        key
        for key, parameter in model.named_parameters()
        if not parameter.requires_grad and not _finite(parameter)
    ]
    if frozen:
        return (
            f"The weight {frozen[0]} is not finite and does not train here, so no learning rate mends it: look at "
            "MODEL and at the stages before"
        )
    if steps == 0:
        key, largest = _largest(model)
        return (
            "Nothing has been trained in this stage yet, so no learning rate mends it: the numbers that came in are "
            f"too large for the arithmetic (largest weight: {largest:.3g}, in {key}). Look at MODEL and at the stages "
            "before"
        )
    if "all" not in stage.train:
        return f"Try a lower learning rate (stages.{name}.lr={stage.lr / 10:g}) in a new run folder"
    mixers = stage.lr if stage.lr_mixers is None else stage.lr_mixers
    return (
        f"The base weights train in this stage and bear far smaller steps than new mixers: try "
        f"stages.{name}.lr={stage.lr / 10:g} with stages.{name}.lr_mixers={mixers:g}, in a new run folder"
    )
