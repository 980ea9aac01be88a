"""The decoding engine, uncaptured on the CPU and captured on CUDA: it gives the tokens that `model.generate` gives."""

from __future__ import annotations

import pytest
import tiny
import torch
from decoding import HEDGEHOG, MIXERS, crossed, devices, hybrid

from linearize import surgery
from linearize.decode import Decoder, Sampling, engine, newest
from linearize.decode.cache import tensors
from linearize.decode.engine import BLOCK
from linearize.errors import LinearizeError
from linearize.kernels import dispatch

NEW = 14


def prompts(device: str, length: int = 20):
    ids, mask, _ = tiny.left_padded(length=length)
    return ids.to(device), mask.to(device)


def expected(model, ids, mask, tokens: int = NEW, **options):
    options = {"do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)[:, ids.shape[1] :]


@devices
@crossed(["llama", "mistral", "gemma2", "gemma3", "gpt2", "qwen3_moe"], {"all": "all", "[1, 2]": [1, 2]})
def test_gives_the_tokens_of_generate(family, layers, device):
    """Left padding, kept softmax layers, sliding windows, soft caps; and a second text on the same state."""
    model = hybrid(family, layers, device=device)
    decoder = Decoder(model, 2, eos=[2], pad=0, length=64)
    for length in (20, 11):
        ids, mask = prompts(device, length)
        assert torch.equal(decoder.generate(ids, mask, NEW, every=5), expected(model, ids, mask))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "qwen3_moe"])
def test_softmax_layers_that_are_told_how_many_keys_are_seen_need_no_mask(family, monkeypatch):
    """As on a GPU, where a kernel reads those alone: left padding, windows, a second text."""
    monkeypatch.setattr(engine, "fits", lambda model, config: True)
    monkeypatch.setattr(engine, "token_masks", None)
    model = hybrid(family, [1, 2])
    before = model.config.get_text_config()._attn_implementation
    decoder = Decoder(model, 2, eos=[2], pad=0, length=64)
    for length in (20, 11):
        ids, mask = prompts("cpu", length)
        assert torch.equal(decoder.generate(ids, mask, NEW, every=5), expected(model, ids, mask))
    assert model.config.get_text_config()._attn_implementation == before
    monkeypatch.undo()
    assert torch.equal(
        Decoder(model, 2, eos=[2], pad=0, length=64, newest=False).generate(ids, mask, NEW),
        expected(model, ids, mask),
    )


@devices
def test_padding_between_tokens_is_left_to_masks(device, monkeypatch):
    """Steps that have been recorded are recorded anew."""
    monkeypatch.setattr(engine, "fits", lambda model, config: True)
    model, (ids, mask) = hybrid("llama", [1, 2], device=device), prompts(device)
    decoder = Decoder(model, 2, eos=[2], pad=0, length=64)
    assert torch.equal(decoder.generate(ids, mask, NEW), expected(model, ids, mask))
    mask[1, 4:7] = 0
    made = decoder.generate(ids, mask, NEW)
    assert torch.equal(made, Decoder(model, 2, eos=[2], pad=0, length=64).generate(ids, mask, NEW))
    monkeypatch.setattr(engine, "fits", lambda model, config: False)
    assert torch.equal(made, Decoder(model, 2, eos=[2], pad=0, length=64).generate(ids, mask, NEW))


@pytest.mark.parametrize("error", [newest.UnknownScores, dispatch.KernelError, RuntimeError])
def test_scores_that_are_not_known_are_left_to_masks(error, monkeypatch):
    monkeypatch.setattr(engine, "fits", lambda model, config: True)

    def unknown(*given, **named):
        raise error("sinks")

    monkeypatch.setattr(newest, "newest_steps", unknown)
    model, (ids, mask) = hybrid("llama", [1, 2]), prompts("cpu")
    made = Decoder(model, 2, eos=[2], pad=0, length=64).generate(ids, mask, NEW)
    assert torch.equal(made, expected(model, ids, mask))


