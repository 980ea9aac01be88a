"""Compositions made at random, of shapes made at random: refused by name, or one function in all three forms.

LINEARIZE_FUZZ=2000 tries as many; the suite tries a few.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import typing
from typing import Any

import pytest
import torch
from compositions import Draw, label, registered
from torch import Tensor

from linearize import export, surgery
from linearize.config.ranges import Range
from linearize.mixers import PARTS, LayerShape, Mixer, build, check
from linearize.mixers.options import limits_of

TRIES = int(os.environ.get("LINEARIZE_FUZZ", "60"))
COUNTS = (1, 2, 3, 4, 5, 7, 8, 11, 16, 23)
KNOWN = registered()


def words(config: type, field: str) -> list[str]:
    """What an option that is a word may be: what the part itself says of one that it does not know."""
    problem = next(x for x in config(**{field: "?"}).problems() if x.startswith(f"{field}:"))
    return problem.partition("is not one of ")[2].split(", ")


def option(dice: random.Random, config: type, field: Any, kind: type, limits: Range | None) -> Any:
    if kind is bool:
        return dice.random() < 0.5
    if kind is str:
        return dice.choice(words(config, field.name))
    assert limits is not None
    if kind is int:
        return dice.choice([x for x in COUNTS if not limits.problem(x)] or [field.default])
    found = dice.uniform(max(limits.low, -3.0), min(limits.high, 3.0))
    return field.default if dice.random() < 0.4 or limits.problem(found) else found


def choice(dice: random.Random, part: str, name: str | None = None) -> dict[str, Any]:
    """A registered choice with some of its options set, or none."""
    registry = PARTS[part][0]
    name = name or dice.choice([*registry.names(), "none"])
    if name not in registry:
        return {"name": name}
    config = registry.get(name).Config
    kinds, ranges = typing.get_type_hints(config), limits_of(config)
    fields = [x for x in dataclasses.fields(config) if kinds[x.name] is int or dice.random() < 0.5]
    made = {x.name: option(dice, config, x, kinds[x.name], ranges.get(x.name)) for x in fields}
    return {"name": name, **made}


def composition(dice: random.Random) -> dict[str, Any]:
    """A known one with one to three parts changed, or one of whatever there is."""
    if dice.random() < 0.3:
        return {part: choice(dice, part) for part in PARTS if dice.random() < 0.6}
    made = copy.deepcopy(dice.choice(KNOWN))
    for part in dice.sample(list(PARTS), dice.randint(1, 3)):
        same = made.get(part, {}).get("name") if dice.random() < 0.5 else None
        made[part] = choice(dice, part, same)
    return made


def shape(dice: random.Random) -> LayerShape:
    heads, shared = dice.choice([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2), (4, 1)])
    width = dice.choice([2, 4, 5, 6, 8])
    turns = tuple(0.3**i for i in range(dice.randint(1, width // 2))) if dice.random() < 0.7 else None
    return LayerShape(
        heads, shared, width, dice.choice([width, 1, 3, 6]), width**-0.5, softcap=dice.choice([None, None, 3.0]),
        sliding_window=dice.choice([None, None, None, 1, 2, 7, 20]), model_dim=10,
        rotary="none" if turns is None else "half", turns=turns,
    )  # fmt: skip


def masks(dice: random.Random, tokens: int) -> dict[str, Tensor]:
    """Padding nowhere, in front or anywhere, and documents."""
    draw = torch.Generator().manual_seed(dice.randrange(2**31))
    valid = torch.ones(2, tokens, dtype=torch.bool)
    kind = dice.choice(["none", "front", "anywhere"])
    if kind == "front":
        valid = torch.arange(tokens) >= torch.tensor([[dice.randrange(tokens)], [0]])
    elif kind == "anywhere":
        valid = torch.rand(2, tokens, generator=draw) < 0.7
    made = {"valid": valid}
    if dice.random() < 0.4:
        made["starts"] = (torch.rand(2, tokens, generator=draw) < 0.1) & valid
    return made


def in_pieces(mixer: Mixer, x: Draw, given: dict[str, Tensor], dice: random.Random) -> Tensor:
    tokens, parts, first = x.k.shape[1], [], 0
    state = mixer.initial_state(2, torch.float64, x.k.device)
    while first < tokens:
        last = min(tokens, first + dice.choice([1, 1, 1, 2, 3, 7, 30, 64]))
        cut = {name: mask[:, first:last] for name, mask in given.items()}
        form: Any = mixer.chunked
        if last - first == 1 and not ("starts" in cut and cut["starts"].any()):
            form, cut = mixer.step, {"valid": cut["valid"]}
        parts.append(x[first:last].run(form, state=state, **cut))
        first = last
    return torch.cat(parts, 1)


def held(seed: int) -> bool:
    """Try one; whether it was not refused."""
    dice = random.Random(seed)
    section, numbers = composition(dice), shape(dice)
    problems = check(section)
    assert all(isinstance(problem, str) and problem.startswith("mixer") for problem in problems)
    if problems:
        return False
    torch.manual_seed(seed)
    mixer = build(section, numbers).double()
    spread = dice.choice([None, 0.3, 1.0])
    for parameter in mixer.parameters() if spread else ():
        torch.nn.init.normal_(parameter, std=spread)
    tokens = dice.choice([1, 2, 5, 17, 40, 65, 90])
    x, given = Draw.of(numbers, tokens, torch.float64, seed=seed), masks(dice, tokens)
    text = given["valid"]
    with torch.no_grad():
        expected = x.run(mixer.parallel, **given)[text]
        found = {"in pieces": in_pieces(mixer, x, given, dice)[text]}
    found["chunked"] = x.run(mixer.chunked, **given)[text].detach()
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    for form, one in found.items():
        assert torch.allclose(one, expected, rtol=0, atol=1e-8 * scale), (seed, form, section, numbers)
    return True


def test_refused_by_name_or_one_function():
    tried = [held(seed) for seed in range(TRIES)]
    assert sum(tried) > TRIES / 10, "hardly anything was let through"


@pytest.mark.parametrize("window", ["sliding", "terraced"])
@pytest.mark.parametrize("off", ["window", "recurrent"])
def test_branches_that_see_keys_rotated_unlike(window, off):
    """What leaves a window are the window's keys: the other branch has no others."""
    section = {
        "feature_map": {"name": "hedgehog", "dim": 8},
        "window": {"name": window, "size": 4},
        "position": {"name": "rope", off: False},
    }
    (problem,) = check(section)
    assert problem.startswith(f"mixer.position.{off}: false needs keys at their own time")
    section["window"]["overlap"] = True
    assert check(section) == []
    section["window"]["overlap"] = False
    section["position"] = {"name": "rope", "window": False, "recurrent": False}
    numbers = LayerShape(4, 2, 8, 6, 8**-0.5, model_dim=10, rotary="half", turns=(1.0, 0.1, 0.01, 0.001))
    mixer, x = build(section, numbers).double(), Draw.of(numbers, 40, torch.float64)
    torch.testing.assert_close(x.run(mixer.chunked), x.run(mixer.parallel), atol=1e-10, rtol=0)


