"""Mixers on the Triton kernels against the same mixers part by part: outputs, states, gradients, token by token."""

from __future__ import annotations

from dataclasses import replace

import kernel_calls
import pytest
import torch
from kernel_calls import INTERPRETED
from torch import Tensor
from watched import Watched

from linearize.kernels import dispatch
from linearize.mixers import LayerShape, build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = LayerShape(heads=4, kv_heads=2, key_dim=16, value_dim=16, scaling=0.25, model_dim=10)
TURNING = replace(SHAPE, turns=(1.0, 0.3, 0.1, 0.03, 0.01))
HEDGEHOG = {"name": "hedgehog", "dim": 16}
SLIDING = {"name": "sliding", "size": 16}
LOW_RANK = {"name": "low_rank", "rank": 3}
MIXERS: dict[str, dict] = {
    "lolcats": {"feature_map": HEDGEHOG, "window": {"name": "sliding", "size": 64}},
    "short window": {"feature_map": {**HEDGEHOG, "per": "kv_head"}, "window": SLIDING, "combine": {
        "name": "shared_normalizer", "complement": True}},
    "terraced": {
        "feature_map": {**HEDGEHOG, "tied": True},
        "window": {"name": "terraced", "size": 16, "sinks": "learned"},
    },
    "pinned lolcats": {"feature_map": HEDGEHOG, "window": {"name": "sliding", "size": 64, "first": 4}, "combine": {
        "name": "shared_normalizer", "complement": True}},
    "pinned, short window": {"feature_map": {**HEDGEHOG, "per": "kv_head"}, "window": {**SLIDING, "first": 3}},
    "pinned terraced": {
        "feature_map": {**HEDGEHOG, "tied": True},
        "window": {"name": "terraced", "size": 16, "first": 2, "sinks": "learned"},
    },
    "pinned, seen from afar": {"feature_map": HEDGEHOG, "window": {**SLIDING, "first": 4, "within": 24}},
    "hedgehog": {"feature_map": HEDGEHOG},
    "window alone": {"window": {**SLIDING, "sinks": "learned"}},
    "pinned": {"window": {**SLIDING, "first": 3, "sinks": "learned"}},
    "taylor": {
        "feature_map": {"name": "taylor", "dim": 8}, "window": {**SLIDING, "first": 3},
        "combine": {"name": "shared_normalizer", "stabilized": True},
    },
    "taylor terraced": {
        "feature_map": {"name": "taylor", "dim": 16, "per": "kv_head"}, "window": {"name": "terraced", "size": 16},
        "combine": {"name": "shared_normalizer", "stabilized": True},
    },
    "taylor alone": {"feature_map": {"name": "taylor", "dim": 8}, "normalizer": {"name": "group_norm"}},
    "delta window": {
        "feature_map": {"name": "identity"}, "gate": {"name": "mamba2"}, "update": {"name": "delta"},
        "normalizer": {"name": "none"}, "window": {**SLIDING, "first": 3, "overlap": True},
        "combine": {"name": "sigmoid", "per": "token"},
    },
    "block": {
        "feature_map": {"name": "elu"}, "window": {"name": "block", "size": 16}, "combine": {"name": "sum"},
    },
    "block alone": {"window": {"name": "block", "size": 16, "sinks": "learned"}},
    "terraced parts": {
        "feature_map": {"name": "elu"}, "window": {"name": "terraced", "size": 16, "first": 2},
    },
    "liger": {
        "feature_map": {"name": "softmax_dim"}, "gate": {"name": "key_pool"}, "normalizer": {"name": "none"},
        "window": {**SLIDING, "overlap": True}, "combine": {"name": "weighted"},
    },
    "lizard": {
        "feature_map": HEDGEHOG, "gate": {"name": "scalar"},
        "window": {"name": "terraced", "size": 16, "overlap": True},
        "combine": {"name": "sum"},
    },
    "gla": {"feature_map": {"name": "identity"}, "gate": LOW_RANK, "normalizer": {"name": "group_norm"}},
    "linear": {"feature_map": {"name": "elu"}},
    "delta": {"feature_map": {"name": "identity"}, "update": {"name": "delta"}, "normalizer": {"name": "none"}},
    "kda": {
        "feature_map": {"name": "identity"}, "update": {"name": "delta"}, "gate": {"name": "kda", "rank": 3},
        "normalizer": {"name": "group_norm", "kind": "rms"},
    },
    "gdn2": {
        "feature_map": {"name": "identity"}, "update": {"name": "gdn2"}, "gate": {"name": "kda", "rank": 3},
        "normalizer": {"name": "none"}, "output": {"name": "gated_norm", "rank": 3},
    },
    "slots": {
        "feature_map": {"name": "softmax_dim"}, "update": {"name": "slots", "slots": 16}, "gate": {"name": "key_pool"},
        "normalizer": {"name": "none"},
    },
}  # fmt: skip
PINNED = {"pinned lolcats", "pinned, short window", "pinned terraced", "pinned, seen from afar"}
COVERED = {"lolcats", "short window", "terraced", "hedgehog"} | PINNED
PRODUCTS = {"taylor", "taylor terraced", "taylor alone"}


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def made(name: str):
    torch.manual_seed(0)
    mixer = build(MIXERS[name], TURNING if "afar" in name else SHAPE).to(DEVICE)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * normal(*parameter.shape, seed=parameter.numel())
    return mixer


