"""Window dropout: which layers, which queries, which loss; against dense masks and plain formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from linearize import objectives, surgery
from linearize.config.schema import RunConfig, StageConfig
from linearize.distill import transfer
from linearize.distill.finetune import FinetuneTrainer
from linearize.distill.trainable import prepare, trained
from linearize.distill.transfer import TransferTrainer, transfer_step
from linearize.distill.window_dropout import draws, sees_without_window, window_off
from linearize.errors import RecipeError
from linearize.mixers.base import documents

LINEAR: dict[str, Any] = {"feature_map": {"name": "hedgehog", "dim": 8}}
WINDOWS = {
    "sliding": {**LINEAR, "window": {"name": "sliding", "size": 6}},
    "terraced": {**LINEAR, "window": {"name": "terraced", "size": 4}},
    "pinned": {**LINEAR, "window": {"name": "sliding", "size": 6, "first": 3}},
    "overlap": {
        **LINEAR,
        "window": {"name": "sliding", "size": 6, "overlap": True},
        "combine": {"name": "weighted"},
    },
    "longer than the text": {**LINEAR, "window": {"name": "sliding", "size": 64}},
}


def observed(mixer: dict[str, Any], batch: dict[str, Tensor], *, family: str = "llama") -> list[Any]:
    """The layers' calls in float64, mixers away from their symmetric start."""
    model = surgery.convert(tiny.model(family), mixer, "all").double()
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    calls: list[Any] = []
    with torch.no_grad(), surgery.observe(model, calls.append):
        model.base_model(**batch, use_cache=False)
    return calls


def packed() -> dict[str, Tensor]:
    ids = tiny.tokens()
    positions = torch.arange(40).repeat(2, 1)
    positions[1, 9:] -= 9
    positions[1, 30:] -= 21
    return {"input_ids": ids, "position_ids": positions}


def padded() -> dict[str, Tensor]:
    ids, mask, positions = tiny.left_padded()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


BATCHES = {"packed": packed, "padded": padded}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mixer", WINDOWS)
def test_queries_that_see_something_without_the_window(mixer: str, batch: str) -> None:
    call = observed(WINDOWS[mixer], BATCHES[batch]())[1]
    docs = documents(call.starts, 2, 40, call.k.device)
    valid = torch.ones(2, 40, dtype=torch.bool) if call.valid is None else call.valid
    order = torch.arange(40)
    age = order[:, None] - order
    visible = (age >= 0) & (docs[:, :, None] == docs[:, None]) & valid[:, None]
    _, left = call.mixer.window.parallel(call.q, call.k, call.v, visible, age)
    seen = sees_without_window(call)
    assert torch.equal(seen & valid, left.any(-1) & valid)
    assert seen.any() == (mixer != "longer than the text")
    assert (seen & valid).equal(valid) == (mixer == "overlap")


@pytest.mark.parametrize("name", objectives.names("layer"))
@pytest.mark.parametrize("batch", BATCHES)
def test_loss_of_the_recurrent_branch_alone(name: str, batch: str) -> None:
    """The plain formula on the recurrent branch's own weights, over the queries that see something."""
    call = observed(WINDOWS["sliding"], BATCHES[batch]())[1]
    with torch.no_grad(), window_off(call) as alone:
        counts = alone.valid
        teacher, weights = alone.weights(slice(0, 40))
        torch.testing.assert_close(
            weights.sum(-1), counts[:, None].expand(-1, 4, -1).double(), rtol=1e-9, atol=1e-9
        )
        student = alone.student()
    values = call.v.repeat_interleave(2, dim=2)
    torch.testing.assert_close(
        student, torch.einsum("bhts,bshv->bthv", weights, values), rtol=1e-9, atol=1e-12
    )
    error = (student - call.teacher)[counts]
    projected = (call.project(student) - call.project(call.teacher))[counts]
    rows = ((weights - teacher) * counts[:, None, :, None]).square().sum((2, 3))
    entropy = -(teacher * weights.clamp_min(1e-12).log()).sum(-1).transpose(1, 2)
    expected = {
        "attention_output": error.square().mean(),
        "attention_output_projected": projected.square().mean(),
        "attention_output_relative": error.square().sum() / call.teacher[counts].square().sum(),
        "attention_weights": entropy[counts].mean(),
        "hidden_alignment": projected.norm(dim=-1).mean() / 32**0.5,
        "mixing_matrix": rows.sqrt().mean(),
    }
    with window_off(call) as alone:
        value = objectives.layer_backward(alone, {name: 1.0})
    torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=0)
    assert call.mixer.branch_off is None


def test_a_text_inside_the_window_has_no_loss() -> None:
    call = observed(WINDOWS["longer than the text"], packed())[0]
    for name in objectives.names("layer"):
        with window_off(call) as alone:
            assert objectives.layer_backward(alone, {name: 1.0}) == 0


def test_a_step_with_some_windows_off() -> None:
    model = prepare(surgery.convert(tiny.model(), tiny.LOLCATS, "all"), StageConfig())
    batch = packed()
    plain = transfer_step(model, batch, {"attention_output": 1.0})
    assert all(p.grad is not None for p in trained(model).values())
    model.zero_grad()
    mixed = transfer_step(model, batch, {"attention_output": 1.0}, window_off=[False, True, False, True])
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]]) and not torch.isclose(mixed[[1, 3]], plain[[1, 3]]).any()
    for layer in surgery.converted(model):
        # how the branches are joined is not asked for in that draw
        assert (layer.mixer.combine.window_factor.grad is None) == (layer.layer_idx in (1, 3))
        assert all(p.grad.abs().sum() > 0 for p in layer.mixer.feature_map.parameters())


