"""No pass makes more logits than one product of a GPU may have: fewer sequences go together, or it is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from byte_llama import TEXT, byte_tokenizer, tiny_llama

from linearize.distill.memory import Fitting, OutOfMemoryError, is_out_of_memory, watched
from linearize.errors import DataError
from linearize.eval.perplexity import perplexity, windows
from linearize.eval.token_scores import Predictor, score_tokens
from linearize.objectives import whole

LENGTH = 16


@pytest.fixture
def limited(monkeypatch):
    """The CPU counts as a device with the limit, of as many logits as three sequences have and some."""
    monkeypatch.setattr(whole, "LIMITED", ("cpu",))
    monkeypatch.setattr(whole, "MOST", 3 * LENGTH * 259 + 5)


@pytest.fixture
def cut():
    return windows(byte_tokenizer(), TEXT, window=LENGTH, max_windows=8)


def test_perplexity_takes_fewer_windows_at_once(limited, cut):
    model, seen = tiny_llama(), []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    found = perplexity(model, None, cut, batch_size=8)
    assert seen == [3, 3, 2]
    whole.LIMITED = ()
    assert found.nll == pytest.approx(perplexity(model, None, cut, batch_size=8).nll, rel=1e-6)


def test_a_window_that_is_too_long_by_itself_is_refused(limited, cut):
    whole.MOST = LENGTH * 259 - 1
    with pytest.raises(
        DataError, match=r"window 16 has more logits .* at most 15 tokens .* `linearize eval`"
    ):
        perplexity(tiny_llama(), None, cut)


def test_the_judge_makes_them_a_slice_at_a_time(limited, cut):
    whole.MOST = LENGTH * 259 - 1
    model = Predictor(tiny_llama())
    assert torch.isfinite(score_tokens(model, cut).nll).all()
    model.head = None  # a family whose head is not known
    with pytest.raises(whole.TooManyLogitsError, match="1 x 16 tokens have 4,144 logits"):
        score_tokens(model, cut)


def test_it_is_told_as_memory_that_has_run_out(limited, cut):
    model, sizes = tiny_llama(), []

    def job(size):
        sizes.append(size)
        return [whole.whole_logits(model, some).shape[0] for some in cut.split(size)]

    with pytest.raises(whole.TooManyLogitsError) as caught:
        job(4)
    assert is_out_of_memory(caught.value)
    fitting = Fitting("auto", LENGTH)
    assert fitting.run(job, torch.device("cpu")) == [2, 2, 2, 2]
    assert sizes == [4, 4, 2]


def test_a_stage_goes_on_with_fewer_sequences(monkeypatch, tmp_path, caplog):
    """Where the head is not known, so that a step makes its logits at once."""
    from linearize.config import compose
    from linearize.distill import finetune, run

    monkeypatch.setattr(whole, "LIMITED", ("cpu",))
    monkeypatch.setattr(whole, "MOST", 2 * 32 * 259)
    monkeypatch.setattr(finetune, "recognize", lambda model, device: None)
    (tmp_path / "text.txt").write_text(TEXT)
    tiny_llama().save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    given = [f"data.source={tmp_path / 'text.txt'}", "data.length=32", "eval.length=32", "eval.max_windows=2"]
    given += [
        "stages.transfer.tokens=256",
        "stages.recover.tokens=256",
        "eval.ablations=false",
        "calibrate.tokens=0",
    ]
    with caplog.at_level(logging.WARNING):
        run(str(tmp_path / "teacher"), compose("lolcats", [*given, "mixer.window.size=8"]), tmp_path / "out")
    assert "stage 'recover': 8 sequences at once do not fit into memory; going on with 4" in caplog.text
    assert "going on with 2" in caplog.text


def test_what_does_not_fit_by_itself_says_why(limited, cut):
    with (
        pytest.raises(
            OutOfMemoryError, match=r"^too many logits in stage 'recover': 4 x 16 tokens .* Take less\.$"
        ),
        watched("in stage 'recover'", lambda: "Take less."),
    ):
        whole.whole_logits(tiny_llama(), cut[:4])


def test_a_teacher_that_reads_nothing_is_doubted(cut, caplog):
    from linearize.config import compose
    from linearize.distill.results import Measurer

    model = tiny_llama()
    measurer = object.__new__(Measurer)
    measurer.settings, measurer.texts, measurer.autocast = compose("lolcats").eval, {"held-out": cut}, None
    measurer.fitting, measurer.tokenizer = Fitting(4, LENGTH), None
    measurer.measure(model, "teacher", tasks=False)
    assert "perplexity" not in caplog.text
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    measurer.measure(model, "after distill", tasks=False)
    assert "perplexity" not in caplog.text
    measurer.measure(model, "teacher", tasks=False)
    assert "the teacher itself has a perplexity of" in caplog.text and "on held-out" in caplog.text
