"""Recipes, overrides and command lines made at random: a recipe, or a message of this package's own; nothing else.

LINEARIZE_FUZZ=2000 tries as many of each; the suite tries a few.
"""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

hypothesis = pytest.importorskip("hypothesis")

import tiny  # noqa: E402 - after the check for hypothesis
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from linearize import cli  # noqa: E402
from linearize.config import Recipe, compose, list_recipes, to_yaml  # noqa: E402
from linearize.config.compose import RECIPES  # noqa: E402
from linearize.errors import LinearizeError, RecipeError  # noqa: E402

TRIES = int(os.environ.get("LINEARIZE_FUZZ", "40"))
SECONDS = 20
FUZZ = settings(
    max_examples=TRIES, deadline=None, database=None, derandomize=TRIES < 1000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip

NAMES = [name for name, _ in list_recipes()]
TREES = [yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in NAMES]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from([10**400, 0, -1, 1, 2, 64]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [
            "???",
            "${oc.env:HOME}",
            "${data.length}",
            "20M",
            "1e999",
            "nan",
            "none",
            "~",
            "a\0b",
            "*",
            "all",
            "\ud800",
        ]
    ),
)
VALUES = st.recursive(
    ODD,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.text(max_size=8),
                st.sampled_from(["name", "every", "keep", "use", "first", "last", "window"]),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
WORDS = sorted(
    {
        "defaults",
        "stages",
        "mixer",
        "mixers",
        "use",
        "keep",
        "data",
        "eval",
        "run",
        "layers",
        "lora",
        "transfer",
        "recover",
        "objective",
        "train",
    }
    | {
        "tokens",
        "lr",
        "window",
        "feature_map",
        "name",
        "size",
        "dim",
        "gate",
        "update",
        "texts",
        "tasks",
        "source",
        "*",
    }
)
KEYS = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), min_size=1, max_size=5).map(".".join)


def spots(tree: Any) -> list[tuple[Any, Any]]:
    """Every place of a structure: what holds it, and its key."""
    pairs = (
        list(tree.items())
        if isinstance(tree, dict)
        else list(enumerate(tree))
        if isinstance(tree, list)
        else []
    )
    return [(tree, key) for key, _ in pairs] + [spot for _, inner in pairs for spot in spots(inner)]


@st.composite
def structures(draw: Any) -> Any:
    """A shipped recipe with a few places changed, removed or added."""
    tree = copy.deepcopy(draw(st.sampled_from(TREES)))
    for _ in range(draw(st.integers(1, 4))):
        places = spots(tree)
        if not places:
            break
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        change = draw(st.sampled_from(["set", "set", "remove", "add"]))
        if change == "remove" and isinstance(holder, dict):
            del holder[key]
        elif change == "add" and isinstance(holder, dict):
            holder[draw(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)))] = draw(VALUES)
        else:
            holder[key] = draw(VALUES)
    return tree


@st.composite
def damaged(draw: Any) -> bytes:
    """The bytes of a shipped recipe, some of them cut, doubled or replaced."""
    data = (RECIPES / f"{draw(st.sampled_from(NAMES))}.yaml").read_bytes()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        piece = draw(
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from(
                    [b"[", b"{", b"&a ", b"*a ", b"\n---\n", b"\t", b"<<: ", b"!!python/name:os ", b"? "]
                ),
            )
        )
        data = data[:at] + piece + data[at + draw(st.integers(0, 30)) :]
    return data


OVERRIDES = st.one_of(
    st.tuples(KEYS, ODD.map(str)).map("=".join),
    st.tuples(KEYS, VALUES.map(lambda value: str(value).replace("'", ""))).map("=".join),
    KEYS.map(lambda key: f"~{key}"),
    st.text(max_size=30),
    st.tuples(KEYS, st.text(alphabet="[]{}(),:'\"\\$ax1.= ", max_size=20)).map("=".join),
)


def judged(recipe: str | Path, overrides: list[str], folder: Path) -> None:
    """Composed, or refused; what is composed survives its own YAML."""
    began = time.process_time()
    try:
        made = compose(recipe, overrides)
    except RecipeError as error:
        assert error.problems and all(isinstance(problem, str) for problem in error.problems)
        assert not any(word in str(error) for word in ("omegaconf", "hydra", "full_key", "Traceback"))
    else:
        assert isinstance(made, Recipe)
        (folder / "again.yaml").write_text(to_yaml(made), encoding="utf-8")
        assert compose(folder / "again.yaml") == made
    assert time.process_time() - began < SECONDS


@FUZZ
@given(tree=structures(), overrides=st.lists(OVERRIDES, max_size=2))
def test_structures(tree, overrides, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8", errors="replace")
    judged(path, overrides, tmp_path)


@FUZZ
@given(data=damaged())
def test_bytes(data, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(data)
    judged(tmp_path / "mine.yaml", [], tmp_path)


@FUZZ
@given(name=st.sampled_from(NAMES), overrides=st.lists(OVERRIDES, min_size=1, max_size=4))
def test_override_lists(name, overrides, tmp_path):
    judged(name, overrides, tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("fuzz") / "tiny"
    tiny.model("llama").save_pretrained(folder)
    return str(folder)


ARGUMENTS = st.one_of(
    OVERRIDES,
    st.sampled_from(
        [*NAMES, "--length", "64", "-1", "--help", "--", "-x", "--length=0", "--out", "./nowhere.yaml", ""]
    ),
    st.text(max_size=12),
)


@FUZZ
@given(command=st.sampled_from(["recipes show", "inspect"]), arguments=st.lists(ARGUMENTS, max_size=4))
def test_command_lines(command, arguments, model, capsys):
    start = [*command.split(), *([model] if command == "inspect" else [])]
    try:
        code = cli.main([*start, *arguments])
    except SystemExit as stop:  # argparse's own help
        code = stop.code or 0
    except LinearizeError as error:  # pragma: no cover - main turns these into messages
        pytest.fail(f"not caught: {error}")
    assert code in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
