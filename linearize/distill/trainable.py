"""What a stage trains: the mixers, low-rank adapters, or everything."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from linearize import objectives, surgery
from linearize.config.schedule import Over
from linearize.config.schema import LoraConfig, Recipe, StageConfig
from linearize.distill import roles
from linearize.errors import RecipeError
from linearize.models.unwrapped import unwrapped
from linearize.registry import closest
from linearize.surgery.plan import Plan

KINDS = ("mixers", "lora", "all")


def needs(stages: Iterable[StageConfig]) -> dict[str, Any]:
    """What stages will ask of the model's projections, as arguments of `surgery.plan`, which finds them beforehand."""
    stages = list(stages)
    adapted = [stage.lora.targets for stage in stages if "lora" in stage.train and stage.lora is not None]
    named = [objectives.get(name) for stage in stages for name in stage.objective]
    return {
        "roles": [role for role in surgery.ROLES if any(role in targets for targets in adapted)],
        "projects": any(getattr(objective, "projects", False) for objective in named),
    }


def prepare(model: nn.Module, stage: StageConfig) -> nn.Module:
    """Freeze the model but for what the stage trains, and hang adapters in when it asks for them.

    Trained parameters become float32, whatever the model's dtype.

    Args:
        model: a converted model, or the PeftModel that an earlier stage made of it; changed in place.
        stage: its `train`, `freeze` and `lora` decide.

    Returns:
        The model to go on with: a PeftModel once adapters are in, else `model`.

    Raises:
        RecipeError: an unknown entry of `train`, a role that the model does not have, or adapters that differ from
            those of an earlier stage.
    """
    problems = [
        f"train: unknown '{kind}': {closest(kind, KINDS)}" for kind in stage.train if kind not in KINDS
    ]
    if problems:
        raise RecipeError(problems)
    if "lora" in stage.train:
        if stage.lora is None:
            raise RecipeError(
                ["train holds lora, but the stage has no lora section: add `lora: {rank: 8, alpha: 16}`"]
            )
        model = with_adapters(model, stage.lora)
    model.requires_grad_(False)
    mixers = mixer_parameters(model)
    frozen = roles.parameters_of(unwrapped(model), stage.freeze)
    for name, parameter in model.named_parameters():
        kind = "mixers" if id(parameter) in mixers else "lora" if ".lora_" in name else "base"
        whole = "all" in stage.train and (
            kind == "mixers" or (kind == "base" and id(parameter) not in frozen)
        )
        parameter.requires_grad_(kind in stage.train or whole)
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if not trained(model):
        raise RecipeError(
            [f"train: {stage.train}: the model has no such parameters, so the stage would do nothing"]
        )
    return model


def check_ranks(recipe: Recipe, plan: Plan, hidden: int | None) -> None:
    """Hold adapters against the model, as soon as its sizes are known: no rank is wider than what it adapts.

    Args:
        recipe: its stages' `lora` are read.
        plan: of `surgery.plan`.
        hidden: width of the hidden states, or None where the config does not say.

    Raises:
        RecipeError: a rank above that of every projection in the converted layers.
    """
    converted = [row for row in plan.rows if row.kind == "mixer"]
    widest = max(((row.heads + 2 * row.kv_heads) * row.head_dim for row in converted), default=0)
    limit = widest if hidden is None else min(widest, hidden)
    problems = [
        f"stages.{name}.lora.rank: {stage.lora.rank} is wider than any projection of the attention; at most {limit}"
        for name, stage in recipe.stages.items()
        if stage.lora is not None and stage.lora.rank > limit
    ]
    if problems:
        raise RecipeError(problems)


def check_reach(recipe: Recipe, plan: Plan) -> None:
    """Hold the stages against the mixers that the model's layers get, which may be fewer than the recipe has.

    Raises:
        RecipeError: a stage trains mixers, or drops windows, and no layer has anything of the kind.
    """
    both = [
        name
        for name, mixer in plan.mixers.items()
        if "none" not in (mixer["window"]["name"], mixer["feature_map"]["name"])
    ]
    given, problems = f"the model's layers get {', '.join(plan.mixers)}", []
    for name, stage in recipe.stages.items():
        if stage.train == ["mixers"] and not plan.parameters:
            problems.append(
                f"stages.{name}.train: {given}, without parameters, so train: [mixers] would do nothing; train lora or "
                f"all, remove the stage (~stages.{name}), or give some layers another mixer"
            )
        if Over.of(stage.window_dropout).most and not both:
            problems.append(
                f"stages.{name}.window_dropout: {given}, without both branches, and dropping the window needs both; "
                "remove window_dropout, or give some layers another mixer"
            )
    if problems:
        raise RecipeError(problems)


def mixer_parameters(model: nn.Module) -> set[int]:
    """Ids of all mixers' parameters."""
    return {id(parameter) for layer in surgery.converted(model) for parameter in layer.mixer.parameters()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that trains; shared parameters once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_adapters(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """A PeftModel with low-rank adapters on the converted layers' projections of the given roles.

    Raises:
        RecipeError: the model has adapters of another shape, or a role that it does not have.
    """
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel):
        active: Any = model.peft_config[model.active_adapter]
        if (active.r, active.lora_alpha, active.lora_dropout) != (lora.rank, lora.alpha, lora.dropout):
            raise RecipeError(
                [
                    f"lora: rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} differ from an "
                    f"earlier stage's {active.r}, {active.lora_alpha:g}, {active.lora_dropout:g}: "
                    "stages share one adapter"
                ]
            )
        base = unwrapped(model)
        adapted = {name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
        if adapted != set(surgery.role_modules(base, list(lora.targets))):
            raise RecipeError(
                [f"lora.targets: {lora.targets} are not an earlier stage's: stages share one adapter"]
            )
        return model
    targets = surgery.role_modules(model, list(lora.targets))
    if not targets:
        raise RecipeError([f"lora.targets: no converted layer has a projection of the roles {lora.targets}"])
    modules = dict(model.named_modules())
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft multiplies by alpha / r
        lora_dropout=lora.dropout,
        target_modules=targets,
        # GPT-2's Conv1D keeps its weight transposed.
        fan_in_fan_out=isinstance(modules[targets[0]], Conv1D),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, config)
