"""A recorded micro-step gives what the same step gives one operation after the other."""

from __future__ import annotations

import logging

import beside
import pytest
import torch
from short_stages import SIZES, STAGES, alike, same, trained, trembling
from torch import nn

from linearize.bench.subjects import convert, random_model, subjects
from linearize.config.schema import StageDataConfig
from linearize.distill import captured as captured_module
from linearize.distill.captured import WARM_UP, Captured
from linearize.recording import record
from linearize.surgery import converted

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("recipe", subjects())
def test_of_every_recipe(recipe, tmp_path, monkeypatch):
    """Fifty steps of each stage with accumulation, clipping, checkpointing, and a run that goes on in the middle."""
    monkeypatch.setenv("LINEARIZE_COMPILE", "never")
    model = convert(random_model("meta", torch.float32, "tiny", **SIZES), recipe)
    trains = any(layer.mixer.added_parameters for layer in converted(model))
    for stage in ("transfer", "all_kl") if trains else ("all_kl",):
        more = {"gradient_checkpointing": stage != "transfer"}
        begun: dict[str, torch.Tensor] = {}
        eager = trained(
            tmp_path / f"{stage}-eager", recipe, stage, 50, capture=False, **more,
            watches=lambda trainer, begun=begun: begun.update(
                {name: p.detach().clone() for name, p in trainer.parameters.items()}
            ),
        )  # fmt: skip
        recorded = trained(tmp_path / stage, recipe, stage, 50, capture=True, resume_at=30, **more)
        assert recorded[2].graph is not None, recorded[2].obstacle
        again = trained(tmp_path / stage, recipe, stage, 50, capture=True, resume_at=30, **more)
        assert len(again[0]) == 20

        def disturbed(stage=stage, more=more):
            folder = tmp_path / f"{stage}-disturbed"
            return trained(folder, recipe, stage, 50, capture=False, watches=trembling, **more)

        alike(eager, recorded, begun, disturbed)
        alike((recorded[0][30:], recorded[1]), again, begun, disturbed)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("recipe", subjects())
def test_each_replay_of_every_recipe(recipe, tmp_path, monkeypatch):
    """Gradients of every replayed micro-step are those of the step itself, from the weights that it has come to."""
    monkeypatch.setenv("LINEARIZE_COMPILE", "never")
    model = convert(random_model("meta", torch.float32, "tiny", **SIZES), recipe)
    trains = any(layer.mixer.added_parameters for layer in converted(model))
    for stage in ("transfer", "all_kl") if trains else ("all_kl",):
        with monkeypatch.context() as patch:
            apart = beside.each_replay(patch)
            recorded = trained(
                tmp_path / stage, recipe, stage, 6, capture=True, gradient_checkpointing=stage != "transfer"
            )
        assert recorded[2].graph is not None and len(apart) == 2 * 6 - 2 - WARM_UP, recorded[2].obstacle
        assert max(apart) < 1, (stage, apart)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_over_fifty_steps(stage, checkpointing, tmp_path):
    """With dropout, gradient checkpointing, compiled mixers, and a run that stops and goes on in the middle."""
    if stage in ("transfer", "weights", "matrix") and checkpointing:
        pytest.skip("no graph spans layers there")
    more = {"gradient_checkpointing": checkpointing}
    eager = trained(tmp_path / "eager", "lolcats", stage, 50, capture=False, **more)
    recorded = trained(tmp_path / "recorded", "lolcats", stage, 50, capture=True, resume_at=30, **more)
    same(eager, recorded)
    again = trained(tmp_path / "recorded", "lolcats", stage, 50, capture=True, resume_at=30, **more)
    assert len(again[0]) == 20
    same((recorded[0][30:], recorded[1]), again)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize(
    ("recipe", "stage", "checkpointing"),
    [
        ("lolcats", "transfer", False),
        ("hedgecats", "transfer", False),
        ("hedgecats", "lora", False),
        ("hedgecats", "all_kl", True),
        ("gated_delta_window", "all_kl", False),
    ],
)
def test_windows_that_are_drawn_off(recipe, stage, checkpointing, tmp_path, caplog, monkeypatch):
    """Over fifty steps, with accumulation, clipping, and a run that stops and goes on in the middle.

    Beside the step that leaves windows out, which other kernels compute, and beside the recorded operations one by one.
    """
    more = {"window_dropout": 0.5, "gradient_checkpointing": checkpointing}
    eager = trained(tmp_path / "eager", recipe, stage, 50, capture=False, **more)
    with monkeypatch.context() as patch:
        patch.setattr(Captured, "__call__", lambda self, run, batch, count, kind=None: run(batch, count))
        told = trained(tmp_path / "told", recipe, stage, 50, capture=True, **more)
    with caplog.at_level(logging.INFO):
        recorded = trained(tmp_path / "recorded", recipe, stage, 50, capture=True, resume_at=30, **more)
    same(told, recorded)
    torch.testing.assert_close(torch.tensor(recorded[0]), torch.tensor(eager[0]), rtol=2e-2, atol=1e-4)
    assert recorded[2].graph is not None, recorded[2].obstacle
    assert "recorded anew" not in caplog.text
    again = trained(tmp_path / "recorded", recipe, stage, 50, capture=True, resume_at=30, **more)
    same((recorded[0][30:], recorded[1]), again)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize(
    ("recipe", "stage"), [("hedgehog", "weights"), ("mohawk", "matrix"), ("gdn2", "matrix")]
)
def test_of_attention_weights(recipe, stage, tmp_path):
    """By tiles of both matrices, and column by column; with accumulation and a run that goes on in the middle."""
    eager = trained(tmp_path / "eager", recipe, stage, 30, capture=False)
    recorded = trained(tmp_path / "recorded", recipe, stage, 30, capture=True, resume_at=20)
    same(eager, recorded)
    assert recorded[2].graph is not None, recorded[2].obstacle


