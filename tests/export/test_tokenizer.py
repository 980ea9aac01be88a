"""An exported tokenizer is the teacher's: neither our padding side nor the last batch's lengths go along."""

from __future__ import annotations

import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import linearize
from linearize import surgery
from linearize.models import load_tokenizer


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("used", [False, True])
def test_the_side_is_the_teachers(side, used, tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {} if side is None else {"padding_side": side}
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", **options
    ).save_pretrained(tmp_path / "teacher")
    teacher = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer = load_tokenizer(tmp_path / "teacher")
    assert tokenizer.padding_side == "left"
    if used:
        tokenizer(["a b a b", "b"], padding=True, truncation=True, max_length=3)
    model = surgery.convert(tiny.model(), tiny.LOLCATS)
    linearize.save(model, tmp_path / "out", tokenizer=tokenizer)
    assert tokenizer.padding_side == "left", "the caller's own tokenizer stays as it is"
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.padding_side == teacher.padding_side == (side or "right")
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a b a b").ids == [0, 1, 0, 1]
