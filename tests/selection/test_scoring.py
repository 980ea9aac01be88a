"""A layer whose conversion is bad on purpose is found; scores are dense KL; what is on disk is not measured again."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional as F

from linearize import surgery
from linearize.errors import DataError, LinearizeError
from linearize.eval.recall_split import distances
from linearize.eval.rows import Scores
from linearize.select import scoring
from linearize.select.job import Options, choose
from linearize.select.scoring import CHOICE, KL, KL_HIT, UNSEEN, Scorer, Signature


def text() -> dict[str, torch.Tensor]:
    """Few different tokens, so that pairs are repeated."""
    return {CHOICE: tiny.tokens(3, 40) % 11 + 3, UNSEEN: tiny.tokens(3, 40, seed=2) % 11 + 3}


def scorer(folder, mixer=tiny.SOFTMAX, bad=None, family="llama", **changes) -> Scorer:
    model = surgery.convert(tiny.model(family, **changes), mixer).eval()
    if bad is not None:
        mixers = surgery.converted(model)[bad].mixer
        right = mixers.chunked
        mixers.chunked = lambda *args, **kwargs: 0.1 * right(*args, **kwargs)
    return Scorer(model, text(), Scores(folder / "scores.json"), Signature("tiny", "linearize", 0, "aligned"))


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("by", ["kl", "recall"])
def test_a_badly_converted_layer_is_restored_first(tmp_path, bad, by):
    found = choose(scorer(tmp_path, bad=bad), Options(keep=2, by=by))
    assert found.steps[0].layer == bad and bad in found.kept
    alone = {layer: row[KL].value for layer, row in found.alone.items()}
    # every other mixer is the softmax that it replaces
    assert alone.pop(bad) > 0.05 and max(alone.values()) < 1e-6
    assert found.converted[KL].value > 0.05 and found.chosen[0][KL].value < 1e-6
    assert found.unseen["one at a time"][1][KL].value < 1e-6  # the ranking knows it as well
    assert found.differences["uniform"].value < 0 and found.differences["uniform"].high < 0


def test_scores_are_dense_kl_of_the_hybrid(tmp_path):
    made = scorer(tmp_path, tiny.LOLCATS, family="gemma2")
    tiny.randomize(layer.mixer for layer in surgery.converted(made.model))
    ids = made.windows[CHOICE]
    for kept in [(), (1, 3), (0,)]:
        found = made(kept)
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
    assert made((0, 1, 2, 3))[KL].value < 1e-6


def test_a_model_whose_head_is_not_recognized_has_the_same_teacher(tmp_path):
    made, other = (scorer(tmp_path / name, tiny.LOLCATS) for name in ("a", "b"))
    other.student.head = other.teacher.head = None
    assert made.student.head is not None
    assert other((2,))[KL].value == pytest.approx(made((2,))[KL].value, rel=1e-4)


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
    before = made((1,))[KL].value
    for file in (tmp_path / "tokens").glob("*.safetensors"):
        file.write_bytes(b"cut off")
    again = scorer(tmp_path, tiny.LOLCATS)
    assert again.difference((1,), (1,), KL).value == 0 and again((1,))[KL].value == before


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
    made.windows = {name: torch.arange(3, 43)[None].expand(3, -1) for name in (CHOICE, UNSEEN)}
    plain = Scorer(made.model, made.windows, Scores(tmp_path / "x" / "s.json"), made.signature)
    with pytest.raises(DataError, match="--by recall: no token of the text repeats a pair"):
        choose(plain, Options(by="recall"))
