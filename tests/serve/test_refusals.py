"""What a server does not do: every refusal has a status, OpenAI's error object, and names value, rule and remedy."""

from __future__ import annotations

import json
import socket

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from byte_llama import byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import CHAT, COMPLETIONS, PATIENCE, byte_model, served, until

from linearize.errors import LinearizeError
from linearize.serve.asked import Limits, Reader
from linearize.serve.refusal import Refusal
from linearize.serve.settings import Settings, bound

LIMITS = {"prompt": 40, "new": 30, "body": 4000, "seconds": 20.0}
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model():
    return byte_model("all")


@pytest.fixture(scope="module")
def client(model):
    with served(model, **LIMITS) as made:
        yield made


def refused(answer, status: int, *words: str) -> dict:
    found, _, body = answer
    assert found == status, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in words), error["message"]
    return error


COMPLETION_FIELDS = [
    ({"prompt": "a", "temprature": 1}, ["unknown field 'temprature'", "did you mean 'temperature'"]),
    ({"prompt": "a", "zzz": 1}, ["unknown field 'zzz'", "known here: prompt"]),
    ({"prompt": "a", "temperature": 3}, ["temperature", "from 0 to 2", "got 3"]),
    ({"prompt": "a", "temperature": True}, ["temperature", "got True"]),
    ({"prompt": "a", "temperature": "1"}, ["temperature", "got '1'"]),
    ({"prompt": "a", "top_p": -0.1}, ["top_p", "from 0 to 1"]),
    ({"prompt": "a", "max_tokens": 0}, ["max_tokens", "from 1 to 30"]),
    ({"prompt": "a", "max_tokens": 1.5}, ["max_tokens", "whole number"]),
    ({"prompt": "a", "max_tokens": 31}, ["max_tokens", "from 1 to 30", "got 31"]),
    ({"prompt": "a", "max_tokens": 10**40}, ["max_tokens", "from 1 to 30"]),
    ({"prompt": "a", "n": 17}, ["n must be", "1 to 16"]),
    ({"prompt": "a", "stream": "yes"}, ["stream must be true or false"]),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, ["stream_options", "stream: true"]),
    ({"prompt": "a", "stop": ["x"] * 17}, ["stop", "at most 16"]),
    ({"prompt": "a", "stop": [""]}, ["each stop", "1 to 1,000"]),
    ({"prompt": "a", "stop": 5}, ["stop", "got 5"]),
    ({"prompt": "a", "logprobs": 6}, ["logprobs", "0 to 5"]),
    ({"prompt": "a", "echo": True}, ["echo is not supported", "only false"]),
    ({"prompt": "a", "best_of": 2}, ["best_of is not supported"]),
    ({"prompt": "a", "presence_penalty": 0.5}, ["presence_penalty is not supported", "only 0"]),
    ({"prompt": "a", "logit_bias": {"5": 1}}, ["logit_bias is not supported"]),
    ({}, ["prompt must be text"]),
    ({"prompt": []}, ["prompt must be text"]),
    ({"prompt": ""}, ["no token"]),
    ({"prompt": [1, -1]}, ["from 0 to 258"]),
    ({"prompt": [1, 259]}, ["from 0 to 258"]),
    ({"prompt": [[]]}, ["from 0 to 258"]),
    ({"prompt": [True]}, ["from 0 to 258"]),
    ({"prompt": {"a": 1}}, ["prompt must be text"]),
    ({"prompt": ["a"] * 65}, ["at most 64"]),
    ({"prompt": "a\ud800"}, ["halves of characters"]),
    ({"prompt": "x" * 41}, ["the prompt has 41 tokens", "at most 40", "--max-prompt-tokens"]),
]
CHAT_FIELDS = [
    ({}, ["messages must be a list"]),
    ({"messages": []}, ["messages must be a list"]),
    ({"messages": ["hi"]}, ["messages[0]", "role and content"]),
    ({"messages": [{"role": "user"}]}, ["messages[0].content must be text"]),
    ({"messages": [{"role": "user", "content": 5}]}, ["messages[0].content", "got 5"]),
    (
        {"messages": [*USER, {"role": "user", "content": [{"type": "image_url"}]}]},
        ["messages[1]", "image_url"],
    ),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, ["messages[0].tool_calls"]),
    ({"messages": USER, "tools": [{"type": "function"}]}, ["tools is not supported"]),
    (
        {"messages": USER, "response_format": {"type": "json_object"}},
        ["response_format is not supported", "text"],
    ),
    ({"messages": USER, "top_logprobs": 2}, ["top_logprobs needs logprobs"]),
    ({"messages": USER, "prompt": "a"}, ["unknown field 'prompt'"]),
    ({"messages": [{"role": "user", "content": "x" * 60}]}, ["the prompt has", "at most 40"]),
]


