"""A draft changes nothing of a greedy text: families, mixers, rows that take unequal numbers, ends, budgets, states."""

from __future__ import annotations

import copy

import compositions
import pytest
import tiny
import torch
from decoding import HEDGEHOG, LOLCATS, MIXERS, crossed, devices, hybrid

from linearize import surgery
from linearize.decode import Draft, Sampling, read_ids
from linearize.decode.ahead import Ahead
from linearize.decode.draft import speculate_ids
from linearize.decode.speculator import Speculator
from linearize.errors import LinearizeError
from linearize.eval.generation import generate
from linearize.kernels import dispatch

NEW = 15
FEW = 6
"""Compositions that CI looks at, with one more; the rest are slow."""
COMPOSED = {str(n): mixer for n, mixer in enumerate(compositions.registered())}
QUICK = {
    *list(COMPOSED)[:FEW],
    next(n for n, x in COMPOSED.items() if x.get("update", {}).get("name") == "log_linear_delta"),
}
"""These and one whose state, a counter, says something else once the next token is there: it must not go before."""
TOLERANCE = 1e-9
"""Of float64 logits behind tokens read in two ways, as a share of the largest: the order of sums is another."""


def near(model, noise: float = 0.02, seed: int = 1):
    """A model that says much the same, but not always."""
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter += (noise * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return made


def expected(model, ids, mask=None, tokens: int = NEW, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)[:, ids.shape[1] :]


def prompts(device: str = "cpu", rows: int = 3, length: int = 20):
    ids, mask, _ = tiny.left_padded(rows, length=length)
    return ids.to(device), mask.to(device)


def was_mixed(made: Speculator) -> bool:
    """Whether some tokens were taken and some were not, and rows took unequal numbers of them."""
    some = 0 < int(made.accepted.sum()) < int(made.rounds.sum()) * made.ahead
    return some and (len(set(made.rounds.tolist())) > 1 or len(set(made.accepted.tolist())) > 1)


def some_taken(made: Speculator) -> None:
    """As `was_mixed`."""
    assert was_mixed(made)


@devices
@crossed(
    ["llama", "mistral", "gemma2", "gemma3", "gpt2", "qwen3_moe"],
    {"all": "all", "[1, 2]": [1, 2], "teacher": "teacher"},
)
def test_gives_the_tokens_of_generate(family, layers, device):
    """Padding, kept softmax layers, sliding windows, soft caps; a softmax model and its own conversion that drafts."""
    model = tiny.model(family).to(device) if layers == "teacher" else hybrid(family, layers, device=device)
    draft = hybrid(family, [0], device=device) if layers == "teacher" else near(model)
    made = Speculator(model, draft, 3, 3, eos=[2], pad=0, length=20 + NEW, tokens=NEW)
    for length in (20, 11):
        ids, mask = prompts(device, length=length)
        assert torch.equal(made.generate(ids, mask, NEW, every=5), expected(model, ids, mask))


RARELY = ("linear", "pinned", "softmax", "nope")
"""What has no more to take back than the others."""


mixers = pytest.mark.parametrize(
    "mixer",
    [
        pytest.param(mixer, id=name, marks=pytest.mark.slow if name in RARELY else [])
        for name, mixer in MIXERS.items()
    ],
)


@devices
@mixers
def test_every_kind_of_state(mixer, device):
    """Drafted by the same kind, and by quite another."""
    model = hybrid("llama", "all", mixer, device)
    ids, mask = prompts(device)
    wanted = expected(model, ids, mask, eos_token_id=None, pad_token_id=0)
    tried = []
    for draft in (near(model), hybrid("llama", [1], HEDGEHOG, device)):
        made = Speculator(model, draft, 3, 4, length=20 + NEW, tokens=NEW)
        for _ in range(2):
            assert torch.equal(made.generate(ids, mask, NEW), wanted), "the state of the text before is gone"
        tried.append(made)
    assert any(was_mixed(made) for made in tried)


@pytest.mark.parametrize("singly", [0, 5, 9])
@pytest.mark.parametrize(
    "name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in COMPOSED]
)
def test_states_are_those_of_the_kept_tokens(name, singly):
    """Every composition: behind tokens ahead of which each row keeps another number, it goes on as behind these.

    The kept ones are read again by the layers, or states are kept behind each token: rings' slots, and whole rings
    that are smaller than a round.
    """
    model = surgery.convert(tiny.model(num_hidden_layers=2).double(), COMPOSED[name])
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    ids, more, last = tiny.tokens(4, 13), tiny.tokens(4, 8, seed=2), tiny.tokens(4, 3, seed=3)
    keeps = (1, 3, 5, 0)
    side = Ahead(model, 4, 64, singly)
    with torch.no_grad():
        side.start(ids, None, None, 40)
        for first, cuts in ((0, (1, 1, 1, 1, 1)), (5, (2, 1))):  # tokens one by one, and two of them at first
            side.begin()
            for piece in more[:, first : first + sum(cuts)].split(cuts, 1):
                side.go(piece)
            most = torch.tensor(keeps) if not first else torch.tensor([0, 1, 2, 3])
            side.keep(torch.arange(sum(cuts)) < most[:, None])
        side.begin()
        found = side.go(last, every=True)
        for row, kept in enumerate(keeps):
            text = torch.cat([ids[row], more[row, :kept], more[row, 5 : 5 + row], last[row]])[None]
            wanted = model(text).logits[0, -3:]
            apart = (found[row] - wanted).abs().max() / wanted.abs().max()
            assert apart < TOLERANCE, (row, COMPOSED[name], apart)


@pytest.mark.parametrize(("ahead", "looks"), [(1, True), (2, False), (7, True), (7, False)])
def test_a_draft_that_is_always_right_is_always_taken(ahead, looks):
    """A state that went wrong would show as a token that is not taken: rounds are as few as they can be."""
    for layers, mixer in (("all", LOLCATS), ([1], tiny.LAWCAT), ([0, 3], HEDGEHOG)):
        model = hybrid("llama", layers, mixer)
        ids, mask = prompts(rows=2)
        made = Speculator(model, model, 2, ahead, length=20 + 33, tokens=33)
        made.looks = looks
        assert torch.equal(
            made.generate(ids, mask, 33), expected(model, ids, mask, 33, eos_token_id=None, pad_token_id=0)
        )
        rounds = -(-32 // (ahead + 1))
        assert made.rounds.tolist() == [rounds] * 2 and made.accepted.tolist() == [rounds * ahead] * 2


@mixers
def test_one_row_with_masks_and_without(mixer):
    """As a graph has it, and as it is where the host may look: then nothing that is taken back is masked."""
    model = hybrid("llama", [0, 2], mixer)
    ids = tiny.tokens(1, 12, seed=4)
    wanted = expected(model, ids, eos_token_id=None, pad_token_id=0)
    for looks in (True, False):
        made = Speculator(model, near(model), 1, 3, length=40, tokens=NEW)
        made.looks = looks
        assert torch.equal(made.generate(ids, None, NEW), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lolcats", "delta", "terraced"])
def test_in_the_kernels_that_a_gpu_runs(name):
    """In Triton's interpreter where there is no GPU: carried states, several tokens, and padding behind them."""
    delta = {"feature_map": {"name": "identity"}, "gate": {"name": "mamba2"}, "update": {"name": "delta"}}
    mixer = MIXERS.get(name) or {**delta, "normalizer": {"name": "none"}, "short_conv": {"name": "depthwise"}}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = hybrid("llama", [0], mixer, device, hidden_size=64, num_hidden_layers=1)
    ids, mask = prompts(device, rows=2, length=9)
    with dispatch.kernels("torch"):
        wanted = expected(model, ids, mask, 5, eos_token_id=None, pad_token_id=0)
    made = Speculator(model, near(model), 2, 2, length=20, tokens=5)
    made.looks = False
    with dispatch.kernels("triton"):
        assert torch.equal(made.generate(ids, mask, 5), wanted)


@pytest.mark.parametrize(
    "tokens", [1, 3, 6, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 5, 7))]
)
def test_the_budget_ends_inside_a_round(tokens):
    """Also where a draft is longer than all that is asked for."""
    model = hybrid("llama", [1, 2])
    ids, mask = prompts()
    for ahead, draft in ((2, model), (5, model), (5, near(model)), (16, model)):
        made = Speculator(model, draft, 3, ahead, length=20 + tokens, tokens=tokens)
        found = made.generate(ids, mask, tokens)
        assert torch.equal(found, expected(model, ids, mask, tokens, eos_token_id=None, pad_token_id=0))
        assert made.made.tolist() == [tokens] * 3


@devices
@pytest.mark.parametrize("every", [1, 16])
def test_ends_in_the_middle_of_what_is_taken(every, device):
    """Ends are chosen from what rows say; a draft that is always right would go on behind them."""
    model = hybrid(device=device)
    ids, mask = prompts(device)
    free = expected(model, ids, mask, eos_token_id=None, pad_token_id=0)
    ends = [int(free[0, 2]), int(free[1, 9]), int(free[2, 5])]
    for draft in (model, near(model)):
        made = Speculator(model, draft, 3, 6, eos=ends, pad=5, length=20 + NEW, tokens=NEW)
        blocks: list[torch.Tensor] = []
        found = made.generate(ids, mask, NEW, on_tokens=blocks.append, every=every)
        assert torch.equal(found, expected(model, ids, mask, eos_token_id=ends, pad_token_id=5))
        assert found.shape[1] < NEW and torch.equal(torch.cat(blocks, 1), found.cpu())


def test_prompts_of_one_token_and_of_one_beside_more():
    """The draft is told all but the last token of a prompt, which may be none."""
    model = hybrid("llama", [0, 3])
    ids, mask = prompts()
    mask[1, :-1] = 0
    for rows, given in ((ids[:, -1:], None), (ids, mask)):
        made = Speculator(model, near(model), 3, 3, length=20 + NEW, tokens=NEW)
        assert torch.equal(
            made.generate(rows, given, NEW), expected(model, rows, given, eos_token_id=None, pad_token_id=0)
        )


@pytest.mark.parametrize("layers", ["all", [1, 2], "teacher"], ids=str)
def test_goes_on_from_what_was_read(layers):
    """Rows that share a text, which the draft has read too, or has not."""
    model = tiny.model() if layers == "teacher" else hybrid("llama", layers, tiny.LAWCAT)
    draft = hybrid("llama", [1]) if layers == "teacher" else near(model)
    text, ids = tiny.tokens(1, 17), tiny.tokens(2, 6, seed=5)
    wanted = expected(model, torch.cat([text.expand(2, -1), ids], 1), eos_token_id=None, pad_token_id=0)
    state, its = read_ids(model, text), read_ids(draft, text)
    taken = []
    made = Speculator(model, draft, 2, 3, length=40, tokens=NEW)
    for prefix in (its, None, its):
        assert torch.equal(made.generate(ids, None, NEW, prefix=state, draft_prefix=prefix), wanted)
        taken.append(made.accepted.tolist())
    assert taken[0] == taken[2]
    # with what it has read, a draft takes the part that it takes of the whole text
    made.generate(torch.cat([text.expand(2, -1), ids], 1), None, NEW)
    assert made.accepted.tolist() == taken[0]
    one = made.generate(ids[:, :1], None, NEW, prefix=state, draft_prefix=its)
    whole = torch.cat([text.expand(2, -1), ids[:, :1]], 1)
    assert torch.equal(one, expected(model, whole, eos_token_id=None, pad_token_id=0))


def test_rows_behind_the_vocabulary_may_be_fewer_or_more():
    """Tables are padded to multiples of one's choice; the tokens are the same."""
    model, ids = hybrid(), tiny.tokens(2, 9)
    wanted = expected(model, ids, eos_token_id=None, pad_token_id=0)
    for size in (90, 97, 128):
        draft = hybrid(vocab_size=size)
        for sampling in (Sampling(), Sampling(True, 1e-4)):  # so cold that it is greedy
            made = Speculator(model, draft, 2, 3, sampling, length=30, tokens=NEW)
            assert torch.equal(made.generate(ids, None, NEW), wanted)


def test_a_table_of_positions_may_end_where_the_text_does():
    """Tokens ahead of the end have no row, and nobody reads them."""
    model = tiny.model("gpt2", n_positions=24)
    ids = tiny.tokens(1, 10)
    made = Speculator(model, near(model), 1, 6, length=24, tokens=14)
    wanted = expected(model, ids, None, 14, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made.generate(ids, None, 14), wanted)


def test_numbers_that_are_none_are_told():
    model = hybrid(num_hidden_layers=1)
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 0] = float("nan")
    made = Speculator(model, model, 1, 3, length=30, tokens=9)
    with pytest.raises(LinearizeError, match="NaN or infinity"):
        made.generate(tiny.tokens(1, 5), None, 9)


