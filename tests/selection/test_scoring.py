"""A layer whose conversion is bad on purpose is found; scores are dense KL; what is on disk is not measured again."""

from __future__ import annotations

import pytest
import tiny
import torch
from byte_llama import byte_tokenizer
from torch.nn import functional as F

from linearize import surgery
from linearize.errors import DataError, LinearizeError
from linearize.eval.recall_split import distances
from linearize.eval.rows import Scores
from linearize.select import samples, scoring
from linearize.select.job import BY, Options, choose, named_samples
from linearize.select.samples import KL, KL_HIT, KL_PASSKEY, PASSKEYS, TEXT, Halves, Sample, of_text
from linearize.select.scoring import Scorer, Signature

CHOICE = "text: choice"


def windows() -> dict[str, Halves]:
    """Text of few different tokens, so that pairs are repeated; and the last three tokens of windows as pass keys."""
    ids, other = tiny.tokens(3, 40) % 11 + 3, tiny.tokens(3, 40, seed=2) % 11 + 3
    last = (torch.arange(39) >= 36).expand(3, -1)
    keys = [Sample(tiny.tokens(3, 40, seed=seed), {KL_PASSKEY: last}) for seed in (3, 4)]
    return {TEXT: Halves(of_text(ids), of_text(other)), PASSKEYS: Halves(*keys)}


def scorer(folder, mixer=tiny.SOFTMAX, bad=None, family="llama", **changes) -> Scorer:
    model = surgery.convert(tiny.model(family, **changes), mixer).eval()
    if bad is not None:
        mixers = surgery.converted(model)[bad].mixer
        right = mixers.chunked
        mixers.chunked = lambda *args, **kwargs: 0.1 * right(*args, **kwargs)
    about = Signature("tiny", "linearize", 0, "aligned")
    return Scorer(model, named_samples(windows()), Scores(folder / "scores.json"), about)


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("by", ["kl", "recall", "passkey"])
def test_a_badly_converted_layer_is_restored_first(tmp_path, bad, by):
    found = choose(scorer(tmp_path, bad=bad), Options(keep=2, by=by))
    assert found.steps[0].layer == bad and bad in found.kept
    metric = BY[by][1]
    alone = {layer: row[metric].value for layer, row in found.alone.items()}
    # every other mixer is the softmax that it replaces
    assert alone.pop(bad) > 0.05 and max(alone.values()) < 1e-6
    assert found.converted[metric].value > 0.05 and found.chosen[0][metric].value < 1e-6
    for known in ("converted alone", "restored alone"):  # the rankings see it as well
        assert found.unseen[known][1].value < 1e-6 and found.unseen[known][1].metric == metric
    assert found.differences["uniform"].value < 0 and found.differences["uniform"].high < 0
    assert all(set(row) == {KL, KL_HIT, KL_PASSKEY} for row in [*found.alone.values(), *found.chosen])


def test_scores_are_dense_kl_of_the_hybrid(tmp_path):
    made = scorer(tmp_path, tiny.LOLCATS, family="gemma2")
    tiny.randomize(layer.mixer for layer in surgery.converted(made.model))
    ids = made.samples[CHOICE].ids
    for kept in [(), (1, 3), (0,)]:
        found = made(kept, CHOICE)
        with torch.no_grad(), surgery.as_teacher_layers(made.model, kept):
            own = F.log_softmax(made.model(ids).logits[:, :-1], -1)
            teacher = F.log_softmax(tiny.model("gemma2")(ids).logits[:, :-1], -1)
        kl = F.kl_div(own, teacher, reduction="none", log_target=True).sum(-1)
        assert found[KL].value > 1e-3
        assert found[KL].value == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
        hits = distances(ids) > 0
        assert kl.mean() > 1e-3
        assert found[KL_HIT].value == pytest.approx(float(kl[hits].mean()), rel=1e-3, abs=1e-6)
        assert found[KL_HIT].n == int(hits.sum()) < found[KL].n == kl.numel()
        assert found[KL].low < found[KL].value < found[KL].high
    assert made((0, 1, 2, 3), CHOICE)[KL].value < 1e-6