@pytest.mark.parametrize("body, words", COMPLETION_FIELDS)
def test_fields_of_completions(client, body, words):
    error = refused(client.ask(COMPLETIONS, body), 400, *words)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body, words", CHAT_FIELDS)
def test_fields_of_chat(client, body, words):
    refused(client.ask(CHAT, body), 400, *words)


def test_what_asks_for_nothing_is_taken(client):
    body = {
        "prompt": "a", "max_tokens": 2, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
        "echo": False, "best_of": 1, "suffix": None, "user": "me", "metadata": {"a": 1}, "seed": None, "stop": None,
    }  # fmt: skip
    assert client.ask(COMPLETIONS, body)[0] == 200
    chat = {
        "messages": USER,
        "max_tokens": 2,
        "response_format": {"type": "text"},
        "tools": [],
        "store": True,
    }
    assert client.ask(CHAT, chat)[0] == 200


def test_a_model_that_is_not_here(client):
    error = refused(
        client.ask(COMPLETIONS, {"model": "gpt-5", "prompt": "a"}), 404, "'gpt-5'", "it is 'tiny'"
    )
    assert error["code"] == "model_not_found" and error["param"] == "model"
    refused(client.ask("/v1/models/gpt-5"), 404, "gpt-5")


def test_paths_and_methods(client):
    refused(
        client.ask("/v1/completion", {}), 404, "there is no /v1/completion", "did you mean '/v1/completions'?"
    )
    status, headers, body = client.ask(COMPLETIONS)
    refused((status, headers, body), 405, "does not take GET")
    assert headers["allow"] == "POST"


GARBAGE = [
    b"", b"{", b"[]", b"5", b"null", b"\xff\xfe\x00", b'{"prompt": "a"', b"{'prompt': 'a'}", b"[" * 3900,
    b'{"a":' * 700, b'"' + b"x" * 100, b'{"max_tokens": 1e999, "prompt": "a"}', b'{"max_tokens": NaN, "prompt": "a"}',
    b'{"temperature": Infinity, "prompt": "a"}', b'{"max_tokens": ' + b"9" * 3900 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("body", GARBAGE, ids=lambda body: repr(body[:24]))
def test_garbage_is_told(client, body, caplog):
    refused(client.ask(COMPLETIONS, body), 400)
    refused(client.ask(CHAT, body), 400)
    assert not caplog.records


def test_bodies_that_are_too_large(client):
    refused(client.ask(COMPLETIONS, {"prompt": "x" * 4001}), 413, "4,000 bytes")
    # and without saying so beforehand
    parts = b"".join(b"%x\r\n%s\r\n" % (500, b"x" * 500) for _ in range(20)) + b"0\r\n\r\n"
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", client.port), timeout=PATIENCE) as connection:
        connection.sendall(head + parts)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_comes(model):
    with (
        served(model, seconds=0.3) as client,
        socket.create_connection(("127.0.0.1", client.port)) as connection,
    ):
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{".encode()
        connection.sendall(head)
        connection.settimeout(PATIENCE)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_no_room_for_more(model):
    long = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with served(model, slots=1, queue=1) as client:
        scheduler = client.served.scheduler
        many = client.ask(COMPLETIONS, {"prompt": "a", "n": 3})
        refused(many, 400, "asks for 3 texts", "at most 2", "fewer at a time", "--slots")
        assert "retry-after" not in many[1], "it never fits, however often it is tried"
        body = json.dumps(long).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with (
            socket.create_connection(("127.0.0.1", client.port)) as one,
            socket.create_connection(("127.0.0.1", client.port)) as two,
        ):
            one.sendall(head + body)
            two.sendall(head + body)
            until(lambda: scheduler.open == 2)
            answer = client.ask(COMPLETIONS, {"prompt": "a"})
            assert refused(answer, 429, "2 texts")["type"] == "rate_limit_error"
            assert answer[1]["retry-after"] == "1"
        until(lambda: not scheduler.open)
        assert client.text("a", 3)


def test_requests_that_take_too_long(model):
    with served(model, slots=1, seconds=2, new=100_000) as client:
        body = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True}
        error = refused(client.ask(COMPLETIONS, body), 504, "the most that a request may take")
        assert error["code"] == "timeout" and error["type"] == "server_error"
        events = client.events(COMPLETIONS, body)
        assert len(events) > 2 and events[-1]["error"]["code"] == "timeout"
        assert client.text("a", 3), "the slot is free again"


def test_the_token(model):
    with served(model, token="s3cret") as client:
        body = {"prompt": "a", "max_tokens": 2}
        for headers in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "é"},
        ):
            answer = client.ask(COMPLETIONS, body, headers=headers)
            assert refused(answer, 401, "Bearer")["type"] == "authentication_error"
            assert answer[1]["www-authenticate"] == "Bearer"
        refused(client.ask("/metrics", headers={}), 401)
        refused(client.ask("/v1/models", headers={}), 401)
        assert client.ask("/health", headers={})[0] == 200
        assert client.ask(COMPLETIONS, body)[0] == 200
        assert client.ask("/v1/models")[0] == 200