@devices
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_every_kind_of_state(mixer, device):
    model = hybrid("llama", "all", mixer, device)
    decoder = Decoder(model, 2, eos=[2], pad=0, length=64)
    ids, mask = prompts(device)
    made = decoder.generate(ids, mask, NEW)
    assert torch.equal(made, expected(model, ids, mask))
    assert torch.equal(decoder.generate(ids, mask, NEW), made), "the state of the text before is gone"


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("mixer", ["softmax", "nope"])
def test_rings_of_many_keys_are_read_in_parts(mixer, monkeypatch):
    """Softmax over everything that a mixer runs, with scores that grow with the text too; padded prompts."""
    from linearize.kernels import sharing
    from linearize.kernels.window import triton_step

    model, (ids, mask) = hybrid("llama", [0, 2], MIXERS[mixer]), prompts("cpu")
    right = Decoder(model, 2, eos=[2], pad=0, length=96).generate(ids, mask, 4)
    grids, launch = [], triton_step.launch
    monkeypatch.setattr(
        triton_step, "launch", lambda kernel, grid, **x: grids.append(grid) or launch(kernel, grid, **x)
    )
    monkeypatch.setattr(triton_step, "SHORT", 64)
    monkeypatch.setattr(sharing, "TILE", 1024)
    monkeypatch.setattr(sharing, "WAVES", 12)
    with dispatch.kernels("triton"):
        made = Decoder(model, 2, eos=[2], pad=0, length=96).generate(ids, mask, 4)
    assert torch.equal(made, right)
    assert {grid[1] for grid in grids if len(grid) == 2} == {3}


@devices
def test_one_prompt_token(device):
    model = hybrid("llama", [0, 3], device=device)
    ids = tiny.tokens(3, 1).to(device)
    decoder = Decoder(model, 3, eos=[2], pad=0, length=32)
    assert torch.equal(decoder.generate(ids, None, NEW), expected(model, ids, torch.ones_like(ids)))


@devices
def test_nothing_moves_and_nothing_grows(device):
    """States stay where they are, prompt or token: what a captured graph relies on."""
    model = hybrid("llama", [1, 2], device=device)
    decoder = Decoder(model, 2, length=256)
    decoder.prepare()
    places = {name: (x.data_ptr(), x.shape) for name, x in tensors(decoder.cache).items()}
    assert {name.split(".")[1] for name in places} > {"keys", "values", "sums", "norms", "window_k"}
    for length in (7, 150):
        decoder.generate(*prompts(device, length + 10), NEW)
        assert {name: (x.data_ptr(), x.shape) for name, x in tensors(decoder.cache).items()} == places
    assert decoder.steps == 2 * (NEW - 1)


