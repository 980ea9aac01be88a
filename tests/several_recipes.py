"""A recipe of every kind of stage for several processes, what one process makes of it, and how they are compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import MIXER
from interrupted import finals
from several import Ended, lines

from linearize.config.schema import (
    CalibrateConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    Recipe,
    RunConfig,
    StageConfig,
    StageDataConfig,
)

STEPS = 4
DEVICE = os.environ.get("LINEARIZE_TEST_DEVICE", "cpu")
"""`cuda` has every test with no more processes than there are cards run over NCCL."""
SLACK = 1 if DEVICE == "cpu" else 20


def enough_cards(request: pytest.FixtureRequest) -> None:
    """Skip what needs more cards than there are."""
    needed, given = request.node.get_closest_marker("processes"), getattr(request.node, "callspec", None)
    size = needed.args[0] if needed else given.params.get("size", 2) if given else 2
    if DEVICE == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"{size} processes need a card each")


def every_stage(folder: Path) -> Recipe:
    """Every kind of stage, four sequences a step, one at once; texts of unequal length, so that labels are too."""
    documents = [
        {"text": f"In {year} the river rose {year % 37} feet. " * (1 + year % 5)}
        for year in range(1500, 1900)
    ]
    pairs = [
        {"prompt": f"house {n}?", "chosen": f"corn {n}", "rejected": "no" * (n % 7 + 1)} for n in range(40)
    ]
    for name, rows in (("text", documents), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = str(folder / "text.jsonl")
    common: dict[str, Any] = {
        "tokens": STEPS * 4 * 64,
        "batch_size": 4,
        "micro_batch": 1,
        "log_every": 1,
        "save_every": 2,
    }
    return Recipe(
        description="every kind of stage",
        mixer=MIXER,
        calibrate=CalibrateConfig(tokens=256),
        stages={
            "transfer": StageConfig(objective={"attention_output": 10.0}, lr=1e-2, **common),
            "recover": StageConfig(
                objective={"next_token": 1.0, "logits_kl": 0.5},
                lr=1e-3,
                train=["lora"],
                lora=LoraConfig(rank=2, alpha=4),
                **common,
            ),
            "whole": StageConfig(
                objective={"logits_kl": 1.0},
                lr=1e-3,
                lr_mixers=2e-3,
                train=["all"],
                window_dropout=0.0,
                **common,
            ),
            "prefer": StageConfig(
                objective={"dpo": 1.0},
                lr=1e-3,
                train=["all"],
                data=StageDataConfig(source=str(folder / "pairs.jsonl"), template="preference"),
                **common,
            ),
        },
        data=DataConfig(source=text, validation=text, length=64),
        eval=EvalConfig(length=64, max_windows=2, ablations=False),
        # a process that has a card takes seconds to fork
        run=RunConfig(device=DEVICE, precision="fp32", workers=0),
    )


def assert_equal(out: Path, reference: Path) -> None:
    """To rounding: sums of four sequences in another order."""
    found, expected = lines(out), lines(reference)
    assert [(x["stage"], x["step"], x["tokens"]) for x in found] == [
        (x["stage"], x["step"], x["tokens"]) for x in expected
    ]
    for key in ("loss", "lr", "lr_mixers", "grad_norm"):
        assert [x.get(key, 0) for x in found] == pytest.approx(
            [x.get(key, 0) for x in expected], rel=2e-4 * SLACK, abs=1e-7
        ), key
    assert {x["stage"] for x in found if "layers" in x} == {x["stage"] for x in found} & {"transfer"}
    one, other = finals(reference), finals(out)
    assert list(one) == list(other)
    for stage, tensors in one.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                other[stage][name], tensor, rtol=1e-3 * SLACK, atol=2e-5 * SLACK, msg=f"{stage} {name}"
            )


def once(ended: Ended, words: str) -> None:
    """One process has said it, and nobody shows a traceback."""
    assert ended.said.count(words) == 1, ended.said
    assert "Traceback" not in ended.said, ended.said