@pytest.mark.gpu
@CUDA
def test_a_stage_that_changes(tmp_path, caplog):
    """Length, batch and window dropout over a stage: recorded anew with each shape, once where layers are drawn."""
    more = {
        "batch_size": [[0, 2], [10, 4]], "data": StageDataConfig(length=[[0, 48], [20, 96]]), "micro_batch": 2,
        "window_dropout": [[0, 0.0], [30, 0.5], [40, 1.0]],
    }  # fmt: skip
    with caplog.at_level(logging.INFO):
        eager = trained(tmp_path / "eager", "lolcats", "transfer", 50, capture=False, **more)
        recorded = trained(
            tmp_path / "recorded", "lolcats", "transfer", 50, capture=True, resume_at=35, **more
        )
    torch.testing.assert_close(torch.tensor(recorded[0]), torch.tensor(eager[0]), rtol=2e-2, atol=1e-4)
    assert recorded[2].graph is not None, recorded[2].obstacle
    # what changes: batch, length, windows drawn, all windows off
    assert caplog.text.count("recorded anew") == 4
    again = trained(tmp_path / "recorded", "lolcats", "transfer", 50, capture=True, resume_at=35, **more)
    same((recorded[0][35:], recorded[1]), again)


@pytest.mark.gpu
@CUDA
def test_what_cannot_be_recorded_goes_on(caplog):
    """A look at the device inside; the step that was to be recorded counts once."""
    weight = nn.Parameter(torch.ones(3, device="cuda"))

    def run(batch, count):
        loss = (weight * batch["x"]).sum()
        assert loss.item() < 1e9
        loss.backward()
        return loss.detach()[None]

    captured = Captured([weight], "probe")
    x = torch.arange(3.0, device="cuda")
    with caplog.at_level(logging.INFO):
        losses = [float(captured(run, {"x": x}, None)) for _ in range(WARM_UP + 2)]
    assert losses == [3.0] * (WARM_UP + 2)
    assert torch.equal(weight.grad, (WARM_UP + 2) * x)
    assert captured.graph is None and "without a CUDA graph" in caplog.text
    # nothing is left of the recording that failed
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    first = torch.randn(3, device="cuda")
    assert not torch.equal(first, torch.randn(3, device="cuda"))
    x = torch.zeros(3, device="cuda")
    graph, made = record(lambda: x + 1)
    graph.replay()
    assert made.tolist() == [1.0] * 3


