"""`linearize select MODEL RECIPE`: which layers stay softmax, as scores, a picture and a recipe of the user's own."""

from __future__ import annotations

import argparse
import shlex

from linearize.cli.run import composed, default_folder, recipe_name
from linearize.console import console, quiet_libraries


def main(options: argparse.Namespace) -> int:
    """Compose the recipe, choose, show, and leave everything in the folder."""
    recipe = composed(options)
    folder = default_folder(options.model, options.recipe)
    out = options.out or folder.with_name(f"select-{folder.name}")

    from linearize.distill import RunStopped  # after the recipe is known to be right: importing takes seconds
    from linearize.distill.lock import held
    from linearize.select import Options, select
    from linearize.select.plot import draw
    from linearize.select.recipe import write
    from linearize.select.summary import tables
    from linearize.signals import exit_code
    from linearize.storing import writing

    quiet_libraries()
    asked = Options(
        keep=options.keep,
        by=options.by,
        tokens=options.tokens,
        windows=options.windows,
        length=options.length,
        draws=options.draws,
        give=options.give,
    )
    with held(out), writing(out):
        try:
            found = select(options.model, recipe, out, asked, command=options.line)
        except KeyboardInterrupt as stop:
            raise RunStopped(
                f"stopped; what was measured is kept in {out}. The same command goes on:\n  {options.line}",
                exit_code(stop),
            ) from None
        by = "" if options.by == "kl" else f"-{options.by}"
        name = f"{recipe_name(options.recipe)}-keep{len(found.kept)}{by}"
        picture = draw(found, out / f"{name}.png")
        written = (options.recipe, recipe, options.overrides, found.kept, options.line, options.give)
        path = write(out / f"{name}.yaml", *written)
    screen = console()
    screen.print(tables(found))
    for line in (
        f"recipe   {path}",
        f"scores   {out / 'scores.json'}",
        f"picture  {picture}",
        f"next     linearize run {shlex.quote(options.model)} {shlex.quote(str(path))}",
    ):
        screen.print(line, markup=False, soft_wrap=True)
    return 0
