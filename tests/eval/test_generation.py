"""Generation: batches, streaming, chat; and the bytes of a cache."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from linearize import surgery
from linearize.decode.ways import cache_bytes
from linearize.errors import LinearizeError
from linearize.eval.generation import generate


def test_a_batch_gives_what_each_prompt_gives_alone(model, tokenizer):
    prompts = ["the cat", "then it was red and the dog ran", "sat on"]
    alone = [generate(model, tokenizer, prompt, max_new_tokens=8)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, max_new_tokens=8) == alone
    assert len(set(alone)) == 3


def test_streaming_calls_back_with_the_same_text(model, tokenizer):
    pieces: list[str] = []
    text = generate(model, tokenizer, "the cat sat", max_new_tokens=8, on_text=pieces.append)[0]
    assert "".join(pieces).strip() == text.strip() and len(pieces) > 1


def test_beams_and_sampling(model, tokenizer):
    assert generate(model, tokenizer, ["a cat", "the"], max_new_tokens=4, num_beams=3)
    torch.manual_seed(0)
    assert generate(model, tokenizer, "a cat", max_new_tokens=4, do_sample=True, temperature=0.9)


def test_chat_template(model, tokenizer):
    with pytest.raises(LinearizeError, match="no chat template"):
        generate(model, tokenizer, "the cat", chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}Answer :"
    chat = generate(model, tokenizer, "the cat", chat=True, system="a dog", max_new_tokens=5)
    assert chat == generate(model, tokenizer, "a dog . the cat . Answer :", max_new_tokens=5)


def seen_by(model, *arguments, **options) -> torch.Tensor:
    """The prompt's ids that reach the model."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        forward = model.forward
        patch.setattr(model, "forward", lambda *a, **k: seen.append(k["input_ids"]) or forward(*a, **k))
        generate(model, *arguments, max_new_tokens=1, graph=False, **options)
    return seen[0][0]


def test_a_message_cannot_spell_control_tokens_but_a_raw_prompt_can(model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <eos> {% endfor %}Answer :"
    end = tokenizer.eos_token_id
    assert (seen_by(model, tokenizer, "the <eos> cat <eos>") == end).sum() == 2
    assert (seen_by(model, tokenizer, "the <eos> cat <eos>", chat=True, system="<eos>") == end).sum() == 2


def test_a_message_that_the_template_refuses(model, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(LinearizeError, match="chat template refuses these messages: no system"):
        generate(model, tokenizer, "the cat", chat=True)


@pytest.mark.parametrize("prompts", [[], "", ["a", ""]])
def test_an_empty_prompt_is_refused(model, tokenizer, prompts):
    with pytest.raises(LinearizeError, match="empty prompt"):
        generate(model, tokenizer, prompts)


def test_streaming_a_batch_is_refused(model, tokenizer):
    with pytest.raises(LinearizeError, match="streaming shows one sequence"):
        generate(model, tokenizer, ["a", "the"], on_text=print)
    with pytest.raises(LinearizeError, match="streaming shows one sequence"):
        generate(model, tokenizer, "a", on_text=print, num_beams=2)


def test_cache_bytes_of_an_ordinary_cache(model):
    for length in (5, 17):
        cache = model(input_ids=torch.ones(2, length, dtype=torch.int64), use_cache=True).past_key_values
        assert isinstance(cache, DynamicCache)
        # 2 layers, keys and values, batch 2, 2 heads of 8 float32
        assert cache_bytes(cache) == 2 * 2 * 2 * 2 * 8 * 4 * length


def test_cache_bytes_finds_states_wherever_they_are():
    @dataclass(slots=True)
    class State:
        matrix: torch.Tensor
        ring: dict

    class Layer:
        def __init__(self) -> None:
            self.state = State(torch.zeros(10), {"k": [torch.zeros(4, dtype=torch.float16)], "none": None})
            self.again = self.state.matrix[:3]
            self.owner = torch.nn.Linear(100, 100)
            self.self = self

    assert cache_bytes([Layer()]) == 40 + 8
    assert cache_bytes(None) == 0


def test_cache_bytes_counts_what_a_view_keeps_alive():
    assert cache_bytes({"window": torch.zeros(1000)[-4:]}) == 4000


def test_the_cache_of_a_converted_model_does_not_grow(model):
    """A recurrent state and a window of 16 after 64 and after 4,096 tokens, while the softmax model's cache grows."""
    mixer = {
        "feature_map": {"name": "hedgehog", "dim": 8},
        "update": {"name": "additive"},
        "window": {"name": "sliding", "size": 16},
        "combine": {"name": "shared_normalizer"},
    }
    prompts = {length: torch.arange(length)[None] % 20 for length in (64, 4096)}

    def measure(length: int) -> int:
        out = model.generate(
            prompts[length], max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        assert out.past_key_values.get_seq_length() == length + 3
        return cache_bytes(out.past_key_values)

    growing = {length: measure(length) for length in prompts}
    surgery.convert(model, mixer, "all")
    constant = {length: measure(length) for length in prompts}
    assert growing[4096] > 50 * growing[64]
    assert constant[64] == constant[4096] < growing[64] * 2


MIXER = {"feature_map": {"name": "hedgehog", "dim": 8}, "window": {"name": "sliding", "size": 4}}


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "temperature": 0.9, "top_p": 0.9}], ids=["greedy", "drawn"]
)
def test_the_captured_step_gives_the_text_of_transformers(model, tokenizer, settings, monkeypatch):
    """Here its steps run one by one on the CPU; the text comes in pieces all the same."""
    from linearize.decode import choice

    monkeypatch.setattr(choice, "DEVICE", next(model.parameters()).device.type)
    surgery.convert(model, MIXER, "all")
    prompts = ["the cat", "then it was red and the dog ran"]
    texts = []
    for graph in (True, None, False):
        torch.manual_seed(0)
        texts.append(generate(model, tokenizer, prompts, max_new_tokens=20, graph=graph, **settings))
    assert texts[0] == texts[1] == texts[2]
    pieces: list[str] = []
    torch.manual_seed(0)
    text = generate(
        model, tokenizer, prompts[1], max_new_tokens=20, on_text=pieces.append, graph=True, **settings
    )[0]
    torch.manual_seed(0)
    assert text == generate(model, tokenizer, prompts[1], max_new_tokens=20, graph=False, **settings)[0]
    assert "".join(pieces).strip() == text.strip() and len(pieces) > 1
    assert len(vars(model)["_linearize_decoders"]) == 2, "one for each batch"
    with pytest.raises(LinearizeError, match="graph=True: beam search"):
        generate(model, tokenizer, prompts, num_beams=2, graph=True)


