"""What processes of the tests of shards do; see `several_jobs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from byte_llama import MIXER, tiny_llama
from several import run
from several_recipes import DEVICE, SLACK
from torch import Tensor, nn

from linearize import launched, objectives, surgery
from linearize.config.schema import LoraConfig, RunConfig, StageConfig
from linearize.distill import gathering, non_finite, pieces, processes, shards
from linearize.distill.device import resolve_device
from linearize.distill.finetune import FinetuneTrainer, predict, predict_teacher
from linearize.distill.pieces import Pieces
from linearize.distill.trainable import prepare, trained
from linearize.distill.transfer import transfer_step
from linearize.errors import CheckpointError, UnsupportedModelError
from linearize.export import rounding
from linearize.models.unwrapped import unwrapped

CPU = torch.device("cpu")


def converted() -> Any:
    """The same in every process."""
    torch.manual_seed(3)
    return surgery.convert(tiny_llama(), MIXER).eval()


def parts(out: Path) -> None:
    """A model in shards beside the same one whole: what is held, what it gives, its gradients, its norm, its file."""
    device = resolve_device(RunConfig(device=DEVICE))
    whole, model = converted().to(device), converted()
    ids = torch.arange(32, device=device).view(2, 16)
    with processes.joined(device):
        shards.into_shards(model, device)
        assert shards.in_shards(model) and not shards.in_shards(whole)
        base = {n: p for n, p in model.named_parameters() if shards.is_sharded(p)}
        own = sum(shards.own(p).numel() for p in base.values())
        total = sum(p.numel() for n, p in whole.named_parameters() if n in base)
        assert total > 0.9 * sum(p.numel() for n, p in whole.named_parameters() if ".mixer." not in n)
        assert own < 1.1 * total / processes.count()
        assert not any(".mixer." in name for name in base)
        for name, parameter in whole.named_parameters():
            assert torch.equal(shards.whole(dict(model.named_parameters())[name].detach()), parameter), name
        _numbers(model)
        _gradients(whole, model, ids)
        _file(out, whole, model)


def _numbers(model: Any) -> None:
    """What is said of a model whose gradients are not finite, by all processes, of rows that one of them has."""
    row = shards.own(model.model.layers[1].mlp.up_proj.weight.detach())[-1]
    before = row.clone()
    row *= 1e3 if launched.rank() == 1 else 1
    name, largest = non_finite._largest(model)
    assert name == "model.layers.1.mlp.up_proj.weight" and largest > 100
    assert processes.most([round(largest * 1e6), -round(largest * 1e6)]) == [
        round(largest * 1e6),
        -round(largest * 1e6),
    ]
    row.copy_(before)


def _gradients(whole: nn.Module, model: nn.Module, ids: Tensor) -> None:
    """Each process has one row of two: gradients are sums, and the whole model's are of both rows."""
    row = ids[launched.rank() % 2][None]
    model(input_ids=row).logits.square().mean().backward()
    whole(input_ids=ids).logits.square().mean().backward()
    scale = processes.count() / 2  # rows are seen by as many, and a mean over one is twice that over two
    expected = {n: 2 * scale * p.grad for n, p in whole.named_parameters() if p.grad is not None}
    own = dict(model.named_parameters())
    kept = [p for p in own.values() if not shards.is_sharded(p)]
    processes.add_up(p.grad for p in kept if p.grad is not None)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            shards.whole(own[name].grad),
            gradient,
            rtol=2e-4 * SLACK,
            atol=1e-6 * SLACK,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    norm = torch.nn.utils.get_total_norm(list(expected.values()))
    found = shards.total_norm(p.grad for p in own.values() if p.grad is not None)
    torch.testing.assert_close(found, norm, rtol=1e-4 * SLACK, atol=0)
    shards.clip(own.values(), float(norm) / 3, found)
    torch.testing.assert_close(
        shards.total_norm(p.grad for p in own.values() if p.grad is not None), norm / 3, rtol=1e-3, atol=0
    )
    for one in (whole, model):
        one.zero_grad(set_to_none=True)


