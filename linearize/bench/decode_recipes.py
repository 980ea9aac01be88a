"""`linearize bench decode random --recipes ...`: prefill and decoding of every recipe beside the teacher.

Decoding goes through `linearize.decode`, the teacher's too: one captured step for each recipe and batch. What recipes
are compared with is the teacher with transformers' own attention; with the kernel that reads keys for softmax layers of
hybrids it has a row of its own. A prompt goes
through the model's chunked form into an ordinary cache, at once, or in pieces where the memory does not hold it.

With `--only` several processes may share a folder and a device: they compile at once, and time one after the other.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.bench import quiet, report, whole
from linearize.bench.profiles import kept, profiled
from linearize.bench.recipes import about, device_of, say
from linearize.bench.subjects import RANDOM, TEACHER, chosen, convert, random_model
from linearize.bench.whole import SLOW, Budget, Row, Stopwatch, Table, empty, reported
from linearize.console import quiet_libraries
from linearize.decode import Decoder
from linearize.decode.cache import tensors
from linearize.decode.ways import EVERY
from linearize.errors import LinearizeError

CONTEXT = (1024,)
"""Tokens before those that are decoded."""
LOOKS = 16
"""Most blocks of EVERY tokens that are timed, so that kept softmax layers know how long their buffers are."""
ALONE = "alone"
"""`--compile alone`: without the step that is not compiled."""
NEWEST = ", newest"
"""Behind a way's name: the teacher by the kernel of kept softmax layers."""
SMALLEST = 1024
"""Tokens of the smallest piece of a prompt that does not fit as a whole."""


def main(options: argparse.Namespace) -> int:
    """Measure, print every row as it comes, and write recipes.json and recipes.md.

    Args:
        options: path ("random"), shape, recipes (names), batch, context (tuples, of decoding), prefill (lengths of
            prompts), compile (also the compiled step; `ALONE`: only that), profile (of each decoding), only (without
            the teacher's own rows), budget, device, out.

    Raises:
        LinearizeError: a model instead of random weights, no such recipe or shape, or no CUDA device.
    """
    if options.path != RANDOM:
        raise LinearizeError(
            f"--recipes goes with {RANDOM} in the place of {options.path}; --recipe names one for it"
        )
    device, names = device_of(options.device), chosen(options.recipes)
    quiet_libraries()
    torch.set_float32_matmul_precision("high")
    random_model("meta", torch.float32, options.shape)
    table = Table(options.out, say, about(device), report.given(options))
    whole.fill(table, names, lambda name, budget: rows(name, options, device, budget), options)
    say(f"recipes.json and recipes.md in {options.out}")
    return 0


def rows(name: str, options: argparse.Namespace, device: torch.device, budget: Budget) -> Iterator[Row]:
    """The rows of one recipe, or of the teacher: its prompts, then its tokens."""
    model: Any = None
    turn = options.out / quiet.TURN if options.only else None
    ways: dict[str, dict[str, Any] | None] = {} if options.compile == ALONE else {"graph": None}
    if options.compile:
        ways["graph, compiled"] = {}
    if name == TEACHER and device.type == "cuda":
        ways |= {f"{way}{NEWEST}": how for way, how in ways.items()}
    todo: list[tuple[Row, Callable[[Any], Row]]] = []
    for length in options.prefill:
        key = {"measured": "prefill", "way": "chunked", "batch": 1, "length": length}
        todo.append((key, partial(read_prompt, length=length, turn=turn)))
    for way, compile in ways.items():  # noqa: A001 - torch's name
        for batch in options.batch:
            for context in options.context or CONTEXT:
                key = {"measured": "decode", "way": way, "batch": batch, "length": context}
                run = partial(decode, batch=batch, context=context, compile=compile, turn=turn)
                newest = name != TEACHER or way.endswith(NEWEST)
                run = partial(run, profile=options.profile, newest=newest)
                todo.append((key, run))
    for key, measure in todo:
        row: Row = {**key, "shape": options.shape, "recipe": name}
        if budget.spent:
            yield row | empty("not run: the budget is spent")
            continue
        found: Row = {}
        with reported() as notes:
            if model is None:
                model = convert(random_model(device, torch.bfloat16, options.shape), name).requires_grad_(
                    False
                )
            found = measure(model)
        whole.release()  # the frames of a failure are gone only now
        profile = found.pop("profile", None)
        yield row | (empty(notes[0]) if notes else found)
        if profile is not None:
            kept(options.out, row | profile)
            say(f"       {100 * profile['busy']:5.1f} % busy, {profile['kernels'] / EVERY:g} kernels a token")
    del model
    whole.release()