def test_chat_without_a_template(model):
    with served(model, byte_tokenizer()) as client:
        refused(client.ask(CHAT, {"messages": USER}), 400, "no chat template", "/v1/completions")
        assert client.text("a", 3)


def test_addresses_and_ports():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(LinearizeError, match=f"--host {host}.*LINEARIZE_TOKEN"):
            bound(Settings("a", host=host))
    with bound(Settings("a", host="0.0.0.0", port=0, token="x")) as made:
        made.listen()
        port = made.getsockname()[1]
        with pytest.raises(LinearizeError, match=rf"cannot listen on 127.0.0.1:{port}.*another --port"):
            bound(Settings("a", port=port))
    with pytest.raises(LinearizeError, match="cannot listen on"):
        bound(Settings("a", host="203.0.113.1", token="x"))


def test_an_error_of_the_decoding_loses_what_it_touches_and_no_more(model, monkeypatch, caplog):
    with served(model) as client:
        slots, good = client.served.slots, client.text("abc", 5)
        run, calls = slots.run, []

        def fails(steps):
            calls.append(steps)
            if len(calls) == 2:
                raise RuntimeError("a kernel that nobody expected")
            return run(steps)

        monkeypatch.setattr(slots, "run", fails)
        refused(
            client.ask(COMPLETIONS, {"prompt": "abc", "max_tokens": 5}), 500, "a kernel that nobody expected"
        )
        assert "texts in slots are lost" in caplog.text
        assert client.text("abc", 5) == good and client.ask("/health")[0] == 200


def test_slots_that_cannot_be_used_any_more(model, monkeypatch):
    with served(model, queue=5) as client:

        def fails(*_):
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(client.served.slots, "run", fails)
        monkeypatch.setattr(client.served.slots, "clear", fails)
        refused(client.ask(COMPLETIONS, {"prompt": "abc", "max_tokens": 5}), 500, "the device is gone")
        refused(client.ask(COMPLETIONS, {"prompt": "abc"}), 503, "has stopped", "restart")
        refused(client.ask("/health"), 503, "has stopped")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["prompt", "messages", "stop", "max_tokens", "temperature", "stream", "n", "logprobs", "tools"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(NAMES | st.text(max_size=12), ANYTHING, max_size=5), st.booleans())
def test_any_object_is_read_or_refused(body, chat):
    """Nothing else than a refusal comes out of the reader, whatever a client sends."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    reader = Reader(tokenizer, 259, "tiny", Limits(40, 30, 70, 4000, 1))
    try:
        asked = reader.read(body, chat=chat)
        assert all(0 < len(ids) <= 40 for ids in asked.prompts) and 0 < asked.tokens <= 30
    except Refusal as refusal:
        assert refusal.status in (400, 404) and len(refusal.message) < 2000
