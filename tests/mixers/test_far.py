"""Pinned tokens far away: rotations written out in float64, kernels, and whole models through files."""

from __future__ import annotations

import elsewhere
import pytest
import torch
from compositions import Draw, make
from safetensors.torch import load_file, save_file
from several import start
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from linearize import export, surgery
from linearize.kernels import dispatch
from linearize.mixers import LayerShape, build
from linearize.mixers.window.far import Far
from linearize.surgery.schema import plan_problems

TURNS = (1.0, 0.2, 0.01)
SHAPE = LayerShape(4, 2, 8, 8, 8**-0.5, model_dim=10, rotary="half", turns=TURNS)
WINDOW = {"name": "sliding", "size": 5, "first": 3, "within": 12}


def turned(x: Tensor, place: int) -> Tensor:
    """One head [8] rotated to a place, the last two dims left alone."""
    made = x.clone()
    for pair, turn in enumerate(TURNS):
        a, b = x[pair], x[pair + 3]
        angle = torch.tensor(place * turn, dtype=torch.float64)
        made[pair] = a * angle.cos() - b * angle.sin()
        made[pair + 3] = b * angle.cos() + a * angle.sin()
    return made


def test_scores_are_those_of_a_query_that_stands_nearer():
    tokens, most = 40, 12
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    expected = torch.zeros(tokens, 4, 8, dtype=torch.float64)
    for n in range(tokens):
        for head in range(4):
            scores, values = [], []
            for i in range(n + 1):
                if i > n - 5 or i < 3:
                    place = min(n, most) if i < 3 else n
                    key = turned(k[i, head // 2], i)
                    scores.append(turned(q[n, head], place) @ key * SHAPE.scaling)
                    values.append(v[i, head // 2])
            expected[n, head] = torch.stack(scores).softmax(0) @ torch.stack(values)
    rotated_q, rotated_k = (
        torch.stack([torch.stack([turned(head, n) for head in row]) for n, row in enumerate(x)])
        for x in (q, k)
    )
    made = build({"window": WINDOW}, SHAPE)
    found = made.chunked(rotated_q[None], rotated_k[None], v[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("window", "shape", "most"),
    [
        ({}, {}, 12),
        ({"within": 1}, {}, 8),  # no token of a query's own run seems nearer than it is
        ({"within": 2000}, {"sliding_window": 40}, 40),
        ({"within": 6}, {"sliding_window": 7}, 8),
    ],
)
def test_how_far_pinned_tokens_may_seem(window, shape, most):
    made = build({"window": {**WINDOW, **window}}, LayerShape(**{**vars(SHAPE), **shape}))
    assert made.window.far.most == most


@pytest.mark.parametrize(
    ("section", "shape"),
    [
        ({"window": {**WINDOW, "first": 0}}, {}),
        ({"window": WINDOW}, {"turns": None}),
        ({"window": WINDOW, "position": {"name": "rope", "window": False}}, {}),
        ({"window": {"name": "full"}}, {}),
    ],
)
def test_where_nothing_is_turned_back(section, shape):
    made = build(section, LayerShape(**{**vars(SHAPE), **shape}))
    assert made.window.far is None
    assert "window_since" not in made.initial_state(1, torch.float32, torch.device("cpu"))


def test_angles_stay_exact_after_a_million_tokens():
    count = torch.tensor([[2_000_000]])
    far = Far((1.0,), 1000)
    q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    angle = torch.tensor(1_999_000.0, dtype=torch.float64)
    expected = torch.stack([angle.cos(), -angle.sin()]).float()
    torch.testing.assert_close(far.turned_back(q, count)[0, 0, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "combine", ["shared_normalizer", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sigmoid", None))]
)
def test_kernels_equal_the_definition(combine):
    """Outputs and gradients of a text with documents, then the one-token kernel; in Triton."""
    section = {"window": {**WINDOW, "size": 16, "within": 30, "sinks": "learned", "overlap": True}}
    if combine:
        section |= {"feature_map": {"name": "hedgehog", "dim": 8}, "combine": {"name": combine}}
        section["normalizer"] = {"name": "running_sum" if combine == "shared_normalizer" else "none"}
    shape = LayerShape(**{**vars(SHAPE), "key_dim": 16, "value_dim": 16})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    narrow, wide = (
        make(section, shape, torch.float32).to(device),
        make(section, shape, torch.float64).to(device),
    )
    x = Draw.of(shape, 90, torch.float32).apply(lambda y: y.to(device).requires_grad_())
    y = x.apply(lambda z: z.detach().double().requires_grad_())
    starts = torch.zeros(2, 90, dtype=torch.bool, device=device)
    starts[1, 47] = True
    expected = y.run(wide.parallel, starts=starts)
    with dispatch.kernels("triton"):
        found = x.run(narrow.chunked, starts=starts)
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=2e-4)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device)
    wanted = torch.autograd.grad((expected * weight.double()).sum(), [y.q, y.k, y.v])
    got = torch.autograd.grad((found * weight).sum(), [x.q, x.k, x.v])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-3, rtol=2e-3)

    with torch.no_grad(), dispatch.kernels("triton"):
        whole = y.run(wide.parallel)
        state = narrow.initial_state(2, torch.float32, device)
        parts = [x[:40].run(narrow.chunked, state=state)]
        parts += [x[t : t + 1].run(narrow.step, state=state) for t in range(40, 50)]
        parts.append(x[50:].run(narrow.chunked, state=state))
    torch.testing.assert_close(torch.cat(parts, 1).double(), whole, atol=2e-4, rtol=2e-4)


def model_of(family: str, **options):
    config = AutoConfig.for_model(
        family, vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


KINDS = ["sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options", "tables"),
    [
        ("llama", {}, 1),
        ("llama", {"rope_parameters": LLAMA3}, 1),
        ("stablelm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 1),
        ("gemma3_text", {"head_dim": 16, "sliding_window": 8, "layer_types": KINDS}, 2),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 0),
        ("cohere", {}, 0),
    ],
    ids=["llama", "llama3", "partial", "by_layer", "dynamic", "interleaved"],
)  # fmt: skip
def test_turns_are_read_off_the_model(family, options, tables):
    model = model_of(family, **options)
    surgery.convert(model, {"window": {"name": "sliding", "size": 4, "first": 2, "within": 6}})
    plan = model.config.linearize
    assert len(plan.get("turns", [])) == tables
    for table in plan.get("turns", []):
        assert table[0] == pytest.approx(1.0) and table == sorted(table, reverse=True)
    assert [("turns" in layer) for layer in plan["layers"].values()] == [tables > 0] * 2


@pytest.mark.parametrize(
    ("family", "options", "rotary"),
    [
        ("glm", {"head_dim": 8}, ["pairs", "pairs"]),
        ("deepseek_v3", {}, ["half-last", "half-last"]),
        ("gpt_oss", {"head_dim": 16}, ["half-once", "half-once"]),
        ("smollm3", {"no_rope_layers": [1, 0]}, ["half", "none"]),
        ("llama", {}, ["half", "half"]),
    ],
)
def test_a_padding_token_of_zeros_hides_no_kind_of_rotation(family, options, rotary):
    """Token 0 is padding and its embedding zero: nothing may be guessed of queries that show nothing."""
    layers = surgery.attention_layers(model_of(family, **options))
    assert [layer.shape.rotary for layer in layers] == rotary
    assert [layer.shape.turns is not None for layer in layers] == [
        kind in ("half", "half-once") for kind in rotary
    ]


def test_of_queries_that_are_all_zero_no_turns_are_guessed():
    model = model_of("llama")
    torch.nn.init.zeros_(model.model.layers[1].self_attn.q_proj.weight)
    first, second = surgery.attention_layers(model)
    assert first.shape.turns is not None
    assert (second.shape.rotary, second.shape.turns) == ("half", None)


def test_turns_are_not_those_of_a_table_that_was_rounded():
    exact = model_of("llama")
    rounded = model_of("llama").bfloat16()
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    expected, found = (surgery.attention_layers(model)[0].shape.turns for model in (exact, rounded))
    assert found == expected


def test_the_table_is_there_under_the_device_that_tensors_have():
    """One that is made at the first step would be made while that is captured."""
    made = build({"window": WINDOW}, SHAPE)
    made.initial_state(1, torch.float32, torch.device("cpu:0"))
    assert set(made.window.far._tables) == {torch.zeros(1).device}


@pytest.mark.parametrize("rotary", ["none", "other", "pairs", "half-last"])
def test_a_plan_with_turns_of_what_does_not_turn_is_refused(rotary):
    model = model_of("llama")
    surgery.convert(model, {"window": {"name": "sliding", "size": 4, "first": 2, "within": 6}})
    plan = model.config.linearize
    assert plan_problems(plan) == []
    plan["layers"]["model.layers.0.self_attn"]["rotary"] = rotary
    assert plan_problems(plan) == [
        f"layers.model.layers.0.self_attn.turns: only an embedding of halves has them (rotary: half "
        f"or half-once), and rotary is "
        f"'{rotary}'"
    ]


def test_through_files_in_another_process(tmp_path):
    """A text far longer than the pinned tokens may seem: fed whole, in pieces and token by token."""
    model = model_of("llama")
    surgery.convert(model, {"window": {"name": "sliding", "size": 4, "first": 2, "within": 6}})
    ids = torch.randint(3, 96, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    export.save(model, tmp_path / "converted")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    ended = start(1, elsewhere.read_in_pieces, tmp_path, folder=tmp_path)
    assert ended.codes == [0], ended.said
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
