"""Attention transfer on a real converted model: gradients, isolation of the layers, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from byte_llama import MIXER, tiny_llama
from torch import Tensor

from linearize import objectives, surgery
from linearize.distill.trainable import prepare, trained
from linearize.distill.transfer import transfer_step


def converted_model(layers: int = 3):
    model = surgery.convert(tiny_llama(layers), MIXER, "all")
    from linearize.config.schema import StageConfig

    return prepare(model, StageConfig(train=["mixers"]))


def make_batch(seed: int = 0) -> dict[str, Tensor]:
    """B 2, T 40; the second sequence holds two documents."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(40).repeat(2, 1)
    positions[1, 25:] -= 25
    return {"input_ids": torch.randint(0, 256, (2, 40), generator=generator), "position_ids": positions}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trained(model).items()}


def whole_graph_gradients(
    model: torch.nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """All layers' losses in one graph, one backward."""
    losses = []
    with surgery.observe(model, lambda call: losses.append((call.student() - call.teacher).square().mean())):
        model.base_model(**batch, use_cache=False)
    model.zero_grad()
    torch.stack(losses).mean().backward()
    return torch.stack(losses).detach(), gradients(model)


def test_layer_wise_gradient_equals_whole_graph_gradient() -> None:
    model, batch = converted_model(), make_batch()
    losses, expected = whole_graph_gradients(model, batch)
    model.zero_grad()
    values = transfer_step(model, batch, {"attention_output": 1.0})
    torch.testing.assert_close(values, losses)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-9)


def test_no_graph_spans_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted_model()
    model.requires_grad_(True)  # even when everything upstream could carry a graph
    seen = []

    def watch(call, objective, scale):
        assert not any(
            tensor.requires_grad for tensor in (call.q, call.k, call.v, call.hidden_states, call.teacher)
        )
        earlier = [layer for layer in surgery.converted(model) if layer.layer_idx < call.layer_idx]
        # The layers before have their gradients, and nothing of theirs is left to go through.
        assert all(p.grad is not None for layer in earlier for p in layer.mixer.parameters())
        assert all(
            p.grad is None
            for p in model.get_submodule(f"model.layers.{call.layer_idx}.self_attn.mixer").parameters()
        )
        seen.append(call.layer_idx)
        return objectives.layer.layer_backward(call, objective, scale)

    monkeypatch.setattr(objectives, "layer_backward", watch)
    transfer_step(model, make_batch(), {"attention_output": 1.0})
    assert seen == [0, 1, 2]
    assert all(p.grad is None for name, p in model.named_parameters() if ".mixer." not in name)


def test_the_head_does_not_run() -> None:
    model = converted_model()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("lm_head ran"))
    transfer_step(model, make_batch(), {"attention_output": 1.0})


@pytest.mark.parametrize("listened", [False, True])
def test_nothing_runs_behind_the_last_converted_attention(
    listened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless somebody listens to what the model gives."""
    model = converted_model()
    ran = []
    last = type(model.model.layers[-1].mlp).forward
    monkeypatch.setattr(
        type(model.model.layers[-1].mlp), "forward", lambda self, x: ran.append(self) or last(self, x)
    )
    if listened:
        model.model.norm.register_forward_hook(lambda *_: None)
    losses = transfer_step(model, make_batch(), {"attention_output": 1.0})
    assert len(losses) == 3 and len(ran) == (3 if listened else 2)


def test_only_the_converted_layers_train() -> None:
    from linearize.config.schema import StageConfig

    model = prepare(surgery.convert(tiny_llama(3), MIXER, [0, 2]), StageConfig(train=["mixers"]))
    assert len(transfer_step(model, make_batch(), {"attention_output": 1.0})) == 2


@pytest.mark.parametrize("name", objectives.names("layer"))
def test_loss_falls(name: str) -> None:
    model = converted_model(2)
    optimizer = torch.optim.Adam(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(transfer_step(model, make_batch(), {name: 1.0}))
        optimizer.step()
    first, last = losses[0], losses[-1]
    floor = teacher_entropy(model) if name == "attention_weights" else torch.zeros(2)
    assert ((last - floor) < 0.9 * (first - floor)).all(), (first, last, floor)


def teacher_entropy(model: torch.nn.Module) -> Tensor:
    """What the cross-entropy of the weights cannot go below, by layer."""
    entropies = []

    def observe(call) -> None:
        teacher, _ = call.weights(slice(0, 40))
        entropies.append(-(teacher * teacher.clamp_min(1e-30).log()).sum(-1).mean())

    with torch.no_grad(), surgery.observe(model, observe):
        model.base_model(**make_batch(), use_cache=False)
    return torch.stack(entropies)


def test_bfloat16_autocast_trains_float32_masters() -> None:
    model, batch = converted_model(), make_batch()
    exact = transfer_step(model, batch, {"attention_output": 1.0})
    reference = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        values = transfer_step(model, batch, {"attention_output": 1.0})
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, exact, rtol=0.1, atol=0)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        similarity = torch.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0)
        assert similarity > 0.98, (name, similarity)


def test_scale_changes_the_gradient_alone() -> None:
    model, batch = converted_model(), make_batch()
    once = transfer_step(model, batch, {"attention_output": 1.0})
    reference = gradients(model)
    model.zero_grad()
    again = transfer_step(model, batch, {"attention_output": 1.0}, scale=0.5)
    torch.testing.assert_close(again, once)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 0.5 * reference[name])
    assert math.isfinite(once.sum())
