"""Recorded micro-steps on the CPU, where a recording is a list of operations: what differs from step to step is heard.

A number of the host that a micro-step reads, and that changes over the stage, would stay what it was when the step was
recorded. On a GPU `test_captured` asks the graphs themselves.
"""

from __future__ import annotations

from typing import Any

import beside
import pytest
import replayed
import torch
from short_stages import same, trained
from transformers import TrainerCallback

from linearize.config.schema import StageDataConfig
from linearize.distill.captured import WARM_UP
from linearize.distill.window_dropout import draws
from linearize.errors import NonFiniteLossError
from linearize.mixers.combine import COMBINES

LINEAR: dict[str, Any] = {"feature_map": {"name": "hedgehog", "dim": 16}}
OVERLAP: dict[str, Any] = {**LINEAR, "window": {"name": "sliding", "size": 6, "overlap": True, "first": 2}}
APART: dict[str, Any] = {**LINEAR, "window": {"name": "sliding", "size": 6}}
STEPS = 9


@pytest.fixture(autouse=True)
def recorded_on_the_cpu(monkeypatch):
    replayed.on_cpu(monkeypatch)


def both(folder, recipe, stage, steps=STEPS, **more):
    """A stage step by step, and recorded; the recording has done all but its first steps."""
    eager = trained(folder / "eager", recipe, stage, steps, capture=False, device="cpu", **more)
    recorded = trained(folder / "recorded", recipe, stage, steps, capture=True, device="cpu", **more)
    assert recorded[2].obstacle is None
    same(eager, recorded, rtol=1e-4, atol=1e-5)
    return recorded


def micro_steps(steps: int, micro: int = 2) -> int:
    """How many of a stage come from its one recording."""
    return steps * micro - 1 - WARM_UP


@pytest.mark.parametrize(
    ("stage", "rule"),
    [
        *(("transfer", rule) for rule in COMBINES.names()),
        ("all_kl", "sigmoid"),
        *(
            pytest.param("all_kl", rule, marks=pytest.mark.slow)
            for rule in COMBINES.names()
            if rule != "sigmoid"
        ),
    ],
)
def test_windows_that_are_drawn_off(stage, rule, tmp_path):
    """Every rule that joins two branches; without overlap in transfer, where queries that see nothing have no loss."""
    recipe = (APART if stage == "transfer" and rule != "sum" else OVERLAP) | {"combine": {"name": rule}}
    recorded = both(tmp_path, recipe, stage, window_dropout=0.5)
    assert recorded[2].graph.replays == micro_steps(STEPS)
    drawn = [draws(0.5, 2, 1, step) for step in range(2, STEPS)]
    assert all(0 < sum(off) < len(drawn) for off in zip(*drawn, strict=True)), "each layer, with and without"


def test_attention_weights(tmp_path):
    """Column by column while windows are drawn."""
    both(tmp_path, OVERLAP, "weights", window_dropout=0.5)


@pytest.mark.parametrize("stage", ["transfer", "lora"])
def test_a_schedule_that_stops_and_goes_on(stage, tmp_path):
    """Clipping, accumulation, dropout of adapters and of windows at three rates; the second half from a checkpoint."""
    more = {"window_dropout": [1.0, 0.5, 0.0], "grad_clip": 0.05}
    steps = 14
    recorded = both(tmp_path, OVERLAP, stage, steps, resume_at=7, **more)
    again = trained(
        tmp_path / "recorded", OVERLAP, stage, steps, capture=True, resume_at=7, device="cpu", **more
    )
    assert len(again[0]) == 7 and again[2].graph is not None
    same((recorded[0][7:], recorded[1]), again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["transfer", pytest.param("lora", marks=pytest.mark.slow)])
def test_batch_and_length_that_change(stage, tmp_path):
    """A share of the batch is a number of the recording, though micro-steps keep their shape."""
    more = {
        "batch_size": [[0, 2], [6, 4]], "micro_batch": 2, "data": StageDataConfig(length=[[0, 32], [9, 96]]),
    }  # fmt: skip
    both(tmp_path, APART, stage, 12, **more)


def test_a_number_that_is_none_stops_a_recorded_step(tmp_path):
    """At the step that has it, which is not applied."""
    seen: dict[str, Any] = {}

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 6:
                trainer = seen["trainer"]
                assert trainer.passes.captured.graph is not None
                seen["before"] = {name: p.detach().clone() for name, p in trainer.parameters.items()}
                with torch.no_grad():
                    trainer.trained_model.model.layers[1].self_attn.v_proj.weight.fill_(float("inf"))

    def watches(trainer):
        seen["trainer"] = trainer
        trainer.add_callback(Spoil())

    with pytest.raises(
        NonFiniteLossError, match=r"step 7: the loss of layer 1 is .*The weight .* is not finite"
    ):
        trained(tmp_path, APART, "transfer", STEPS, capture=True, device="cpu", watches=watches)
    for name, value in seen["before"].items():
        assert torch.equal(seen["trainer"].parameters[name], value)


@pytest.mark.parametrize("stage", ["transfer", "all_kl"])
def test_every_replay_gives_the_gradients_of_its_step(stage, tmp_path, monkeypatch):
    """What `test_captured` asks of graphs on a card; here to the last digits, and that it would hear a stale batch."""
    apart = beside.each_replay(monkeypatch, share=1e-4, floor=1e-5)
    recipe = {**LINEAR, "window": {"name": "sliding", "size": 6}}
    recorded = trained(tmp_path / "sound", recipe, stage, STEPS, capture=True, device="cpu")
    assert recorded[2].obstacle is None and len(apart) == micro_steps(STEPS) - 1
    assert max(apart) < 1
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "_foreach_copy_", lambda *args: None
        )  # the batch of the recording, again and again
        broken = beside.each_replay(patch)
        with pytest.raises(AssertionError):
            trained(tmp_path / "stale", recipe, stage, STEPS, capture=True, device="cpu")
            assert max(broken) < 1
