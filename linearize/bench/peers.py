"""What ours is compared with: softmax through torch's SDPA, fla-core's operators, and compositions of them."""

from __future__ import annotations

import gc
import importlib
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.bench.case import Call, Contender, NotAvailable, Tensors

FLA_VERSION = "0.6.0"
"""What the published comparison was made with."""

_most: int | None = None


@contextmanager
def tuning_among(most: int | None) -> Iterator[None]:
    """Inside, each of fla's kernels tunes itself among so many of its configurations, drawn once; None: among all.

    It tries all of them at first: some 500 compilations for one operator, which takes longer than a benchmark has.
    """
    global _most
    before, _most = _most, most
    try:
        yield
    finally:
        _most = before


def _restrict() -> None:
    """Leave each kernel `_most` configurations; the same ones in every process."""
    if _most is None:
        return
    from triton.runtime.autotuner import Autotuner

    for tuner in gc.get_objects():
        # by its type: to ask a lazy object for its class may import or warn
        if issubclass(type(tuner), Autotuner) and tuner.base_fn.__module__.startswith("fla."):
            count = len(tuner.configs)
            if count > _most:
                kept = sorted(random.Random(tuner.base_fn.__name__).sample(range(count), _most))
                tuner.configs = [tuner.configs[place] for place in kept]


def fla(module: str, name: str) -> Callable[..., Any]:
    """A function of fla-core.

    Raises:
        NotAvailable: fla-core is not installed, or it has no such function.
    """
    try:
        found = getattr(importlib.import_module(f"fla.{module}"), name)
        _restrict()
        return found  # type: ignore[no-any-return]
    except ImportError as error:
        raise NotAvailable(
            f"fla-core cannot be imported ({error}): pip install fla-core=={FLA_VERSION}"
        ) from error
    except AttributeError as error:
        raise NotAvailable(f"this fla-core has no fla.{module}.{name}; {FLA_VERSION} has") from error


def ours(module: str, name: str) -> Callable[..., Any]:
    """One of our operators, imported when it is timed.

    Raises:
        NotAvailable: this version of the package has none of that name.
    """
    try:
        return getattr(importlib.import_module(f"linearize.kernels.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise NotAvailable(f"linearize.kernels.{module}.{name}: {error}") from error


def softmax(backend: str, label: str, scaling: float | None = None) -> Contender:
    """Causal softmax attention by one of torch's backends.

    Args:
        backend: name in `torch.nn.attention.SDPBackend`.
        label: as the table shows it.
        scaling: factor on q.k; the square root of 1 / D by default.
    """

    def heads_first(inputs: Tensors) -> Tensors:
        return {name: inputs[name].transpose(1, 2).contiguous() for name in ("q", "k", "v")}

    def build(inputs: Tensors) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        grouped = q.shape[1] != k.shape[1]
        chosen = getattr(SDPBackend, backend)

        def call() -> Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped
                )

        with warnings.catch_warnings(record=True) as said, torch.no_grad():
            warnings.simplefilter("always")
            try:
                call()
            except RuntimeError as error:
                reasons = "; ".join(str(x.message).split("(Triggered")[0].strip() for x in said)
                raise RuntimeError(f"{error} {reasons}") from error
        return call

    return Contender(label, build, layout=heads_first, shared=True)


SOFTMAX = (softmax("FLASH_ATTENTION", "SDPA flash"), softmax("CUDNN_ATTENTION", "SDPA cuDNN"))


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """Hedgehog features in plain torch, [B, T, H, D] -> [B, T, H, 2 f] in the dtype of x (LoLCATs' form)."""
    projected = torch.einsum("bthd,hdf->bthf", x, weight.to(x.dtype))
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)


def composed(inputs: Tensors) -> Call:
    """Features in torch, then fla's normalized linear attention over the whole past; no window."""
    chunk_linear_attn = fla("ops.linear_attn", "chunk_linear_attn")

    def call() -> Tensor:
        k, v = inputs["k"], inputs["v"]
        group = inputs["q"].shape[2] // k.shape[2]
        if group > 1:  # fla's operator has as many key heads as query heads
            k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        phi_q, phi_k = hedgehog(inputs["q"], inputs["query_map"]), hedgehog(k, inputs["key_map"])
        return chunk_linear_attn(phi_q, phi_k, v, scale=1.0, normalize=True)[0]

    return call


def linear(normalize: bool) -> Callable[[Tensors], Call]:
    """fla's linear attention on q and k as they are."""

    def build(inputs: Tensors) -> Call:
        chunk_linear_attn = fla("ops.linear_attn", "chunk_linear_attn")
        return lambda: chunk_linear_attn(
            inputs["q"], inputs["k"], inputs["v"], scale=1.0, normalize=normalize
        )[0]

    return build
