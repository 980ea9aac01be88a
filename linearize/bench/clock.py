"""Timing on a CUDA device with events, and the two rates that every floor is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from linearize.errors import LinearizeError

CYCLES = 2.0e6
"""Clock cycles a millisecond, rounded up: the fastest that the GPU's clock goes."""
MATRIX = 8192
"""Rows and columns of the matrix product whose rate is the ceiling."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Args:
        median: of all repeats, on the GPU.
        low, high: first and last decile.
        host: until the host has launched everything; where it is above the median, a call by itself takes that long.
        repeats: how many.
    """

    median: float
    low: float
    high: float
    host: float
    repeats: int


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes copied a second (read and written both count), operations a second in bf16."""

    bandwidth: float
    operations: float

    def floor(self, moved: float, operations: float) -> tuple[float, str]:
        """Milliseconds below which no version goes, and which of the two says so."""
        by_bytes, by_operations = 1e3 * moved / self.bandwidth, 1e3 * operations / self.operations
        return (by_bytes, "bytes") if by_bytes >= by_operations else (by_operations, "operations")


class CudaClock:
    """Times calls on the current CUDA device.

    The L2 cache is filled with something else before every call. The GPU is kept busy until the host has launched the
    whole call, so that the events around it see the GPU's time alone; the host's is given beside it.

    Args:
        spend: milliseconds to spend on the repeats of a call.

    Raises:
        LinearizeError: there is no CUDA device, or no Triton.
    """

    device = "cuda"
    dtype = torch.bfloat16

    def __init__(self, spend: float = 200.0) -> None:
        require_cuda()
        self.spend = spend
        self.other = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def describe(self) -> dict[str, Any]:
        """Name, capability, memory and multiprocessors of the device."""
        return described()

    def ceilings(self) -> Ceilings:
        """Measure a copy of 1 GiB and a bf16 product of random matrices."""
        source = torch.randn(2**28, device="cuda")
        target = torch.empty_like(source)
        copy = self.time(lambda: target.copy_(source))
        left, right = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        product = self.time(lambda: left @ right)
        return Ceilings(1e3 * 2 * source.numel() * 4 / copy.median, 1e3 * 2 * MATRIX**3 / product.median)

    def time(self, call: Callable[[], Any]) -> Timing:
        """Median and spread of a call that has run before."""
        torch.cuda.synchronize()
        host = statistics.median(self._host(call) for _ in range(5))
        estimate = statistics.median(self._repeat(call, 3, host))
        repeats = max(7, min(200, int(self.spend / max(estimate, 1e-3))))
        spans = sorted(self._repeat(call, repeats, host))
        cut = repeats // 10
        return Timing(statistics.median(spans), spans[cut], spans[-1 - cut], host, repeats)

    def peak(self, call: Callable[[], Any]) -> float:
        """MiB that a call holds at most beyond what was held before it."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def finish(self) -> None:
        """Wait for the device, so that an error shows where it was made."""
        torch.cuda.synchronize()

    def release(self) -> None:
        """Give the memory of the last case back."""
        torch.cuda.empty_cache()

    def _host(self, call: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def _repeat(self, call: Callable[[], Any], repeats: int, host: float) -> list[float]:
        marks = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.other.zero_()
            torch.cuda._sleep(int(1.3 * host * CYCLES))
            start.record()
            call()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]


def described() -> dict[str, Any]:
    """Name, capability, memory and multiprocessors of the current CUDA device."""
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
    }


def require_cuda() -> None:
    """Refuse to time kernels where there are none.

    Raises:
        LinearizeError: no CUDA device, too old a one, or no Triton; with what to do.
    """
    from linearize.kernels import dispatch

    if not torch.cuda.is_available():
        built = "built without CUDA" if torch.version.cuda is None else "no device or no driver found"
        raise LinearizeError(
            f"timing kernels needs a CUDA device, and torch {torch.__version__} sees none ({built}): run this on a "
            "machine with an NVIDIA GPU of compute capability 8.0 or newer and a CUDA build of torch (pip install "
            "torch); results from one H100 are in docs/results/kernels-h100.md"
        )
    if torch.cuda.get_device_capability()[0] < 8:
        name = torch.cuda.get_device_name()
        raise LinearizeError(
            f"the kernels need compute capability 8.0 or newer (A100, H100), and {name} is older"
        )
    if not dispatch.has_triton():
        raise LinearizeError("the kernels need Triton, which is not installed: pip install 'triton>=3.6'")


def to_dict(timing: Timing | None) -> dict[str, float] | None:
    """For JSON: milliseconds to four digits."""
    return None if timing is None else {name: round(value, 5) for name, value in asdict(timing).items()}
