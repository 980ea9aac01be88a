"""One token of window_linear: torch form and Triton kernel against the mixer's own one-token form, states included."""

from __future__ import annotations

import pytest
import torch

from linearize.kernels import dispatch
from linearize.kernels.window_linear.recurrent import window_linear_step
from linearize.mixers import LayerShape, Mixer, build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
GROUPED = {"heads": 2, "kv_heads": 1, "key_dim": 16, "value_dim": 16, "scaling": 0.25}
FOUR = {"heads": 4, "kv_heads": 2}
TURNS = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Of ten of sixteen dims."""
MAPS = {"name": "hedgehog", "dim": 16}
PER_KV = {**MAPS, "per": "kv_head"}


def sliding(size: int, **options: object) -> dict:
    return {"name": "sliding", "size": size, **options}


def terraced(size: int, **options: object) -> dict:
    return {"name": "terraced", "size": size, **options}


CASES: dict[str, tuple[dict, dict]] = {
    "sliding": ({"feature_map": MAPS, "window": sliding(3)}, FOUR),
    "window of one": ({"feature_map": MAPS, "window": sliding(1)}, {}),
    "state shared by a group": ({"feature_map": PER_KV, "window": sliding(3)}, FOUR),
    "complement": (
        {
            "feature_map": MAPS,
            "window": sliding(3),
            "combine": {"name": "shared_normalizer", "complement": True},
        },
        {},
    ),
    "sink and cap": ({"feature_map": MAPS, "window": sliding(3, sinks="learned")}, {"softcap": 2.0}),
    "odd widths": (
        {"feature_map": {"name": "hedgehog", "dim": 9}, "window": sliding(3)},
        {"key_dim": 12, "value_dim": 10},
    ),
    "overlap": ({"feature_map": PER_KV, "window": sliding(3, overlap=True)}, {}),
    "terraced": ({"feature_map": MAPS, "window": terraced(3)}, {}),
    "terraced, shared, sink": ({"feature_map": PER_KV, "window": terraced(3, sinks="learned")}, FOUR),
    "terraced, the teacher slides": ({"feature_map": MAPS, "window": terraced(3)}, {"sliding_window": 5}),
    "pinned": ({"feature_map": MAPS, "window": sliding(3, first=2)}, FOUR),
    "pinned, shared, sink": ({"feature_map": PER_KV, "window": sliding(2, first=3, sinks="learned")}, FOUR),
    "pinned, terraced": ({"feature_map": MAPS, "window": terraced(3, first=2)}, {}),
    "pinned, seen from afar": ({"feature_map": MAPS, "window": sliding(2, first=1, within=3)}, {"turns": TURNS}),
    "pinned, terraced, from afar": (
        {"feature_map": PER_KV, "window": terraced(1, first=2, within=4)}, {**FOUR, "turns": TURNS}
    ),
    "no window": ({"feature_map": MAPS}, {}),
    "no window, shared": ({"feature_map": PER_KV}, {}),
    "head dim 64, two tiles of values": (
        {"feature_map": {"name": "hedgehog", "dim": 128}, "window": sliding(6)},
        {"heads": 2, "kv_heads": 1, "key_dim": 64, "value_dim": 128},
    ),
}  # fmt: skip
cases = pytest.mark.parametrize(("mixer", "shape"), CASES.values(), ids=CASES)


def make(mixer: dict, shape: dict) -> Mixer:
    made = build(mixer, LayerShape(**{**GROUPED, **shape}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        scale = 1.0 if parameter.dim() < 3 else 2.0 * parameter.shape[1] ** -0.5
        torch.nn.init.normal_(parameter, std=scale, generator=generator)
        assert name
    return made.to(DEVICE)


def arguments(made: Mixer, state, rotation=None) -> dict:
    """The operator's arguments for a mixer."""
    near, far = made.window, made.recurrent
    assert far is not None
    both = made.combine
    return {
        "query_map": far.feature_map.query_weight,
        "key_map": far.feature_map.key_weight,
        "scaling": made.shape.scaling,
        "ring": near.ring(state) if near.size else None,
        "state": (state["sums"], state["norms"]),
        "window_factor": None if both is None else both.window_factor,
        "complement": both is not None and both.config.complement,
        "sink": getattr(near, "sink_logit", None),
        "softcap": made.shape.softcap,
        "at_once": getattr(near, "overlap", False),
        "rotation": rotation,
    }


