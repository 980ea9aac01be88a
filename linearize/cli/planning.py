"""`linearize plan MODEL RECIPE`: what each stage needs and costs on given cards, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from linearize.cli.run import composed, recipe_name
from linearize.console import console, quiet_libraries

if TYPE_CHECKING:
    from linearize.cost.stages import Plan, StagePlan
    from linearize.eval.tables import Fitted

PARTS = {
    "frozen": "frozen",
    "masters": "mas- ters",
    "gradients": "grads",
    "adamw": "AdamW",
    "teacher": "teach- er",
    "activations": "activ- ations",
    "logits": "logits",
    "gathered": "gath- ered",
    "workspace": "other",
}
"""Parts of the memory, and what they are called in the table, whose headers are broken at a space."""


def main(options: argparse.Namespace) -> int:
    """Print two tables, memory and time, and a sentence on each stage; with --json the numbers alone."""
    from linearize.cost.cards import cards

    count, card = cards(options.gpus)
    if options.batch is not None:
        options.overrides = [*options.overrides, f"stages.*.batch_size={options.batch}"]
    recipe = composed(options)

    from linearize.cost.shapes import (
        config_of,
    )  # after the recipe is known to be right: importing takes seconds
    from linearize.cost.stages import PRICE, plan

    quiet_libraries()
    name = recipe_name(options.recipe)
    price = PRICE if options.price is None else options.price
    found = plan(config_of(options.model), recipe, count, card, model=options.model, name=name, price=price)
    if options.json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
        return 0
    screen = console()
    for line in heading(found):
        screen.print(line, markup=False, soft_wrap=True)
    if found.stages:
        screen.print(memory(found))
        screen.print(time(found))
    for line in sentences(found):
        screen.print(line, markup=False, soft_wrap=True)
    return 0


def heading(plan: Plan) -> list[str]:
    """Parameters and cards."""
    return [
        f"teacher     {plan.teacher:,} parameters"
        + (f", {plan.active:,} of them at work for a token" if plan.active < plan.teacher else ""),
        f"converted   {plan.converted:,} parameters, {plan.converted - plan.teacher:,} of them in mixers",
        f"cards       {plan.count} x {plan.card.name}, {plan.card.usable / 2**30:.0f} GiB of each to be had; "
        f"${plan.price:g} a card and hour",
    ]


def memory(plan: Plan) -> Fitted:
    """GiB of one card by part, a line a stage; parts that no stage has are left out."""
    parts = [part for part in PARTS if any(stage.fit.bytes[part] for stage in plan.stages)]
    rows = [
        {
            "stage": stage.name,
            "trains": f"{stage.sizes.trained / 1e6:,.1f}M",
            "peak": _gib(stage.fit.peak),
            **{PARTS[part]: _gib(stage.fit.bytes[part]) for part in parts},
        }
        for stage in plan.stages
    ]
    return _table(rows, "GiB on a card")


def time(plan: Plan) -> Fitted:
    """Work, speed, hours and money, a line for each length of a stage's steps."""
    rows = []
    for stage in plan.stages:
        first, *later = [f"{batch} x {length:,}" for batch, length in stage.shapes] or [""]
        row = {
            "stage": stage.name,
            "runs": way(stage),
            "step": first,
            "at once": str(stage.fit.micro),
            "tokens": f"{stage.tokens / 1e6:,.1f}M",
            "tokens /s": "" if stage.rate is None else f"{stage.rate:,.0f}",
            "hours": "" if stage.hours is None else f"{stage.hours:,.2f}",
            "$": "" if stage.money is None else f"{stage.money:,.2f}",
            "MFU": "" if stage.mfu is None else f"{100 * stage.mfu:.0f} %",
            "GFLOPs /token": f"{stage.flops / 1e9:,.2f}",
            "EFLOPs": f"{stage.flops * stage.tokens / 1e18:,.2f}",
        }
        rows += [row, *({"step": step} for step in later)]
    return _table(rows, "time")


def _table(rows: list[dict[str, str]], title: str) -> Fitted:
    from linearize.eval.tables import Fitted

    return Fitted(rows, title, numeric=set().union(*rows) - {"stage", "runs"})


def way(stage: StagePlan) -> str:
    """How a stage runs, in a word or two."""
    again = ", checkpointing" if stage.fit.checkpointing and stage.fit.way != "none" else ""
    if stage.fit.way == "none":
        return "does not fit"
    return (stage.fit.way if stage.fit.cards == 1 else f"{stage.fit.way} on {stage.fit.cards}") + again


def sentences(plan: Plan) -> list[str]:
    """Why each stage runs like that, what of it this package does today, and what the speed rests on."""
    lines = []
    for stage in plan.stages:
        lines += [f"{stage.name}: {why(stage, plan)}", f"    speed: {stage.basis}"]
    hours = [stage.hours for stage in plan.stages]
    money = [stage.money for stage in plan.stages]
    if hours and None not in hours:
        lines.append(f"in all {sum(h or 0 for h in hours):,.2f} hours, ${sum(m or 0 for m in money):,.2f}; "
                     "evaluation, calibration and compiling are not in it")  # fmt: skip
    return lines


def why(stage: StagePlan, plan: Plan) -> str:
    """Of one stage."""
    fit, room = stage.fit, f"{plan.card.usable / 2**30:.0f} GiB"
    again = "" if not fit.checkpointing else (
        f"; without stages.{stage.name}.gradient_checkpointing=true it would not"
    )  # fmt: skip
    alone = "one card does not hold it" if stage.today is None else f"one card takes {stage.today:,.2f} hours"
    if fit.way == "one card":
        return f"fits on one card{again}"
    if fit.way == "ddp":
        launch = f"torchrun --nproc-per-node {fit.cards} -m linearize run"
        return f"a copy fits on each card{again}: data-parallel, by `{launch}`; {alone}"
    if fit.way == "sharded":
        launch = f"torchrun --nproc-per-node {fit.cards} -m linearize run"
        return (
            f"does not fit on one card ({room}): base weights in shards over {fit.cards}{again}, by `{launch}` with "
            "run.shard=auto or full"
        )
    least = f"from {fit.cards} cards on" if fit.cards else "on no number of cards that was tried"
    return (
        f"does not fit on {plan.count} x {plan.card.name} ({room} each): with run.shard=full and checkpointing it "
        f"would fit {least}, with a step of a sequence for each ({_gib(fit.peak)} GiB on a card)"
    )


def _gib(size: float) -> str:
    size /= 2**30
    return "" if size == 0 else f"{size:,.2f}" if size < 100 else f"{size:,.0f}"
