"""`linearize blocks`: attention transfer block by block, for models that fit nowhere."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from linearize.cli.run import composed, default_folder, recipe_name
from linearize.console import console, quiet_libraries

if TYPE_CHECKING:
    from linearize.distill.blockwise.job import Job


def plan(options: argparse.Namespace) -> int:
    """Show what blocks of several sizes need and take."""
    from linearize.cost.cards import cards

    count, card = cards(options.gpus)
    recipe = composed(options)

    from linearize.cost import blocks  # after the recipe is known to be right: importing takes seconds
    from linearize.cost.shapes import config_of
    from linearize.eval.tables import Fitted

    quiet_libraries()
    found = blocks.plan(config_of(options.model), recipe, count, card, name=recipe_name(options.recipe))
    screen = console()
    for line in found.heading(options.model):
        screen.print(line, markup=False, soft_wrap=True)
    screen.print(Fitted(found.cells(), "blocks", numeric=blocks.COLUMNS))
    for line in found.sentences():
        screen.print(line, markup=False, soft_wrap=True)
    return 0


def write(options: argparse.Namespace) -> int:
    """Write the blocks' inputs."""
    job = _job(options)
    from linearize.distill.blockwise.writing import write

    found = write(job, size=options.layers, place=options.streams, keep=options.keep)
    lines = [f"blocks      {found.blocks}, {len(found.trained)} of them trained, {len(found.ready)} ready"]
    if found.ready:
        lines.append(f"train them  {job.command('blocks train')}")
        lines.append(
            "            as many at once as there are cards; each takes blocks that nobody else is at"
        )
    if found.waits:
        lines.append("then        give this command again: more is written when some of these are trained")
    if not found.ready and not found.waits:
        lines.append(f"join them   {job.command('blocks join')}")
    return _show(lines)


def train(options: argparse.Namespace) -> int:
    """Train what is written and nobody else is at."""
    from linearize.distill.blockwise.division import chosen

    job = _job(options)
    job.open()
    from linearize.distill.blockwise.training import train

    found = train(job, chosen(options.blocks, len(job.blocks)))
    lines = [f"trained     {_numbers(found.trained)}"]
    if found.others:
        lines.append(f"others at   {_numbers(found.others)}")
    if found.waiting:
        lines.append(f"not written {_numbers(found.waiting)}: {job.command('blocks write')}")
    if not found.left:
        lines.append(f"join them   {job.command('blocks join')}")
    return _show(lines)


def join(options: argparse.Namespace) -> int:
    """Put the blocks together."""
    job = _job(options)
    from linearize.distill.blockwise import exporting, joining
    from linearize.distill.blockwise.writing import amount

    found = joining.join(job, keep_streams=options.keep_streams)
    lines = [f"stage       {name}, loss {loss:.4g}" for name, loss in found.losses.items()]
    if found.freed:
        lines.append(f"freed       {amount(found.freed)}")
    if options.export:
        lines.append(f"checkpoint  {exporting.checkpoint(job)}")
    else:
        lines.append(f"go on       {job.command('run')} --resume")
    return _show(lines)


def _job(options: argparse.Namespace) -> Job:
    recipe = composed(options)
    out = options.out or default_folder(options.model, options.recipe)

    from linearize.distill.blockwise.job import Job

    quiet_libraries()
    return Job(options.model, recipe, out, recipe_name(options.recipe))


def _numbers(numbers: list[int]) -> str:
    return f"block{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}" if numbers else "nothing"


def _show(lines: list[str]) -> int:
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)
    return 0
