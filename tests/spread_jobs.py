"""What processes of the tests of spread sequences do; see `several_jobs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from byte_llama import MIXER, tiny_llama
from over_nccl import OverNccl
from several_recipes import DEVICE
from torch import Tensor, nn

from linearize import across as across_module
from linearize import objectives, surgery
from linearize.across import Across, _received, _sent
from linearize.config.schema import RunConfig, StageConfig
from linearize.distill import processes
from linearize.distill.blocks import around_attention
from linearize.distill.device import resolve_device
from linearize.distill.finetune import predict, predict_teacher
from linearize.distill.passes import Passes
from linearize.distill.trainable import prepare, trained
from linearize.mixers import LayerShape, build, spread
from linearize.mixers import compiled as compiled_mixers
from linearize.surgery.spreading import refusal, spreading

SHAPE = LayerShape(
    heads=4,
    kv_heads=2,
    key_dim=8,
    value_dim=8,
    scaling=8**-0.5,
    model_dim=16,
    rotary="half",
    turns=(1.0, 0.2, 0.01),
)
EXACT = DEVICE == "cpu"
BORDERS = {"one document": [[], []], "several": [[5, 16, 21], [13]], "at the border": [[16], [15, 17]]}
"""Where further documents begin in 32 tokens, in each of two rows."""


def positions(borders: list[list[int]], tokens: int, device: torch.device) -> Tensor:
    found = torch.arange(tokens).repeat(len(borders), 1)
    for row, begins in zip(found, borders, strict=True):
        for begin in begins:
            row[begin:] = torch.arange(tokens - begin)
    return found.to(device)


def mixers(sections: dict[str, dict[str, Any]], ways: dict[str, bool], out: Path) -> None:
    """Each mixer over all processes beside the same one whole: what it gives, and every gradient.

    Args:
        sections: name -> a mixer's section.
        ways: name -> whether it is to be computed at once.
    """
    device = resolve_device(RunConfig(device=DEVICE))
    with processes.joined(device):
        for name, section in sections.items():
            for what, borders in BORDERS.items():
                _mixer(f"{name}, {what}", section, ways.get(name), positions(borders, 32, device))


def _mixer(what: str, section: dict[str, Any], at_once: bool | None, places: Tensor) -> None:
    dtype = torch.float64 if EXACT else torch.float32
    random = torch.Generator().manual_seed(1)
    whole, own = (build(section, SHAPE) for _ in range(2))
    for parameter, copy in zip(whole.parameters(), own.parameters(), strict=True):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=random))
        copy.data.copy_(parameter.data)
    whole, own = whole.to(places.device, dtype), own.to(places.device, dtype)
    sizes = {"q": (4, 8), "k": (2, 8), "v": (2, 8), "plain_q": (4, 8), "plain_k": (2, 8), "hidden": (16,)}
    given = {
        name: torch.randn(2, 32, *size, generator=random).to(places.device, dtype)
        for name, size in {**sizes, "first": (2, 8), "weight": (4, 8)}.items()
    }
    across = Across(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), places)
    assert at_once is None or spread.at_once(own) == at_once, what
    mine = {name: across.own(x).clone() for name, x in given.items()}
    one = _gradients(given, lambda *x, **y: whole.chunked(*x, **y, starts=places == 0))
    many = _gradients(mine, lambda *x, **y: spread.chunked(across, own, *x, **y))
    for name, x in one.items():
        _alike(f"{what}: {name}", many[name], across.own(x))
    kept = [p.grad for p in own.parameters()]
    own.zero_grad(set_to_none=True)
    for x in mine.values():
        x.grad = None
    again = _gradients(mine, lambda *x, **y: spread.chunked(across, own, *x, **y, again=True))
    for name, x in many.items():
        _alike(f"{what}, computed again: {name}", again[name], x)
    for before, parameter in zip(kept, own.parameters(), strict=True):
        assert (before is None) == (parameter.grad is None), f"{what}, computed again"
        if before is not None and parameter.grad is not None:
            _alike(f"{what}, computed again", parameter.grad, before)
    processes.add_up(p.grad for p in own.parameters() if p.grad is not None)
    for (name, parameter), copy in zip(whole.named_parameters(), own.parameters(), strict=True):
        assert (parameter.grad is None) == (copy.grad is None), f"{what}: {name}"
        if copy.grad is not None:
            _alike(f"{what}: {name}", copy.grad, parameter.grad)


def _gradients(given: dict[str, Tensor], form: Any) -> dict[str, Tensor]:
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    q, k, v, plain_q, plain_k, hidden, first, weight = leaves.values()
    made = form(q, k, v, hidden=hidden, plain=(plain_q, plain_k), first=first)
    (made * weight).sum().backward()
    found = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return {"output": made.detach(), **found}


def softmax(model: Any, out: Path) -> None:
    """An unconverted model over all processes beside itself whole: logits and gradients, also checkpointed."""
    device = resolve_device(RunConfig(device=DEVICE))
    with processes.joined(device):
        model = model().to(device).float().train()
        if not EXACT:
            _flash(model, device)
        for borders in BORDERS.values():
            places = positions(borders, 32, device)
            ids = torch.arange(64, device=device).view(2, 32) * 7 % 250
            across = Across(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), places)
            whole = model(input_ids=ids, position_ids=places, use_cache=False).logits
            expected = _taken(model, whole.float().square().sum())
            for checkpointed in (False, True):
                if checkpointed:
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                with spreading([model], across):
                    own = {"input_ids": across.own(ids), "position_ids": across.own(places)}
                    made = model(**own, use_cache=False).logits
                    found = _taken(model, made.float().square().sum())
                model.gradient_checkpointing_disable()
                _alike("logits", made, across.own(whole))
                processes.add_up(found.values())
                for name, gradient in expected.items():
                    _alike(name, found[name], gradient, 1e-3)
            again = model(input_ids=ids, position_ids=places, use_cache=False).logits
            assert torch.equal(again, whole), "nothing stays changed"


def layouts(out: Path) -> None:
    """Tensors and gradients that are not contiguous: everything goes to the others as NCCL takes it."""
    device, gathered = resolve_device(RunConfig(device=DEVICE)), across_module._gathered
    across_module._gathered = lambda *given: _Looking.apply(gathered(*given))
    with processes.joined(device), OverNccl() as spoken:
        rank, size = dist.get_rank(), dist.get_world_size()
        across = Across(dist.group.WORLD, rank, size, torch.arange(4 * size, device=device)[None])
        x = torch.arange(12.0, device=device).view(3, 4).t().requires_grad_()
        weights = torch.arange(12.0 * size, device=device).view(size, 3, 4)
        made = across.gathered(x)
        assert torch.equal(made, x.detach().expand(size, 4, 3))
        (made.transpose(1, 2) * weights).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, size * weights[rank].t())
        if rank == 0:
            _sent(across, x, 1)
            _sent(across, x > 5, 1)
        elif rank == 1:
            assert torch.equal(_received(across, x.detach(), 0), x)
            assert torch.equal(_received(across, x > 5, 0), x > 5)
        names = {name.partition(".")[0] for name in spoken.seen}
        assert any("reduce_scatter" in name for name in names) and any("gather" in name for name in names)


class _Looking(torch.autograd.Function):
    """Around a collective: the gradient that comes to its backward pass; torch 2.13 mends it there, 2.11 does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert grad.is_contiguous(), grad.stride()
        return grad