def read_prompt(model: Any, length: int, turn: Path | None = None) -> Row:
    """A row of reading one prompt of random tokens, whose last logits are made."""
    device = next(model.parameters()).device
    watch, piece, note = Stopwatch(device, spend=0.5, turn=turn), length, ""
    ids = random_tokens(model, 1, length)
    while True:
        try:
            first = watch.once(lambda: prefill(model, ids, piece))  # noqa: B023 - called at once
            break
        except torch.OutOfMemoryError:
            if piece // 2 < SMALLEST:
                raise
        piece //= 2
        whole.release()
        note = f"in pieces of {piece:,} tokens"
    watch.forget_peak()
    # without a second look where the first one took so long that compiling hardly counts
    again = first if first > 6 * SLOW else watch.once(lambda: prefill(model, ids, piece))
    seconds, count = watch.seconds(lambda: prefill(model, ids, piece), again)
    return {
        "tokens_per_second": round(length / seconds, 1),
        "milliseconds": round(1e3 * seconds, 3),
        "peak_gib": watch.peak(),
        "first_seconds": round(first, 2),
        "steps": count,
        "note": note,
    }


@torch.no_grad()
def prefill(model: Any, ids: Tensor, piece: int) -> Tensor:
    """Logits behind the last of the tokens [B, T], read `piece` at a time into a cache that is thrown away."""
    from transformers import DynamicCache

    names = inspect.signature(model.forward).parameters
    # the second name is that of transformers before 5.24
    cache = {"cache" if "cache" in names else "past_key_values": DynamicCache(config=model.config)}
    for part in ids.split(piece, 1):
        logits = model(input_ids=part, use_cache=True, logits_to_keep=1, **cache).logits
    return logits


def decode(
    model: Any,
    batch: int,
    context: int,
    compile: dict[str, Any] | None,  # noqa: A002 - torch's name
    turn: Path | None = None,
    *,
    profile: bool = False,
    newest: bool = True,
) -> Row:
    """A row of decoding behind prompts of random tokens; `profile` in it, where asked for, is of `EVERY` tokens.

    `newest`: see `Decoder`.
    """
    device = next(model.parameters()).device
    watch = Stopwatch(device, spend=0.5, most=LOOKS, turn=turn)
    if compile is not None:
        torch._dynamo.reset()
    # two runs to warm up, one behind the wait for the turn, those that are timed, and one that is profiled
    length = context + 1 + EVERY * (LOOKS + 4)
    decoder = Decoder(model, batch, length=length, compile=compile, newest=newest)
    first = watch.once(decoder.prepare)
    if decoder.obstacle:
        raise LinearizeError(decoder.obstacle)
    with watch.turn:  # prompts take memory and the whole device: others wait
        watch.once(lambda: decoder.read(random_tokens(model, batch, context), None))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        watch.forget_peak()
        watch.once(lambda: decoder.run(EVERY))
        again = watch.once(lambda: decoder.run(EVERY))
        seconds, count = watch.seconds(lambda: decoder.run(EVERY), again)
        looked = {}
        if profile:
            looked["profile"] = profiled(lambda: decoder.run(EVERY), watch, round(1e3 * seconds, 4))
            looked["profile"] |= {"tokens": EVERY, "weights_mib": round(weights(model) / 2**20, 2)}
    seconds /= EVERY
    held = sum(x.numel() * x.element_size() for x in tensors(decoder.cache).values())
    return {
        "tokens_per_second": round(batch / seconds, 1),
        "milliseconds": round(1e3 * seconds, 4),
        "peak_gib": watch.peak(),
        "cache_mib": round(held / 2**20, 2),
        "first_seconds": round(first, 2),
        "steps": count * EVERY,
        "note": "",
        **looked,
    }


def weights(model: Any) -> int:
    """Bytes of a model's parameters, of which each token reads all but the rows of the embedding."""
    return sum(x.numel() * x.element_size() for x in model.parameters())


def random_tokens(model: Any, batch: int, length: int) -> Tensor:
    """[batch, length] on the model's device, the same for the same sizes."""
    generator = torch.Generator().manual_seed(length)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    return ids.to(next(model.parameters()).device)
