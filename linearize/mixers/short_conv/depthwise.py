"""A causal depthwise convolution that does nothing at the start (LAWCAT, Liu et al. 2025, arXiv 2509.18467)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.kernels.short_conv import short_conv_reference, short_conv_step_streams, short_conv_streams
from linearize.mixers.base import LayerShape, Part, fill
from linearize.mixers.options import choice_problems, number
from linearize.mixers.padding import behind, packing
from linearize.mixers.short_conv import SHORT_CONVS, ShortConv
from linearize.mixers.state import State


@SHORT_CONVS.register("depthwise")
class Depthwise(ShortConv):
    """y_t = sum_j w_j x_{t-j} over `taps` tokens, a filter for every channel of q, k and (if asked for) v.

    Starts as the identity: the token's own tap is 1, the others are `others`. A random filter, the usual start of a
    model trained from scratch, wrecks the copied weights (MMLU .25 instead of .68 in a conversion of 8B parameters).
    Keys and values are filtered per key-value head, before they are shared in a group.
    """

    @dataclass
    class Config(Part.Config):
        taps: int = number(4, least=2, most=1024)
        """Tokens that the filter reaches over, the own one included."""
        roles: str = "qk"
        """What is convolved: qk, qkv or k."""
        activation: str = "none"
        """none, or silu behind the filter."""
        others: float = number(0.001, least=-1000, most=1000)
        """The other taps at the start."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(
                roles=(self.roles, ("qk", "qkv", "k")), activation=(self.activation, ("none", "silu"))
            )

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config = config
        sizes = {
            "q": (shape.heads, shape.key_dim),
            "k": (shape.kv_heads, shape.key_dim),
            "v": (shape.kv_heads, shape.value_dim),
        }
        self.sizes = {role: sizes[role] for role in config.roles}
        self.filters = nn.ParameterDict(
            {role: nn.Parameter(torch.empty(*size, config.taps)) for role, size in self.sizes.items()}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.filters.values():
            start = torch.full_like(weight, self.config.others)
            start[..., -1] = 1.0
            fill(weight, start)

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        past = self.config.taps - 1
        return {
            f"conv_{role}": torch.zeros(batch, past, *size, dtype=dtype, device=device)
            for role, size in self.sizes.items()
        }

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        valid: Tensor,
        docs: Tensor | None,
        state: State | None,
        front: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        streams = {"q": q, "k": k, "v": v}
        # values of no width ask for the mixer's weights: what filters the values is no part of them
        roles = [role for role in self.filters if streams[role].shape[-1]]
        given = {f"conv_{role}": (streams[role], self.filters[role]) for role in roles}
        silu = self.config.activation == "silu"
        outputs = convolved(given, valid=valid, docs=docs, state=state, front=front, silu=silu)
        streams |= dict(zip(roles, outputs, strict=True))
        return streams["q"], streams["k"], streams["v"]


def convolved(
    given: dict[str, tuple[Tensor, Tensor]],
    *,
    valid: Tensor,
    docs: Tensor | None,
    state: State | None,
    front: Tensor | None,
    silu: bool = False,
) -> list[Tensor]:
    """Several streams under filters of as many taps, in every form.

    Args:
        given: name in the state -> x [B, T, heads, width] and its filters [heads, width, taps].
        valid, docs, state, front: see `ShortConv.forward`.
        silu: an activation behind the filter.
    """
    inputs, weights = [x for x, _ in given.values()], [weight for _, weight in given.values()]
    if not given:
        return []
    alone = inputs[0].shape[1] == 1 and docs is None and not torch.is_grad_enabled()
    docs = torch.zeros_like(valid, dtype=torch.int64) if docs is None else docs
    if state is None:
        return [_defined(x, w, valid, docs, silu) for x, w in zip(inputs, weights, strict=True)]
    past = [state[name] for name in given]
    if alone:
        tokens = [x[:, 0] for x in inputs]
        made = short_conv_step_streams(tokens, weights, past, valid=valid[:, 0], silu=silu)
        return [y[:, None] for y in made]
    if front is not None:
        inputs, past, valid, docs = _shifted(inputs, past, valid, docs, front)
    codes = torch.where(valid, docs, -1 - docs)
    outputs, last = short_conv_streams(
        inputs, weights, codes=codes, states=past, silu=silu, return_state=True
    )
    assert last is not None
    state.write({name: x.to(state[name].dtype) for name, x in zip(given, last, strict=True)})
    return list(outputs)


def _shifted(
    inputs: list[Tensor], past: list[Tensor], valid: Tensor, docs: Tensor, front: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The same sequence with the padding in front of each row before the inputs that were carried."""
    carried = past[0].shape[1]
    valid = behind(valid.new_ones(valid.shape[0], carried), valid, front)
    docs = behind(docs.new_zeros(docs.shape[0], carried), docs, front)
    both = [behind(old.to(x.dtype), x, front) for old, x in zip(past, inputs, strict=True)]
    hidden = ~valid[:, :carried, None, None]
    starts = [x[:, :carried].masked_fill(hidden, 0.0) for x in both]
    return [x[:, carried:] for x in both], starts, valid[:, carried:], docs[:, carried:]


def _defined(x: Tensor, weight: Tensor, valid: Tensor, docs: Tensor, silu: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    packed = packing(valid)
    seen = packed.pack(x.to(wide) * valid[..., None, None].to(wide))
    docs = packed.pack(torch.where(valid, docs, 0))
    empty = seen.new_zeros(x.shape[0], weight.shape[-1] - 1, *x.shape[2:])
    return packed.unpack(short_conv_reference(seen, weight.to(wide), docs, empty, silu=silu)[0]).to(x.dtype)
