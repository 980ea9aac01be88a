"""The teacher's softmax by the window's kernel is that of its own attention function, document by document."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import DEVICE

from linearize import surgery
from linearize.bench.subjects import convert, random_model
from linearize.kernels import dispatch
from linearize.kernels.window import operator
from linearize.surgery import teaching

SIZES = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2}


def seen(model, batch) -> list[torch.Tensor]:
    """What each layer's teacher answers."""
    found: list[torch.Tensor] = []
    with torch.no_grad(), surgery.observe(model, lambda call: found.append(call.teacher)):
        model.base_model(**batch, use_cache=False)
    return found


def batch(documents: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    places = torch.arange(70).repeat(2, 1)
    if documents:
        places[1, 25:] -= 25
        places[1, 40:] -= 15
    return {"input_ids": ids, "position_ids": places.to(DEVICE)}


@pytest.fixture()
def calls(monkeypatch) -> list[int]:
    """Windows of the kernel's calls."""
    made: list[int] = []
    inner = operator.window_triton

    def counted(q, k, v, runs, **kwargs):
        made.append(runs.window)
        return inner(q, k, v, runs, **kwargs)

    monkeypatch.setattr(operator, "window_triton", counted)
    return made


@pytest.fixture()
def model():
    found = convert(random_model(DEVICE, torch.float16, "tiny", **SIZES), "lolcats")
    assert found.config.num_key_value_heads < found.config.num_attention_heads  # heads are not repeated
    return found


def test_equal_to_torch(model, calls):
    with dispatch.kernels("torch"), surgery.trusting(model):
        expected = seen(model, batch())
    assert calls == []
    with dispatch.kernels("triton"), surgery.trusting(model):
        found = seen(model, batch())
    assert calls == [70, 70]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-3 * float(theirs.abs().max()))
    alone = {name: x[1:, 25:40] - (25 if name == "position_ids" else 0) for name, x in batch().items()}
    alone["position_ids"] = torch.arange(15, device=DEVICE)[None]
    with dispatch.kernels("torch"):
        for ours, theirs in zip(found, seen(model, alone), strict=True):
            torch.testing.assert_close(ours[1:, 25:40], theirs, rtol=0, atol=4e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("why", ["nobody has looked", "no mask", "float32", "eager"])
def test_left_to_the_own_function(model, calls, why):
    given = batch(documents=why != "no mask")
    if why == "float32":
        model = model.float()
    if why == "eager":
        model.set_attn_implementation("eager")
    with dispatch.kernels("triton"):
        if why == "nobody has looked":
            seen(model, given)
        else:
            with surgery.trusting(model):
                seen(model, given)
    assert calls == []


def test_sliding_windows(calls):
    """Layers whose softmax has a window of its own."""
    q, k, v = (torch.randn(1, 40, heads, 16, device=DEVICE).half() for heads in (4, 2, 2))
    starts = torch.zeros(1, 40, dtype=torch.bool, device=DEVICE)
    starts[0, 9] = True
    shape = surgery.converted(
        convert(random_model("meta", torch.float16, "tiny", **SIZES), "lolcats")
    )[0].mixer.shape  # fmt: skip
    from dataclasses import replace
    from types import SimpleNamespace

    shape = replace(shape, heads=4, kv_heads=2, key_dim=16, value_dim=16, scaling=0.25, sliding_window=7)
    config = SimpleNamespace(_attn_implementation="sdpa")
    with dispatch.kernels("triton"):
        found = teaching.by_documents(config, shape, q, k, v, starts, None)
        assert teaching.by_documents(config, replace(shape, softcap=30.0), q, k, v, starts, None) is None
        assert teaching.by_documents(config, shape, q, k, v, starts, torch.zeros(4)) is None
    assert found is not None and calls == [7]
    place = torch.arange(40, device=DEVICE)
    mask = (place[:, None] - place < 7) & (place[:, None] >= place) & ~((place[:, None] >= 9) & (place < 9))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, k, v)), attn_mask=mask, scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-3)
