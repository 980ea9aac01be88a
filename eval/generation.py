"""Text from a model, whole or as it comes, and the size of the cache that it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TextStreamer

from linearize.data.chat import Chat
from linearize.data.tokens import Tokens
from linearize.decode.arguments import evaluating
from linearize.decode.choice import obstacles
from linearize.decode.continuation import behind, check_continuation
from linearize.decode.draft import Draft, speculate_ids
from linearize.decode.generate import generate_ids
from linearize.decode.limits import check_numbers, check_room
from linearize.decode.prefix import Prefix, read_ids
from linearize.errors import LinearizeError
from linearize.mixers.offloaded import device_of
from linearize.models.boundary import boundary
from linearize.models.tokenizer import check_ids

REMEDY = "look at the options given and at the checkpoint's generation_config.json"


def generate(
    model: Any,
    tokenizer: Any,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    chat: bool = False,
    system: str | None = None,
    on_text: Callable[[str], None] | None = None,
    graph: bool | None = None,
    compile: bool = False,  # noqa: A002 - torch's name
    state: Prefix | None = None,
    draft: Draft | None = None,
    **options: Any,
) -> list[str]:
    """Continue one or more prompts; a batch is padded on the left.

    A converted model on a CUDA device decodes in one CUDA graph that is kept for the next call (`linearize.decode`),
    greedy or with plain sampling (temperature, top_k, top_p); it gives the tokens that `model.generate` gives. Whatever
    else is asked for (beams, assistants, penalties, ...) runs through `model.generate`. The host looks for the end of
    the texts every 16 tokens (every 4 when streaming) and cuts off what lies behind.

    Args:
        model: a causal language model of transformers with `generate`.
        tokenizer: its tokenizer.
        prompts: one prompt or several. A control token that a raw prompt spells is that token (so a template can be
            written out by hand); one that the message of a chat spells is text.
        max_new_tokens: at most this many tokens are added to each prompt.
        chat: put each prompt into the tokenizer's chat template, as the user's message.
        system: the system message of the chat template; only with `chat`.
        on_text: called with each new piece of text as soon as whole words are there (one prompt, no beams).
        graph: False decodes through transformers always, True insists on the graph.
        compile: `torch.compile` the graph's step first: about a minute at the first call, then faster tokens; with a
            draft the forwards of a round.
        state: of a text that all prompts go on from (`linearize.read_state`, `load_state`). The prompts are split by
            themselves and without the tokenizer's special tokens, and have as many tokens each.
        draft: a model that drafts tokens which this one checks, several in one launch (`linearize.decode.draft`), on
            any device: the same greedy text, to rounding, and the same distribution of sampled ones, whatever the
            draft. Its `count` says how many were taken, and how fast.
        **options: passed to `generate`: do_sample, temperature, top_p, num_beams, ...

    Returns:
        The new text of each prompt, without the prompt and without special tokens.

    Raises:
        LinearizeError: no prompt, an empty one, a chat template asked for that the tokenizer lacks or that refuses the
            message, or streaming of several prompts or of beams, `graph=True` or `compile` where there can be no graph;
            options, or a generation config, that transformers cannot follow or that lie beyond `limits`; more tokens
            than a table of learned positions has rows; logits that are NaN; a state of another model, or with
            options or prompts that it cannot serve; a draft with other tokens, or one that cannot draft here.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check_text(texts)
    if state is not None and not isinstance(state, Prefix):
        raise LinearizeError(
            f"state={state!r:.80}: give a state that is read or loaded, linearize.load_state(PATH)"
        )
    if draft is not None and not isinstance(draft, Draft):
        raise LinearizeError(f"draft={draft!r:.80}: give linearize.decode.Draft(model, its_tokenizer)")
    if draft is not None:
        _check_draft(draft, model, tokenizer, state, graph=graph, compile=compile)
    if on_text is not None and (len(texts) > 1 or options.get("num_beams", 1) > 1):
        raise LinearizeError("streaming shows one sequence: give one prompt and no beams")
    check_numbers({"max_new_tokens": max_new_tokens, **options})
    check_numbers(_unasked(model, options), "the checkpoint's generation_config.json: ")
    if state is not None and chat:
        raise LinearizeError(
            "a chat template behind a state: it would begin another chat; write the template's control tokens into the "
            "prompt, which is split as it stands"
        )
    special = {} if state is None else {"add_special_tokens": False}
    rows = _chat(tokenizer, texts, system) if chat else tokenizer(texts, **special)["input_ids"]
    embedding = model.get_input_embeddings().weight.shape[0]
    for text, row in zip(texts, rows, strict=True):
        check_ids(row, embedding, tokenizer, f"the prompt {text[:40]!r}")
    read = 0 if state is None else state.tokens
    check_room(model, read + max(map(len, rows)), max_new_tokens)
    batch = {name: tensor.to(device_of(model)) for name, tensor in _padded(tokenizer, rows).items()}
    options.setdefault("do_sample", False)
    if not options["do_sample"]:
        # A checkpoint's generation config may hold sampling values, which greedy decoding warns about.
        options = {"temperature": None, "top_p": None, "top_k": None} | options
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options |= {"max_new_tokens": max_new_tokens, "pad_token_id": pad}
    stream = None if on_text is None else _Callback(tokenizer, on_text)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if state is not None:
        check_continuation(model, tokenizer, state, mask, options)
    looking: dict[str, Any] = {
        "on_tokens": None if stream is None else stream.put_block,
        "every": 16 if stream is None else 4,
        "prefix": state,
    }
    made: Tensor | None
    if draft is not None:
        capture = graph is not False
        made = speculate_ids(model, ids, mask, options, draft, capture=capture, compile=compile, **looking)
    else:
        insists = True if compile else graph
        made = generate_ids(model, ids, mask, options, graph=insists, compile=compile, **looking)
    if made is None:
        if state is not None:
            batch = behind(model, state, ids)
        streaming = {} if stream is None else {"streamer": stream}
        plain: dict[str, Any] = {"return_dict_in_generate": False}
        if options.get("stop_strings") or getattr(model.generation_config, "stop_strings", None):
            plain["tokenizer"] = tokenizer  # what they are looked for with
        processors = [*options.pop("logits_processor", ()), _check_logits]
        plain["logits_processor"] = LogitsProcessorList(processors)
        with evaluating(model), boundary("the text", REMEDY, verb="cannot be generated", kind=LinearizeError):
            made = model.generate(**batch, **plain | options, **streaming)
        made = made[:, read + ids.shape[1] :]
    elif stream is not None:
        stream.end()
    return tokenizer.batch_decode(made, skip_special_tokens=True)


