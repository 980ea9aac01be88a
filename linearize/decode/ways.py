"""Ways to decode that are timed side by side: our captured step, transformers' `generate`, and a loop of its parts.

Every way reads a prompt and then makes tokens; what is timed is the time from token to token, without the prompt and
without the first tokens, in which things compile. Nobody stops early: no token ends a text here.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from linearize.decode import Decoder
from linearize.decode.cache import tensors
from linearize.errors import LinearizeError

SKIPPED = 12
"""First tokens that are not timed: compiling, recording, warming up."""
EVERY = 16
"""Tokens between two looks of the host, as `linearize.generate` takes them."""


@dataclass(frozen=True)
class Point:
    """Where a way is measured.

    Attributes:
        batch: texts at once.
        context: tokens of each prompt.
        tokens: timed tokens of each text.
    """

    batch: int
    context: int
    tokens: int

    @property
    def made(self) -> int:
        """Tokens made of each text, in whole looks of the host, the untimed ones with them."""
        return 1 + EVERY * (-(-SKIPPED // EVERY) + -(-self.tokens // EVERY))


@dataclass
class Stamps(BaseStreamer):
    """When tokens came, on the host.

    Attributes:
        times: seconds, one for each look.
        counts: tokens of each text by then.
    """

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """One token of each text, [B]; the prompt [B, T] does not count."""
        if value.dim() == 1:
            self.add(1)

    def end(self) -> None:
        """Nothing is left to hand on."""

    def add(self, tokens: int) -> None:
        """So many tokens of each text have come."""
        self.times.append(time.perf_counter())
        self.counts.append((self.counts[-1] if self.counts else 0) + tokens)

    def seconds(self) -> float:
        """Seconds from token to token, the first `SKIPPED` left out.

        Raises:
            ValueError: no token came after them.
        """
        kept = [i for i, count in enumerate(self.counts) if count > SKIPPED]
        if len(kept) < 2:
            raise ValueError("too few tokens to time")
        first, last = kept[0], kept[-1]
        return (self.times[last] - self.times[first]) / (self.counts[last] - self.counts[first])


Measured = tuple[float, int]
"""Seconds from token to token, and bytes of the cache at the end."""


def graph(model: Any, compile: dict[str, Any] | None) -> Callable[[Point], Measured]:  # noqa: A002
    """Our engine; one decoder for each batch serves all contexts, so what grows with the context would show."""
    made: dict[int, Decoder] = {}

    def measure(point: Point) -> Measured:
        if point.batch not in made:
            made[point.batch] = Decoder(model, point.batch, compile=compile)
            made[point.batch].prepare()
            if made[point.batch].obstacle:
                raise LinearizeError(f"the step does not compile: {made[point.batch].obstacle}")
        decoder, stamps = made[point.batch], Stamps()
        decoder.generate(
            prompt(model, point), None, point.made, on_tokens=lambda x: stamps.add(x.shape[1]), every=EVERY
        )
        held = sum(x.numel() * x.element_size() for x in tensors(decoder.cache).values())
        return stamps.seconds(), held

    return measure


def generate(model: Any, **options: Any) -> Callable[[Point], Measured]:
    """`model.generate` as it is, timed by a streamer, which costs it nothing that it does not do anyway."""

    def measure(point: Point) -> Measured:
        ids, stamps = prompt(model, point), Stamps()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=point.made,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=stamps,
            return_dict_in_generate=True,
            **options,
        )
        held = cache_bytes(made.cache if "cache" in made else made.past_key_values)
        if hasattr(model, "_cache"):
            del model._cache
        return stamps.seconds(), held

    return measure


def loop(model: Any, **options: Any) -> Callable[[Point], Measured]:
    """A compiled forward and argmax over a static cache, token after token: generate without its work on the host."""
    # the second name is that of transformers before 5.24
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def measure(point: Point) -> Measured:
        cache = StaticCache(config=model.config, max_cache_len=point.context + point.made)

        def step(token: Tensor, position: Tensor) -> Tensor:
            logits = model(input_ids=token, position_ids=position, use_cache=True, **{name: cache}).logits
            return logits[:, -1].argmax(-1, keepdim=True)

        compiled = torch.compile(step, dynamic=False, **options)
        ids, stamps = prompt(model, point), Stamps()
        with torch.no_grad():
            given = {name: cache, "use_cache": True, "logits_to_keep": 1}
            token = model(input_ids=ids, **given).logits[:, -1].argmax(-1, keepdim=True)
            position = torch.full_like(token, point.context)
            for _ in range(point.made // EVERY):
                for _ in range(EVERY):
                    torch.compiler.cudagraph_mark_step_begin()
                    token = compiled(token, position).clone()
                    position += 1
                token.cpu()
                stamps.add(EVERY)
        return stamps.seconds(), cache_bytes(cache)

    return measure


def prompt(model: Any, point: Point) -> Tensor:
    """Random tokens [B, context]."""
    generator = torch.Generator().manual_seed(point.context)
    size = (point.batch, point.context)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, size, generator=generator).to(next(model.parameters()).device)


@contextmanager
def room(device: torch.device) -> Iterator[None]:
    """Before and after, memory of what is no longer used is given back."""

    def release() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    release()
    try:
        yield
    finally:
        release()


def half(model: Any) -> Any:
    """A converted model in bfloat16, its mixers in float32 as they were."""
    for name, parameter in model.named_parameters():
        if ".mixer." not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def cache_bytes(past_key_values: Any) -> int:
    """Bytes held by every tensor that can be reached from a cache: keys, values, states, counters.

    Each storage counts once and whole, so that a short view which keeps a long tensor alive is not mistaken for a small
    cache. Modules reached from the cache are not part of it.

    Args:
        past_key_values: a Cache of transformers, or any object, list or dict that holds tensors.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    seen: set[int] = set()
    pending = [past_key_values]
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, nn.Module | type | str | bytes):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[item.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list | tuple | set):
            pending.extend(item)
        else:
            pending.extend(getattr(item, "__dict__", {}).values())
            pending.extend(getattr(item, name, None) for name in _slots(type(item)))
    return sum(storages.values())


def _slots(cls: type) -> list[str]:
    """Names in the `__slots__` of a class and its bases (a state dataclass may have them instead of `__dict__`)."""
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names.extend([slots] if isinstance(slots, str) else slots)
    return [name for name in names if not name.startswith("__")]