def inputs(tokens: int, batch: int = 2) -> dict[str, Tensor]:
    return {
        "q": normal(batch, tokens, 4, 16, seed=1),
        "k": normal(batch, tokens, 2, 16, seed=2),
        "v": normal(batch, tokens, 2, 16, seed=3),
        "hidden": normal(batch, tokens, 10, seed=4),
    }


def close(one: Tensor, two: Tensor, limit: float = 2e-5) -> None:
    one, two = one.double(), two.double()
    assert one.isfinite().all()
    assert (one - two).norm() <= limit * two.norm().clamp_min(1e-2 * two.numel() ** 0.5), (
        (one - two).abs().max()
    )


RING = {"window_k", "window_v", "window_valid", "window_next"}
"""Of the state; a ring may begin at another slot."""
LIMIT = 2e-3 if DEVICE == "cuda" else 5e-5  # float32 products of the torch form may take tf32 there


def test_which_compositions_one_kernel_covers():
    assert {name for name in MIXERS if made(name).fused is not None} == COVERED
    branches = {name: made(name).recurrent for name in MIXERS}
    assert {name for name, made in branches.items() if made is not None and made.by_products} == PRODUCTS


@pytest.mark.parametrize("name", ["taylor", "taylor alone"])
def test_features_of_products_stay_in_the_kernel(name, monkeypatch):
    mixer, given = made(name), inputs(20)
    monkeypatch.setattr(type(mixer.feature_map), "activate", lambda *_: pytest.fail("features were made"))
    with dispatch.kernels("triton"), torch.no_grad():
        state = mixer.initial_state(2, torch.float32, torch.device(DEVICE))
        mixer.chunked(**{n: x[:, :19] for n, x in given.items()}, state=state)
        mixer.step(**{n: x[:, 19:] for n, x in given.items()}, state=state)


