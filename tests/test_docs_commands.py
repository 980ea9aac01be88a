"""Commands in the blocks of README and docs: options that the parser has, recipes that compose, files that exist."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from linearize.cli.parser import build_parser, parse
from linearize.config import compose
from linearize.config.overrides import FORM
from linearize.errors import LinearizeError

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels/README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
STANDS_FOR = {"RECIPE", "mine.yaml"}
"""Recipes that a page leaves to the reader."""
WRITTEN = re.compile(r"runs/\S+\.yaml")
"""Recipes that the command before wrote."""
SIGNATURE = re.compile(r"[\[|]|\.\.\.")
"""What a line has that lists options in place of giving some."""


class Line(NamedTuple):
    """A command of a page."""

    page: str
    number: int
    text: str


def blocks(page: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Fenced blocks: number of the first line, language, lines."""
    fence, first, language, held = "", 0, "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        mark = re.match(r"`{3,}", line)
        if not fence and mark:
            fence, first, language, held = mark[0], number + 1, line[len(mark[0]) :].strip(), []
        elif fence and line.strip() == fence:
            yield first, language, held
            fence = ""
        elif fence:
            held.append(line)


def commands(page: Path) -> Iterator[Line]:
    """Lines of blocks without a language; those that end with a backslash go on."""
    for first, language, lines in blocks(page):
        if language not in ("", "sh", "bash", "shell"):
            continue
        begun, where = "", first
        for number, line in enumerate(lines, first):
            where = where if begun else number
            begun += line
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            yield Line(str(page.relative_to(ROOT)), where, begun.strip().removeprefix("$ "))
            begun = ""


def words(text: str) -> list[str]:
    """Of one command, without its comment, what is set before it, and what follows in the shell."""
    try:
        found = shlex.split(text, comments=True)
    except ValueError:  # output that has a quote
        return []
    found = found[: next((n for n, word in enumerate(found) if word in ("&", "|", ">")), None)]
    while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
        del found[0]
    return found


def arguments(found: list[str]) -> list[str] | None:
    """What `linearize` is given, or None where a line is none of its commands."""
    if found and Path(found[0]).name == "linearize":
        return found[1:]
    if "-m" in found and found[found.index("-m") + 1 :][:1] == ["linearize"]:
        return found[found.index("-m") + 2 :]
    return None


def inline(page: Path) -> Iterator[Line]:
    """Commands within sentences and tables, which leave out what they are not about."""
    inside = {number for first, _, held in blocks(page) for number in range(first, first + len(held))}
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if number not in inside:
            for text in re.findall(r"`(linearize [^`]+)`", line.replace("\\|", "|")):
                yield Line(str(page.relative_to(ROOT)), number, text)


def choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a parser, by name; none where it is one itself."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def mistakes(text: str) -> list[str]:
    """Of a command that may leave out what is required: unknown names and options, and words too many."""
    parser: argparse.ArgumentParser = build_parser()
    rest = re.sub(r"[\[\]]|\B\.\.\.", " ", text).split(maxsplit=1)[1]
    found = shlex.split(rest, comments=True)
    while choices(parser) and found:
        names = found.pop(0).split("|")
        unknown = [f"no command {name}" for name in names if name not in choices(parser)]
        if unknown:
            return unknown
        parser = choices(parser)[names[0]]
    options = {flag: action for action in parser._actions for flag in action.option_strings}
    places = [action for action in parser._actions if not action.option_strings]
    most = 99 if any(action.nargs for action in places) else len(places)
    wrong, count, taken = [], 0, 0
    for word in found:
        if word.startswith("--"):
            flag = word.split("=")[0]
            wrong += [f"no option {flag}"] * (flag not in options)
            taken = {None: 1, "?": 1, 0: 0, "*": 99, "+": 99}[
                options[flag].nargs if flag in options else None
            ]
        elif taken:
            taken -= 1
        elif "=" not in word and not word.startswith("~"):
            count += 1
    return wrong + [f"{count} words where there are {most} at most"] * (count > most)


LINES = [line for page in PAGES for line in commands(page)]
OURS = [line for line in LINES if (given := arguments(words(line.text))) and not SIGNATURE.search(given[-1])]


def test_there_are_commands_to_look_at() -> None:
    assert len(OURS) > 60 and {"README.md", "docs/guide.md", "docs/serve.md"} <= {line.page for line in LINES}


@pytest.mark.parametrize("line", OURS, ids=lambda line: f"{line.page}:{line.number}")
def test_the_command_line_is_understood(line: Line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parser takes it, and what it names exists: a recipe with its overrides composes."""
    monkeypatch.chdir(tmp_path)
    given = arguments(words(line.text)) or []
    given = [word for word in given if word != "$SETTINGS"]
    options = parse(build_parser(), given)
    recipe, changes = getattr(options, "recipe", None), getattr(options, "overrides", [])
    if recipe is None or WRITTEN.fullmatch(recipe):
        return
    if recipe in STANDS_FOR:
        assert all("=" in change for change in changes), FORM
        return
    compose(recipe, changes)


@pytest.mark.parametrize(
    "words_of_it",
    ["run MODEL lolcat", "run MODEL lolcats stages.transfr.lr=1", "eval runs/demo --sute quick", "evil x"],
)
def test_a_line_that_is_wrong_is_found(words_of_it: str) -> None:
    with pytest.raises(LinearizeError):
        options = parse(build_parser(), words_of_it.split())
        compose(options.recipe, options.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences(page: Path) -> None:
    """Options that exist, and no word where the command takes none."""
    found = {f"{line.number}: {line.text}": mistakes(line.text) for line in inline(page)}
    assert {where: wrong for where, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('linearize generate path "..."', "2 words where there are 1 at most"),
        ("linearize evil", "no command evil"),
        ("linearize eval runs/a [--suit quick]", "no option --suit"),
    ],
)
def test_a_sentence_that_is_wrong_is_found(text: str, said: str) -> None:
    assert mistakes(text) == [said]


def test_scripts_and_targets_exist() -> None:
    """What a block starts from this repository, and what it asks make for."""
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    wrong = []
    for line in LINES:
        found = words(line.text)
        missing = [
            word
            for word in found
            if re.fullmatch(r"(scripts|recipes)/\S+\.\w+", word) and not (ROOT / word).is_file()
        ]
        wrong += [f"{line.page}:{line.number}: {word} does not exist" for word in missing]
        if found[:1] == ["make"]:
            unknown = [word for word in found[1:] if re.fullmatch(r"[a-z-]+", word) and word not in targets]
            wrong += [f"{line.page}:{line.number}: no target {word}" for word in unknown]
    assert not wrong


def test_extras_that_are_named_exist() -> None:
    """`pip install '.[serve]'` and its like, on pages and in what the package says."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    sources = [*PAGES, *ROOT.glob("linearize/**/*.py"), *ROOT.glob("eval/**/*.py")]
    named = {
        extra
        for path in sources
        for names in re.findall(
            r"pip install (?:-e )?'(?:\.|linearize)\[([\w,]+)\]'", path.read_text(encoding="utf-8")
        )
        for extra in names.split(",")
    }
    assert {"serve", "quantize", "vllm"} <= named <= set(extras)


def test_the_table_of_commands_names_them_all() -> None:
    """README's table has every command that the parser has, and no other."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Commands\n")[1].split("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`linearize (\w+)", rows)) == set(choices(build_parser()))


def test_the_page_of_plans_names_its_shapes_and_cards() -> None:
    from linearize.cost.cards import CARDS
    from linearize.cost.shapes import known

    sentence = (
        (ROOT / "docs/plan.md").read_text(encoding="utf-8").split("MODEL is what")[1].split("unless")[0]
    )
    shapes, found = sentence.split("Cards:")
    assert re.findall(r"`([^`]+)`", shapes.replace("`run`", "")) == known()
    assert re.findall(r"[\w-]+", found.split(". A card")[0]) == list(CARDS)