def read_state(model: Any, tokenizer: Any, text: str, *, after: Prefix | None = None) -> Prefix:
    """Read a text once, so that `generate` goes on from it as often as is wanted (`state=`).

    Args:
        model: a causal language model of transformers, converted or not.
        tokenizer: its tokenizer.
        text: split as `generate` splits a prompt: a control token that it spells is that token.
        after: what has been read before; the text goes on from there, without special tokens.

    Raises:
        LinearizeError: an empty text, or one longer than the model's positions reach; `after` is another model's.
        UnsupportedModelError: a layer holds something else than a mixer's state or keys and values.
    """
    _check_text([text], "the text")
    special = {} if after is None else {"add_special_tokens": False}
    row = tokenizer(text, **special)["input_ids"]
    check_ids(row, model.get_input_embeddings().weight.shape[0], tokenizer, f"the text {text[:40]!r}")
    if not row:
        raise LinearizeError("an empty text: the tokenizer made no token of it")
    return read_ids(model, row, tokenizer=tokenizer, after=after)


class _Callback(TextStreamer):
    """Hands finished pieces of text on instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)

    def put_block(self, tokens: Tensor) -> None:
        """New tokens [1, n]; the prompt need not have come before."""
        self.next_tokens_are_prompt = False
        for token in tokens[0].split(1):
            self.put(token)


def _check_text(texts: list[str], what: str = "the prompt") -> None:
    if not texts or not all(texts):
        raise LinearizeError("an empty prompt: give at least one character to continue")
    if any("\ud800" <= sign <= "\udfff" for text in texts for sign in text):
        raise LinearizeError(f"{what} holds bytes that are no UTF-8 text; give it in UTF-8")


def _check_draft(
    draft: Draft,
    model: Any,
    tokenizer: Any,
    state: Prefix | None,
    *,
    graph: bool | None,
    compile: bool,  # noqa: A002 - torch's name
) -> None:
    """Refuse what cannot draft for this model, or not in this way."""
    name = "compile" if compile else "graph"
    problems = obstacles(model) if compile or graph else []
    if problems:
        raise LinearizeError(
            f"{name}=True: {'; '.join(problems)}; without it rounds run operation by operation"
        )
    draft.check(model, tokenizer, state)


def _unasked(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What the model's own generation config adds to a call with these options."""
    own = {**vars(model.generation_config), "max_new_tokens": None, "do_sample": options.get("do_sample")}
    return {name: value for name, value in own.items() if name not in options or name == "do_sample"}


def _check_logits(ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor: NaN or infinity would be decoded as whatever token comes first."""
    if bool((scores.isnan() | scores.isposinf()).any()):
        raise LinearizeError(
            f"the model gives NaN or infinity and no logits after {ids.shape[1]} tokens: its numbers overflow in "
            f"{scores.dtype} or its weights are damaged; load it in a wider dtype, or take another checkpoint"
        )
    return scores


def _chat(tokenizer: Any, texts: list[str], system: str | None) -> list[list[int]]:
    """Ids of each text as the user's message. The template writes its special tokens itself."""
    if not getattr(tokenizer, "chat_template", None):
        raise LinearizeError("the tokenizer has no chat template: generate without the chat option")
    chat, encode = Chat(tokenizer), Tokens(tokenizer)
    before = [{"role": "system", "content": system}] if system else []
    return [encode.document(chat.prompt([*before, {"role": "user", "content": text}])) for text in texts]


def _padded(tokenizer: Any, rows: list[list[int]]) -> dict[str, Tensor]:
    """Left-padded ids and mask."""
    if not all(rows):
        raise LinearizeError("an empty prompt: the tokenizer made no token of it")
    longest = max(len(row) for row in rows)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
