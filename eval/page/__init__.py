"""One page about one conversion or several: read what was measured, say what it means, draw it.

`sources` reads folders, `contestants` decides who stands in the charts, `verdict` and `sections` turn scores into
blocks (words, tables, charts as plain data), `html` and `words` write the same blocks as a page and as markdown.
"""

from __future__ import annotations

from pathlib import Path

from linearize.errors import LinearizeError
from linearize.eval.page import html, words
from linearize.eval.page.blocks import Page
from linearize.eval.page.sections import page as compose
from linearize.eval.page.sources import Subject, read

__all__ = ["Page", "Subject", "compose", "read", "write"]


def write(page: Page, folder: Path) -> tuple[list[Path], str | None]:
    """Write page.md and page.html.

    Args:
        page: from `compose`.
        folder: made where it is missing.

    Returns:
        What was written, and why the HTML was not, if it was not.

    Raises:
        LinearizeError: the folder cannot be written.
    """
    text, drawn, missing = words.render(page), None, None
    try:
        drawn = html.render(page)
    except LinearizeError as error:
        missing = str(error)
    files = {"page.md": text} | ({} if drawn is None else {"page.html": drawn})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8", errors="replace")
    except OSError as error:
        raise LinearizeError(f"cannot write the page into {folder}: {error.strerror}") from error
    return [folder / name for name in files], missing