def _file(out: Path, whole: nn.Module, model: nn.Module) -> None:
    """Written by all, read by rows and whole; a piece that is missing is missed."""
    path = out / "weights.safetensors"
    pieces.write(path, dict(model.named_parameters()))
    processes.most([0])
    found = Pieces(path)
    assert set(found.shapes) == {name for name, _ in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        assert found.shapes[name] == parameter.shape and torch.equal(found.whole(name), parameter.cpu()), name
        part = dict(model.named_parameters())[name]
        assert torch.equal(found.of(name, part), shards.own(part).cpu()), name
    processes.most([0])
    if launched.first():
        pieces.name_of(path, 1, processes.count()).unlink()
        try:
            Pieces(path)
        except CheckpointError as error:
            assert f"-2-of-{processes.count()}" in str(error)
        else:
            raise AssertionError("a piece is missing, and nobody says so")


def shared(out: Path) -> None:
    """Two blocks that share a weight."""
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with processes.joined(CPU):
        try:
            shards.into_shards(model, CPU)
        except UnsupportedModelError as error:
            assert "is shared by several blocks" in str(error)
            (out / f"refused-{launched.rank()}").touch()


def not_finite(model: str, recipe: Any, out: Path) -> None:
    """In step 3 a gradient's rows of the second process alone are not finite."""
    original = FinetuneTrainer.micro_step

    def micro_step(self: FinetuneTrainer, *given: Any) -> Tensor:
        found = original(self, *given)
        if launched.rank() == 1 and self.state.global_step == 2:
            parameter = self.parameters["model.layers.1.mlp.up_proj.weight"]
            assert shards.is_sharded(parameter)
            shards.own(parameter.grad).fill_(float("nan"))
        return found

    FinetuneTrainer.micro_step = micro_step  # type: ignore[method-assign]
    run(model, recipe, out)


def full_disk(model: str, recipe: Any, out: Path) -> None:
    """The second process cannot write its piece of the first checkpoint."""
    original = pieces.write

    def write(path: Path, tensors: Any) -> None:
        if launched.rank() == 1 and path.parent.name == ".partial-pieces":
            raise CheckpointError(f"{path}: the disk is full: free space")
        original(path, tensors)

    pieces.write = write
    run(model, recipe, out)


def families(out: Path) -> None:
    """Of every family: losses and gradients of both kinds of stages, adapters over shards, tensors of the export."""
    with processes.joined(CPU):
        for family in tiny.FAMILIES:
            gathering.check(tiny.model(family))
            whole, model = (surgery.convert(tiny.model(family), tiny.LAWCAT, "all") for _ in range(2))
            for one in (whole, model):
                tiny.randomize([layer.mixer for layer in surgery.converted(one)])
            shards.into_shards(model, CPU)
            _family(family, whole, model)
    (out / f"done-{launched.rank()}").touch()


def _family(family: str, whole: Any, model: Any) -> None:
    ids = tiny.tokens(2, 24)
    batch = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids), "labels": ids}
    targets = objectives.next_targets(ids, batch["position_ids"])
    mixers, both = StageConfig(train=["mixers"]), [whole, model]
    both = [prepare(one, mixers) for one in both]
    _alike(family, [transfer_step(one, batch, {"attention_output": 1.0}) for one in both])
    for one in both:
        one.zero_grad(set_to_none=True)
        shards.settle(one)
    lora = StageConfig(train=["lora"], lora=LoraConfig(rank=2))
    for number in (0, 1):
        torch.manual_seed(0)
        both[number] = prepare(both[number], lora)
        torch.manual_seed(1)
        for name, parameter in both[number].named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter)
    teacher = [predict_teacher(one, batch) for one in both]
    _alike(family, teacher)
    objective = {"next_token": 1.0, "logits_kl": 1.0}
    for stage, times in ((lora, 1), (StageConfig(train=["all"]), processes.count())):
        for one in both:
            shards.settle(one)
            prepare(one, stage).eval()
        losses = [
            objectives.token_backward(predict(one, batch), targets, objective, teacher=teacher[0])
            for one in both
        ]
        _alike(family, losses)
        own = trained(both[1])
        for name, parameter in trained(both[0]).items():
            found = own[name].grad
            scale = times if shards.is_sharded(own[name]) else 1
            assert (parameter.grad is None) == (found is None), (family, name)
            if found is not None:
                _alike(f"{family} {name}", [scale * parameter.grad, shards.whole(found)])
        for one in both:
            one.zero_grad(set_to_none=True)
    twin = gathering._twin(unwrapped(both[1]), torch.float32)
    names = list(twin.state_dict())
    tensors = {name: gathering._tensor(unwrapped(both[1]), name, torch.float32, True) for name in names}
    expected = rounding.merged(both[0], torch.float32).state_dict()
    assert list(expected) == names, family
    for name in names:
        _alike(f"{family} {name}", [expected[name], tensors[name]])


def _alike(what: str, pair: list[Tensor]) -> None:
    torch.testing.assert_close(pair[1], pair[0], rtol=1e-3, atol=1e-5, msg=lambda text: f"{what}: {text}")


def written_together(model: str, recipe: Any, out: Path) -> None:
    """A family whose checkpoint makes one weight of two tensors of the model."""
    original = gathering.revert_weight_conversion

    def revert(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = dict(original(model, tensors))
        names = [name for name in found if name.endswith(("q_proj.weight", "k_proj.weight"))]
        if len(names) > 1:
            found["qk"] = torch.cat([found.pop(name) for name in names])
        return found

    gathering.revert_weight_conversion = revert  # type: ignore[assignment]
    run(model, recipe, out)
