"""Random requests against what `generate` makes, read by rules that are written down here once more, in plain words."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from byte_llama import MIXER, tiny_llama

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from serving import COMPLETIONS, Client, chatting, served

from linearize import surgery
from linearize.serve.text import BROKEN

END = 257
LINES = ("In the year 1512", "日本語 – ", "é", "👩‍👩‍👧 and\n\n", "a\ufffdb", " ", "the river rose; " * 5)


def any_bytes(layers: Any) -> Any:
    """A model that writes bytes of all kinds, most of them no characters, and ends texts now and then."""
    model = surgery.convert(tiny_llama(layers=3), MIXER, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    with torch.no_grad():
        model.lm_head.weight[END] *= 1.5
    return model.eval()


def wanted(model: Any, tokenizer: Any, body: dict[str, Any]) -> tuple[str, str, int, int]:
    """Text, how it ends, tokens that count, and tokens that have scores."""
    ids = tokenizer(body["prompt"])["input_ids"]
    ends = -1 if body["ignore_eos"] else END
    given = torch.tensor([ids])
    made = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=body["max_tokens"], do_sample=False,
        eos_token_id=ends, pad_token_id=258,
    )[0, len(ids) :].tolist()  # fmt: skip
    stopped = made[-1] == ends
    new = made[:-1] if stopped else made

    def read(count: int, last: bool) -> str:
        text = tokenizer.decode(new[:count], skip_special_tokens=True)
        return text if last else text.rstrip(BROKEN)

    for count in range(1, len(new) + 1):
        for last in (False, True)[: 1 + (count == len(new))]:
            text = read(count, last)
            places = [text.find(stop) for stop in body["stop"] if stop in text]
            if places:
                return text[: min(places)], "stop", count, count
    return read(len(new), last=True), "stop" if stopped else "length", len(made), len(new)


def asked(dice: random.Random) -> dict[str, Any]:
    """A body, with stop strings that have a chance."""
    stops = dice.choice(
        [[], [], ["a"], ["\ufffd"], ["1", "e", "Z"], [chr(dice.randrange(33, 126))], ["xy", "q" * 9]]
    )
    return {
        "prompt": dice.choice(LINES)[: dice.randint(1, 80)],
        "max_tokens": dice.choice([1, 2, 3, dice.randint(4, 40)]),
        "temperature": 0,
        "stop": stops,
        "n": dice.choice([1, 1, 3]),
        "logprobs": dice.choice([None, 0, 5]),
        "ignore_eos": dice.random() < 0.3,
    }


def got(client: Client, body: dict[str, Any], stream: bool) -> list[tuple[str, str, int]]:
    """Text, end and number of scores of every choice; and the tokens that count of all."""
    if not stream:
        status, _, found = client.ask(COMPLETIONS, body)
        assert status == 200, found
        rows = [(c["text"], c["finish_reason"], c["logprobs"]) for c in found["choices"]]
        usage = found["usage"]
    else:
        events = client.events(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
        usage, texts = events.pop()["usage"], [["", None, {"tokens": []}] for _ in range(body["n"])]
        for event in events:
            choice = event["choices"][0]
            row = texts[choice["index"]]
            assert row[1] is None, "nothing comes behind the end"
            row[0] += choice["text"]
            row[1] = choice["finish_reason"]
            row[2]["tokens"] += (choice["logprobs"] or {"tokens": []})["tokens"]
        rows = [tuple(row) for row in texts]
    made = [(text, end, len(scores["tokens"]) if scores else 0) for text, end, scores in rows]
    return [*made, ("", "", usage["completion_tokens"])]


@pytest.mark.parametrize("layers", ["all", [0, 2]], ids=["converted", "hybrid"])
def test_random_requests(layers):
    model, tokenizer, dice = any_bytes(layers), chatting(), random.Random(7)
    bodies = [asked(dice) for _ in range(40)]
    right = [wanted(model, tokenizer, body) for body in bodies]
    assert sum(end == "stop" for _, end, *_ in right) > 5 and sum(BROKEN in text for text, *_ in right) > 5
    with served(model, tokenizer, slots=4, queue=200) as client, ThreadPoolExecutor(8) as pool:
        for stream in (False, True):
            answers = list(pool.map(lambda body, stream=stream: got(client, body, stream), bodies))
            for body, answer, (text, end, count, scores) in zip(bodies, answers, right, strict=True):
                told = scores if body["logprobs"] is not None else 0
                row = (text, end, told)
                assert answer == [*[row] * body["n"], ("", "", body["n"] * count)], (body, stream)
