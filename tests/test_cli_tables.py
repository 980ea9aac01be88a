"""Tables of the command line on a terminal of 80 columns: whole numbers, whole words, nothing beyond the edge."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from linearize import cli
from linearize.cli import inspection, planning, recipes
from linearize.config import compose
from linearize.cost import blocks
from linearize.cost.cards import cards
from linearize.cost.shapes import config_of
from linearize.cost.stages import plan
from linearize.eval.tables import Fitted, number
from linearize.surgery.plan import Plan, Row

WIDTH = 80


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    """What the commands print to, as narrow as a terminal is."""
    made = Console(width=WIDTH, file=io.StringIO(), highlight=False)
    for module in ("planning", "blocks", "inspection", "recipes"):
        monkeypatch.setattr(f"linearize.cli.{module}.console", lambda: made)
    return made


def said(screen: Console) -> list[str]:
    """The lines of tables: sentences are left to the terminal."""
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    return text.splitlines()


def words(lines: list[str]) -> set[str]:
    return {word for line in lines for word in line.split()}


@pytest.mark.parametrize("gpus", ["2xH100", "8xH100"])
@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3-70b"])
def test_a_plan(model: str, gpus: str, screen: Console) -> None:
    count, card = cards(gpus)
    found = plan(config_of(model), compose("lolcats"), count, card, model=model, name="lolcats")
    assert cli.main(["plan", model, "lolcats", "--gpus", gpus]) == 0
    lines = said(screen)
    shown = words(lines)
    tables = lines[
        lines.index(next(line for line in lines if line.startswith("GiB"))) : -len(planning.sentences(found))
    ]
    assert tables and max(map(len, tables)) <= WIDTH
    for made in (planning.memory(found), planning.time(found)):
        for row in made.rows:
            for name, value in row.items():
                assert set(value.split()) <= shown, (name, value)
    assert {stage.name for stage in found.stages} <= shown and {"peak", "hours"} <= shown
    # a part that nothing needs has no column, one that something needs does
    assert ("gath-" in shown) == any(stage.fit.bytes["gathered"] for stage in found.stages)


def test_a_plan_of_blocks(screen: Console) -> None:
    line = ["llama-3-70b", "lolcats", "stages.transfer.clip_by=layer"]
    assert cli.main(["blocks", "plan", *line, "--gpus", "8xH100"]) == 0
    count, card = cards("8xH100")
    found = blocks.plan(config_of(line[0]), compose("lolcats", line[2:]), count, card, name="lolcats")
    shown = words(said(screen))
    for row in found.cells():
        for value in row.values():
            assert set(value.split()) <= shown, value
    assert {"layers", "writing", "training", "--keep"} <= shown and "on 8 cards," in screen.file.getvalue()  # type: ignore[attr-defined]


def test_layers_of_which_some_slide(screen: Console) -> None:
    """As Gemma 3 has them: a cache that ends at a window, and enough layers for a long list of them."""
    rows = [
        Row(layer, f"layers.{layer}", "mixer", 128, 16, 256, 83_891_200, 101_700_000, 16_384,
            None if layer % 6 == 5 else 1024, mixer="mixer")
        for layer in range(100)
    ]  # fmt: skip
    found = Plan(rows, mixers={"mixer": _mixer("best_hybrid")})
    screen.print(inspection.table(found))
    lines = said(screen)
    assert max(map(len, lines)) <= WIDTH
    assert {"16", "KiB", "1,024", "83,891,200", "identity,", "mamba2"} <= words(lines)


def _mixer(recipe: str) -> Any:
    from linearize.mixers import normalize

    return normalize(compose(recipe).mixer)


def test_the_list_of_recipes(screen: Console) -> None:
    assert recipes.main(SimpleNamespace()) == 0
    lines = said(screen)
    assert max(len(line.rstrip()) for line in lines if "`" not in line) <= WIDTH
    assert "log_linear_gated_deltanet" in words(lines)


def test_short_words_above_numbers_are_not_broken() -> None:
    rows = [
        {"kept": n, "converted alone": f"0.{n}000", "restored alone": f"0.{n}100", "step": "8 x 1,024"}
        for n in range(3)
    ]
    long = {"converted", "restored"}
    for width, missing in ((18, long), (30, long), (36, {"converted"}), (38, set()), (60, set())):
        screen = Console(width=width, file=io.StringIO())
        screen.print(Fitted(rows, numeric=["step"]))
        lines = said(screen)
        assert {"kept", "alone", "step", *long} - words(lines) <= missing, lines
        assert max(map(len, lines)) <= width
        assert all(number(value) in screen.file.getvalue() for row in rows for value in row.values())  # type: ignore[attr-defined]
