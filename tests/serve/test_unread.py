"""Whoever sends too much, or asks a server that stops, is told so, and never finds the connection gone instead."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from serving import COMPLETIONS, byte_model, served, until

from linearize.errors import LinearizeError
from linearize.serve import app, connections
from linearize.serve.settings import Settings, bound

MB = 10**6


@pytest.fixture(scope="module")
def client():
    with served(byte_model("all")) as made:
        yield made


@pytest.mark.parametrize("size", [2 * MB, 20 * MB])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_a_body_that_is_too_large(client, size, chunked):
    """http.client reads nothing before it has sent everything."""
    body = json.dumps({"prompt": "x" * size}).encode()
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=300)
        parts = (body[first : first + 2**16] for first in range(0, len(body), 2**16))
        connection.request("POST", COMPLETIONS, parts if chunked else body, encode_chunked=chunked,
                           headers={"Transfer-Encoding": "chunked"} if chunked else {})  # fmt: skip
        answer = connection.getresponse()
        assert answer.status == 413
        error = json.loads(answer.read())["error"]
        assert "1,048,576 bytes" in error["message"]
        connection.close()
    assert client.ask("/health")[0] == 200


@pytest.mark.parametrize("size", [2 * MB, 20 * MB])
def test_openai_is_told_as_well(client, size):
    openai = pytest.importorskip("openai")
    asking = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0)
    for _ in range(3):
        with pytest.raises(openai.APIStatusError) as refused:
            asking.completions.create(model="tiny", prompt="x" * size)
        assert refused.value.status_code == 413 and "1,048,576 bytes" in str(refused.value)


def test_who_waits_to_be_told_to_go_on_sends_nothing(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: 20000000\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("limit", ["bytes", "quiet", "seconds"])
def test_no_more_is_read_than_that(client, limit, monkeypatch):
    """A client that goes on and on, or says nothing any more, is left; a thousand megabytes are never held."""
    monkeypatch.setattr(app, "MOST_UNREAD", 4 * MB if limit == "bytes" else 2**60)
    monkeypatch.setattr(app, "QUIET", 0.3 if limit == "quiet" else 60)
    monkeypatch.setattr(app, "LINGER", 0.5 if limit == "seconds" else 60)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n".encode()
    sent = 0
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
        began = time.monotonic()
        with pytest.raises(OSError):
            while limit != "quiet":
                sent += connection.send(b"x" * 2**16)
                time.sleep(0.001)
            while connection.recv(2**16):
                pass
            raise OSError("closed in order")
        assert time.monotonic() - began < 50
    assert limit != "bytes" or sent < 100 * MB


def test_what_is_no_http_is_told_whatever_comes_behind_it(client, monkeypatch):
    for bad in (b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000):
        with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
            connection.sendall(bad + b"x" * 2 * MB)
            said = b""
            while part := connection.recv(2**16):
                said += part
        assert b'"error"' in said
    monkeypatch.setattr(connections, "MOST_UNREAD", MB)
    with (
        socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection,
        pytest.raises(OSError),
    ):
        connection.sendall(b"GARBAGE\r\n\r\n")
        for _ in range(1000):
            connection.sendall(b"x" * MB)


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/chat/completions/", "/health/", "/nothing"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_every_wrong_path_gets_the_error_object(client, path, method):
    status, _, found = client.ask(path, {} if method == "POST" else None, method=method)
    assert status == 404 and f"there is no {path}" in found["error"]["message"]


def test_a_server_that_stops_says_so():
    """While running texts end: health and new requests get 503, with a word on when to come back."""
    with served(byte_model("all"), grace=200, new=2000) as client:
        answers: list = []
        body = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True}
        thread = threading.Thread(target=lambda: answers.append(client.ask(COMPLETIONS, body)))
        thread.start()
        until(lambda: client.number("linearize_tokens_total") > 0 or client.served.scheduler.open)
        client.served.stop()
        asked = [
            client.ask("/health"), client.ask(COMPLETIONS, {"prompt": "a"}), client.ask("/v1/models"),
        ]  # fmt: skip
        assert client.served.scheduler.open, "the text has ended already, and nothing was tested"
        assert [status for status, _, _ in asked] == [503, 503, 200]
        for _, headers, found in asked[:2]:
            assert int(headers["retry-after"]) > 0 and "shutting down" in found["error"]["message"]
        thread.join()
        assert answers[0][0] == 200 and answers[0][2]["usage"]["completion_tokens"] == 400


def test_an_idle_server_stops_at_once():
    with served(byte_model("all"), grace=200) as client:
        assert client.ask("/health")[0] == 200
        began = time.monotonic()
        client.served.stop()
        until(lambda: not client.served.scheduler.alive)
        assert time.monotonic() - began < 60
    with pytest.raises(OSError):
        client.ask("/health")


def test_asked_twice_it_takes_no_new_connections():
    with served(byte_model("all"), grace=5, new=1_000_000, slots=1) as client:
        body = {"prompt": "abc", "max_tokens": 1_000_000, "ignore_eos": True}
        thread = threading.Thread(target=lambda: client.ask(COMPLETIONS, body))
        thread.start()
        until(lambda: client.served.scheduler.open)
        client.served.stop()
        client.served.stop()
        time.sleep(1)
        with pytest.raises(OSError):
            client.ask("/health")
        thread.join()


@pytest.mark.parametrize("host", ["", " "])
def test_a_host_that_is_empty(host):
    with pytest.raises(LinearizeError, match=r"^--host is empty; give an address such as 127\.0\.0\.1"):
        bound(Settings(name="a", host=host))
