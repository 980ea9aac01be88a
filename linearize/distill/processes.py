"""Several processes of one run: they train together, and the first of them does whatever is done once.

What they say to each other on the host goes over gloo, which notices at once that a process is gone. It comes before
anything that goes over NCCL, where one that waits for a process that is gone waits for minutes; within a pass `watch`
ends such a wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from linearize import launched, signals
from linearize.distill.watch import Watch
from linearize.errors import LinearizeError

TOGETHER = timedelta(minutes=30)
"""How long one waits for the others in a step: a checkpoint may be written in between."""
ALONE = timedelta(days=7)
"""How long the others wait for what the first does alone, an evaluation for one."""
GONE = "has ended, or does not answer"
BUCKET = 2**24
"""Numbers that are added up in one go."""

Made = TypeVar("Made")


class ProcessLost(LinearizeError):
    """Another process of the run has ended or does not answer."""


class FirstFailed(LinearizeError):
    """Another process, mostly the first, has failed in what it did while this one waited; the message is its own.

    Args:
        message: of the error.
        exit_code: of the error.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class _Groups:
    steps: Any
    waits: Any
    watch: Watch


_joined: list[_Groups] = []
_losses: list[BaseException] = []
"""What was lost, of other processes."""


def several() -> bool:
    """Whether this process is one of several that have joined."""
    return bool(_joined)


def count() -> int:
    """How many have joined."""
    return dist.get_world_size() if several() else 1


def rank() -> int:
    """Number of this one, from 0."""
    return dist.get_rank() if several() else 0


@contextmanager
def joined(
    device: torch.device, last_words: Callable[[ProcessLost], Exception] | None = None
) -> Iterator[None]:
    """Inside, the processes that a launcher has started know each other; nothing happens where there is one.

    Args:
        device: of this process.
        last_words: makes what is shown of a loss that ends this process in the middle of a pass.

    Raises:
        ProcessLost: they do not find each other.
    """
    if not launched.several():
        yield
        return
    with _lost("could not be reached"):
        store, number, size = next(iter(dist.rendezvous("env://")))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TOGETHER)
        groups = [dist.new_group(backend="gloo", timeout=time) for time in (TOGETHER, ALONE)]
    told = dist.PrefixStore("linearize", store)
    launched.speaks.append(lambda: _first_to_tell(told))
    watch = Watch(
        dist.PrefixStore("watch", store),
        number,
        size,
        partial(_last_words, last_words),
        ProcessLost.exit_code,
    )
    _joined.append(_Groups(*groups, watch))
    done = False
    try:
        yield
        most([0])  # nobody leaves before all are done
        watch.leave(done := True)
        dist.destroy_process_group()
        launched.speaks.clear()
    finally:
        # after a failure the others are not there to say goodbye to: the process ends without
        if not done:
            watch.leave(done)
        _joined.clear()


def _last_words(of: Callable[[ProcessLost], Exception] | None, why: str) -> str:
    lost = ProcessLost(f"another process of this run {GONE} ({why})")
    return str(lost if of is None else of(lost))


def in_pass() -> AbstractContextManager[None]:
    """Around what waits for the others on the device, and is worth nothing where one is gone: this process ends too."""
    return _joined[0].watch.passing() if several() else nullcontext()


def _first_to_tell(store: Any) -> bool:
    try:
        return bool(store.add("told", 1) == 1)
    except RuntimeError:
        # the first process keeps the store where no launcher does; it is gone, and has said its own errors
        return bool(_losses)


