"""Load on `linearize serve`: every request of a crowd has its end and is counted, and nothing grows.

The server is a process of its own, so that what is weighed is the server alone, and two cores are both at work: in one
process its threads and its clients wait for one another.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from crowd import Crowd
from recordings import Card, on_cpu
from serving import Client, Process, byte_model, chatting, expected, served

from linearize import export

openai = pytest.importorskip("openai")

TOKENS = 5
PROMPTS = [("The river " * 7)[start : start + 3 + 5 * start] for start in range(10)]
GROWTH = {"memory": 8 * 2**20, "files": 2, "threads": 1}
"""Of the least that is held in the later half of a load over the least in the earlier one.

What is held goes up and down by some megabytes, with what an allocator keeps for later; what leaks raises the least.
"""


def held(process: int) -> dict[str, int]:
    """Seconds of a process, and what it holds: bytes of its own memory, open files, threads.

    Empty where the system does not tell.
    """
    told = Path(f"/proc/{process}")
    if not told.exists():
        return {}
    # pages of files, libraries among them, come and go as the system likes
    own = re.search(r"RssAnon:\s+(\d+) kB", (told / "status").read_text())
    assert own
    times = (told / "stat").read_text().rpartition(")")[2].split()[11:13]
    return {
        "processor s": sum(map(int, times)) // os.sysconf("SC_CLK_TCK"),
        "memory": int(own[1]) * 1024,
        "files": len(list((told / "fd").iterdir())),
        "threads": len(list((told / "task").iterdir())),
    }


def numbers(client: Client) -> dict[str, float]:
    """Every line of the metrics."""
    lines = [line for line in client.ask("/metrics")[2].splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def answered(found: dict[str, float], status: int) -> float:
    """Requests of both endpoints with a status."""
    names = [
        f'linearize_requests_total{{endpoint="/v1/{end}",status="{status}"}}'
        for end in ("completions", "chat/completions")
    ]
    return sum(found.get(name, 0) for name in names)


async def by_openai(port: int, texts: dict[str, str], count: int, width: int) -> None:
    """Requests of OpenAI's own client, whole and as streams, every third stream left behind its first event."""
    turns = asyncio.Semaphore(width)

    async def one(number: int, prompt: str) -> None:
        settings = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        async with turns:
            if number % 2:
                made = await api.completions.create(**settings)
                assert made.choices[0].text == texts[prompt]
                return
            stream, text = await api.completions.create(**settings, stream=True), ""
            async for piece in stream:
                text += piece.choices[0].text
                if not number % 3:
                    await stream.close()
                    return
            assert text == texts[prompt]

    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300
    ) as api:
        await asyncio.gather(*(one(number, PROMPTS[number % 10]) for number in range(count)))


def load(client: Client, process: int, model: Any, count: int, turns: int) -> None:
    """So many requests in so many turns, between which nothing is under way and the server's process is weighed."""
    tokenizer = chatting()
    texts = {prompt: expected(model, tokenizer, prompt, TOKENS) for prompt in PROMPTS}
    chats = {prompt: expected(model, tokenizer, f"<user>{prompt}\n<assistant>", TOKENS) for prompt in PROMPTS}
    crowd, each, began = Crowd(client.port, texts, chats, TOKENS), count // turns, time.monotonic()
    weighed, of_openai = [], 0
    for turn in range(turns):
        asyncio.run(crowd.ask(each - each // 10, 48))
        asyncio.run(by_openai(client.port, texts, each // 10, 16))
        of_openai += each // 10
        found = numbers(client)
        while found["linearize_texts_running"] + found["linearize_texts_waiting"]:
            time.sleep(0.02)
            found = numbers(client)
        gc.collect()
        weighed.append(held(process))
        print(f"{(turn + 1) * each:6,} requests, {time.monotonic() - began:5.0f} s: {weighed[-1]}")
    kinds = crowd.found
    print(
        {**kinds, "by OpenAI's client": of_openai}, f"processor s of this process: {time.process_time():.0f}"
    )
    print({name: int(value) for name, value in found.items() if "requests" in name or "texts_total" in name})
    assert sum(kinds.values()) + of_openai == count and len(kinds) == 7, "every kind, and each has its end"
    assert answered(found, 400) == kinds["garbage"] + kinds["wrong"]
    # who leaves may have been answered already
    whole = kinds["whole"] + kinds["streams"] + of_openai
    assert whole <= answered(found, 200) <= whole + kinds["streams left"] + kinds["left before the answer"]
    assert answered(found, 499) >= kinds["half a body"]
    assert sum(answered(found, status) for status in (200, 400, 499)) == count
    ended = {
        why: found.get(f'linearize_texts_total{{reason="{why}"}}', 0)
        for why in ("length", "stop", "cancelled")
    }
    assert sum(value for name, value in found.items() if "texts_total" in name) == sum(ended.values())
    assert ended["length"] + ended["stop"] >= kinds["whole"] + kinds["streams"]
    assert answered(found, 200) <= sum(ended.values()) <= count - answered(found, 400) - kinds["half a body"]
    for what, most in GROWTH.items():
        values = [each[what] for each in weighed if each]
        earlier, later = values[: len(values) // 2], values[len(values) // 2 :]
        assert min(later, default=0) - min(earlier, default=0) <= most, (what, values)


def by_process(folder: Path, count: int, turns: int) -> None:
    """The command in a process of its own, which has nothing to say about it all."""
    model = byte_model([1])
    export.save(model, folder, tokenizer=chatting())
    process = Process(folder, "--port", 0, "--slots", 32, "--queue", 100)
    shutil.rmtree(folder)  # what is served has been read
    try:
        load(process.client, process.process.pid, model, count, turns)
    finally:
        code, said, _ = process.stop(signal.SIGTERM)
    assert (code, said.strip()) == (0, "stopped"), "no traceback, and no warning"


def recorded(monkeypatch, count: int) -> None:
    """As on a card, where prompts of converted layers alone are read in recorded pieces."""
    model, graphs = byte_model("all"), on_cpu(monkeypatch, Card(), words=259)
    with served(model, slots=32, queue=100) as client:
        client.served.slots._reading._pieces._records = True
        load(client, os.getpid(), model, count, 4)
    assert len(graphs) > 3 and sum(graph.replays for graph in graphs) > count // 6


def test_hundreds_of_requests(tmp_path):
    by_process(tmp_path / "tiny", 200, 4)


def test_hundreds_of_requests_in_recorded_pieces(monkeypatch):
    recorded(monkeypatch, 120)


@pytest.mark.slow
def test_ten_thousand_requests(tmp_path):
    by_process(tmp_path / "tiny", 10_000, 10)


@pytest.mark.slow
def test_two_thousand_requests_in_recorded_pieces(monkeypatch):
    """Not ten: without a card a recorded piece is computed as wide as it was recorded, in the clients' own process."""
    recorded(monkeypatch, 2_000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_thousand_requests_on_a_card():
    """Steps and pieces of prompts are CUDA graphs there."""
    model = byte_model("all").cuda()
    with served(model, slots=32, queue=100) as client:
        load(client, os.getpid(), model, 1_000, 4)