def draw(shape: LayerShape, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((shape.heads, shape.key_dim), (shape.kv_heads, shape.key_dim), (shape.kv_heads, shape.value_dim))
    return [torch.randn(2, tokens, *size, generator=generator).to(dtype).to(DEVICE) for size in sizes]


def close(out: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    error = (out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert error < tolerance, f"{what}: {error:.1e}"


@torch.no_grad()
def compare(made: Mixer, kernels: str, dtype: torch.dtype, tokens: int, prefilled: int = 0) -> None:
    """Both forms through `tokens` tokens, with padding in one row; outputs and the whole state."""
    xs = draw(made.shape, prefilled + tokens, dtype)
    valid = torch.ones(2, prefilled + tokens, dtype=torch.bool, device=DEVICE)
    valid[0, : max(3, prefilled // 2)] = False
    valid[1, prefilled + tokens - 2] = False
    state = made.initial_state(2, dtype, torch.device(DEVICE))
    if prefilled:
        with dispatch.kernels("torch"):
            made.chunked(*(x[:, :prefilled] for x in xs), valid=valid[:, :prefilled], state=state)
    other = state.clone()
    places = {name: other[name].data_ptr() for name in other}
    outs, expected = [], []
    for t in range(prefilled, prefilled + tokens):
        q, k, v = (x[:, t] for x in xs)
        with dispatch.kernels("torch"):
            turn = made.step(*(x[:, None] for x in (q, k, v)), state=state, valid=valid[:, t : t + 1])
        with dispatch.kernels(kernels):
            outs.append(window_linear_step(q, k, v, valid=valid[:, t], **arguments(made, other)))
        expected.append(turn[:, 0])
    assert outs[0].dtype == dtype and outs[0].shape == expected[0].shape
    close(torch.stack(outs), torch.stack(expected), TOLERANCE[dtype], "output")
    for name in state:
        if state[name].is_floating_point():
            close(other[name], state[name], 1e-5, name)
        elif name != "window_valid":
            assert torch.equal(other[name], state[name]), name
    assert {name: other[name].data_ptr() for name in other} == places


@cases
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_equals_the_mixer(mixer, shape, kernels):
    compare(
        make(mixer, shape),
        kernels,
        torch.float32,
        {"terraced": 10, "sliding": 7}.get(mixer.get("window", {}).get("name"), 5),
    )


@pytest.mark.parametrize(
    "case",
    [
        ({"feature_map": MAPS, "window": sliding(70)}, {"heads": 2}),
        ({"feature_map": PER_KV, "window": terraced(5)}, {}),
    ],
    ids=["two tiles of the window", "terraced"],
)
def test_goes_on_from_a_prefilled_state(case):
    compare(make(*case), "triton", torch.float32, 6, prefilled=77)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ["sliding", "state shared by a group", "terraced"])
def test_half_precision(case, dtype):
    compare(make(*CASES[case]), "triton", dtype, 8)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(("width", "rows"), [(16, 2), (8, 1)], ids=["whole", "partial, one for all rows"])
@torch.no_grad()
def test_rotation_inside(kernels, width, rows):
    """Rotating inside is rotating before."""
    made = make(*CASES["state shared by a group"])
    xs = draw(made.shape, 5, torch.float32)
    states = [made.initial_state(2, torch.float32, torch.device(DEVICE)) for _ in range(2)]
    generator = torch.Generator().manual_seed(5)
    for t in range(5):
        q, k, v = (x[:, t] for x in xs)
        angle = torch.randn(rows, width // 2, generator=generator).to(DEVICE).repeat(1, 2)

        def rotated(x, angle=angle):
            head, rest = x[..., :width], x[..., width:]
            first, second = head.chunk(2, -1)
            across = torch.cat([-second, first], -1)
            return torch.cat([head * angle.cos()[:, None] + across * angle.sin()[:, None], rest], -1)

        rotation = (angle.cos(), angle.sin())
        with dispatch.kernels("torch"):
            before = window_linear_step(rotated(q), rotated(k), v, **arguments(made, states[0]))
        with dispatch.kernels(kernels):
            inside = window_linear_step(q, k, v, **arguments(made, states[1], rotation))
        close(inside, before, 1e-5)
    for name in ("window_k", "sums", "norms"):
        close(states[1][name], states[0][name], 1e-5, name)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@torch.no_grad()
def test_weights_of_the_branches_or_their_logits(kernels):
    made = make(*CASES["complement"])
    q, k, v = (x[:, 0] for x in draw(made.shape, 1, torch.float32))
    outs = []
    for given in ("logits", "weights"):
        call = arguments(made, made.initial_state(2, torch.float32, torch.device(DEVICE)))
        call["ring"].next.fill_(3)
        call["ring"].k.normal_(generator=torch.Generator(DEVICE).manual_seed(2))
        call["ring"].v.normal_(generator=torch.Generator(DEVICE).manual_seed(3))
        call["ring"].valid.fill_(True)
        if given == "weights":
            share = call.pop("window_factor").sigmoid()
            call |= {"window_weight": share, "linear_weight": 1 - share, "complement": False}
        with dispatch.kernels(kernels):
            outs.append(window_linear_step(q, k, v, **call))
    close(*outs, 1e-6)


def test_uncovered_shapes_are_refused():
    made = make(*CASES["sliding"])
    state = made.initial_state(1, torch.float32, torch.device(DEVICE))
    q, k, v = (x[:1, 0] for x in draw(made.shape, 1, torch.float32))
    given = arguments(made, state)
    with dispatch.kernels("triton"), pytest.raises(dispatch.KernelError, match="must be bfloat16"):
        window_linear_step(q.half(), k, v, **given)
    sums, norms = given.pop("state")
    apart = sums.transpose(2, 3).contiguous().transpose(2, 3)
    with dispatch.kernels("triton"), pytest.raises(dispatch.KernelError, match="written in place"):
        window_linear_step(q, k, v, state=(apart, norms), **given)


@torch.no_grad()
def test_is_a_torch_operator():
    """Schema, fake shapes, and what it says that it mutates."""
    from linearize.kernels.window_linear import triton_step

    made = make(*CASES["terraced"])
    state = made.initial_state(2, torch.float32, torch.device(DEVICE))
    q, k, v = (x[:, 0] for x in draw(made.shape, 1, torch.float32))
    ring, (sums, norms) = made.window.ring(state), (state["sums"], state["norms"])
    maps = [made.feature_map.query_weight.detach(), made.feature_map.key_weight.detach()]
    call = (
        q, k, v, None, None, None, *maps, torch.ones(made.shape.heads, device=DEVICE), None, None,
        ring.k, ring.v, ring.valid,
        ring.next, ring.position, sums, norms, None, None, [3.0, 6.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0],
    )  # fmt: skip
    with dispatch.kernels("triton"):
        torch.library.opcheck(triton_step.step, call, test_utils=("test_schema", "test_faketensor"))
