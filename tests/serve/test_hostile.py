"""Clients that mean no good, and those that are merely odd: told by name, counted as what they are, not waited for."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from itertools import pairwise

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from serving import CHAT, COMPLETIONS, PATIENCE, byte_model, chatting, expected, served, until

from linearize.decode.row_choice import Wish
from linearize.decode.sampling import Sampling
from linearize.errors import LinearizeError
from linearize.serve.asked import Limits, Reader
from linearize.serve.connections import Patience
from linearize.serve.job import Job, deadline
from linearize.serve.refusal import Refusal
from linearize.serve.scheduler import Piece, Ticket
from linearize.serve.settings import Settings, bound

HALF = "\ud800"
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def model():
    return byte_model("all")


@pytest.fixture(scope="module")
def client(model):
    with served(model) as made:
        yield made


def request(fields: dict, length: int | None = None) -> bytes:
    body = json.dumps({"prompt": "a", "temperature": 0, "ignore_eos": True, **fields}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    "path, body",
    [
        (COMPLETIONS, {"prompt": "a", HALF: 1}),
        (COMPLETIONS, {"prompt": "a", "temperatur" + HALF: 1}),
        (COMPLETIONS, {"prompt": "a", "stream": True, "stream_options": {HALF: 1}}),
        (CHAT, {"messages": [{**USER, HALF: 1}]}),
        (CHAT, {"messages": [{**USER, "role": HALF}]}),
        (CHAT, {"messages": [{**USER, "name": HALF}]}),
        (CHAT, {"messages": [{**USER, "name": {"a": 1}}]}),
        (CHAT, {"messages": [USER], "max_tokens": "many", "max_completion_tokens": 3}),
        (CHAT, {"messages": [USER], "max_tokens": 2, "max_completion_tokens": 3}),
    ],
    ids=str,
)
def test_names_that_no_answer_could_hold(client, path, body, caplog):
    """What a client spells comes back in the refusal, and a half of a character has no UTF-8."""
    status, _, found = client.ask(path, body)
    assert status == 400 and found["error"]["type"] == "invalid_request_error", found
    assert "TextEncodeInput" not in found["error"]["message"] and not caplog.records


def test_both_names_of_the_most_tokens_may_agree(client):
    body = {"messages": [USER], "max_tokens": 3, "max_completion_tokens": 3, "temperature": 0}
    assert client.ask(CHAT, body)[2]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("role", ["alien", "", "x" * 5000, "user>a\n<system"])
def test_a_role_that_the_template_does_not_know(client, role):
    status, _, found = client.ask(CHAT, {"messages": [{**USER, "role": role}]})
    assert status == 400 and "neither is a common one" in found["error"]["message"], found
    assert len(found["error"]["message"]) < 400


def test_a_role_that_the_template_would_drop_in_silence(model):
    tokenizer = chatting()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endif %}"
        "{% endfor %}<assistant>"
    )
    with served(model, tokenizer) as client:
        messages = [{"role": "developer", "content": "say nothing"}, USER]
        status, _, found = client.ask(CHAT, {"messages": messages, "max_tokens": 2})
    assert status == 400 and "does not write messages of the role 'developer'" in found["error"]["message"]


def test_who_has_gone_is_no_mistake_of_the_server(model):
    with served(model, slots=1) as client:
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            connection.sendall(request({"max_tokens": 1000}))
            until(lambda: client.served.scheduler.open == 1)
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            connection.sendall(request({}, length=1000))  # and before its body is whole
        gone = 'linearize_requests_total{endpoint="/v1/completions",status="499"}'
        until(lambda: client.number(gone) == 2)
        assert client.number(gone.replace("499", "500")) == 0


def test_a_stream_lets_its_client_go_between_any_two_events(model):
    """Pieces may be at hand faster than they are sent; asyncio warns of who writes on and on to nobody."""
    tickets: list[Ticket] = []

    class Taking:
        def submit(self, found: list[Ticket]) -> None:
            tickets.extend(found)

        def cancel(self, ticket: Ticket, reason: str = "") -> None:
            pass

    async def turns() -> list[int]:
        loop, passed, found = asyncio.get_running_loop(), 0, []

        def turn() -> None:
            nonlocal passed
            passed += 1
            loop.call_soon(turn)

        tokenizer = chatting()
        body = {"prompt": "a", "stream": True, "max_tokens": 9}
        asked = Reader(tokenizer, 259, "tiny", Limits(40, 30, 70, 4000, 1)).read(body, chat=False)
        job = Job(asked, Taking(), tokenizer, "tiny", deadline(100))
        for number in range(9):
            tickets[0].put(Piece([65 + number], 1, end="length" if number == 8 else None))
        loop.call_soon(turn)
        async for _ in job.events():
            found.append(passed)
        return found

    found = asyncio.run(turns())
    # the last piece is an event of its own and its end another
    assert len(found) == 11 and all(later > now for now, later in pairwise(found[:9])), found


@pytest.mark.parametrize("every", [1, 4])
def test_what_a_stop_string_ends_is_counted_to_its_last_token(model, every):
    """Also where tokens are looked at four at a time, as on a GPU."""
    tokenizer = chatting()
    free = expected(model, tokenizer, "abcd", 24)
    at, stop = next((i, free[i : i + 2]) for i in range(5, 20) if free.find(free[i : i + 2]) == i)
    with served(model, tokenizer) as client:
        client.served.scheduler.every = every
        body = {
            "prompt": "abcd",
            "max_tokens": 200,
            "temperature": 0,
            "stop": stop,
            "logprobs": 0,
            "ignore_eos": True,
        }
        found = client.ask(COMPLETIONS, body)[2]
        assert found["choices"][0]["text"] == free[:at] and found["usage"]["completion_tokens"] == at + 2
        assert len(found["choices"][0]["logprobs"]["tokens"]) == at + 2
        until(lambda: client.number('linearize_texts_total{reason="stop"}') == 1)
        assert client.number('linearize_texts_total{reason="cancelled"}') == 0


def test_scores_of_a_stream_are_those_of_the_whole(client):
    body = {"prompt": "abcd", "max_tokens": 6, "temperature": 0, "logprobs": 3, "n": 2}
    whole = [choice["logprobs"] for choice in client.ask(COMPLETIONS, body)[2]["choices"]]
    made: list[dict] = [{name: [] for name in scores} for scores in whole]
    for event in client.events(COMPLETIONS, body):
        choice = event["choices"][0]
        for name, values in (choice["logprobs"] or {}).items():
            made[choice["index"]][name] += values
    assert made == whole and whole[0]["text_offset"] == list(range(6))


def test_seeds_below_zero_are_seeds_of_their_own():
    def drawn(seed: int) -> list[float]:
        return Wish(Sampling(True), seed).draws(3)

    assert len({tuple(drawn(seed)) for seed in (-(2**63), -2, -1, 0, 1, 2, 2**64 + 15)}) == 7
    assert drawn(-1) == drawn(-1)


def test_heads_that_never_end_are_not_waited_for(model):
    """Nothing at all, a part of a head, and a part of the next one: each holds one of a process' few connections."""
    with served(model, seconds=2) as client:
        made = [socket.create_connection(("127.0.0.1", client.port), timeout=PATIENCE) for _ in range(3)]
        made[1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        made[2].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert made[2].recv(1000).startswith(b"HTTP/1.1 200")
        made[2].sendall(b"GET /hea")
        for connection in made:
            try:
                while connection.recv(1000):
                    pass
            except ConnectionResetError:
                pass
            connection.close()
        assert client.text("a", 3)


def spoken(port: int, *parts: bytes) -> tuple[int, dict, bytes]:
    """Status and object of the first answer to bytes, sent one part behind the other, and what came after it."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        got = b""
        for part in parts:
            connection.sendall(part)
            while b"}" not in got:
                got += connection.recv(10_000)
        head, _, rest = got.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head.lower())[1])
        return int(head.split()[1]), json.loads(rest[:length]), rest[length:]


CHUNKED = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


@pytest.mark.parametrize(
    "sent, status, word",
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000, 431, "65,536 bytes"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 15_000, 431, "65,536 bytes"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "no TLS here"),
        (b"GET /" + b"\xff" * 500 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400, "illegal request line"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "Content-Length"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501, "Transfer-Encoding"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_http_is_told_so(client, sent, status, word, caplog):
    """By the error object, as everything else, and counted; the next one is served."""
    name = f'linearize_requests_total{{endpoint="other",status="{status}"}}'
    before = client.number(name)
    found, body, rest = spoken(client.port, sent)
    assert (found, rest) == (status, b"") and word in body["error"]["message"], body
    assert set(body["error"]) == {"message", "type", "param", "code"} and len(body["error"]["message"]) < 400
    assert client.number(name) == before + 1 and not caplog.records


def test_a_body_that_goes_wrong_is_one_request(client, caplog):
    """Before an answer, and behind one that did not wait for it, where nothing more can be said."""
    names = [f'linearize_requests_total{{endpoint="{path}",status="400"}}' for path in (COMPLETIONS, "other")]
    before = [client.number(name) for name in names]
    assert spoken(client.port, CHUNKED + b"no number\r\n")[0] == 400
    until(lambda: client.number(names[0]) == before[0] + 1)
    told = spoken(client.port, CHUNKED.replace(b"/v1", b"/v2"), b"no number\r\n")
    assert told[0] == 404 and told[2] == b""
    until(lambda: not client.served._server.server_state.tasks)
    assert [client.number(name) for name in names] == [before[0] + 1, before[1]] and not caplog.records


def test_more_connections_than_there_are_files(model, monkeypatch, caplog):
    from linearize.serve import connections

    assert connections.most() is None or connections.most() > 0
    monkeypatch.setattr(connections, "most", lambda: 2)
    with served(model) as client:
        made = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(2)]
        until(lambda: len(client.served._server.server_state.connections) == 2)
        status, headers, found = client.ask("/health")
        assert status == 503 and headers["retry-after"] == "1"
        assert "2 connections are open" in found["error"]["message"]
        made.pop().close()
        until(lambda: len(client.served._server.server_state.connections) == 1)
        assert client.number('linearize_requests_total{endpoint="other",status="503"}') == 1
        made.pop().close()
    assert not caplog.records


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ nobody.knows }}", "undefined"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "Recursion"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{# nothing of it #}", "does not write"),
    ],
    ids=lambda value: value[:30],
)
def test_templates_that_refuse_or_fail(template, words):
    """What a template says reaches the client; it is no mistake of this server's."""
    tokenizer = chatting()
    tokenizer.chat_template = template
    reader = Reader(tokenizer, 259, "tiny", Limits(40, 30, 70, 4000, 1))
    with pytest.raises(Refusal) as refused:
        reader.read({"messages": [{"role": "system", "content": "be brief"}, USER]}, chat=True)
    assert refused.value.status == 400 and words in refused.value.message


def test_how_long_a_connection_may_stand():
    class Connection:
        cycle = None

    class Cycle:
        response_complete = False

    new, busy = Connection(), Connection()
    busy.cycle = Cycle()
    patience = Patience(100)
    assert patience.over([new, busy], 0) == patience.over([new, busy], 29) == []
    assert patience.over([new, busy], 31) == [new]
    new.cycle = Cycle()  # a request, and then an answer
    assert patience.over([new, busy], 32) == []
    new.cycle.response_complete = True
    assert patience.over([new, busy], 60) == patience.over([new, busy], 89) == []
    assert patience.over([new, busy], 91) == [new] and patience.over([new, busy], 131) == [new, busy]


def test_the_server_stops_without_what_never_comes_and_without_a_traceback(model, monkeypatch, caplog):
    from linearize.serve import server

    monkeypatch.setattr(server, "LAST_WORDS", 0.5)
    with served(model, grace=0.1) as client:
        connection = socket.create_connection(("127.0.0.1", client.port))
        connection.sendall(request({}, length=1000))
        until(lambda: len(client.served._server.server_state.tasks) == 1)
    connection.close()
    assert not caplog.records


@pytest.mark.parametrize("host", ["", "\udcff", "a\0b", "x" * 80 + ".org"])
def test_hosts_that_are_none(host):
    with pytest.raises(LinearizeError, match="--host"):
        bound(Settings("a", host=host, token="x", port=0))
