"""Losses from hidden states against losses from logits: same numbers, same gradients, no tensor of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from linearize import objectives, surgery
from linearize.config.schema import LoraConfig, RunConfig, StageConfig
from linearize.distill.finetune import FinetuneTrainer, predict, predict_teacher, teacher_predicts
from linearize.distill.sequences import Sequences
from linearize.distill.trainable import prepare, trained
from linearize.kernels.distill import operator
from linearize.objectives import Final
from linearize.objectives.headless import predict_final, recognize

CPU = torch.device("cpu")
LOSSES = {"next_token": 0.5, "logits_kl": 1.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 1.5},
    "granite": {"logits_scaling": 4.0},
    "llama": {"tie_word_embeddings": True},
}
EXPECTED = {"gemma2": (1.0, 1.5), "granite": (0.25, None)}
lora = StageConfig(train=["lora", "mixers"], lora=LoraConfig(rank=2))
everything = StageConfig(train=["all"])


def batch(length: int = 20) -> dict[str, Tensor]:
    ids = tiny.tokens(2, length)
    positions = torch.arange(ids.shape[1]).expand_as(ids).clone()
    positions[0, 7:] -= 7
    labels = ids.clone()
    labels[1, :5] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def student(family: str, stage: StageConfig) -> nn.Module:
    """A prepared model whose adapters do something."""
    model = prepare(surgery.convert(tiny.model(family, **VARIANTS.get(family, {})), tiny.LOLCATS), stage)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return model.eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    model.zero_grad()
    return found


def both_ways(model: nn.Module, losses: dict[str, float]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Losses and gradients over logits and over hidden states."""
    given = batch()
    head = recognize(model, CPU)
    assert head is not None
    targets = objectives.next_targets(given["labels"], given["position_ids"])
    values, found = [], []
    for known in (None, head):
        teacher = teacher_predicts(model, given, None, known)
        own = predict(model, given) if known is None else predict_final(model, given, known)
        assert isinstance(own, Tensor if known is None else Final)
        values.append(objectives.token_backward(own, targets, losses, teacher=teacher))
        found.append(gradients(model))
    return values, found


def same(model: nn.Module, losses: dict[str, float]) -> None:
    values, (old, new) = both_ways(model, losses)
    torch.testing.assert_close(values[1], values[0])
    assert old.keys() == new.keys() and old.keys() == trained(model).keys()
    for name in old:
        torch.testing.assert_close(
            new[name], old[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_adapters_and_a_frozen_head(family: str) -> None:
    same(student(family, lora), LOSSES)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "granite", "gpt_neox"])
def test_everything_trains(family: str) -> None:
    """Tied tables (llama here, Gemma 2, GPT-2) get both of their gradients."""
    same(student(family, everything), LOSSES)


@pytest.mark.parametrize("losses", [{"next_token": 1.0}, {"logits_kl": 2.0}], ids=lambda x: next(iter(x)))
def test_one_loss_alone(losses: dict[str, float]) -> None:
    same(student("gemma2", lora), losses)


@pytest.mark.parametrize("family", EXPECTED)
def test_what_the_family_does_to_its_logits_is_read(family: str) -> None:
    head = recognize(student(family, lora), CPU)
    assert head is not None and (head.scale, head.softcap) == EXPECTED[family]