def test_a_model_whose_head_is_not_recognized_has_the_same_teacher(tmp_path):
    made, other = (scorer(tmp_path / name, tiny.LOLCATS) for name in ("a", "b"))
    other.student.head = other.teacher.head = None
    assert made.student.head is not None
    assert other((2,), CHOICE)[KL].value == pytest.approx(made((2,), CHOICE)[KL].value, rel=1e-4)


def test_pass_keys_are_judged_at_their_tokens(tmp_path):
    made, name = scorer(tmp_path, tiny.LOLCATS), "passkey: choice"
    ids = made.samples[name].ids
    found = made((1,), name)[KL_PASSKEY]
    with torch.no_grad(), surgery.as_teacher_layers(made.model, (1,)):
        own = F.log_softmax(made.model(ids).logits[:, -4:-1], -1)
        teacher = F.log_softmax(tiny.model("llama")(ids).logits[:, -4:-1], -1)
    kl = F.kl_div(own, teacher, reduction="none", log_target=True).sum(-1)
    assert found.value == pytest.approx(float(kl.mean()), rel=1e-3) and found.n == 9
    nll = made.teacher_nll(name)
    assert nll.value == pytest.approx(-float(teacher.gather(2, ids[:, -3:, None]).mean()), rel=1e-4)
    assert (nll.role, nll.metric, nll.against) == ("teacher", "answer_nll", "")


def test_pass_keys_end_with_their_answer():
    tokenizer = byte_tokenizer()
    made = samples.passkeys(tokenizer, 3, 400, seed=0)
    seen = set()
    for sample in (made.choice, made.unseen):
        assert sample.ids.shape == (3, 400) and sample.masks[KL_PASSKEY].shape == (3, 399)
        places = []
        for ids, where in zip(sample.ids, sample.masks[KL_PASSKEY], strict=True):
            answer = tokenizer.decode(ids[1:][where]).strip()
            whole = tokenizer.decode(ids)
            assert len(answer) == 5 and answer.isdigit() and whole.endswith(f"The pass key is {answer}")
            assert whole.count(answer) == 3 and f"The pass key is {answer}. Remember it." in whole
            seen.add(answer)
            places.append(whole.index(f"The pass key is {answer}."))
        assert places == sorted(places) and places[-1] > places[0]
    assert len(seen) == 6
    with pytest.raises(DataError, match="does not fit into 100"):
        samples.passkeys(tokenizer, 3, 100, seed=0)


def test_nothing_is_measured_twice(tmp_path, monkeypatch):
    options = Options(keep=2, draws=1)
    first = choose(scorer(tmp_path, tiny.LOLCATS), options)
    written = (tmp_path / "scores.json").read_bytes()
    with monkeypatch.context() as context:
        context.setattr(scoring, "score_tokens", lambda *args, **kwargs: pytest.fail("measured again"))
        again = choose(scorer(tmp_path, tiny.LOLCATS), options)
        fewer = choose(scorer(tmp_path, tiny.LOLCATS), Options(keep=1, draws=0))
    assert again == first and (tmp_path / "scores.json").read_bytes() == written
    assert fewer.steps == first.steps[:1]
    # somewhere else, the same is chosen
    assert choose(scorer(tmp_path / "other", tiny.LOLCATS), options).steps == first.steps


def test_damaged_scores_are_measured_again(tmp_path):
    made = scorer(tmp_path, tiny.LOLCATS)
    before = made((1,), CHOICE)[KL].value
    for file in (tmp_path / "tokens").glob("*.safetensors"):
        file.write_bytes(b"cut off")
    again = scorer(tmp_path, tiny.LOLCATS)
    assert again.difference((1,), (1,), KL, CHOICE).value == 0 and again((1,), CHOICE)[KL].value == before


