"""The shipped openings."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from byte_llama import byte_tokenizer

from linearize.errors import DataError
from linearize.sample import openings
from linearize.sample.openings import CHAT, shipped

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_thousands_and_none_twice():
    texts = [text for some in shipped().values() for text in some]
    assert len(texts) >= 3000 and len(set(texts)) == len(texts) and len(shipped()) >= 20
    assert all(text.strip() and not text.endswith(" ") and "{" + "Place}" not in text for text in texts)
    first = Counter(text.split()[0] for text in texts)
    assert len(first) > 700 and first.most_common(1)[0][1] < len(texts) / 10


def test_the_file_is_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    made = runpy.run_path(str(ROOT / "scripts" / "make_openings.py"))
    out = tmp_path / "openings.json"
    made["main"].__globals__["OUT"] = out
    made["main"]()
    for name in [name for name in sys.modules if name.split(".")[0] == "openings"]:
        del sys.modules[name]
    assert out.read_bytes() == openings.FILE.read_bytes()


def test_turns_go_through_the_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    found = openings.openings(tokenizer, chat=True, longest=200)
    turn = found.ids[found.kinds.index(CHAT)]
    assert turn[0] == tokenizer.bos_token_id and tokenizer.decode(turn[-2:]) == "A:"
    assert CHAT not in openings.openings(tokenizer, chat=False, longest=200).kinds
    with pytest.raises(DataError, match=r"data\.teacher\.length"):
        openings.openings(tokenizer, chat=True, longest=5)


def test_the_share_of_turns():
    made = openings.Openings([[1]] * 5, [CHAT, "news", "news", CHAT, "code"], [])
    turns = {index for index, kind in enumerate(made.kinds) if kind == CHAT}
    for chat in (0.0, 0.3, 1.0):
        drawn = made.order(200, 40, chat, seed=1)
        share = np.isin(drawn, list(turns)).mean()
        assert abs(share - chat) < 0.02
    assert np.array_equal(made.order(3, 4, 0.3, 7), made.order(3, 4, 0.3, 7))
    assert not np.array_equal(made.order(30, 4, 0.3, 7), made.order(30, 4, 0.3, 8))
