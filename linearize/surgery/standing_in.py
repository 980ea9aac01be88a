"""Numbers for a model without weights, whose forward looks at values (which expert gets how many tokens)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def standing_in(model: nn.Module) -> Iterator[None]:
    """Inside, a model on the meta device has numbers: every parameter and buffer is one number, spread over its shape.

    One number takes no memory, and products with it are sums: a model of 100 billion parameters runs in seconds.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        tables: list[Any] = [module._parameters, module._buffers]
        for held in tables:
            for name, value in held.items():
                if value is not None and value.is_meta:
                    kept.append((held, name, value))
    try:
        for held, name, value in kept:
            number = torch.full((), 0.01 if value.is_floating_point() else 0, dtype=value.dtype)
            spread = number.expand(value.shape)
            held[name] = nn.Parameter(spread, False) if isinstance(value, nn.Parameter) else spread
        with _Sums():
            yield
    finally:
        for held, name, value in kept:
            held[name] = value


class _Sums(TorchFunctionMode):
    """Products with a matrix of one number [N, K], which would be computed in full, and copied before."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.linear and len(args) >= 2 and _is_spread(args[1]):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            columns = (args[0].sum(-1, keepdim=True) * args[1][0, 0]).to(args[0].dtype)
            made = columns.expand(*args[0].shape[:-1], args[1].shape[0]).contiguous()
            return made if bias is None else made + bias
        return function(*args, **kwargs)


def _is_spread(weight: Any) -> bool:
    return (
        isinstance(weight, Tensor) and weight.dim() == 2 and weight.numel() > 1 and not any(weight.stride())
    )