def test_the_decoder_is_kept_until_something_changes():
    model = hybrid(num_hidden_layers=2)
    draft = Draft(near(model), tokens=2)
    ids = tiny.tokens(1, 9)
    options = {"do_sample": False, "max_new_tokens": 9}
    wanted = expected(model, ids, None, 9)
    for _ in range(2):
        assert torch.equal(speculate_ids(model, ids, None, options, draft), wanted)
    kept = draft._kept[1]
    speculate_ids(model, ids[:, :4], None, {**options, "max_new_tokens": 3}, draft)
    assert draft._kept[1] is kept
    count = draft.count
    assert count.drafted == 2 * count.rounds and count.tokens >= count.rounds > 0 and 0 < count.rate < 1
    with torch.no_grad():
        surgery.converted(draft.model)[0].mixer.to(torch.float64)
    with pytest.raises(Exception):  # noqa: B017 - whatever a broken model raises, nothing of it is kept
        draft.model.get_input_embeddings().weight.data = torch.zeros(97, 3)
        speculate_ids(model, ids, None, options, draft)
    assert draft._kept is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"do_sample": True, "top_k": -1},
        {"do_sample": True, "top_k": 2.5},
        {"num_return_sequences": 2},
        {"generation_config": {"repetition_penalty": 1.3}},
    ],
    ids=str,
)
def test_options_that_are_none_are_refused_by_name(wrong):
    """Those of the model's own generation config name their file: nobody gave them."""
    model, (ids, mask) = tiny.model("llama"), prompts()
    if "generation_config" in wrong:
        model.generation_config.update(**wrong.pop("generation_config"))
    with pytest.raises(LinearizeError) as refused:
        speculate_ids(model, ids, mask, {"max_new_tokens": 3, **wrong}, Draft(model))
    assert ("generation_config.json" in str(refused.value)) == (not wrong)


def test_what_is_no_draft_and_no_state_is_refused():
    model = tiny.model("llama")
    for made in (lambda: Draft("runs/window"), lambda: Draft(model, state="doc.state")):
        with pytest.raises(LinearizeError, match="that is loaded"):
            made()
    for given in ({"draft": model}, {"draft": "runs/window"}, {"state": "doc.state"}):
        with pytest.raises(LinearizeError, match="give"):
            generate(model, None, "a", **given)
