"""The server over HTTP: answers that are `generate`'s, streams that are the same, and nothing of a neighbour's."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from serving import CHAT, COMPLETIONS, PATIENCE, byte_model, chatting, expected, served, until

WORDS = "In the year 1512 the river rose by seven feet, and the miller moved his corn. "


@pytest.fixture(scope="module")
def model():
    return byte_model(layers=[0, 2])


@pytest.fixture(scope="module")
def client(model):
    with served(model) as made:
        yield made


def prompts(count: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    return [
        WORDS[start : start + dice.randint(1, 60)] for start in (dice.randrange(15) for _ in range(count))
    ]


def at_once(calls) -> list:
    """What functions of no arguments give, all running at the same time."""
    found = [None] * len(calls)

    def run(index: int) -> None:
        found[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return found


@pytest.mark.parametrize("layers", ["all", [1], None], ids=["converted", "hybrid", "teacher"])
def test_unequal_prompts_at_once_are_generates(layers):
    """More of them than slots, some longer than a piece of reading."""
    model, tokenizer = byte_model(layers), chatting()
    texts = prompts(9)
    with served(model, tokenizer) as client:
        made = at_once([lambda text=text: client.text(text, 12) for text in texts])
    assert made == [expected(model, tokenizer, text, 12) for text in texts]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layers", ["all", [1], None], ids=["converted", "hybrid", "teacher"])
def test_graphs_of_a_card(layers):
    """The rows' steps are CUDA graphs there; twice as many texts as slots, which come and go."""
    model, tokenizer = byte_model(layers).cuda(), chatting()
    texts = prompts(9, seed=1)
    # first, so that kernels are compiled when the server is waited for
    wanted = [expected(model, tokenizer, text, 12) for text in texts]
    with served(model, tokenizer, slots=4) as client:
        assert at_once([lambda text=text: client.text(text, 12) for text in texts]) == wanted


def test_chat_is_the_template_and_generate(client, model):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a river?"}]
    body = {"model": "tiny", "messages": messages, "max_completion_tokens": 10, "temperature": 0}
    status, _, found = client.ask(CHAT, body)
    assert status == 200
    written = "<system>be brief\n<user>a river?\n<assistant>"
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected(model, chatting(), written, 10)}
    used = len(written)
    assert found["usage"] == {"prompt_tokens": used, "completion_tokens": 10, "total_tokens": used + 10}
    assert choice["finish_reason"] == "length" and found["object"] == "chat.completion"
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "river?"}]
    body["messages"][1]["content"] = parts
    assert client.ask(CHAT, body)[2]["choices"] == found["choices"]


@pytest.mark.parametrize(
    "fields", [{}, {"seed": 4, "temperature": 1.2, "top_p": 0.9}, {"stop": ["e", "1"]}], ids=str
)
def test_streams_are_the_whole_answers(client, fields):
    body = {"prompt": WORDS[:30], "max_tokens": 40, "temperature": 0, **fields}
    whole = client.ask(COMPLETIONS, body)[2]
    events = client.events(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    assert events[-1]["usage"] == whole["usage"] and events[-1]["choices"] == []
    choices = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [
        whole["choices"][0]["finish_reason"]
    ]
    assert len(choices) > 3 or whole["choices"][0]["finish_reason"] == "stop"
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "temperature": 0}
    deltas = [event["choices"][0]["delta"] for event in client.events(CHAT, chat)]
    assert deltas[0]["role"] == "assistant" and deltas[-1] == {}
    said = client.ask(CHAT, chat)[2]["choices"][0]["message"]["content"]
    assert "".join(delta.get("content", "") for delta in deltas) == said


def test_a_stop_string_ends_the_text_before_it(client, model):
    free = client.text(WORDS[:20], 30)
    stop = free[7:9]
    status, _, found = client.ask(
        COMPLETIONS, {"prompt": WORDS[:20], "max_tokens": 30, "temperature": 0, "stop": ["never so", stop]}
    )
    assert status == 200 and found["choices"][0]["finish_reason"] == "stop"
    assert found["choices"][0]["text"] == free[: free.index(stop)]


def test_a_token_that_ends_texts_ends_them(model):
    tokenizer = chatting()
    free = expected(model, tokenizer, WORDS[:20], 12)
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [257, tokenizer(free[5])["input_ids"][0]]
        with served(model, tokenizer) as client:
            body = {"prompt": WORDS[:20], "max_tokens": 12, "temperature": 0}
            found = client.ask(COMPLETIONS, body)[2]
            assert found["choices"][0]["text"] == free[: free.index(free[5])]
            assert found["choices"][0]["finish_reason"] == "stop"
            assert found["usage"]["completion_tokens"] == free.index(free[5]) + 1
            assert client.text(WORDS[:20], 12, ignore_eos=True) == free
    finally:
        model.generation_config.eos_token_id = before