def test_a_branch_without_parameters_is_refused(tmp_path: Path) -> None:
    mixer = {"feature_map": {"name": "elu"}, "window": {"name": "sliding", "size": 6}}
    stage = StageConfig(objective={"attention_output": 1.0}, tokens=64, batch_size=2, window_dropout=0.5)
    with pytest.raises(RecipeError, match=r"window_dropout: .*no parameters in its recurrent branch"):
        trainer(stage, mixer, tmp_path)


def test_bfloat16_autocast() -> None:
    model = prepare(surgery.convert(tiny.model(), tiny.LOLCATS, "all"), StageConfig())
    off, batch = [True] * 4, packed()
    exact = transfer_step(model, batch, {"attention_output": 1.0}, window_off=off)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        low = transfer_step(model, batch, {"attention_output": 1.0}, window_off=off)
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0)
    assert not torch.equal(low, exact)


def test_draws() -> None:
    assert draws(0.5, 8, 3, 1) == draws(0.5, 8, 3, 1)
    others = [draws(0.5, 30, *place) for place in ((3, 1), (4, 1), (3, 2))]
    assert len({tuple(drawn) for drawn in others}) == 3
    assert not any(draws(0.0, 100, 0, 0))
    share = sum(sum(draws(0.2, 10, 0, step)) for step in range(500)) / 5000
    assert share == pytest.approx(0.2, abs=0.02)


def test_every_step_draws_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def remember(*arguments: Any) -> list[bool]:
        asked.append(arguments)
        return draws(*arguments)

    monkeypatch.setattr(transfer.window_dropout, "draws", remember)
    stage = StageConfig(
        objective={"attention_output": 1.0},
        tokens=3 * 4 * 32,
        batch_size=4,
        micro_batch=2,
        window_dropout=0.5,
    )
    trainer(stage, tiny.LOLCATS, tmp_path).train()
    assert asked == [(0.5, 4, 7, step) for step in range(3)]


def test_a_schedule_of_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step draws at its part's rate; every window off is a stage of the recurrent branch alone."""
    asked = []
    monkeypatch.setattr(
        transfer.window_dropout, "draws", lambda *given: asked.append(given[0]) or draws(*given)
    )
    stage = StageConfig(
        objective={"attention_output": 1.0}, tokens=6 * 4 * 32, batch_size=4, window_dropout=[1.0, 0.25, 0.0]
    )  # fmt: skip
    made = trainer(stage, tiny.LOLCATS, tmp_path)
    before = [layer.mixer.combine.window_factor.clone() for layer in surgery.converted(made.trained_model)]
    seen: list[Any] = []
    step = TransferTrainer.micro_step

    def micro_step(self: TransferTrainer, *given: Any) -> Tensor:
        seen.append(list(self.off))
        if len(seen) == 3:
            factors = [layer.mixer.combine.window_factor for layer in surgery.converted(self.trained_model)]
            assert all(map(torch.equal, factors, before))
        return step(self, *given)

    monkeypatch.setattr(TransferTrainer, "micro_step", micro_step)
    made.train()
    assert asked == [1.0, 1.0, 0.25, 0.25, 0.0, 0.0]
    assert seen[:2] == 2 * [4 * [True]] and seen[4:] == 2 * [4 * [False]]


OVERLAP: dict[str, Any] = {
    **LINEAR,
    "window": {"name": "sliding", "size": 6, "overlap": True},
    "combine": {"name": "shared_normalizer", "window_weight_init": 0.5},
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_whole_models_run_without_the_drawn_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Loss and gradients are those of a model whose mixers have no window, and the teacher has no mixers."""
    stage = StageConfig(
        objective={"next_token": 1.0, "logits_kl": 1.0}, train=["all"], tokens=4 * 32, batch_size=4,
        window_dropout=1.0,
    )  # fmt: skip
    found: dict[str, Any] = {}
    for kind, mixer in (("dropped", OVERLAP), ("alone", LINEAR)):
        torch.manual_seed(0)
        model = prepare(surgery.convert(tiny.model(), mixer, "all"), stage)
        for layer in surgery.converted(model):
            tiny.randomize([layer.mixer.feature_map])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rates = stage if kind == "dropped" else replace(stage, window_dropout=0.0)
        made = trainer(rates, mixer, tmp_path / kind, model=model, kind=FinetuneTrainer)
        made._clip_grad_norm = lambda model, made=made: (
            found.setdefault(  # type: ignore[method-assign]
                made, {n: p.grad.clone() for n, p in made.parameters.items() if p.grad is not None}
            )
            and torch.tensor(1.0)
        )
        made._maybe_log_save_evaluate = lambda *given, **named: None
        made.train()
        found[kind] = found[made]
        assert all(layer.mixer.branch_off is None for layer in surgery.converted(model))
    names = {name for name in found["dropped"] if "combine" not in name}
    assert names == set(found["alone"]) and any("feature_map" in name for name in names)
    for name in names:
        torch.testing.assert_close(found["dropped"][name], found["alone"][name], rtol=1e-4, atol=1e-6)


def trainer(
    stage: StageConfig, mixer: dict[str, Any], folder: Path, *, model: Any = None, kind: Any = TransferTrainer
) -> Any:
    ids = tiny.tokens(batch=4, length=32)
    return kind(
        prepare(surgery.convert(tiny.model(), mixer, "all"), stage) if model is None else model,
        name="stage",
        stage=stage,
        run=RunConfig(device="cpu"),
        folder=folder,
        dataset=[{"input_ids": row, "position_ids": torch.arange(32), "labels": row} for row in ids],
        length=32,
        seed=7,
        device=torch.device("cpu"),
        autocast=None,
    )
