"""A server in a thread of the test's process or in one of its own, and a client that speaks plain HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
import torch
from byte_llama import MIXER, byte_tokenizer, tiny_llama

from linearize import surgery

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PATIENCE = 200
"""Seconds that a busy machine may take for what a quiet one does at once."""
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ROOT = Path(__file__).resolve().parents[1]


def byte_model(layers: Any = "all", seed: int = 0) -> Any:
    """A converted Llama over bytes, some of its layers softmax unless `layers` is all; it writes ASCII alone."""
    model = (
        surgery.convert(tiny_llama(layers=3, seed=seed), MIXER, layers) if layers else tiny_llama(layers=3)
    )
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    with torch.no_grad():
        words = torch.tensor(byte_tokenizer()(string.ascii_letters + " .,")["input_ids"])
        others = torch.ones(259, dtype=torch.bool).index_fill(0, words, False)
        model.lm_head.weight[others] = 0  # never the likeliest
        model.lm_head.weight *= 5  # nor often drawn
    return model.eval()


def chatting() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, patiently."""
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.01)


class Client:
    """Plain HTTP to a served model."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port, self.token = port, token
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: Any = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of an answer, parsed where it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        given = self.headers if headers is None else headers
        connection.request(method or ("GET" if body is None else "POST"), path, data, given)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        is_json = found.get("content-type") == "application/json"
        return answer.status, found, json.loads(text) if is_json else text.decode()

    def text(self, prompt: Any, tokens: int = 8, **fields: Any) -> str:
        """The only choice of a greedy completion."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **fields}
        status, _, found = self.ask(COMPLETIONS, body)
        assert status == 200, found
        return found["choices"][0]["text"]

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """What a stream sends, the end included."""
        status, headers, text = self.ask(path, {**body, "stream": True})
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
        parts = [part.removeprefix("data: ") for part in text.strip().split("\n\n")]
        assert parts.pop() == "[DONE]"
        return [json.loads(part) for part in parts]

    def number(self, name: str) -> float:
        """A line of the metrics; 0 where it is not there yet."""
        lines = self.ask("/metrics")[2].splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)


class Process:
    """The command in a process of its own, started as from a terminal."""

    def __init__(self, *arguments: object) -> None:
        restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{restore}; import sys; from linearize import cli; sys.exit(cli.main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", *map(str, arguments)],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.said)
        assert found, self.said + self.process.stderr.read()
        self.client = Client(int(found[1]))

    def stop(self, number: int) -> tuple[int, str, float]:
        """Exit code, what was said after the first line, and how long it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=300)
        return self.process.returncode, said, time.monotonic() - began


@contextmanager
def served(model: Any, tokenizer: Any = None, **settings: Any) -> Iterator[Client]:
    """Serve a model as long as the block runs; it has to have stopped by itself in the end."""
    from linearize.serve.server import Served
    from linearize.serve.settings import Settings, bound

    chosen = Settings(**{"name": "tiny", "port": 0, "slots": 3, "piece": 16, "grace": 0.5, **settings})
    with bound(chosen) as listening:
        made = Served(model, chatting() if tokenizer is None else tokenizer, chosen)
        ready = threading.Event()
        thread = threading.Thread(target=made.run, args=(listening, ready.set))
        thread.start()
        try:
            assert ready.wait(PATIENCE)
            client = Client(listening.getsockname()[1], chosen.token)
            client.served = made  # type: ignore[attr-defined]
            yield client
        finally:
            made.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive() and not made.scheduler.alive


def expected(model: Any, tokenizer: Any, prompt: str | list[int], tokens: int = 8, **options: Any) -> str:
    """The text that `generate` adds to a prompt, greedily."""
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    given = torch.tensor([ids], device=model.device)
    made = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, **options
    )
    return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
