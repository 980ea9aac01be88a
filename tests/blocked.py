"""A recipe in blocks on a tiny teacher of four layers, and the whole run that it is held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from byte_llama import MIXER, TEXT, byte_tokenizer, tiny_llama

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
from linearize.distill.blockwise.job import Job
from linearize.distill.blockwise.joining import join
from linearize.distill.blockwise.training import train
from linearize.distill.blockwise.writing import write

COMMON: dict[str, Any] = {"tokens": 4 * 2 * 64, "batch_size": 2, "log_every": 1, "save_every": 2}


def teacher(folder: Path, layers: int = 4) -> str:
    """A checkpoint folder with its text beside it; gives its name."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_llama(layers=layers).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT[:600], encoding="utf-8")
    return str(folder)


def recipe(source: str, *, stages: int = 1, calibrate: int = 0, **changes: Any) -> Recipe:
    """Transfer, and of more stages an alignment in another order and LoRA; the text is short, so that it repeats."""
    text = str(Path(source) / "text.txt")
    stage = {
        "objective": {"attention_output": 10.0},
        "lr": 1e-2,
        "clip_by": "layer",
        "grad_clip": 0.1,
        **COMMON,
    }
    every = {
        "transfer": StageConfig(**{**stage, "window_dropout": [0.9, 0.3], **changes}),
        "align": StageConfig(
            **{**stage, "objective": {"hidden_alignment": 1.0}, "data": StageDataConfig(length=128)},
        ),
        "recover": StageConfig(
            objective={"next_token": 1.0}, train=["lora"], lora=LoraConfig(rank=2), lr=1e-3, **COMMON
        ),
    }
    return Recipe(
        description="tiny",
        mixer=MIXER,
        calibrate=CalibrateConfig(tokens=calibrate),
        stages=dict(list(every.items())[:stages]),
        data=DataConfig(source=text, validation=text, length=64),
        eval=EvalConfig(length=64, max_windows=1, ablations=False),
        run=RunConfig(device="cpu"),
    )


def in_blocks(source: str, given: Recipe, out: Path, size: int = 1) -> None:
    """The whole of it, in this process."""
    write(Job(source, given, out), size=size)
    assert train(Job(source, given, out)).left == []
    join(Job(source, given, out))


def lines(out: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without speeds."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in found]


def assert_equal(out: Path, reference: Path, stages: list[str]) -> None:
    """Bit by bit: losses of every layer, rates, and what was trained."""
    from linearize.distill.pieces import Pieces

    found, expected = lines(out), lines(reference)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        norms = [line.pop("grad_norm") for line in (one, other)]
        assert abs(norms[0] - norms[1]) <= 1e-5 * norms[1]
        assert one == other
    for stage in stages:
        pair = [Pieces(folder / stage / "final.safetensors") for folder in (out, reference)]
        assert list(pair[0].shapes) == list(pair[1].shapes)
        for name in pair[0].shapes:
            assert torch.equal(pair[0].whole(name), pair[1].whole(name)), (stage, name)
