"""`clip_by: layer`: each layer's gradient by itself, so that no layer looks at another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from byte_llama import MIXER, tiny_llama

from linearize import surgery
from linearize.config import compose
from linearize.config.schema import Recipe, RunConfig, StageConfig
from linearize.distill import stages
from linearize.distill.continuing import changes
from linearize.errors import RecipeError


@pytest.mark.parametrize("by", ["all", "layer"])
def test_norms(by: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = surgery.convert(tiny_llama(layers=3), MIXER)
    stage = StageConfig(
        objective={"attention_output": 1.0}, tokens=64, batch_size=2, grad_clip=0.5, clip_by=by
    )
    item = {key: torch.zeros(16, dtype=torch.int64) for key in ("input_ids", "position_ids", "labels")}
    opened = stages.training(
        model,
        stage,
        name="transfer",
        folder=tmp_path,
        run=RunConfig(device="cpu"),
        seed=0,
        dataset=[item] * 4,
        length=16,
        autocast=None,
        teacher=None,
    )
    with opened as trainer:
        sizes = []
        for layer, size in zip(surgery.converted(model), (0.01, 1.0, 30.0), strict=True):
            own = list(layer.mixer.parameters())
            for parameter in own:
                parameter.grad = torch.randn_like(parameter)
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in own))
            for parameter in own:
                parameter.grad *= size / norm
            sizes.append(size)
        whole = math.sqrt(sum(size**2 for size in sizes))
        trainer.clip(torch.tensor(whole))
        norms = [
            math.sqrt(sum(float(p.grad.square().sum()) for p in layer.mixer.parameters()))
            for layer in surgery.converted(model)
        ]
    most = 0.5 / math.sqrt(3)
    expected = [0.01, most, most] if by == "layer" else [size * 0.5 / whole for size in sizes]
    assert norms == pytest.approx(expected, rel=1e-4)


def test_where_it_is_refused() -> None:
    assert compose("lolcats", ["stages.transfer.clip_by=layer"]).stages["transfer"].clip_by == "layer"
    with pytest.raises(
        RecipeError, match=r"stages.recover.clip_by: layer is for stages in which layers learn by themselves"
    ):
        compose("lolcats", ["stages.recover.clip_by=layer"])
    with pytest.raises(RecipeError, match=r"stages.transfer.clip_by.*did you mean 'layer'"):
        compose("lolcats", ["stages.transfer.clip_by=layers"])


def test_a_run_from_before_there_was_a_choice(make_recipe: Callable[..., Recipe]) -> None:
    now = asdict(make_recipe())
    before = asdict(make_recipe())
    for stage in before["stages"].values():
        del stage["clip_by"]
    found = changes(before, now)
    assert (found.accepted, found.refused) == ([], [])
    now["stages"]["transfer"]["clip_by"] = "layer"
    assert changes(before, now).refused == ["stages.transfer.clip_by: all -> layer"]