def test_as_teacher_layers_is_the_teacher_bit_for_bit():
    teacher, ids = tiny.model("mistral"), tiny.tokens()
    model = surgery.convert(tiny.model("mistral"), tiny.LOLCATS).eval()
    layers = surgery.converted(model)
    with torch.no_grad():
        expected, student = teacher(ids).logits, model(ids).logits
        with surgery.as_teacher_layers(model, [0, 1, 2, 3]):
            assert torch.equal(model(ids).logits, expected)
            with surgery.as_teacher_layers(model, [1]):
                assert torch.equal(model(ids).logits, expected)
            assert torch.equal(model(ids).logits, expected)
        with surgery.as_teacher_layers(model, [1]):
            hybrid = model(ids).logits
        assert torch.equal(model(ids).logits, student)
    assert len({id(layer.linearize_switch) for layer in layers}) == 1
    kept = surgery.convert(tiny.model("mistral"), tiny.LOLCATS, {"keep": [1]}).eval()
    surgery.load_mixer_state(
        kept, {name: value for name, value in surgery.mixer_state(model).items() if ".layers.1." not in name}
    )
    with torch.no_grad():
        assert torch.equal(kept(ids).logits, hybrid) and not torch.equal(hybrid, student)
    with (
        pytest.raises(LinearizeError, match="layer 4 is not converted"),
        surgery.as_teacher_layers(model, [4]),
    ):
        pass


def test_what_cannot_be_chosen_is_said(tmp_path):
    made = scorer(tmp_path)
    for keep in (4, 9):
        with pytest.raises(LinearizeError, match="4 attention layers, of which 1 to 3 can stay softmax"):
            choose(made, Options(keep=keep))
    with pytest.raises(LinearizeError, match="1 attention layer: there is nothing to choose among"):
        choose(scorer(tmp_path / "one", num_hidden_layers=1), Options())
    same = of_text(torch.arange(3, 43)[None].expand(3, -1))
    made_of = named_samples({TEXT: Halves(same, same)})
    plain = Scorer(made.model, made_of, Scores(tmp_path / "x" / "s.json"), made.signature)
    with pytest.raises(DataError, match="--by recall: no token of the text repeats a pair"):
        choose(plain, Options(by="recall"))


def test_passes_that_begin_late_give_the_scores_of_whole_ones(tmp_path):
    """Every placement of the job, its scores and its tokens' KL; and a model that hands values past its blocks."""
    late, whole = (scorer(tmp_path / name, tiny.LOLCATS) for name in ("a", "b"))
    whole.student.obstacle = "whole passes are wanted"
    blocks = late.student.blocks
    ran = [0] * len(blocks)
    for number, block in enumerate(blocks):
        attention = next(part for part in block.modules() if hasattr(part, "linearize_switch"))
        attention.register_forward_pre_hook(
            lambda *_, number=number: ran.__setitem__(number, ran[number] + 1)
        )
    found, expected = (choose(one, Options(keep=2)) for one in (late, whole))
    assert late.student.obstacle is None and late.student._base is None
    assert found.steps == expected.steps and found.placements == expected.placements
    for layer, row in expected.alone.items():
        assert found.alone[layer][KL].value == pytest.approx(row[KL].value, rel=1e-6, abs=1e-9)
    assert ran[0] < 0.7 * ran[-1]  # most of what stands in front was not run again

    made = scorer(tmp_path / "c", tiny.LOLCATS)
    mixed = torch.zeros(())

    def put(*_):  # past the blocks, from the first to the last
        mixed.copy_(torch.randn(()))

    last = made.student.blocks[-1]
    made.student.blocks[0].register_forward_hook(put)
    last.register_forward_hook(lambda block, args, output: output + mixed if isinstance(output, torch.Tensor)
                               else (output[0] + mixed, *output[1:]))  # fmt: skip
    with made.near((0, 1, 2, 3)):
        made((1, 2, 3), CHOICE), made((0, 1, 2), CHOICE)
    assert "differ" in (made.student.obstacle or "")
