"""window_linear in Triton and in blocks of torch against its dense definition in float64: output, state, gradients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import kernel_calls
import pytest
import torch
from kernel_calls import DEVICE, NARROW, error, normal
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.window_linear import Layer, Pins, Weights, plan, window_linear, window_linear_reference
from linearize.kernels.window_linear.operator import window_linear_triton

TOLERANCE = {torch.float64: 1e-10, **kernel_calls.TOLERANCE}
SCANS = plan.Plan.scans


@dataclass(frozen=True)
class Case:
    """One shape with its options; with "shared" `maps` one key map per key-value head.

    `lead` keys of the prefix are padding; with `asking` pinned keys are asked by other queries.
    """

    tokens: int = 130
    heads: int = 2
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    map_dim: int = 16
    window: int = 64
    least: int | None = None
    maps: str = "own"
    factor: bool = False
    sink: bool = False
    documents: bool = False
    prefix: int = 0
    state: bool = False
    segments: int = 0
    batch: int = 1
    pins: int = 0
    lead: int = 0
    asking: bool = False
    tensors: tuple[str, ...] = field(default=(), repr=False)


CASES = {
    "plain": Case(batch=2),
    "short": Case(tokens=7),
    "one": Case(tokens=1),
    "grouped": Case(heads=4, tokens=70),
    "shared_maps": Case(kv_heads=1, maps="shared", tokens=140, documents=True, batch=2),
    "small_window": Case(window=16, tokens=100),
    "odd_window": Case(window=75, tokens=170),
    "one_more_than_a_chunk": Case(window=65, tokens=150, heads=1, kv_heads=1),
    "wide_window": Case(window=192, tokens=270, heads=1, kv_heads=1),
    "no_window": Case(window=0),
    "no_window_documents": Case(window=0, documents=True, state=True, tokens=140, batch=2),
    "factor_and_sink": Case(factor=True, sink=True, tokens=100),
    "documents": Case(kv_heads=1, documents=True, tokens=200, batch=2),
    "carried": Case(prefix=64, state=True, tokens=100, kv_heads=1, batch=2),
    "carried_documents": Case(
        prefix=48, window=48, state=True, documents=True, tokens=140, batch=2, heads=1, kv_heads=1
    ),
    "segments": Case(segments=3, tokens=330, state=True, prefix=64, heads=1, kv_heads=1),
    "segments_documents": Case(
        segments=3, tokens=300, batch=2, documents=True, kv_heads=1, state=True, prefix=64
    ),
    "terraced": Case(window=64, least=33, tokens=140, documents=True, batch=2, heads=1, kv_heads=1),
    "terraced_carried": Case(window=128, least=65, tokens=150, prefix=128, state=True),
    "wide_head": Case(key_dim=64, value_dim=64, map_dim=64, tokens=130, heads=2, kv_heads=1),
    "odd_dims": Case(key_dim=20, value_dim=24, tokens=90, state=True, prefix=64),
    "pinned": Case(pins=4, tokens=200, kv_heads=1),
    "pinned_documents": Case(pins=3, tokens=290, documents=True, heads=2, kv_heads=1, sink=True, factor=True),
    "pinned_general": Case(pins=4, window=16, tokens=280, documents=True, kv_heads=1, asking=True),
    "pinned_asking": Case(
        pins=5, window=128, tokens=210, documents=True, asking=True, sink=True, heads=1, kv_heads=1
    ),
    "pinned_carried": Case(pins=4, prefix=128, lead=60, state=True, tokens=140, kv_heads=1, asking=True),
    "pinned_carried_general": Case(
        pins=4,
        window=48,
        prefix=52,
        state=True,
        tokens=100,
        documents=True,
        batch=2,
        maps="shared",
        kv_heads=1,
    ),
    "pinned_terraced": Case(
        pins=4, window=64, least=33, prefix=68, state=True, tokens=150, asking=True, heads=1, kv_heads=1
    ),
    "pinned_split_backward": Case(
        pins=4, key_dim=128, value_dim=64, tokens=100, window=32, prefix=36, heads=1, kv_heads=1
    ),
    "pinned_wide_head": Case(
        pins=4, key_dim=64, value_dim=64, map_dim=64, tokens=180, kv_heads=1, documents=True, asking=True
    ),
    "pinned_segments": Case(pins=2, tokens=700, heads=1, kv_heads=1, segments=2, window=64),
    "split_backward": Case(key_dim=128, value_dim=64, map_dim=16, tokens=100, heads=1, kv_heads=1),
}
IN_HALF_ON_CPU = {"grouped", "small_window", "no_window_documents"}
"""The interpreter takes seconds a case, so only these run there in float16; on CUDA all do, and in bfloat16 too."""
AT_EVERY_CHANGE = {"pinned", "pinned_carried_general", "pinned_terraced"}
"""Of those with pinned keys, what the interpreter runs at every change; the others are `slow` there."""
RARELY = {name for name, case in CASES.items() if case.pins} - AT_EVERY_CHANGE
RARELY |= {"plain", "small_window", "documents", "carried", "segments_documents", "terraced_carried"}
RUNS = {f"{form}-{name}": (form, name) for form in ("torch", "triton") for name in CASES}


def draw(case: Case) -> dict[str, Tensor | None]:
    """Random float64 tensors of a call; q, k and v are numbers that every dtype holds.

    Rounded ones would be other inputs: where two scores are close, another key would be the largest of its row, and its
    gradient that of another key.
    """
    keys, heads = case.prefix + case.tokens, case.heads
    found: dict[str, Tensor | None] = {
        "q": 1.5 * normal(case.batch, case.tokens, heads, case.key_dim, seed=1),
        "k": normal(case.batch, keys, case.kv_heads, case.key_dim, seed=2),
        "v": normal(case.batch, keys, case.kv_heads, case.value_dim, seed=3),
    }
    found = {name: x.bfloat16().double() for name, x in found.items()}
    state_heads = heads if case.maps == "own" else case.kv_heads
    found["query_map"] = 0.5 * normal(heads, case.key_dim, case.map_dim, seed=4)
    found["key_map"] = 0.5 * normal(state_heads, case.key_dim, case.map_dim, seed=5)
    if case.window:
        found["window_weight"] = normal(heads, seed=6).sigmoid()
    if case.factor:
        found["linear_weight"] = normal(heads, seed=7).sigmoid()
    if case.sink:
        found["sink"] = normal(heads, seed=8)
    if case.asking:
        found["asking"] = (
            (1.5 * normal(case.batch, case.tokens, heads, case.key_dim, seed=12)).bfloat16().double()
        )
    return {name: None if x is None else x.to(DEVICE) for name, x in found.items()}


def masks(case: Case) -> tuple[Tensor, Tensor]:
    """Codes (left padding in row 0, packed documents) and reach."""
    keys = case.prefix + case.tokens
    docs = torch.zeros(case.batch, keys, dtype=torch.int64)
    valid = torch.ones(case.batch, keys, dtype=torch.bool)
    if case.documents:
        for row, places in enumerate([(5, 6, 70, 128, 190), (0, 3, 64, 91)][: case.batch]):
            for place in places:
                docs[row, min(case.prefix + place, keys) :] += 1
        valid[0, : case.prefix // 2 + 4] = False
        valid[-1, case.prefix + case.tokens // 2] = False
    valid[:, : case.lead] = False
    codes = torch.where(valid, docs, -1 - docs).to(torch.int32)
    reach = torch.full((case.batch, case.tokens), case.window, dtype=torch.int32)
    if case.least is not None:
        place = torch.arange(case.tokens) + 13
        reach[:] = (case.least + place % (case.window - case.least + 1)).to(torch.int32)
    return codes.to(DEVICE), reach.to(DEVICE)


def pinned(case: Case, codes: Tensor, asking: Tensor | None) -> Pins | None:
    """The first valid keys of each document."""
    if not case.pins:
        return None
    codes = codes.cpu()
    docs = torch.where(codes >= 0, codes, -1 - codes)
    first = torch.stack(
        [
            torch.tensor([next((i for i, c in enumerate(row) if c == d), 0) for d in own])
            for row, own in zip(codes.tolist(), docs.tolist(), strict=True)
        ]
    )
    first = first.cummax(1).values.to(torch.int32)
    order = torch.arange(codes.shape[1]) - first
    past = torch.where((order >= 0) & (order < case.pins), -1 - docs, codes)
    return Pins(case.pins, first[:, case.prefix :].to(DEVICE), past.to(DEVICE), asking)


def carried(case: Case) -> tuple[Tensor, Tensor] | None:
    if not case.state:
        return None
    heads = case.heads if case.maps == "own" else case.kv_heads
    size = (case.batch, heads, 2 * case.map_dim)
    return normal(*size, case.value_dim, seed=9).to(DEVICE), normal(*size, seed=10).abs().to(DEVICE)


def split(tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Weights]:
    rest = {name: x for name, x in tensors.items() if name not in "qkv" and name != "asking"}
    names = ("query_map", "key_map", "window_weight", "linear_weight", "sink")
    return tensors["q"], tensors["k"], tensors["v"], Weights(*(rest.get(name) for name in names))


def run(
    case: Case, dtype: torch.dtype, form: str
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """Output, gradients by name, and final state of one form."""
    wide = max(dtype, torch.float32, key=lambda d: d.itemsize)
    tensors = {n: x.to(dtype if n in ("q", "k", "v", "asking") else wide) for n, x in draw(case).items()}
    for x in tensors.values():
        x.requires_grad_()
    q, k, v, weights = split(tensors)
    codes, reach = masks(case)
    layer = Layer(case.window, case.window if case.least is None else case.least, 0.3, case.prefix)
    pins = pinned(case, codes, tensors.get("asking"))
    state = carried(case)
    state = None if state is None else tuple(x.to(wide) for x in state)
    final = None
    if form == "reference":
        out = window_linear_reference(
            q, k, v, weights, layer, codes=codes, reach=reach, state=state, pins=pins
        )
    elif form == "triton":
        given = codes if case.documents or case.pins else None
        far = reach if case.least is not None else None
        with dispatch.kernels("triton"):
            out, final = window_linear_triton(
                q, k, v, weights, layer, given, far, state, True, case.segments, pins
            )
    else:
        with dispatch.kernels("torch"):
            out, final = window_linear(
                q, k, v, weights.query_map, weights.key_map, window=case.window, scaling=0.3,
                window_weight=weights.window_weight, linear_weight=weights.linear_weight, sink=weights.sink,
                codes=codes, reach=reach, least=layer.least, prefix=case.prefix, state=state, return_state=True,
                pins=pins,
            )  # fmt: skip
    assert out.isfinite().all()
    grads = torch.autograd.grad((out * normal(*out.shape, seed=11).to(out)).sum(), list(tensors.values()))
    return out.detach(), dict(zip(tensors, grads, strict=True)), final


@pytest.mark.parametrize(("form", "name"), kernel_calls.cases(RUNS, {f"triton-{name}" for name in RARELY}))
def test_equals_the_definition(name, form):
    """The final state, which the definition does not give, is compared with that of torch in float64."""
    case = CASES[name]
    exact, exact_grads, _ = run(case, torch.float64, "reference")
    exact_state = None if form == "torch" else run(case, torch.float64, "torch")[2]
    narrow = NARROW if DEVICE == "cuda" or name in IN_HALF_ON_CPU else NARROW[:1]
    for dtype in [torch.float64] if form == "torch" else narrow:
        out, grads, state = run(case, dtype, form)
        assert out.dtype == dtype
        limit = TOLERANCE[dtype]
        found = {"out": error(out, exact)} | {n: error(grads[n], exact_grads[n]) / 3 for n in grads}
        if dtype != torch.float64 and "sink" in found:
            found["sink"] /= 3  # a small difference of large sums
        for ours, other in zip(state or (), exact_state or (), strict=form == "triton"):
            assert ours.dtype == torch.float32
            found[f"state {ours.dim()}"] = error(ours, other)
        assert max(found.values()) < limit, (dtype, found)


FROZEN = (
    "documents",
    "wide_window",
    "factor_and_sink",
    "segments_documents",
    "no_window",
    "terraced",
    "pinned",
)


@pytest.mark.parametrize(
    "name", kernel_calls.cases({name: name for name in FROZEN}, {*FROZEN[:2], "segments_documents"})
)
def test_frozen_inputs_leave_the_other_gradients_as_they_are(name):
    """Attention transfer: q, k and v come from frozen projections, and theirs are never made."""
    case, dtype = CASES[name], NARROW[-1] if DEVICE == "cuda" else NARROW[0]
    _, whole, _ = run(case, dtype, "triton")
    frozen = {n: x.to(dtype if n in "qkv" else torch.float32) for n, x in draw(case).items()}
    learned = [x.requires_grad_() for n, x in frozen.items() if n not in "qkv"]
    q, k, v, weights = split(frozen)
    codes, reach = masks(case)
    layer = Layer(case.window, case.window if case.least is None else case.least, 0.3, case.prefix)
    state = carried(case)
    state = None if state is None else tuple(x.float() for x in state)
    far = reach if case.least is not None else None
    with dispatch.kernels("triton"):
        out, _ = window_linear_triton(
            q, k, v, weights, layer, codes if case.documents or case.pins else None, far, state, True,
            case.segments, pinned(case, codes, None),
        )  # fmt: skip
    found = torch.autograd.grad((out * normal(*out.shape, seed=11).to(out)).sum(), learned)
    names = [n for n in frozen if n not in "qkv"]
    for name, gradient in zip(names, found, strict=True):
        assert gradient.abs().max() > 0
        if DEVICE == "cuda":  # another kernel to the compiler, which may join other operations
            assert error(gradient, whole[name]) < TOLERANCE[dtype] / 4, name
        else:
            assert torch.equal(gradient, whole[name]), name


HALVED = {name: name for name in ("carried", "shared_maps", "no_window_documents")}


@pytest.mark.parametrize("name", kernel_calls.cases(HALVED, {"shared_maps", "no_window_documents"}))
def test_scans_with_one_half_of_the_features(name, monkeypatch):
    """What fills a device with few sequences: twice as many programs, with half of the features each."""
    case = CASES[name]
    rows = case.batch * (case.heads if case.maps == "own" else case.kv_heads)
    monkeypatch.setattr(plan, "processors", lambda device: rows)
    made = []
    monkeypatch.setattr(
        plan.Plan, "scans", lambda self, config: made.append(self.split) or SCANS(self, config)
    )
    exact, exact_grads, _ = run(case, torch.float64, "reference")
    exact_state = run(case, torch.float64, "torch")[2]
    for dtype in NARROW if DEVICE == "cuda" else NARROW[:1]:
        out, grads, state = run(case, dtype, "triton")
        found = [error(out, exact)] + [error(grads[n], exact_grads[n]) / 3 for n in grads]
        found += [error(*pair) for pair in zip(state, exact_state, strict=True)]
        assert max(found) < TOLERANCE[dtype], (dtype, found)
    assert made and all(made)


def test_a_state_carries_over_a_split():
    """Two calls, the second with the first one's window and state, are one call."""
    case = Case(tokens=200, kv_heads=1)
    with dispatch.kernels("triton"):
        q, k, v, weights = split({n: x.float() for n, x in draw(case).items()})
        options = {"window": 64, "scaling": 0.3, "window_weight": weights.window_weight}
        whole, final = window_linear(
            q, k, v, weights.query_map, weights.key_map, **options, return_state=True
        )
        first, state = window_linear(
            q[:, :90], k[:, :90], v[:, :90], weights.query_map, weights.key_map, **options, return_state=True
        )
        second, last = window_linear(
            q[:, 90:], k[:, 26:], v[:, 26:], weights.query_map, weights.key_map, **options, prefix=64, state=state,
            return_state=True,
        )  # fmt: skip
    assert error(torch.cat([first, second], 1), whole) < 1e-5
    for one, other in zip(last, final, strict=True):
        assert error(one, other) < 1e-5


