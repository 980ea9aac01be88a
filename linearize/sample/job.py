"""The whole job: as many tokens of a teacher's own text as are wanted, from the cache where they are there.

Rounds are written one by one; while the device is at the next, the last one is filtered, turned to text and stored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from linearize.config.schema import TeacherConfig
from linearize.decode.choice import obstacles
from linearize.decode.reach import furthest
from linearize.errors import DataError, UnsupportedModelError
from linearize.models.layers import head_sizes, most
from linearize.progress import Meter
from linearize.sample.choice import Narrow
from linearize.sample.documents import Filter, beginning, documents
from linearize.sample.openings import CHAT_SHARE, Openings, openings
from linearize.sample.store import Counts, Part, Store, key_of
from linearize.sample.writer import Writer
from linearize.surgery import converted

log = logging.getLogger(__name__)

MOST_ROWS = 2048
ROWS_ON_CPU = 8
SHARE = 0.7
"""Of a device's memory, for keys and scores; of all of it and not of what is free, so that a card has one batch."""
SCORE_BYTES = 16
"""Of a row and vocabulary entry: logits, and what selecting among them takes."""
ROUND = {"cuda": 2, "cpu": 1}
"""Lengths of a document that a round goes on for; the documents at its end are cut."""
PER_LENGTH = 32
"""Openings a row and length; begun again where documents are shorter still."""
LIKELY = 0.5
"""Share that is kept of what is written, until the first round has shown it."""
FRUITLESS = 8
"""Rounds one after the other that keep less than a hundredth."""


@dataclass(frozen=True)
class Sampled:
    """What is there.

    Attributes:
        files: parts, in order, which together hold the tokens that were wanted.
        counts: of these parts.
        made: tokens that this call has made, the dropped ones included; the others were there.
        seconds: that making them took, from the first step to the last part.
        folder: that holds the parts.
    """

    files: list[Path]
    counts: Counts
    made: int
    seconds: float
    folder: Path


