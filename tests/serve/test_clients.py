"""OpenAI's own client against the server, and many requests at once: none is lost, and nothing grows."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from recordings import Card, on_cpu
from serving import COMPLETIONS, Client, byte_model, chatting, expected, served

openai = pytest.importorskip("openai")

PROMPTS = [("The river " * 7)[start : start + 3 + 5 * start] for start in range(10)]


@pytest.fixture(scope="module")
def model():
    return byte_model([1])


def of(client, **options):
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{client.port}/v1",
        api_key=client.token or "none",
        max_retries=0,
        **options,
    )


def test_the_client_of_openai(model):
    tokenizer = chatting()
    with served(model, tokenizer, token="s3cret") as client, of(client) as api:
        assert [each.id for each in api.models.list()] == ["tiny"]
        settings = {"model": "tiny", "max_tokens": 9, "temperature": 0}
        made = api.completions.create(prompt=PROMPTS[2], **settings)
        assert made.choices[0].text == expected(model, tokenizer, PROMPTS[2], 9)
        assert made.usage.completion_tokens == 9 and made.choices[0].finish_reason == "length"
        chat = {"messages": [{"role": "user", "content": "hi"}], **settings}
        whole = api.chat.completions.create(**chat, logprobs=True, top_logprobs=2).choices[0]
        assert whole.message.content == expected(model, tokenizer, "<user>hi\n<assistant>", 9)
        assert len(whole.logprobs.content) == 9 and len(whole.logprobs.content[0].top_logprobs) == 2
        pieces = list(
            api.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
        )
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.message.content
        assert pieces[-1].usage.total_tokens == pieces[-1].usage.prompt_tokens + 9
        with pytest.raises(openai.BadRequestError, match="presence_penalty is not supported"):
            api.chat.completions.create(**chat, presence_penalty=1)
        with pytest.raises(openai.NotFoundError, match="it is 'tiny'"):
            api.chat.completions.create(**{**chat, "model": "other"})
        with pytest.raises(openai.AuthenticationError, match="wants a token"), of(client) as wrong:
            wrong.api_key = "guess"
            wrong.models.list()


def test_a_stream_that_takes_too_long_raises(model):
    with served(model, seconds=0.4, new=100_000) as client, of(client) as api:
        options = {"model": "tiny", "max_tokens": 100_000, "extra_body": {"ignore_eos": True}}
        with pytest.raises(openai.APIError, match="the most that a request may take"):
            list(api.completions.create(prompt="a", stream=True, **options))


async def many(port: int, count: int, width: int, texts: dict[str, str], seed: int) -> dict[str, int]:
    """So many requests, `width` at once: whole, streams, streams that are dropped, and garbage."""
    dice, found = random.Random(seed), {"right": 0, "dropped": 0, "refused": 0, "garbage": 0}
    api = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120
    )
    turns = asyncio.Semaphore(width)

    async def one(kind: float, prompt: str) -> None:
        settings = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0}
        async with turns:
            if kind < 0.05:
                body = dice.randbytes(dice.randrange(300))
                status, _, answer = await asyncio.to_thread(Client(port).ask, COMPLETIONS, body)
                assert status == 400 and "message" in answer["error"]
                found["garbage"] += 1
            elif kind < 0.1:
                with pytest.raises(openai.BadRequestError):
                    await api.completions.create(**{**settings, "temperature": 9})
                found["refused"] += 1
            elif kind < 0.5:
                made = await api.completions.create(**settings)
                assert made.choices[0].text == texts[prompt], "a neighbour's"
                found["right"] += 1
            else:
                stream, made = await api.completions.create(**settings, stream=True), ""
                async for piece in stream:
                    made += piece.choices[0].text
                    if kind > 0.8:
                        await stream.close()
                        found["dropped"] += 1
                        return
                assert made == texts[prompt], "a neighbour's"
                found["right"] += 1

    async with api:
        await asyncio.gather(*(one(dice.random(), dice.choice(PROMPTS)) for _ in range(count)))
    return found


def resident() -> int:
    """Bytes that this process holds, or 0 where the system does not tell."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * 4096 if told.exists() else 0


def load(model, count: int, prepared: Callable[[Any], None] = lambda slots: None) -> None:
    """None is lost, and of the same number of requests twice the second leaves memory where the first did."""
    tokenizer, before = chatting(), 0
    texts = {prompt: expected(model, tokenizer, prompt, 6) for prompt in PROMPTS}
    with served(model, tokenizer, slots=8, queue=100) as client:
        prepared(client.served.slots)
        for turn in range(2):
            found = asyncio.run(many(client.port, count // 2, 32, texts, turn))
            assert sum(found.values()) == count // 2 and min(found.values()) > 0
            while client.served.scheduler.open:
                asyncio.run(asyncio.sleep(0.01))
            gc.collect()
            before = before or resident()
        assert resident() - before < 20 * 2**20
        reasons = ("length", "stop", "cancelled")
        ended = sum(client.number(f'linearize_texts_total{{reason="{why}"}}') for why in reasons)
        refused = client.number('linearize_requests_total{endpoint="/v1/completions",status="400"}')
        assert ended + refused == count, "every request has an end"
        assert client.served.slots.live == 0


def recorded(monkeypatch, count: int) -> None:
    """As on a card, where prompts of converted layers alone are read in recorded pieces."""
    graphs = on_cpu(monkeypatch, Card(), words=259)

    def prepared(slots: Any) -> None:
        slots._reading._pieces._records = True

    load(byte_model("all"), count, prepared)
    assert len(graphs) > 3 and sum(graph.replays for graph in graphs) > count // 3


def test_hundreds_of_requests(model):
    load(model, 120)


def test_hundreds_of_requests_in_recorded_pieces(monkeypatch):
    recorded(monkeypatch, 120)


@pytest.mark.slow
def test_ten_thousand_requests(model):
    load(model, 10_000)


@pytest.mark.slow
def test_ten_thousand_requests_in_recorded_pieces(monkeypatch):
    recorded(monkeypatch, 10_000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_thousand_requests_on_a_card():
    """Steps and pieces of prompts are CUDA graphs there."""
    load(byte_model("all").cuda(), 1_000, lambda slots: None)
