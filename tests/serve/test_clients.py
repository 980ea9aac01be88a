"""OpenAI's own client against the server."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from serving import byte_model, chatting, expected, served

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
