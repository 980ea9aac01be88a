"""The plan of a recipe, stage by stage, counted on a model without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from linearize import models, objectives, surgery
from linearize.bench import flops
from linearize.config.course import Course
from linearize.config.schema import Recipe, StageConfig
from linearize.cost import speed
from linearize.cost.cards import Card
from linearize.cost.memory import Sizes, mixer_bytes
from linearize.cost.strategy import Fit, fit
from linearize.distill.finetune import needs_teacher
from linearize.distill.teachers import apart
from linearize.distill.trainable import prepare, trained
from linearize.distill.tying import untied
from linearize.models import experts
from linearize.models.layers import head_sizes, most
from linearize.models.unwrapped import unwrapped
from linearize.surgery.inspection import skeleton
from linearize.surgery.projections import linear_sizes

PRICE = 3.0
"""US dollars a card and hour where none is given: a round number near what clouds ask for an H100 on demand."""


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        kind: key of `flops.PASSES`.
        shapes: batch and length of its steps, one after the other; `batch` and `length` are the heaviest of them.
        fit: how it runs.
        flops: of a token, the mean of all steps.
        rate: tokens a second over all cards; None where nothing fits.
        mfu: of one card.
        basis: the measurements that the speed rests on.
        today: hours on one card; None where one does not hold it.
    """

    name: str
    kind: str
    sizes: Sizes
    tokens: int
    batch: int
    length: int
    shapes: list[tuple[int, int]]
    fit: Fit
    flops: float
    rate: float | None
    mfu: float | None
    hours: float | None
    money: float | None
    basis: str
    today: float | None


@dataclass(frozen=True)
class Plan:
    """A recipe on a model.

    Attributes:
        teacher, converted: parameters of the model and of what becomes of it, without adapters.
        active: of the model's, those at work for a token; all but in a mixture of experts.
    """

    model: str
    recipe: str
    count: int
    card: Card
    price: float
    teacher: int
    converted: int
    active: int
    stages: list[StagePlan] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; bytes, seconds and FLOPs as they are."""
        found = asdict(self)
        for row, stage in zip(found["stages"], self.stages, strict=True):
            row["fit"]["peak"] = stage.fit.peak
        return found


def kind_of(stage: StageConfig) -> str:
    """Which of `flops.PASSES` a stage is: by what trains and whether it looks at a teacher."""
    level = objectives.level_of(stage.objective)
    if level == "layer":
        return "transfer"
    base = "all" if "all" in stage.train else "lora" if "lora" in stage.train else "mixers"
    return base + ("_kl" if level == "pair" or needs_teacher(stage.objective) else "")


def plan(
    config: Any, recipe: Recipe, count: int, card: Card, *, model: str, name: str, price: float = PRICE
) -> Plan:
    """What each stage of a recipe costs.

    Args:
        config: of the teacher.
        recipe: composed and checked.
        count, card: what there is.
        model, name: of teacher and recipe, as the user writes them.
        price: US dollars a card and hour.

    Raises:
        UnsupportedModelError: as `surgery.plan`, or a mixture of experts that does not say how many are at work.
        RecipeError: as `surgery.plan`.
    """
    base: Any = skeleton(config)
    teacher, active = _count(base), experts.active(base)
    with torch.device("meta"):
        student: Any = surgery.convert(base, recipe.mixer, recipe.layers, recipe.mixers).eval()
    found = Plan(model, name, count, card, price, teacher, _count(student), active)
    for key, stage, prepared in _prepared(student, recipe):
        found.stages.append(_stage(prepared, stage, key, recipe, found))
    return found


def ways(config: Any, recipe: Recipe, count: int, card: Card) -> dict[str, str]:
    """How each stage of a recipe fits, as `strategy.Fit.way` has it.

    Args:
        config, recipe, count, card: as `plan`; of the card its memory counts.

    Raises:
        LinearizeError: as `plan`.
    """
    base: Any = skeleton(config)
    teacher, found = _count(base), {}
    with torch.device("meta"):
        student: Any = surgery.convert(base, recipe.mixer, recipe.layers, recipe.mixers).eval()
    for key, stage, prepared in _prepared(student, recipe):
        kind, course = kind_of(stage), Course.of(stage, recipe.data.of(stage).length)
        batch, length = course.heaviest
        sizes = sizes_of(prepared, kind, None, _teacher(recipe, teacher), apart=_beside(recipe, key))
        micro = None if stage.micro_batch == "auto" else int(stage.micro_batch)
        asked = stage.gradient_checkpointing
        found[key] = fit(sizes, kind, batch, length, count, card, checkpointing=asked, micro=micro).way
    return found


def _teacher(recipe: Recipe, own: int) -> int:
    """Parameters of the model whose predictions are learned."""
    other = recipe.run.teacher
    return _count(skeleton(models.load_config(other))) if other else own


def _beside(recipe: Recipe, key: str) -> bool:
    """Whether a stage's teacher is a model of its own on the card."""
    elsewhere = recipe.run.teacher_device == "cpu" or recipe.stages[key].top_k > 0
    return apart(recipe, key) and not elsewhere