def test_a_factor_on_the_logits_and_a_bias() -> None:
    config = transformers.CohereConfig(
        **{**tiny.COMMON, "logit_scale": 0.125, "bos_token_id": 1, "eos_token_id": 2}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    head = recognize(model, CPU)
    assert head is not None and (head.scale, head.softcap) == (0.125, None)
    biased = tiny.model("llama")
    biased.lm_head = nn.Linear(32, tiny.VOCABULARY)
    head = recognize(biased, CPU)
    given = {"input_ids": tiny.tokens()}
    final = predict_final(biased, given, head)
    with torch.no_grad():
        logits = biased(**given).logits
    torch.testing.assert_close(nn.functional.linear(final.hidden, head.weight, head.bias), logits)


def test_recognizing_leaves_the_model_as_it_was() -> None:
    model = student("llama", lora)
    model.train()
    model.get_base_model().model.eval()
    state, flags = torch.get_rng_state(), [part.training for part in model.modules()]
    recognize(model, CPU)
    assert flags == [part.training for part in model.modules()] and torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model.get_base_model().get_output_embeddings())


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def strange(kind: str) -> nn.Module:
    model = tiny.model("granite" if kind == "other scale" else "llama", **VARIANTS["granite"])
    if kind == "class":
        model.lm_head = Doubled(32, tiny.VOCABULARY)
    elif kind == "hook":
        model.lm_head.register_forward_hook(lambda module, given, out: 3 * out)
    elif kind == "other scale":
        model.config.logits_scaling = 4.0
        forward = type(model).forward

        class Odd(type(model)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                out = forward(self, *args, **kwargs)
                out.logits = out.logits + out.logits.sin()
                return out

        model.__class__ = Odd
    elif kind == "adapter":
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        return get_peft_model(
            model, PeftConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
        )
    return model


@pytest.mark.parametrize("kind", ["class", "hook", "other scale", "adapter"])
def test_other_heads_keep_their_logits(kind: str) -> None:
    assert recognize(strange(kind), CPU) is None


def test_bfloat16_under_autocast() -> None:
    model = student("llama", lora)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        head = recognize(model, CPU)
        assert head is not None
        final = predict_final(model, batch(), head)
    assert final.dtype == torch.bfloat16
    given = batch()
    targets = objectives.next_targets(given["labels"], given["position_ids"])
    value = objectives.token_backward(final, targets, {"next_token": 1.0})
    new = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        logits = predict(model, given)
    torch.testing.assert_close(objectives.token_backward(logits, targets, {"next_token": 1.0}), value)
    old = gradients(model)
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=0.05, atol=0.05 * old[name].abs().max().item())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_preference_over_hidden_states(checkpointing: bool) -> None:
    model, given = student("gemma2", lora), batch()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    model.train()
    side = torch.zeros_like(given["labels"])
    side[:, 2:5], side[:, 8:11] = 1, -1
    targets = objectives.next_targets(given["labels"].masked_fill(side == 0, -100), given["position_ids"])
    values, found = [], []
    for known in (None, recognize(model, CPU)):
        teacher = teacher_predicts(model, given, None, known)
        own = predict(model, given) if known is None else predict_final(model, given, known)
        values.append(
            objectives.pair_backward(own, targets, side, {"dpo": 1.0}, teacher=teacher, beta=0.3, count=2)
        )
        found.append(gradients(model))
    torch.testing.assert_close(values[1], values[0])
    for name, old in found[0].items():
        torch.testing.assert_close(found[1][name], old, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """Rows of the largest tensor with the vocabulary as its last size, inside the operator too."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.linearize.distill.default:
            with self:  # its own tensors are what this is about
                return operator.distill._init_fn(*args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, Tensor) and x.ndim and x.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, x.numel() // self.vocabulary)
        return found


def trainer(objective: dict[str, float], model: nn.Module) -> Any:
    """A trainer as far as one micro-step needs it."""
    made: Any = object.__new__(FinetuneTrainer)
    made.stage = StageConfig(train=["lora"], lora=LoraConfig(rank=2), objective=objective)
    made.teacher, made.needs_teacher, made._heads, made.autocast_dtype = (
        None,
        "logits_kl" in objective,
        None,
        None,
    )
    made.sequences = Sequences(RunConfig(), CPU)
    return made


def test_a_step_never_holds_the_logits_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize.kernels.distill import slices

    monkeypatch.setitem(slices.ELEMENTS, "cpu", 4 * tiny.VOCABULARY)
    model, given = student("llama", lora), batch(40)
    with Largest(tiny.VOCABULARY) as largest:
        loss = trainer(LOSSES, model).micro_step(model, given, torch.tensor(20))
    # what has more rows than a slice is the head's own matrix, seen from the other side
    assert 4 <= largest.rows <= 32 < given["input_ids"].numel() and loss.isfinite()
    new = gradients(model)
    monkeypatch.setattr("linearize.distill.finetune.recognize", lambda *_: None)
    with Largest(tiny.VOCABULARY) as largest:
        torch.testing.assert_close(trainer(LOSSES, model).micro_step(model, given, torch.tensor(20)), loss)
    assert largest.rows >= given["input_ids"].numel(), "the test would not see them"
    for name, old in gradients(model).items():
        torch.testing.assert_close(new[name], old, rtol=1e-4, atol=1e-6)


def test_an_adapter_on_the_head_learns() -> None:
    """Its teacher is the head without it; logits are made, and the gradients are those of autograd."""
    model, given = strange("adapter"), batch()
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter)
    own = trainer({"next_token": 1.0}, model)
    own.micro_step(model, given, None)
    found = {name: p.grad.clone() for name, p in trained(model).items()}
    assert any("lm_head" in name for name in found)
    model.zero_grad()
    logits, targets = predict(model, given), objectives.next_targets(given["labels"], given["position_ids"])
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for name, p in trained(model).items():
        torch.testing.assert_close(found[name], p.grad)


def test_the_teacher_is_the_original() -> None:
    model, given = student("llama", lora), batch()
    head = recognize(model, CPU)
    final = teacher_predicts(model, given, None, head)
    assert isinstance(final, Final) and not final.hidden.requires_grad
    torch.testing.assert_close(
        nn.functional.linear(final.hidden, final.head.weight), predict_teacher(model, given)
    )
