"""`linearize push PATH REPO`: an export on the hub, or what would go there."""

from __future__ import annotations

import argparse
from pathlib import Path

from linearize.console import console, quiet_libraries, size


def main(options: argparse.Namespace) -> int:
    """Gather, show, and push unless it is a dry run.

    Raises:
        LinearizeError: what keeps it from going, of a dry run too, once it has shown what would go.
    """
    from linearize.cli.checkpoint import export_of

    quiet_libraries()
    from linearize.export.push import gather, push
    from linearize.models import resolve

    folder = resolve(export_of(options.path))
    gathered = gather(
        folder, options.repo, license=options.license, base_model=options.base_model, judged=judged(folder)
    )
    screen = console()
    for name, count in gathered.sizes().items():
        screen.print(f"{size(count):>10}  {name}", markup=False, highlight=False, soft_wrap=True)
    for name in gathered.left_out:
        screen.print(f"  left out  {name}", markup=False, highlight=False, soft_wrap=True)
    if options.dry_run:
        screen.print(f"\nREADME.md:\n{gathered.card}", markup=False, highlight=False, soft_wrap=True)
        gathered.check()
        return 0
    screen.print(push(gathered, private=options.private), markup=False, soft_wrap=True)
    return 0


def judged(folder: Path) -> str:
    """The verdict and the summary of the page that `linearize eval` wrote beside an export, or nothing."""
    from linearize.models.files import read_words

    for page in (folder.parent / "eval" / "page.md", folder / "eval" / "page.md"):
        if page.is_file():
            words = read_words(page, "delete it, or write it again with `linearize eval`")
            _, _, rest = words.partition("\n")
            before, mark, after = rest.partition("## Summary")
            return (before + after.partition("\n## ")[0] if mark else "").strip()
    return ""