def chat_share(settings: TeacherConfig, tokenizer: Any) -> float:
    """The share of documents that are answers in a conversation.

    Raises:
        DataError: it was asked for, and the tokenizer has no chat template.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if settings.chat == "auto":
        return CHAT_SHARE if has else 0.0
    if settings.chat and not has:
        raise DataError(
            f"data.teacher.chat={settings.chat}: this model's tokenizer has no chat template; set it to 0 or auto"
        )
    return float(settings.chat)


def sample(
    tokens: int,
    settings: TeacherConfig,
    *,
    teacher: dict[str, str],
    tokenizer: Any,
    load: Callable[[], Any],
    compile: bool = False,  # noqa: A002 - torch's name
    title: str = "sample",
) -> Sampled:
    """At least so many tokens of text, in as many of the first parts as that takes.

    Args:
        tokens: of kept documents, openings included.
        settings: how they are written.
        teacher: fingerprint of the model's files.
        tokenizer: of the teacher.
        load: gives the teacher, on its device, in evaluation mode; called only where something is missing.
        compile: the step, before it is captured: a minute at first, faster from then on, and other roundings, so that
            it is another text.
        title: of the progress bar.

    Raises:
        UnsupportedModelError: the teacher's layers cannot be run in this way; names what stands in the way.
        DataError: settings that the tokenizer or the model cannot follow; nothing but loops comes out.
        CheckpointError: the text cannot be written; what was written before stays.
    """
    chat = chat_share(settings, tokenizer)
    prompts = openings(tokenizer, chat=chat > 0, longest=settings.length // 2)
    store = Store(key_of(teacher, {**asdict(settings), "chat": chat, "compile": compile}))
    with store.held():
        have = _Have(store, tokens)
        have.look()
        before, seconds = have.counts.tokens["kept"], 0.0
        if before < tokens:
            if before:
                log.info("%s tokens of this text are there already, in %s", f"{before:,}", store.folder)
            with Meter(title, tokens, done=before) as meter:
                seconds = _go_on(have, settings, chat, prompts, tokenizer, load, compile, meter)
        made = sum(have.counts.tokens.values()) - have.found
        if made:
            # a round that was begun on a guess may not have been needed: a call that finds all parts gives the same
            have = _Have(store, tokens)
            have.look()
    return Sampled([store.part(n) for n in range(have.parts)], have.counts, made, seconds, store.folder)


class _Have:
    """Parts that are there, counted as far as they are wanted."""

    def __init__(self, store: Store, tokens: int) -> None:
        self.store, self.tokens = store, tokens
        self.counts, self.known, self.parts, self.found = Counts(), set[int](), 0, 0

    @property
    def enough(self) -> bool:
        return self.counts.tokens["kept"] >= self.tokens

    def look(self) -> None:
        """Take the next parts as far as they are there."""
        while not self.enough and (part := self.store.read(self.parts)) is not None:
            self.counts.include(part[0])
            self.known.update(part[1])
            self.parts += 1
            self.found = sum(self.counts.tokens.values())

    def take(self, part: Part) -> None:
        """Store a part that was made."""
        self.store.write(self.parts, part)
        self.counts.include(part.counts)
        self.parts += 1


def _go_on(
    have: _Have,
    settings: TeacherConfig,
    chat: float,
    prompts: Openings,
    tokenizer: Any,
    load: Callable[[], Any],
    compile: bool,  # noqa: A002
    meter: Meter,
) -> float:
    """Rounds until there is enough; seconds that they took, loading and capturing left out."""
    model = load()
    _check(model, settings)
    about = have.store.about() if have.parts else {}
    rows = about.get("batch") or _rows(model, settings)
    device = next(model.parameters()).device
    steps = about.get("steps") or ROUND.get(device.type, 1) * settings.length
    many = PER_LENGTH * -(-steps // settings.length)
    have.store.describe(
        {
            "batch": rows,
            "steps": steps,
            "device": _name(device),
            "settings": {**asdict(settings), "chat": chat},
        }
    )
    sampling = Narrow(settings.temperature > 0, settings.temperature or 1.0, settings.top_k, settings.top_p)
    writer = Writer(
        model,
        rows,
        sampling,
        prompts.ids,
        ends=_ends(model, tokenizer),
        length=settings.length,
        steps=steps,
        capture=device.type == "cuda",
        compile={} if compile else None,
    )
    writer.prepare_order(many)
    sizes = np.array(list(map(len, prompts.ids)))
    sift = Filter(have.known)
    poor, began = 0, time.monotonic()
    waiting: Future[Part] | None = None
    number = have.parts
    with ThreadPoolExecutor(1) as worker:
        try:
            while waiting is not None or not have.enough:
                likely = have.counts.tokens["kept"]
                likely += 0 if waiting is None else _expected(have, rows * steps)
                written = None
                if likely < have.tokens:
                    seed = _seed(settings.seed, number)
                    order = prompts.order(rows, many, chat, seed)
                    rounds = 1 if waiting is None else 2  # the one before is not looked at yet
                    written = writer.write(order, seed, _progress(meter, have, rounds * rows * steps, steps))
                    number += 1
                if waiting is not None:
                    done, waiting = waiting, None
                    part = done.result()
                    have.take(part)
                    poor = poor + 1 if part.counts.tokens["kept"] * 100 < rows * steps else 0
                    if poor >= FRUITLESS:
                        raise DataError(_fruitless(have.counts))
                    meter.advance(0, kept=_kept(have))
                if written is not None:
                    waiting = worker.submit(_part, written, order, sizes, prompts, sift, tokenizer)
        except KeyboardInterrupt:
            if waiting is not None:
                have.take(waiting.result())
            raise
        finally:
            writer.release()
    meter.advance(have.tokens - meter.done, kept=_kept(have))
    return time.monotonic() - began


def _part(
    written: np.ndarray, order: np.ndarray, sizes: np.ndarray, prompts: Openings, sift: Filter, tokenizer: Any
) -> Part:
    """A round as texts."""
    counts, kept = Counts(), []
    for document in documents(written, order, sizes):
        verdict = sift.verdict(document)
        counts.add(verdict, len(document.ids), ended=document.ended)
        if verdict is None:
            kept.append(document)
    begin = len(prompts.begin)
    ids = [
        d.ids[begin if d.ids[:begin].tolist() == prompts.begin else 0 :].astype(np.int64).tolist()
        for d in kept
    ]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Part(
        # a document that was cut may end within a character
        [text.rstrip("\ufffd") for text in texts],
        [f"teacher/{prompts.kinds[document.opening]}" for document in kept],
        [len(document.ids) for document in kept],
        [beginning(document.ids) for document in kept],
        counts,
    )


def _check(model: Any, settings: TeacherConfig) -> None:
    """Refuse a model that cannot write in this way. Raises UnsupportedModelError, or DataError for its length."""
    if converted(model):
        raise UnsupportedModelError(
            "this model is a conversion; text is sampled from its teacher, a model that is softmax throughout"
        )
    problems = [problem for problem in obstacles(model) if "need a CUDA device" not in problem]
    if not getattr(model, "_supports_attention_backend", False):
        problems.append(
            f"{type(model).__name__} has an attention of its own that transformers cannot exchange"
        )
    if problems:
        raise UnsupportedModelError(
            f"text cannot be sampled from this model: {'; '.join(problems)}; sample with another tool, and give the "
            "text as a file (data.source=FILE)"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and settings.length > longest:
        raise DataError(
            f"data.teacher.length={settings.length}: the model has {longest} positions; take {longest} or less"
        )
    longest = furthest(model)
    if longest is not None and settings.length > longest:
        raise DataError(
            f"data.teacher.length={settings.length}: the model's rotary embedding turns all tokens otherwise beyond "
            f"{longest}, and keys of rows that are written side by side stay as they were; take {longest} or less"
        )


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a document: end of text, and every other control token, which no text holds."""
    from linearize.data.tokens import Tokens

    encode = Tokens(tokenizer)
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = given if isinstance(given, list | tuple) else [given]
    found = {*encode.control.ids, encode.end, *listed} - {None}
    rows = model.get_output_embeddings().weight.shape[0]
    return sorted(int(token) for token in found if token < rows)