def alone(job: Callable[[], Made]) -> Made:
    """What `job` gives in the first process, in all of them; the others wait.

    Args:
        job: gives a plain value, and calls nothing of this module.

    Raises:
        BaseException: what `job` raised, in the first process.
        FirstFailed, KeyboardInterrupt: the same, in the others.
        ProcessLost: see there.
    """
    if not several():
        return job()
    if rank() == 0:
        try:
            found = job()
        except BaseException as error:
            with suppress(Exception):
                _send([None, _described(error)])
            raise
        _send([found, None])
        return found
    found, failure = _send([None, None])
    if failure is None:
        return found  # type: ignore[return-value]  # the first process's
    message, exit_code, stopped = failure
    if stopped:
        raise signals.Terminated if exit_code == signals.code_of(signals.STOPPING[1]) else KeyboardInterrupt
    raise FirstFailed(message, exit_code)


def first(job: Callable[[], Made]) -> Made:
    """What `job` gives in each process; in the first it is done before the others begin.

    Raises:
        BaseException: as `alone`.
    """
    kept: list[Made] = []
    alone(lambda: kept.append(job()))
    return kept[0] if kept else job()


def each(job: Callable[[], Any]) -> None:
    """Do `job` in all processes, and go on where it went well in all of them.

    Args:
        job: calls nothing of this module.

    Raises:
        Exception: what `job` raised, where it did.
        FirstFailed: the same, in the others.
    """
    failure: Exception | None = None
    try:
        job()
    except Exception as error:
        failure = error
    [failed] = most([0 if failure is None else rank() + 1])
    if not failed:
        return
    if failure is not None and count() == 1:
        raise failure
    told = _send([None if failure is None else _described(failure)], failed - 1)[0]
    if failure is not None:
        raise failure
    raise FirstFailed(*told[:2])


def _described(error: BaseException) -> tuple[str, int, bool]:
    if isinstance(error, KeyboardInterrupt):
        return "", signals.exit_code(error), True
    if isinstance(error, LinearizeError):
        return str(error), error.exit_code, False
    return f"process {rank()} failed: {type(error).__name__}: {error}", 1, False


def _send(box: list[Any], source: int = 0) -> list[Any]:
    with _lost():
        dist.broadcast_object_list(box, src=source, group=_joined[0].waits)
    return box


def most(values: Sequence[int]) -> list[int]:
    """The largest of each of some numbers over all processes.

    Raises:
        ProcessLost: see there.
    """
    if not several():
        return list(values)
    found = torch.tensor(values, dtype=torch.int64)
    with _lost():
        dist.all_reduce(found, dist.ReduceOp.MAX, group=_joined[0].steps)
    numbers: list[int] = found.tolist()
    return numbers


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over all processes; on a GPU the host does not wait.

    Small ones go together, as DistributedDataParallel sends them (Li et al. 2020, arXiv 2006.15704, section 3.2.3).

    Args:
        tensors: on the device; all processes give as many, of the same shapes.
    """
    if not several():
        return
    for bucket in _buckets(tensors):
        with _lost():
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(
            bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
        )


def same(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values."""
    if not several():
        return
    for tensor in tensors:
        found = tensor.detach()
        sent = found.contiguous()  # NCCL takes no other
        with _lost():
            dist.broadcast(sent, src=0)
        if sent is not found:
            found.copy_(sent)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, in their order, `BUCKET` numbers at most unless one alone has more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(math.prod(other.shape) for other in bucket) + tensor.numel() > BUCKET
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def random_apart(seed: int, step: int) -> None:
    """Seed torch for one step of this process: each drops out for itself, and a resumed run as it would have."""
    if several():
        torch.manual_seed(
            int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0] >> 1)
        )


@contextmanager
def passing() -> Iterator[None]:
    """Around passes of a sharded model, in which processes wait for each other in torch's own words.

    Raises:
        ProcessLost: another one is gone.
    """
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        if not several() or not (isinstance(error, dist.DistError) or "gloo" in words):
            raise
        with _lost():
            raise


@contextmanager
def _lost(what: str = GONE) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo's and the store's are plain RuntimeErrors
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _losses.append(error)
        said = " ".join(str(error).split())[:200]
        raise ProcessLost(f"another process of this run {what} ({said})") from error
