"""The page as markdown: the same blocks, every chart as the table of its numbers."""

from __future__ import annotations

from collections.abc import Iterator

from linearize import markdown
from linearize.eval import tables
from linearize.eval.page.blocks import Block, Page, Samples, Table, Words


def render(page: Page) -> str:
    """The whole file."""
    parts = [
        f"# {markdown.text(page.title)}",
        f"**{markdown.text(page.headline.text)}.**",
        "\n".join(f"- {markdown.text(finding.text)}" for finding in page.findings),
    ]
    for section in page.sections:
        parts.append(f"## {markdown.text(section.title)}")
        for block in section.blocks:
            parts += _block(block)
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Words):
        yield markdown.text(block.text)
    elif isinstance(block, Samples):
        for number, sample in enumerate(block.samples, 1):
            yield f"### Sample {number}"
            yield markdown.fenced(sample.prompt, "text")
            for name, text in sample.texts:
                yield f"{markdown.text(name)}:"
                yield markdown.fenced(text, "text")
    else:
        found = block if isinstance(block, Table) else block.table()
        if found.title:
            yield f"### {markdown.text(found.title)}"
        yield tables.markdown(found.rows)