HOSTILE = {
    "repetition_penalty": 0.0,
    "forced_eos_token_id": 10**9,
    "bad_words_ids": [[10**9]],
    "sequence_bias": [[[1], "x"]],
    "dola_layers": "high",
    "stop_strings": 3,
    "exponential_decay_length_penalty": [1, "x"],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_generation_config_that_cannot_be_followed_is_no_traceback(model, tokenizer, name):
    setattr(model.generation_config, name, HOSTILE[name])
    with pytest.raises(LinearizeError, match=r"cannot be generated: .*generation_config\.json") as caught:
        generate(model, tokenizer, "the cat", max_new_tokens=4)
    assert "trust_remote_code" not in str(caught.value)


def test_a_generation_config_that_asks_for_more(model, tokenizer):
    whole = generate(model, tokenizer, "the cat", max_new_tokens=8)[0]
    model.generation_config.return_dict_in_generate = True
    assert generate(model, tokenizer, "the cat", max_new_tokens=8)[0] == whole
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", lambda **options: seen.append(options) or options["input_ids"])
        generate(model, tokenizer, "the cat", stop_strings=["dog"])
    assert seen[0]["tokenizer"] is tokenizer  # without which transformers refuses stop strings


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_numbers_that_overflow_are_said_and_not_decoded(model, tokenizer, options):
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(1e38)
        model.model.layers[0].self_attn.o_proj.weight.fill_(1e38)
    with pytest.raises(LinearizeError, match="the model gives NaN or infinity and no logits after 2 tokens"):
        generate(model, tokenizer, "the cat", max_new_tokens=4, **options)


def test_a_prompt_that_is_no_text(model, tokenizer):
    with pytest.raises(LinearizeError, match="no UTF-8 text"):
        generate(model, tokenizer, "the \udcff")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 60_000}, "num_beams must be a whole number from 1 to 100, got 60000"),
        ({"num_beams": 2.5}, "num_beams must be a whole number"),
        ({"num_return_sequences": 10**6, "num_beams": 4}, "num_return_sequences must be"),
        ({"max_new_tokens": 2**31}, "max_new_tokens must be a whole number from 1 to 1,000,000"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        (
            {"do_sample": True, "temperature": 1e-300},
            "temperature must be a number from 1e-05 to 10,000, got 1e-300",
        ),
        ({"do_sample": True, "temperature": 1e300}, "without sampling .* the likeliest token is taken"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be a number from 0 to 1"),
    ],
)
def test_numbers_beyond_their_ends_are_refused_at_once(model, tokenizer, options, message, monkeypatch):
    monkeypatch.setattr(model, "forward", None)  # nothing is computed
    with pytest.raises(LinearizeError, match=message):
        generate(model, tokenizer, "the cat", **options)
    if "max_new_tokens" not in options:  # a generation config cannot ask for what the caller cannot
        for name, value in options.items():
            setattr(model.generation_config, name, value)
        sample = {"do_sample": True} if "do_sample" in options else {}
        with pytest.raises(LinearizeError, match=rf"generation_config\.json: {message.split()[0]}|{message}"):
            generate(model, tokenizer, "the cat", **sample)


def test_numbers_at_their_ends_work(model, tokenizer):
    greedy = generate(model, tokenizer, "the cat", max_new_tokens=4)
    assert generate(model, tokenizer, "the cat", max_new_tokens=4, do_sample=True, temperature=1e-5) == greedy
    generate(model, tokenizer, "the cat", max_new_tokens=4, do_sample=True, temperature=1e4, top_p=1e-9)
    generate(model, tokenizer, "the cat", max_new_tokens=2, num_beams=20)


def test_a_table_of_learned_positions_has_an_end(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=16)
    table = GPT2LMHeadModel(config)
    assert generate(table, tokenizer, "the cat sat", max_new_tokens=13)
    with pytest.raises(
        LinearizeError, match=r"14 after a prompt of 3 tokens .* 16 learned positions; at most 13"
    ):
        generate(table, tokenizer, ["the cat sat", "on"], max_new_tokens=14)
    with pytest.raises(LinearizeError, match="shorten the prompt"):
        generate(table, tokenizer, "the " * 16, max_new_tokens=1)