RARELY = PINNED - {"pinned lolcats"}
RARELY |= {"short window", "window alone", "block alone", "taylor terraced", "delta"}
"""Of their parts each is met in another composition."""


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        pytest.param(
            name, masked, marks=INTERPRETED if name in RARELY or (name, masked) == ("gla", False) else []
        )
        for name, masked in [*((name, True) for name in MIXERS), ("lolcats", False), ("gla", False)]
    ],
)
def test_training_equals_the_parts(name, masked):
    """Outputs and gradients of inputs and parameters, with packed documents and left padding."""
    mixer, given, tokens = made(name), inputs(84, 1), 84
    masks = {}
    if masked:
        valid = torch.ones(1, tokens, dtype=torch.bool, device=DEVICE)
        valid[0, :5] = False
        starts = torch.zeros(1, tokens, dtype=torch.bool, device=DEVICE)
        starts[0, [6, 7, 77]] = True  # one document is longer than every window
        masks = {"valid": valid, "starts": starts}
    found = {}
    for kind in ("torch", "triton"):
        tensors = {n: x.clone().requires_grad_() for n, x in given.items()}
        with dispatch.kernels(kind):
            out = mixer.chunked(**tensors, **masks)
            weight = normal(*out.shape, seed=5)
            if masked:
                weight = weight * masks["valid"][..., None, None]
            wanted = [*tensors.values(), *mixer.parameters()]
            found[kind] = [out, *torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)]
    if masked:
        for outputs in found.values():
            outputs[0] = outputs[0] * masks["valid"][..., None, None]
    for one, two in zip(found["triton"], found["torch"], strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            close(one, two, LIMIT)


@pytest.mark.parametrize("name", kernel_calls.cases({name: name for name in MIXERS}, MIXERS))
def test_prefill_split_and_tokens_equal_the_parts(name):
    """A prompt with left padding in two calls, then tokens one by one beyond the windows: the outputs and the state."""
    mixer, given = made(name), inputs(33)
    valid = torch.ones(2, 33, dtype=torch.bool, device=DEVICE)
    valid[0, :5] = False
    found = {}
    for kind in ("torch", "triton"):
        with dispatch.kernels(kind), torch.no_grad():
            state, outputs = mixer.initial_state(2, torch.float32, torch.device(DEVICE)), []
            for piece in (slice(0, 13), slice(13, 28)):
                part = {n: x[:, piece] for n, x in given.items()}
                outputs.append(mixer.chunked(**part, valid=valid[:, piece], state=state))
            for t in range(28, 33):
                part = {n: x[:, t : t + 1] for n, x in given.items()}
                outputs.append(mixer.step(**part, valid=valid[:, t : t + 1], state=state))
            found[kind] = torch.cat(outputs, 1) * valid[..., None, None], state
    (one, ours), (two, theirs) = found["triton"], found["torch"]
    close(one, two, LIMIT)
    for part in theirs:
        assert ours[part].dtype == theirs[part].dtype
        if part not in RING:
            close(ours[part], theirs[part], LIMIT)


def test_what_no_kernel_takes_runs_in_torch_unless_triton_was_asked_for(monkeypatch):
    """Taylor features of a wide head pass 256: automatic choice keeps the linear torch form."""
    mixer = build({"feature_map": {"name": "taylor", "dim": 24}}, SHAPE).to(DEVICE)
    given = inputs(20)
    assert mixer.update is not None and mixer.update.feature_dim > 256
    monkeypatch.setattr(dispatch, "_chosen", lambda: "auto")
    assert mixer.chunked(**given).isfinite().all()
    with (
        dispatch.kernels("triton"),
        pytest.raises(dispatch.KernelError, match=r"features: .*LINEARIZE_KERNELS=torch"),
    ):
        mixer.chunked(**given)


def test_autocast_leaves_queries_and_keys_in_float32():
    """A rotary embedding in float32 in front of sixteen-bit values: the kernel takes them, training and decoding."""
    mixer, given = made("short window"), inputs(40)
    narrow = {**given, "v": given["v"].to(torch.float16)}
    found = {}
    for kind, tensors in (("torch", given), ("triton", narrow)):
        with dispatch.kernels(kind), torch.no_grad():
            state = mixer.initial_state(2, tensors["v"].dtype, torch.device(DEVICE))
            outputs = [mixer.chunked(**{n: x[:, :39] for n, x in tensors.items()}, state=state)]
            outputs.append(mixer.step(**{n: x[:, 39:] for n, x in tensors.items()}, state=state))
            found[kind] = torch.cat([x.float() for x in outputs], 1)
    close(found["triton"], found["torch"], 3e-3)


@pytest.mark.parametrize("name", kernel_calls.cases({name: name for name in MIXERS}, MIXERS))
def test_padding_between_tokens_equals_the_parts(name):
    """Second turns of a padded batch: gaps in every call, calls that begin and end in them, blocks handed on before."""
    mixer, given = made(name), inputs(75)
    valid = torch.rand(2, 75, generator=torch.Generator().manual_seed(6)).to(DEVICE) > 0.3
    valid[0, 40:46], valid[1, :9] = False, False
    found = {}
    for kind in ("torch", "triton"):
        with dispatch.kernels(kind), torch.no_grad():
            state, outputs = mixer.initial_state(2, torch.float32, torch.device(DEVICE)), []
            for first, last in (
                (0, 43),
                (43, 58),
                (58, 59),
                (59, 60),
                (60, 61),
                (61, 62),
                (62, 63),
                (63, 75),
            ):
                part = {n: x[:, first:last] for n, x in given.items()}
                form = mixer.step if last - first == 1 else mixer.chunked
                outputs.append(form(**part, valid=valid[:, first:last], state=state))
            whole = mixer.chunked(**given, valid=valid)
            found[kind] = torch.cat(outputs, 1) * valid[..., None, None], whole * valid[..., None, None]
    for out in (*found["triton"], found["torch"][0]):
        close(out, found["torch"][1], LIMIT)


GROWING = {"gated_linear", "taylor_linear"}
"""Kernels whose answer is a sum over the text."""
QUICK = {"gdn2", "lolcats"}
NAMES = ["delta window", "kda", "gdn2", "slots", "liger", "taylor", "linear", "block", "lolcats"]


def sixteen_bit_run(mixer, given: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A prompt and three tokens behind it."""
    given, tokens = {name: x.to(dtype) for name, x in given.items()}, given["q"].shape[1]
    with torch.no_grad():
        state = mixer.initial_state(2, dtype, torch.device(DEVICE))
        outputs = [mixer.chunked(**{n: x[:, : tokens - 3] for n, x in given.items()}, state=state)]
        for t in range(tokens - 3, tokens):
            outputs.append(mixer.step(**{n: x[:, t : t + 1] for n, x in given.items()}, state=state))
    assert all(x.dtype == dtype for x in outputs)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=INTERPRETED) for name in NAMES],
)
def test_kernels_are_given_float16(name):
    mixer, given = made(name), inputs(75)
    given = {key: x.half().float() for key, x in given.items()}
    with dispatch.kernels("torch"):
        expected = sixteen_bit_run(mixer, given, torch.float32)
    with dispatch.kernels("triton"):
        close(sixteen_bit_run(mixer, given, torch.float16), expected, 6e-3)
        look = Watched(72, 2 * 72 * 2 * 16)
        narrow = {key: x[:, :72].half() for key, x in given.items()}
        with torch.no_grad(), look.mixers():
            mixer.chunked(**narrow)
    assert look.kernels and {key.split()[0] for key in look.wide} <= GROWING, dict(look.wide)


@pytest.mark.parametrize("name", ["linear", pytest.param("taylor alone", marks=INTERPRETED)])
def test_sums_that_float16_does_not_hold(name):
    """Of hundreds of tokens with large values, before they are divided."""
    mixer, given = made(name), inputs(203)
    given["v"] = 3000 * given["v"].abs()
    with dispatch.kernels("torch"):
        expected = sixteen_bit_run(mixer, given, torch.float32)
    with dispatch.kernels("triton"):
        close(sixteen_bit_run(mixer, given, torch.float16), expected, 6e-3)