def _rows(model: Any, settings: TeacherConfig) -> int:
    """Rows that fill the device: a power of two by the device's memory, or what was asked for."""
    if settings.batch != "auto":
        return int(settings.batch)
    parameter = next(model.parameters())
    if parameter.device.type != "cuda":
        return ROWS_ON_CPU
    config = model.config.get_text_config()
    heads = most(config, "num_key_value_heads") or most(config, "num_attention_heads") or 1
    width = max(head_sizes(config), default=config.hidden_size)
    keys = 2 * config.num_hidden_layers * heads * width * parameter.element_size() * settings.length
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    room = SHARE * (torch.cuda.get_device_properties(parameter.device).total_memory - weights)
    fits = int(room / (keys + SCORE_BYTES * config.vocab_size))
    return min(MOST_ROWS, 1 << max(fits, 1).bit_length() - 1)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _seed(seed: int, number: int) -> int:
    """Of a round."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


def _expected(have: _Have, tokens: int) -> int:
    """Tokens that a round will have kept, by what the ones before have."""
    return int(tokens * _kept(have)) if have.counts.tokens["kept"] else tokens


def _kept(have: _Have) -> float:
    """Share of what was written."""
    seen = sum(have.counts.tokens.values())
    return have.counts.tokens["kept"] / seen if seen else LIKELY


def _progress(meter: Meter, have: _Have, pending: int, steps: int) -> Callable[[int], None]:
    """The bar during a round: from where it stands to where it ought to be at the round's end.

    How much of a round is kept shows only afterwards; a guess that was wrong is made good over the next round, so that
    the bar neither jumps nor goes back nor runs past its end.

    Args:
        meter: of tokens that are kept.
        have: what is known to be kept.
        pending: tokens that will have been written beside it.
        steps: of the round.

    Returns:
        What the writer tells how many steps more are done.
    """
    begin, done = meter.done, 0
    goal = max(begin, min(have.tokens, have.counts.tokens["kept"] + int(pending * _kept(have))))

    def advance(more: int) -> None:
        nonlocal done
        done = min(steps, done + more)
        meter.advance(begin + (goal - begin) * done // steps - meter.done)

    return advance


def _fruitless(counts: Counts) -> str:
    dropped = ", ".join(f"{what} {n:,}" for what, n in counts.documents.items() if what != "kept")
    return (
        f"the teacher writes next to no text that can be kept (documents dropped: {dropped}); raise "
        "data.teacher.temperature, or give a corpus as data.source"
    )