def _flash(model: nn.Module, device: torch.device) -> None:
    """In bfloat16, where other kernels run: masks are the same, or numbers differ by more than they are rounded."""
    for borders in BORDERS.values():
        places = positions(borders, 32, device)
        ids = torch.arange(64, device=device).view(2, 32) * 7 % 250
        across = Across(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), places)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            whole = model(input_ids=ids, position_ids=places, use_cache=False).logits.float()
            with spreading([model], across):
                made = model(
                    input_ids=across.own(ids), position_ids=across.own(places), use_cache=False
                ).logits.float()
        off = (made - across.own(whole)).square().mean().sqrt() / whole.square().mean().sqrt()
        assert off < 0.03, f"{borders}: {off}"


def compiled(out: Path) -> None:
    """Passes of a hybrid and of a teacher beside it: what stands around their attention is compiled at once."""
    compiled_mixers.BACKEND = "eager"  # tracing is what can fail
    device = resolve_device(RunConfig(device=DEVICE))
    with processes.joined(device):
        teacher = tiny_llama().to(device).eval().requires_grad_(False)
        stage = StageConfig(objective={"logits_kl": 1.0}, train=["all"])
        model = prepare(surgery.convert(tiny_llama(seed=1).to(device), MIXER, [1]), stage).train()
        ids = torch.arange(64, device=device).view(2, 32) * 7 % 250
        across = Across(
            dist.group.WORLD,
            dist.get_rank(),
            dist.get_world_size(),
            positions(BORDERS["several"], 32, device),
        )
        batch = {"input_ids": ids, "position_ids": across.positions}

        def step(part: dict[str, Tensor], count: Tensor | None, off: Any) -> Tensor:
            with spreading([model, teacher], across, again=True):
                own = {name: across.own(x) for name, x in part.items()}
                theirs = predict_teacher(model, own, teacher)
                made = predict(model, own)
                loss = objectives.token_backward(made, own["input_ids"], stage.objective, teacher=theirs)
            return loss[None]

        def parts() -> list[nn.Module]:
            return [*around_attention(model, softmax=True), *around_attention(teacher, softmax=True)]

        found: list[dict[str, Tensor]] = []
        for way in ("never", "always"):
            run = RunConfig(device=DEVICE, compile=way)
            passes = Passes(
                model, "probe", stage, run, device, 1, [*trained(model).values()], parts, spread=True
            )
            for _ in range(2):
                model.zero_grad()
                loss = passes(step, batch, None)
                found.append(
                    {
                        "loss": loss,
                        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
                    }
                )
            assert passes.blocks is not None and passes.captured.graph is None
            assert len(passes.blocks.layers) == (12 if way == "always" else 0), (
                "norms and feed-forward layers"
            )
            assert way == "never" or passes.blocks.obstacle is None, passes.blocks.obstacle
        for other in found[1:]:
            assert list(other) == list(found[0])
            for name, x in found[0].items():
                _alike(name, other[name], x)