def test_what_is_not_covered_is_refused_with_a_remedy():
    case = replace(CASES["plain"], map_dim=24)
    q, k, v, weights = split({n: x.float() for n, x in draw(case).items()})
    with (
        dispatch.kernels("triton"),
        pytest.raises(dispatch.KernelError, match=r"map_dim: 24.*LINEARIZE_KERNELS=torch"),
    ):
        window_linear(q, k, v, weights.query_map, weights.key_map, window=64, scaling=0.3)


def test_compiles_and_checkpoints():
    """One graph under torch.compile, and recomputation under gradient checkpointing gives the same gradients."""
    case = Case(tokens=70, batch=1)
    q, k, v, weights = split({n: x.float().requires_grad_() for n, x in draw(case).items()})

    def layer(q, k, v):
        out, _ = window_linear(
            q * 1.0,
            k,
            v,
            weights.query_map,
            weights.key_map,
            window=64,
            scaling=0.3,
            window_weight=weights.window_weight,
        )
        return out.square()

    with dispatch.kernels("triton"):
        plain = torch.autograd.grad(layer(q, k, v).sum(), (q, k, v))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for other in (compiled, lambda *x: torch.utils.checkpoint.checkpoint(layer, *x, use_reentrant=False)):
            for one, two in zip(torch.autograd.grad(other(q, k, v).sum(), (q, k, v)), plain, strict=True):
                assert error(one, two) < 1e-6