@devices
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "top_k": 12}, {"top_k": 0, "top_p": 0.8}],
    ids=["plain", "top_k", "top_p"],
)
def test_sampling_draws_what_transformers_draws(settings, device):
    """The same seed, the same tokens; and again from a decoder that has been used before."""
    model = hybrid(device=device)
    ids, mask = prompts(device)
    options = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, **settings}
    # nothing ends a text: where it ends early, a decoder that looks every four tokens has drawn for more of them
    decoder = Decoder(model, 2, Sampling(True, **options), pad=0)
    for _ in range(2):
        torch.manual_seed(3)
        made = decoder.generate(ids, mask, NEW, every=4)
        after = torch.rand(1, device=device)
        torch.manual_seed(3)
        ends = {"eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(made, expected(model, ids, mask, do_sample=True, **ends, **options))
        assert made.shape[1] == NEW and torch.equal(after, torch.rand(1, device=device))
    torch.manual_seed(4)
    assert not torch.equal(decoder.generate(ids, mask, NEW), made)


@devices
@pytest.mark.parametrize("every", [1, 5, 64])
def test_ends_where_the_last_row_ends(every, device):
    """Tokens that end a row are chosen from what it says, one early, one late; the other rows go on."""
    model = hybrid(device=device)
    ids, mask = prompts(device)
    free = expected(model, ids, mask, eos_token_id=None, pad_token_id=0)
    ends = [int(free[0, 3]), int(free[1, 8])]
    decoder = Decoder(model, 2, eos=ends, pad=5)
    blocks: list[torch.Tensor] = []
    made = decoder.generate(ids, mask, NEW, on_tokens=blocks.append, every=every)
    assert torch.equal(made, expected(model, ids, mask, eos_token_id=ends, pad_token_id=5))
    assert made.shape[1] <= 9 and torch.equal(torch.cat(blocks, 1), made.cpu())
    assert decoder.steps < made.shape[1] + every


@devices
def test_longer_than_the_buffer_of_fetched_tokens(device):
    model = hybrid(device=device, num_hidden_layers=1)
    ids, mask = prompts(device)
    made = Decoder(model, 2, eos=[], pad=0).generate(ids, mask, 2 * BLOCK + 9, every=48)
    assert torch.equal(made, expected(model, ids, mask, 2 * BLOCK + 9, eos_token_id=None, pad_token_id=0))


@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
def test_the_step_compiles_in_one_piece(layers):
    model = hybrid("llama", layers, HEDGEHOG, num_hidden_layers=2)
    ids, mask = prompts("cpu")
    options = {"backend": "aot_eager", "fullgraph": True}
    decoder = Decoder(model, 2, eos=[2], pad=0, length=64, compile=options)
    assert torch.equal(decoder.generate(ids, mask, NEW), expected(model, ids, mask))


def test_a_step_that_does_not_compile_goes_on_without(caplog):
    def refuses(graph, example):
        raise RuntimeError("no such thing here")

    model = hybrid(mixer=HEDGEHOG, num_hidden_layers=1)
    ids, mask = prompts("cpu")
    decoder = Decoder(model, 2, eos=[2], pad=0, compile={"backend": refuses})
    assert torch.equal(decoder.generate(ids, mask, NEW), expected(model, ids, mask))
    assert "no such thing here" in decoder.obstacle and "not compiled" in caplog.text


def test_a_state_that_moves_is_refused(monkeypatch):
    from linearize.mixers import State

    model = hybrid(mixer=HEDGEHOG)
    mixer = surgery.converted(model)[0].mixer
    step = mixer.step

    def moving(*args, state: State, **given):
        out = step(*args, state=state, **given)
        state["sums"] = state["sums"].clone()
        return out

    monkeypatch.setattr(mixer, "step", moving)
    with pytest.raises(LinearizeError, match=r"not written in place.*0\.sums"):
        Decoder(model, 1).prepare()


def test_more_than_fits_is_refused():
    ids = tiny.tokens(2, 20)
    with pytest.raises(LinearizeError, match="3 prompts for a decoder of 2"):
        Decoder(hybrid(), 2).generate(tiny.tokens(3, 5), None, 4)
    with pytest.raises(LinearizeError, match=r"34 tokens.*hold 32"):
        Decoder(hybrid("llama", [1]), 2, length=32).generate(ids, None, NEW)
    assert Decoder(hybrid(), 2, length=32).generate(ids, None, 0).shape == (2, 0)


def test_no_room_is_said_before_the_device_stops():
    """A step beyond what softmax layers hold would write behind their keys."""
    decoder = Decoder(hybrid(layers=[0]), 1, length=12)
    decoder.prepare()
    decoder.read(tiny.tokens(1, 8, 0), None)
    decoder.run(4)
    with pytest.raises(LinearizeError, match="13 tokens for a decoder whose softmax layers hold 12"):
        decoder.run(1)
    decoder.read(tiny.tokens(1, 8, 0), None)
    decoder.run(4)