@pytest.mark.gpu
@CUDA
def test_gradients_add_up_across_recorded_and_other_batches():
    weight, idle = (nn.Parameter(torch.ones(3, device="cuda")) for _ in range(2))

    def run(batch, count):
        loss = (weight * batch["x"]).sum() / count
        loss.backward()
        return loss.detach()[None]

    captured = Captured([weight, idle], "probe")
    count = torch.tensor(2.0, device="cuda")
    for turn in range(WARM_UP + 4):
        x = torch.full((3,), float(turn), device="cuda")
        captured(run, {"x": x}, count)
        captured(run, {"x": x + 1}, count)
        wide = torch.ones(1, 3, device="cuda")
        if turn > WARM_UP:  # another shape, one by one, into the same gradients
            captured(run, {"x": wide}, count)
        expected = (2 * turn + 1 + (turn > WARM_UP)) / 2
        torch.testing.assert_close(weight.grad, torch.full((3,), expected, device="cuda"))
        assert idle.grad is None
        weight.grad = None
    assert captured.graph is not None


def test_without_a_gpu_a_step_is_what_it_was():
    seen = []
    captured = Captured([], "probe", obstacle="not asked for")
    captured(lambda batch, count: seen.append((batch, count)) or torch.ones(1), {"x": 1}, None)
    assert seen == [({"x": 1}, None)] and captured.graph is None


@pytest.fixture
def on_paper(monkeypatch):
    """Recordings without a device: a graph that computes anew, into the tensor that the recording gave."""

    class Graph:
        def __init__(self, call):
            self.call, self.losses = call, torch.zeros(1)

        def replay(self):
            self.losses.copy_(self.call())

    def fake(call):
        graph = Graph(call)
        return graph, graph.losses

    def aside(self, run, batch, count):
        losses = run(batch, count)
        self._receivers = [p for p in self.parameters if p.grad is not None]
        return losses

    monkeypatch.setattr(captured_module, "record", fake)
    monkeypatch.setattr(Captured, "_aside", aside)


def test_steps_that_change_are_recorded_anew(on_paper, caplog):
    """Other shapes or another kind of step, for good: first one by one, then recorded; single ones leave it alone."""
    weight = nn.Parameter(torch.ones(3))
    seen = []

    def run(batch, count):
        loss = (weight * batch["x"]).sum()
        loss.backward()
        seen.append(tuple(batch["x"].shape))
        return loss.detach()[None]

    captured = Captured([weight], "probe")
    kinds = [(1, 0), (2, 0), (1, 0), (2, 0), (2, 0), (2, 1)]
    turns = [6, 6, 1, 2, 3, 6]
    graphs = []
    with caplog.at_level(logging.INFO):
        for (rows, kind), times in zip(kinds, turns, strict=True):
            for turn in range(times):
                x = torch.full((rows, 3), float(turn))
                weight.grad = None
                losses = captured(run, {"x": x}, None, kind)
                assert losses.item() == 3 * rows * turn
                assert torch.equal(weight.grad, torch.full((3,), float(rows * turn)))
            graphs.append(captured.graph)
    assert graphs[0] is not None and graphs[1] not in (None, graphs[0])
    assert graphs[1] is graphs[2] is graphs[3] is graphs[4] and graphs[5] not in (None, graphs[4])
    assert caplog.text.count("stage 'probe': its steps have changed; they are recorded anew") == 2


def test_a_replayed_step_does_not_look_through_the_model(tmp_path, monkeypatch):
    """While the host walks over modules nothing is queued, and small steps are over before it has done so."""
    walks: list[int] = []
    seen = nn.Module.named_modules

    def named_modules(self, *args, **kwargs):
        if walks:
            walks[-1] += 1
        return seen(self, *args, **kwargs)

    def replayed(self, run, batch, count, kind=None):
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.full_like(parameter, 1e-3)
        return torch.zeros(2)

    def watches(trainer):
        walks.append(0)
        own = trainer.training_step

        def training_step(*args, **kwargs):
            walks.append(0)
            return own(*args, **kwargs)

        monkeypatch.setattr(trainer, "training_step", training_step)

    monkeypatch.setattr(Captured, "__call__", replayed)
    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    trained(tmp_path, "lolcats", "transfer", 6, capture=False, device="cpu", watches=watches)
    # from one step's beginning to the next one's; the first looks, and the last ends the stage
    assert len(walks) == 7 and walks[2:-1] == [0, 0, 0, 0], walks