def families(out: Path) -> None:
    """Every family that is not refused: logits of the teacher and of the student, and a gradient of each parameter."""
    refused = []
    with processes.joined(torch.device("cpu")):
        for family in tiny.FAMILIES:
            why = refusal(tiny.model(family))
            if why is not None:
                refused.append(f"{family}: {why}")
                continue
            model = surgery.convert(tiny.model(family), tiny.LAWCAT, "all").eval()
            tiny.randomize([layer.mixer for layer in surgery.converted(model)])
            ids = tiny.tokens(2, 32)
            places = positions(BORDERS["several"], 32, ids.device)
            across = Across(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), places)
            own = {"input_ids": across.own(ids), "position_ids": across.own(places), "use_cache": False}
            for mode in ("teacher", "student"):
                with surgery.mode(model, mode):
                    whole = model(input_ids=ids, position_ids=places, use_cache=False).logits
                    expected = _taken(model, whole.square().mean())
                    with spreading([model], across):
                        made = model(**own).logits
                        found = _taken(model, made.square().mean() / across.size)
                _alike(f"{family}, {mode}", made, across.own(whole), 1e-3)
                processes.add_up(found.values())
                for name, gradient in expected.items():
                    _alike(f"{family}, {mode}: {name}", found[name], gradient, 1e-3)
        (out / f"refused-{processes.rank()}.txt").write_text("\n".join(refused))


def _taken(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _alike(what: str, found: Tensor, expected: Tensor, slack: float = 1e-4) -> None:
    rtol = atol = 1e-9 if found.dtype == torch.float64 else slack
    if not EXACT:  # kernels, and sums in another order
        atol = 20 * slack * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(
        found.detach(), expected.detach(), rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
    )