def test_a_stop_string_that_spells_a_control_token(model):
    """No text holds it, so that as a string it would never be found."""
    tokenizer = chatting()
    free = expected(model, tokenizer, WORDS[:20], 12)
    place = free.index(free[5])
    row = model.lm_head.weight[tokenizer(free[5])["input_ids"][0]]
    with torch.no_grad():  # the token that begins texts is made in the place of a letter
        kept = row.clone(), model.lm_head.weight[256].clone()
        model.lm_head.weight[256], row[:] = row.clone(), 0
    begin = tokenizer.convert_ids_to_tokens(256)
    try:
        with served(model, tokenizer) as client:
            body = {"prompt": WORDS[:20], "max_tokens": 12, "temperature": 0}
            assert client.ask(COMPLETIONS, body)[2]["choices"][0]["finish_reason"] == "length"
            for stream in (False, True):
                asked = {**body, "stop": ["never", begin], "ignore_eos": True}
                found = client.events(COMPLETIONS, asked) if stream else [client.ask(COMPLETIONS, asked)[2]]
                assert "".join(each["choices"][0]["text"] for each in found) == free[:place]
                assert found[-1]["choices"][0]["finish_reason"] == "stop"
                assert stream or found[0]["usage"]["completion_tokens"] == place + 1
    finally:
        with torch.no_grad():
            row[:], model.lm_head.weight[256] = kept


def test_several_prompts_and_several_choices(client, model):
    body = {"prompt": ["In the", "the miller"], "max_tokens": 6, "temperature": 0, "n": 2}
    choices = client.ask(COMPLETIONS, body)[2]["choices"]
    texts = [expected(model, chatting(), text, 6) for text in body["prompt"]]
    assert [choice["text"] for choice in choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    drawn = {**body, "temperature": 1.5, "seed": 11, "max_tokens": 20}
    one, two = client.ask(COMPLETIONS, drawn)[2], client.ask(COMPLETIONS, drawn)[2]
    assert one["choices"] == two["choices"], "a seed gives the same texts"
    assert len({choice["text"] for choice in one["choices"]}) == 4
    ids = chatting()("In the")["input_ids"]
    assert client.text(ids, 6) == client.text([ids], 6) == texts[0]


def test_scores_are_the_models(client, model):
    body = {"prompt": WORDS[:9], "max_tokens": 4, "temperature": 0, "logprobs": 2}
    found = client.ask(COMPLETIONS, body)[2]["choices"][0]
    ids = chatting()(WORDS[:9] + found["text"])["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, 8:-1].log_softmax(-1)
    scores = found["logprobs"]
    assert torch.allclose(torch.tensor(scores["token_logprobs"]), logits.amax(-1), atol=1e-4)
    assert "".join(scores["tokens"]) == found["text"] and scores["text_offset"] == [0, 1, 2, 3]
    assert all(len(top) == 2 for top in scores["top_logprobs"])
    chat = {
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 1,
    }
    whole = client.ask(CHAT, {**chat, "temperature": 0})[2]["choices"][0]["logprobs"]["content"]
    streamed = [e["choices"][0]["logprobs"] for e in client.events(CHAT, {**chat, "temperature": 0})]
    assert [token for part in streamed if part for token in part["content"]] == whole and len(whole) == 3
    assert all(each["top_logprobs"][0]["token"] == each["token"] for each in whole)


def raw_stream(port: int, prompt: str, tokens: int) -> socket.socket:
    """A stream that has begun, as a bare connection."""
    body = f'{{"prompt": "{prompt}", "max_tokens": {tokens}, "stream": true, "temperature": 0}}'.encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.sendall(head + body)
    assert connection.recv(20).startswith(b"HTTP/1.1 200")
    return connection


def test_whoever_goes_away_frees_a_slot_and_leaves_nothing(model):
    """Streams that are dropped at random beside texts that are not: those are `generate`'s, in slots used before."""
    tokenizer, dice = chatting(), random.Random(3)
    with served(model, tokenizer, queue=100, new=100_000) as client:
        for _ in range(4):
            streams = [raw_stream(client.port, text, 100_000) for text in prompts(3, dice.random())]
            texts = prompts(4, dice.random())
            asked: list = []
            thread = threading.Thread(
                target=lambda texts=texts, asked=asked: asked.extend(
                    at_once([lambda text=text: client.text(text, 9) for text in texts])
                )
            )
            thread.start()
            for stream in streams:
                time.sleep(dice.random() / 20)
                stream.close()
            thread.join(PATIENCE)
            assert asked == [expected(model, tokenizer, text, 9) for text in texts]
        until(lambda: client.served.scheduler.open == 0)
        assert client.number('linearize_texts_total{reason="cancelled"}') == 12
        assert client.served.slots.live == 0


def test_who_goes_away_before_an_answer_that_is_no_stream(model):
    with served(model, slots=1, new=100_000) as client:
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            body = b'{"prompt": "a", "max_tokens": 100000, "ignore_eos": true}'
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            until(lambda: client.served.scheduler.open == 1)
        until(lambda: client.served.scheduler.open == 0)
        assert client.number('linearize_texts_total{reason="cancelled"}') == 1


def test_models_health_and_metrics(client):
    status, _, listed = client.ask("/v1/models")
    assert status == 200 and [each["id"] for each in listed["data"]] == ["tiny"]
    assert client.ask("/v1/models/tiny")[2]["object"] == "model"
    assert client.ask("/health")[::2] == (200, {"status": "ok"})
    before = client.number("linearize_generated_tokens_total"), client.number("linearize_prompt_tokens_total")
    client.text("abcd", 5)
    assert client.number("linearize_generated_tokens_total") == before[0] + 5
    assert client.number("linearize_prompt_tokens_total") == before[1] + 4
    assert client.number("linearize_slots") == 3 and client.number("linearize_state_bytes") > 0