def _prepared(student: Any, recipe: Recipe) -> Iterator[tuple[str, StageConfig, Any]]:
    """Each stage with the model as it has it."""
    for key, stage in recipe.stages.items():
        with torch.device("meta"):
            student = prepare(student, stage)
            with untied(student, stage.untie):
                yield key, stage, student


def _stage(model: Any, stage: StageConfig, key: str, recipe: Recipe, of: Plan) -> StagePlan:
    kind, course = kind_of(stage), Course.of(stage, recipe.data.of(stage).length)
    batch, length = course.heaviest
    sizes = sizes_of(model, kind, of.recipe, _teacher(recipe, of.teacher), apart=_beside(recipe, key))
    works = (
        flops.per_token(model, kind, phase.length) * phase.steps * phase.step_tokens
        for phase in course.phases
    )
    needed = sum(works) / course.tokens
    micro = None if stage.micro_batch == "auto" else int(stage.micro_batch)

    def on(count: int) -> Fit:
        asked = stage.gradient_checkpointing
        return fit(sizes, kind, batch, length, count, of.card, checkpointing=asked, micro=micro)

    def seconds(way: Fit) -> float:
        tokens, again = way.micro * length, way.checkpointing
        return speed.seconds(sizes, kind, needed, tokens, of.card, checkpointing=again)

    way, alone = on(of.count), on(1)
    rate = mfu = hours = None
    if way.way != "none":
        rate = way.cards * (speed.SCALING if way.cards > 1 else 1.0) / seconds(way)
        mfu, hours = needed / seconds(way) / of.card.peak, course.tokens / rate / 3600
    return StagePlan(
        name=key,
        kind=kind,
        sizes=sizes,
        tokens=course.tokens,
        batch=batch,
        length=length,
        shapes=course.shapes,
        fit=way,
        flops=needed,
        rate=rate,
        mfu=mfu,
        hours=hours,
        money=None if hours is None else hours * way.cards * of.price,
        basis=speed.rows(sizes, kind, of.card, experts=of.active < of.teacher),
        today=None if alone.way == "none" else course.tokens * seconds(alone) / 3600,
    )


def sizes_of(model: nn.Module, kind: str, recipe: str | None, teacher: int, *, apart: bool) -> Sizes:
    """A prepared model in numbers.

    Args:
        model: of `trainable.prepare`, on the meta device or loaded.
        kind: of the stage.
        recipe: name; None for the softmax model itself.
        teacher: parameters of the original.
        apart: whether the teacher is a copy of its own.
    """
    base = unwrapped(model)
    text = base.config.get_text_config()
    heads = most(text, "num_attention_heads") or 1
    dim = max(head_sizes(text))
    layers, changed = text.num_hidden_layers, len(surgery.converted(base))
    own = {id(p) for layer in surgery.converted(base) for p in layer.mixer.parameters()}
    tables = {id(part.weight) for part in base.modules() if isinstance(part, nn.Embedding)}
    head = base.get_output_embeddings().weight
    tables.add(id(head))
    trains = trained(model).values()
    body = [p for p in trains if p.dim() > 1 and id(p) not in own and id(p) not in tables]
    key = (most(text, "num_key_value_heads") or heads) * dim
    mixed, softmax = mixer_bytes(recipe, heads * dim, key), mixer_bytes(None, heads * dim, key)
    kept, moved = (
        (changed * one + (layers - changed) * other) / layers
        for one, other in zip(mixed, softmax, strict=True)
    )
    return Sizes(
        total=_count(model),
        teacher=teacher,
        trained=sum(p.numel() for p in trains),
        whole=sum(p.numel() for name, p in model.named_parameters() if id(p) in own or ".lora_" in name),
        body=sum(p.numel() for p in body),
        head=head.numel(),
        head_trained=head.requires_grad,
        base_trained=kind.startswith("all"),
        apart=apart,
        layers=layers,
        hidden=text.hidden_size,
        inner=_inner(base, text),
        query=heads * dim,
        key=key,
        mixer=kept,
        moved=moved,
    )


def _inner(model: nn.Module, text: Any) -> int:
    """Width inside the feed-forward layers; where the config has another name for it, of what leads back out of them.

    Where a config has a width for each layer, the widest counts; of a mixture, the experts that a token goes to.
    """
    routed = experts.inner(model)
    if routed:
        return routed
    said = most(text, "intermediate_size")
    if said:
        return said
    widths = linear_sizes(model)
    return max(
        (before for before, after in widths if after == text.hidden_size), default=4 * text.hidden_size
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
