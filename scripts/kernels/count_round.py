"""Launches and bytes of one round of speculative decoding by part, beside those of ordinary steps, and their floor.

    PYTHONPATH=. python scripts/kernels/count_round.py [--drafts swa_sinks best_constant] [--rows 1 64] [--ahead 4]

Needs no GPU and no weights: both models have the numbers of a known shape on the meta device, where tensors have no
data, and run the very operations of a round: `begin` makes ready to go back, `draft` makes the tokens, `check` is the
model's launch over all of them, `choose` takes some, `keep` takes the states back to those. A launch is an operation
that makes or writes a tensor, a Triton kernel one each. Bytes are those of every tensor that it reads or writes, once
each, and of a write into some places of a tensor those places. The floor is what a replayed graph takes that starts a
kernel every 2.5 us and moves 4.2 TB/s, so the larger of both for each launch: programs too few to fill the device, or
waiting for each other inside, come on top.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.bench.subjects import SHAPES, TEACHER, convert, random_model
from linearize.decode import Decoder, Sampling
from linearize.decode.speculator import Speculator
from linearize.kernels import dispatch, launch

META = torch.device("meta")
LAUNCH, BANDWIDTH = 2.5e-6, 4.2e12
"""Seconds that a small kernel takes in a graph, and bytes a second, of an H200."""
NOTHING = (
    "empty",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "_local_scalar_dense",
    "_reshape_alias",
    "promote_types",
)
"""Operations, by how their names begin, that launch nothing, beside views."""
PLACES = ("index_put_", "index_copy_", "scatter_", "index_put", "_index_put_impl_", "select_scatter")
"""Operations that write some places of a tensor and leave the rest."""
PICKS = ("index", "gather", "embedding", "index_select")
"""Operations that read some places of a tensor."""


class Counting(TorchDispatchMode):
    """Counts launches and bytes of what runs inside, by `part`.

    Attributes:
        part: what runs now.
        launches, bytes, seconds: by part; seconds are the floor's.
        names: how often each operation was launched, by part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.names: dict[str, Counter[str]] = {}

    def add(self, name: str, size: int, launches: int = 1) -> None:
        """A launch, or several that together touch so many bytes."""
        self.launches[self.part] += launches
        self.bytes[self.part] += size
        took = max(launches * LAUNCH, size / BANDWIDTH)
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + took
        self.names.setdefault(self.part, Counter())[name] += launches

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace == "linearize":
            self._kernels(function, args, kwargs or {})
            return function(*args, **(kwargs or {}))
        made = function(*args, **(kwargs or {}))
        if function.is_view or name.startswith(NOTHING):
            return made
        self.add(name, _touched(name, args, kwargs or {}, made))
        return made

    def _kernels(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The launches inside an operator of this package, which are recorded and not made."""
        body = torch._library.custom_ops.OPDEFS[function._schema.name]._init_fn
        with launch.record() as made, self:  # what it does beside its kernels is counted as any operation is
            body(*args, **kwargs)
        for each in made:
            tensors = {id(x): x for x in each.arguments.values() if isinstance(x, Tensor)}
            self.add(each.kernel.fn.__name__, sum(_size(x) for x in tensors.values()))


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor, of what is repeated once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def _touched(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> int:
    """Bytes that an operation reads and writes."""
    given = [
        x
        for x in torch.utils._pytree.tree_leaves((args, kwargs))
        if isinstance(x, Tensor) and x.device == META
    ]
    results = [x for x in torch.utils._pytree.tree_leaves(made) if isinstance(x, Tensor)]
    if name in PLACES:
        return 2 * sum(_size(x) for x in given[1:])
    if name in PICKS:
        return 2 * sum(_size(x) for x in results) + sum(_size(x) for x in given[1:])
    read = {id(x): x for x in given}
    if name in ("copy_", "fill_", "zero_"):
        read.pop(id(given[0]))
    return sum(_size(x) for x in read.values()) + sum(_size(x) for x in results)


def to_meta(module: nn.Module) -> None:
    """Every parameter and buffer without its data."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, x in list(held.items()):
                if x is not None:
                    empty = torch.empty_like(x, device=META)
                    held[name] = (
                        nn.Parameter(empty, requires_grad=False) if held is part._parameters else empty
                    )


@contextmanager
def as_on_a_card(counting: Counting) -> Iterator[None]:
    """Kernels are chosen as on a CUDA device, and torch's own attention is the one that takes masks there."""
    own = torch.autocast

    def autocast(kind: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if kind == "meta" else own(kind, *args, **kwargs)

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        made = q.new_empty(*q.shape[:-1], v.shape[-1])
        if attn_mask is not None:
            # a mask is made numbers of the queries' dtype, once for all heads
            counting.add("attention's mask", 4 * attn_mask.numel() * q.element_size(), 2)
        counting.add("scaled_dot_product_attention", sum(_size(x) for x in (q, k, v, made)))
        return made

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "use_triton", lambda *x: True))
        stack.enter_context(mock.patch.object(torch, "autocast", autocast))
        stack.enter_context(mock.patch.object(nn.functional, "scaled_dot_product_attention", attention))
        yield


