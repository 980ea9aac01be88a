"""Token shift in front of a layer's own projections: RWKV-7 as published, in every way that a model runs."""

from __future__ import annotations

import math
from collections import Counter

import odd
import pytest
import tiny
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from transformers import StaticCache
from transformers.cache_utils import Cache

import linearize
from linearize import export, objectives, surgery
from linearize.decode import Decoder, Draft, Sampling
from linearize.decode.draft import speculate_ids
from linearize.errors import UnsupportedModelError
from linearize.mixers import shift
from linearize.surgery import handed_on

PUBLISHED = {
    "feature_map": {"name": "identity", "scaled": False},
    "gate": {"name": "rwkv7", "rank": 3, "per": "query_head", "shift": True},
    "update": {
        "name": "rwkv7",
        "rank": 3,
        "balanced": False,
        "shift": True,
        "shift_projections": True,
        "first_values": True,
        "first_rank": 3,
    },
    "normalizer": {"name": "none"},
    "output": {"name": "gate", "rank": 3, "shift": True},
    "position": {"name": "rope", "recurrent": False},
}
"""Every mix that published layers have: r, w, k, v, a, g."""


def without(part, option):
    return {**PUBLISHED, part: {**PUBLISHED[part], option: False}}


def made(family="llama", layers="all", mixer=PUBLISHED, mix=True, **changes):
    model = surgery.convert(tiny.model(family, **changes), mixer, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".mix"):
                parameter.copy_(torch.rand_like(parameter) if mix else 0)
            elif ".mixer." in name:
                parameter.mul_(0.3)
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_starts_as_the_model_without_it(family):
    plain = surgery.convert(tiny.model(family), without("update", "shift_projections"))
    own = surgery.convert(tiny.model(family), PUBLISHED)
    own.load_state_dict(plain.state_dict(), strict=False)
    for model in (plain, own):
        tiny.randomize(x.mixer.output for x in surgery.converted(model))
    with torch.no_grad():
        for one, two in zip(*map(surgery.converted, (plain, own)), strict=True):
            two.mixer.output.load_state_dict(one.mixer.output.state_dict())
        ids = tiny.tokens()
        assert torch.equal(own(ids).logits, plain(ids).logits)
        assert all((x.mixer.update.inputs.mix == 0).all() for x in surgery.converted(own))


def paper(layer, hidden, first):
    """Eq. 3 to 18 of arXiv 2503.14456 for one row [T, D] in float64; values handed on and the layer's output."""
    mixer, shape = layer.mixer, layer.mixer.shape
    update, gate, output = mixer.update, mixer.recurrent.gate, mixer.output
    before = torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]])

    def lerp(mix):
        return hidden + (before - hidden) * mix

    def low(x, part, bend):
        return part.base + torch.einsum("tr,rmf->tmf", bend(x @ part.down), part.up)

    def same(x):
        return x

    r, k, v = (
        (lerp(mix) @ projection.weight.T).unflatten(-1, (-1, shape.key_dim))
        for mix, projection in zip(update.inputs.mix, (layer.q_proj, layer.k_proj, layer.v_proj), strict=True)
    )
    handed = v
    if first is not None:
        v = v + (first - v) * torch.sigmoid(low(lerp(update.inputs.mix[2]), update.first.share, same))
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(low(lerp(gate.mix), gate.logits, torch.tanh)))
    a = torch.sigmoid(low(lerp(update.mix), update.rate, same))
    g = 1 + torch.einsum("tr,rhv->thv", torch.sigmoid(lerp(output.mix) @ output.down), output.up)
    answer = torch.zeros(len(hidden), shape.heads, shape.value_dim, dtype=torch.float64)
    for head in range(shape.heads):
        n, state = head // shape.group, torch.zeros(shape.key_dim, shape.value_dim, dtype=torch.float64)
        for t in range(len(hidden)):
            kappa = F.normalize(k[t, n] * update.removal[head], dim=0)
            written = k[t, n] * (1 + (a[t, head] - 1) * update.share[head])
            state = torch.diag(w[t, head]) @ state - torch.outer(kappa * a[t, head], kappa @ state)
            state = state + torch.outer(written, v[t, n])
            answer[t, head] = update.scale[head] * (r[t, head] @ state)
    return handed, (answer * g).flatten(1) @ layer.o_proj.weight.T


