"""Random calls of gated_delta for its Triton tests, gates a head or a key dimension, and how far results are off."""

from __future__ import annotations

from dataclasses import dataclass

import kernel_calls
import torch
import torch.nn.functional as F
from kernel_calls import DEVICE, ON_GPU, USUAL, normal, uniform
from torch import Tensor

from linearize.kernels import dispatch

DIM, HEADS, STATE_HEADS = (64, 4, 2) if ON_GPU else (16, 1, 1)
"""Alike for most cases on a GPU, where every other shape is compiled anew."""
single, half = torch.float32, torch.float16


@dataclass(frozen=True)
class Case:
    """One shape with its options; log decays are uniform down to `-strength`, None for no decay.

    With `per_key` every key dimension has its own, and the weakest dimension's is a hundredth of the strongest's.
    """

    tokens: int
    batch: int = 1
    heads: int = HEADS
    state_heads: int = STATE_HEADS
    key_dim: int = DIM
    value_dim: int = DIM
    strength: float | None = 0.1
    largest_beta: float = 1.0
    documents: bool = False
    padding: bool = False
    same_keys: bool = False
    per_key: bool = False
    dtypes: tuple[torch.dtype, ...] = USUAL


def draw(case: Case) -> dict[str, Tensor]:
    """Random float64 tensors of a call; keys are of length one, padding has neither strength nor decay."""
    size = (case.batch, case.tokens, case.state_heads)
    k = normal(*size, case.key_dim, seed=2)
    k = k[:, :1].expand_as(k) if case.same_keys else k
    beta = case.largest_beta * uniform(*size, seed=4)
    gates = {"beta": beta}
    if case.strength is not None:
        gates["log_decay"] = -case.strength * uniform(*size, *[case.key_dim] * case.per_key, seed=5)
        if case.per_key:
            gates["log_decay"] *= torch.logspace(0, -2, case.key_dim, dtype=torch.float64)
    if case.padding:
        seen = torch.ones(case.batch, case.tokens, 1, dtype=torch.float64)
        seen[:, :3] = seen[:, 80:90] = 0
        gates = {name: x * (seen if x.dim() == 3 else seen[..., None]) for name, x in gates.items()}
    return {
        # a layout that is not contiguous
        "q": normal(case.batch, case.heads, case.tokens, case.key_dim, seed=1).transpose(1, 2),
        "k": F.normalize(k, dim=-1),
        "v": normal(case.value_dim, *size, seed=3).movedim(0, -1),
        **gates,
        "state": normal(case.batch, case.state_heads, case.key_dim, case.value_dim, seed=6),
    }


def documents(case: Case) -> Tensor:
    places = [(5, 6, 40, 128, 141, 400), (0, 3, 64, 200)] if case.documents else []
    return kernel_calls.documents(case.batch, case.tokens, *places)


def call(form, x: dict[str, Tensor], docs: Tensor) -> tuple[Tensor, Tensor]:
    return form(x["q"], x["k"], x["v"], x["beta"], x.get("log_decay"), docs, x["state"])


def run(case: Case, dtype: torch.dtype | None, form) -> dict[str, Tensor]:
    """Output, final state, and gradients by name under random weights of both; None is float64."""

    def cast(name: str, x: Tensor) -> Tensor:
        wide = torch.float64 if dtype is None else single
        return x.to(DEVICE, wide if name not in "qkv" or dtype is None else dtype).requires_grad_()

    x = {name: cast(name, tensor) for name, tensor in draw(case).items()}
    with dispatch.kernels("triton"):
        out, state = call(form, x, documents(case))
    if dtype is not None:
        assert out.dtype == dtype and state.dtype == single
    loss = (out * normal(*out.shape, seed=7).to(out)).sum() + (
        state * normal(*state.shape, seed=8).to(state)
    ).sum()
    grads = torch.autograd.grad(loss, list(x.values()))
    return {"out": out.detach(), "final": state.detach()} | dict(zip(x, grads, strict=True))