def model_of(shape: str, name: str) -> Any:
    """A shape's model on the meta device, with a recipe's mixers."""
    made = convert(random_model("cpu", torch.bfloat16, shape), name)
    to_meta(made)
    return made


def count_step(model: Any, rows: int, length: int, sampling: Sampling, counting: Counting) -> None:
    """An ordinary step, as the engine takes it without compiling."""
    decoder = Decoder(model, rows, sampling, length=length)
    with torch.no_grad(), as_on_a_card(Counting()):
        decoder._newest = decoder.keeps_softmax
        decoder._reset()
        decoder.clock.start(0)
        with decoder._decoding():
            decoder._eager_step()
    with torch.no_grad(), as_on_a_card(counting), decoder._decoding(), counting:
        counting.part = "step"
        decoder._eager_step()


def count_round(
    model: Any, draft: Any, rows: int, ahead: int, length: int, sampling: Sampling, counting: Counting
) -> None:
    """A round, every part under its name."""
    made = Speculator(model, draft, rows, ahead, sampling, eos=[2], length=length, tokens=96)
    made.width = model.config.vocab_size
    with torch.no_grad(), as_on_a_card(Counting()):
        for side in (made.draft, made.model):
            side.newest = side.keeps_softmax
            side.start(torch.zeros(rows, 1, dtype=torch.int64, device=META), None, None, 1)
        with made._decoding():
            made._round()
    for side, method, part in (
        (made.model, "begin", "begin"),
        (made.draft, "begin", "begin"),
        (made.draft, "go", "draft"),
        (made.model, "go", "check"),
        (made.model, "keep", "keep, model"),
        (made.draft, "keep", "keep, draft"),
    ):
        setattr(side, method, _within(counting, part, getattr(side, method)))
    with torch.no_grad(), as_on_a_card(counting), made._decoding(), counting:
        counting.part = "choose"
        made._round()


def _within(counting: Counting, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        before, counting.part = counting.part, part
        try:
            return call(*args, **kwargs)
        finally:
            counting.part = before

    return made


def table(title: str, counting: Counting, most: int = 0) -> str:
    """Lines of a table in Markdown, and of each part's most frequent operations."""
    lines = [f"**{title}**", "", "| part | launches | MB | floor, ms |", "|---|---:|---:|---:|"]
    parts = list(counting.launches)
    for part in parts:
        numbers = counting.launches[part], counting.bytes[part] / 1e6, counting.seconds[part] * 1e3
        lines.append("| {} | {:,} | {:,.1f} | {:.2f} |".format(part, *numbers))
    if len(parts) > 1:
        numbers = (
            counting.launches.total(),
            counting.bytes.total() / 1e6,
            sum(counting.seconds.values()) * 1e3,
        )
        lines.append("| all | {:,} | {:,.1f} | {:.2f} |".format(*numbers))
    for part in parts if most else ():
        named = ", ".join(f"{name} {count}" for name, count in counting.names[part].most_common(most))
        lines += ["", f"{part}: {named}"]
    return "\n".join([*lines, ""])


def main() -> int:
    """Print a table for each model's step and each draft's round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="smollm2-135m", choices=sorted(SHAPES))
    parser.add_argument("--drafts", nargs="+", default=["swa_sinks", "best_constant"], metavar="RECIPE")
    parser.add_argument("--context", type=int, default=7900, metavar="TOKENS")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--ahead", type=int, default=4, metavar="K", help="tokens drafted in a round")
    parser.add_argument("--sample", action="store_true", help="at temperature 0.8, and not greedy")
    parser.add_argument("--names", type=int, default=0, metavar="N", help="also each part's N most frequent")
    options = parser.parse_args()
    sampling = Sampling(True, 0.8) if options.sample else Sampling()
    model, length = model_of(options.shape, TEACHER), options.context + 96
    for name in (TEACHER, *options.drafts):
        for rows in options.rows:
            draft = model if name == TEACHER else model_of(options.shape, name)
            counting = Counting()
            count_step(draft, rows, length, sampling, counting)
            print(table(f"{name}, a step of {rows} rows", counting, options.names), flush=True)
            if name == TEACHER:
                continue
            counting = Counting()
            count_round(model, draft, rows, options.ahead, length, sampling, counting)
            title = f"{name} drafts {options.ahead} for {rows} rows, a round"
            print(table(title, counting, options.names), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