@torch.no_grad()
def test_it_is_the_papers_layer():
    model, seen = made().double(), {}
    for layer in surgery.converted(model):
        layer.register_forward_hook(
            lambda module, args, given, out: seen.update(
                {module.layer_idx: (given["hidden_states"][0], out[0][0])}
            ),
            with_kwargs=True,
        )
    model(tiny.tokens(1, 24), use_cache=False)
    first = None
    for layer in surgery.converted(model):
        hidden, out = seen[layer.layer_idx]
        handed, expected = paper(layer, hidden, first)
        first = handed if first is None else first
        torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("part", ["update", "gate", "output"])
def test_each_mix_does_something(part):
    model = made(mix=False)
    with torch.no_grad():
        before = model(tiny.tokens()).logits
        for layer in surgery.converted(model):
            at = {"update": layer.mixer.update.inputs, "gate": layer.mixer.recurrent.gate}
            torch.nn.init.constant_(at.get(part, layer.mixer.output).mix, 0.5)
        assert (model(tiny.tokens()).logits - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "qwen3", "gemma3"])
def test_a_cache_in_pieces_gives_the_whole(family):
    model = made(family)
    ids = tiny.tokens(length=24)
    whole = model(ids, use_cache=False).logits
    for cache in (None, StaticCache(config=model.config, max_cache_len=32)):
        parts, past = [], cache
        for begin, end in ((0, 10), (10, 11), (11, 12), (12, 20), (20, 24)):
            out = model(ids[:, begin:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_and_packed_documents():
    model = made()
    ids, mask, places = tiny.left_padded(length=20)
    out = model(ids, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(out[0, 7:], model(ids[:1, 7:]).logits[0], rtol=1e-4, atol=1e-4)
    packed = torch.cat([torch.arange(9), torch.arange(11)])[None]
    out = model(ids[1:], position_ids=packed, use_cache=False).logits
    alone = [model(x).logits for x in ids[1:].split([9, 11], 1)]
    torch.testing.assert_close(out, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    # padding behind tokens: the second turn of a batch
    gaps = torch.ones(2, 20, dtype=torch.int64)
    gaps[0, 4:8] = 0
    rows = torch.where(gaps.bool(), tiny.tokens(2, 20), 0)
    out = model(rows, attention_mask=gaps, position_ids=(gaps.cumsum(1) - 1).clamp_min(0)).logits
    kept = rows[:1, gaps[0].bool()]
    torch.testing.assert_close(out[0, gaps[0].bool()], model(kept).logits[0], rtol=1e-4, atol=1e-4)


def test_decoding_in_every_way():
    """Static states, drafts whose tokens are taken back, and a draft of its own."""
    model = made()
    ids, mask, _ = tiny.left_padded(3, length=20)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    decoder = Decoder(model, 3, Sampling(), length=40)
    assert torch.equal(decoder.generate(ids, mask, 12).cpu(), plain[:, 20:])
    again = model.generate(ids[1:2], max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(again, plain[1:2])
    options = {"max_new_tokens": 12, "do_sample": False}
    helped = speculate_ids(model, ids, mask, options, Draft(made(), tokens=3))
    assert torch.equal(helped.cpu(), plain[:, 20:])


@torch.no_grad()
def test_a_state_goes_on():
    model, ids = made(), tiny.tokens(1, 24)
    whole = model(ids, use_cache=True).past_key_values
    first = model(ids[:, :15], use_cache=True).past_key_values
    model(ids[:, 15:], past_key_values=first, use_cache=True)
    for one, two in zip(whole.layers, first.layers, strict=True):
        assert shift.PROJECTIONS in one.state and shift.OUTPUT in one.state
        for name in one.state:
            torch.testing.assert_close(one.state[name], two.state[name], rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    """`check` loads the remote code in a process of its own."""
    model = made(layers=[1, 3])
    export.save(model, tmp_path / "made", check=True)
    loaded, ids = linearize.load(tmp_path / "made"), tiny.tokens()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_it_trains_with_the_model_and_in_transfer():
    model, ids = made(), tiny.tokens()
    model(ids, use_cache=False, labels=ids).loss.backward()
    found = gradients(model)
    assert all(
        found[f"model.layers.{n}.self_attn.mixer.recurrent.update.inputs.mix"].abs().max() for n in range(4)
    )
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mixer." in name)
    layers, student = surgery.converted(model), {}

    def observe(call):
        with torch.enable_grad():
            objectives.layer_backward(call, {"hidden_alignment": 1.0, "attention_weights": 1.0})
        student[call.layer_idx] = call.student().detach()

    hooked = {}
    layers[0].register_forward_hook(lambda module, args, given, out: hooked.update(given), with_kwargs=True)
    with torch.no_grad(), surgery.observe(model, observe):
        model(ids, use_cache=False)
    found = gradients(model)
    assert all(
        found[f"model.layers.{n}.self_attn.mixer.recurrent.update.inputs.mix"].abs().max() for n in range(4)
    )
    # what transfer sees is what the layer computes
    with torch.no_grad():
        given = {**hooked, "linearize_first_values": handed_on.FirstLayer()}
        out = layers[0](**given)[0]
        flat = student[0].flatten(2) @ layers[0].o_proj.weight.T
    torch.testing.assert_close(out, flat, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_untouched():
    model, ids = made(), tiny.tokens()
    teacher = tiny.model()
    with torch.no_grad(), surgery.mode(model, "teacher"):
        assert torch.equal(model(ids, use_cache=False).logits, teacher(ids, use_cache=False).logits)


def test_attention_that_keeps_a_convolutions_state_is_refused():
    """It would write that four times a token; one that stands beside a recurrence (Falcon-H1) writes keys alone."""
    mixer = {**PUBLISHED, "position": {"name": "rope"}}
    for model in (odd.config("zaya"), odd.model("zaya")):
        with pytest.raises(
            UnsupportedModelError, match=r"Zaya.*beside keys and values.*shift_projections=false"
        ):
            surgery.plan(model, mixer)
        surgery.plan(model, {**mixer, "update": {**mixer["update"], "shift_projections": False}})
    with pytest.raises(UnsupportedModelError, match="cannot run on shifted inputs"):
        surgery.convert(odd.model("zaya"), mixer)
    for model in (odd.config("falcon_h1"), odd.model("falcon_h1")):
        surgery.plan(model, mixer)
    assert not [name for name, x in vars(Cache).items() if "watched" in getattr(x, "__qualname__", "")]


def test_a_compiled_token_equals_one_that_is_not():
    """And makes each projection's product once, though the forward runs four times."""
    ids, mask, _ = tiny.left_padded(length=9)
    model = made(num_hidden_layers=1, mixer=without("update", "first_values"))
    expected = Decoder(model, 2, length=32).generate(ids, mask, 4)
    matrices: Counter[tuple[int, ...]] = Counter()

    def look(graph, inputs):
        products = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
        matrices.update(tuple(node.args[1].meta["val"].shape) for node in products)
        return graph

    torch._dynamo.reset()
    options = {"backend": aot_autograd(fw_compiler=look), "fullgraph": True}
    decoder = Decoder(model, 2, length=32, compile=options)
    assert torch.equal(decoder.generate(ids, mask, 4), expected)
    assert decoder.obstacle is None
    assert decoder.compiled.joining.joined == [2], "those into the MLP; q, k and v have an input each"
    width, keys = 32, 16
    assert matrices[width, width] == 2, "q, and behind the attention"
    assert matrices[width, keys] == 2, "k and v"
    assert not matrices[width, width + 2 * keys]
