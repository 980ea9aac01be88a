"""`linearize parts`: what is registered, said in the words of its own source; and `linearize help`."""

from __future__ import annotations

import dataclasses

import pytest

from linearize.cli import main
from linearize.cli.parts import MEANS, documented, summary, uses
from linearize.config import outline
from linearize.mixers import PARTS

ALL = [(part, name) for part, (registry, _) in PARTS.items() for name in registry.names()]


def test_every_part_has_its_meaning() -> None:
    assert list(MEANS) == list(PARTS)


@pytest.mark.parametrize(("part", "name"), ALL)
def test_every_choice_and_option_says_what_it_is(part: str, name: str) -> None:
    cls = PARTS[part][0].get(name)
    assert summary(cls)
    said = documented(cls.Config)
    assert [field.name for field in dataclasses.fields(cls.Config) if not said.get(field.name)] == []


def test_the_list_has_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parts"]) == 0
    out = capsys.readouterr().out
    assert all(f"{part}: {meaning}" in out for part, meaning in MEANS.items())
    assert {name for _, name in ALL} <= {line.split(" ")[0] for line in out.splitlines()}
    assert main(["parts", "gate"]) == 0
    out = capsys.readouterr().out
    assert "low_rank" in out and "hedgehog" not in out


def test_one_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parts", "gate", "low_rank"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("log decay = logsigmoid(x W1 W2 + b) / divisor")
    assert "rank 16 Width between W1 [D, rank] and W2 [rank, N F]; at least 1 and at most 16384" in out
    assert "in a recipe mixer: {gate: {name: low_rank}}" in out
    assert "lawcat" in out and "lolcats" not in out


def test_recipes_that_use_a_part() -> None:
    assert uses(outline("gated_deltanet"), "update", "delta") and not uses(
        outline("lolcats"), "update", "delta"
    )
    assert uses(outline("gated_deltanet_hybrid"), "window", "sliding"), "a mixer of some layers alone"
    assert uses(outline("lolcats"), "normalizer", "running_sum"), "what is there without being named"
    assert not uses(outline("swa_sinks"), "normalizer", "running_sum"), (
        "no recurrent branch, nothing to normalize"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gat"], "unknown part 'gat'; did you mean 'gate'?"),
        (["gate", "lowrank"], "unknown gate 'lowrank': did you mean 'low_rank'?"),
    ],
)
def test_names_that_are_not_there(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parts", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["bench", "kernels"]])
def test_help_as_a_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for arguments in (["help", *command], [*command, "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        said.append((stop.value.code, capsys.readouterr().out))
    assert said[0] == said[1] and said[0][0] == 0 and "usage: linearize" in said[0][1]
