"""Links of README and docs: files that exist, headings that are there, settings that a recipe has."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from linearize.config import Recipe, StageConfig
from linearize.mixers import PARTS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Lines outside fenced blocks, with their numbers."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them; one that comes again has a number behind it."""
    found: set[str] = set()
    for _, line in prose(page):
        if heading := re.match(r"#+ (.*)", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            name = again = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            count = 0
            while again in found:
                count += 1
                again = f"{name}-{count}"
            found.add(again)
    return found


def wrong_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    wrong = []
    for number, line in prose(page):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            there = path.exists() and (not anchor or path.suffix != ".md" or anchor in anchors(path))
            wrong += [] if there else [f"{number}: {target}"]
    return wrong


def _fields(section: type) -> set[str]:
    return {field.name for field in dataclasses.fields(section)}


SECTIONS = {
    name: _fields(kind)
    for name, kind in typing.get_type_hints(Recipe).items()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type)
}
OPTIONS = {
    part: {"name"}.union(*(_fields(registry.get(name).Config) for name in registry.names()))
    for part, (registry, _) in PARTS.items()
}
KEY = re.compile(r"(?<![\w./-])(\w+)\.([\w*]+)(?:\.(\w+))?(?:\.(\w+))?(?=[=`: \]])")


def unknown(line: str) -> list[str]:
    """Dotted keys of recipes in a line's code that no recipe has."""
    wrong = []
    for code in re.findall(r"`[^`]+`", line):
        for found in KEY.finditer(code):
            top, first, second, third = found.groups()
            if second is None and first in ("*", "md", "json", "yaml", "txt", "py"):
                continue
            known = {
                "stages": second is None or second in _fields(StageConfig),
                "mixer": first in OPTIONS and (second is None or second in OPTIONS[first]),
                "mixers": second is None
                or (second in OPTIONS and (third is None or third in OPTIONS[second])),
            }.get(top, top not in SECTIONS or first in SECTIONS[top])
            wrong += [] if known else [found[0]]
    return wrong


@pages
def test_links_lead_somewhere(page: Path) -> None:
    assert wrong_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n# Same\n# Same\n[a](#one-two-three) [b](#same-1) [c](page.md#same)\n"
    )
    assert wrong_links(page) == []
    page.write_text("# One\n[a](#two) [b](no.md) [c](https://example.org/x)\n```\n[d](neither.md)\n```\n")
    assert wrong_links(page) == ["2: #two", "2: no.md"]


@pytest.mark.parametrize("page", PAGES[:2] + PAGES[3:], ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_are_named_exist(page: Path) -> None:
    """Not of the changelog, which tells of settings that are gone."""
    found = {number: unknown(line) for number, line in prose(page)}
    assert {number: keys for number, keys in found.items() if keys} == {}


def test_a_setting_that_is_not_there_is_found() -> None:
    known = "`run.capture: true`, `stages.*.tokens=2M`, `mixer.window.size`, `mixers.a.window.first=0`, `data.json`"
    assert unknown(known) == []
    wrong = ["run.captured", "stages.x.token", "mixer.windw", "mixer.window.sise", "mixers.a.window.frist"]
    assert unknown(" ".join(f"`{key}=1`" for key in wrong)) == wrong