@pytest.mark.parametrize("part", [part for part in PARTS if part != "feature_map"])
@pytest.mark.parametrize(
    "beside", [{"feature_map": {"name": "elu"}}, {"window": {"name": "sliding"}}], ids=str
)
def test_a_part_that_is_none(part, beside):
    """Left out where a mixer can be without it, else refused."""
    section = {"window": {"name": "sliding"}} if part == "combine" else {}
    section = {**section, **beside, part: {"name": "none"}}
    problems = check(section)
    if not problems:
        build(section, shape(random.Random(0)))
    assert all(problem.startswith(f"mixer.{part}") or problem.startswith("mixer:") for problem in problems)
    if part == "position":
        assert problems == ["mixer.position.name: unknown position 'none'; valid: rope, selective_rope"]


@pytest.mark.slow
def test_through_files(tmp_path):
    """A model of each comes back with the logits that it had."""
    import tiny

    ids, kept = tiny.tokens(2, 40), 0
    for seed in range(40):
        section = composition(random.Random(seed))
        if check(section):
            continue
        model = surgery.convert(tiny.model("llama", num_hidden_layers=2), section)
        tiny.randomize(layer.mixer for layer in surgery.converted(model))
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            if not expected.isfinite().all():
                continue
            export.save(model, tmp_path / str(seed))
            found = export.load(tmp_path / str(seed), dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=label(section))
        kept += 1
    assert kept > 5
