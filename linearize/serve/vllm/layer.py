"""The layer that vLLM sees in the place of attention: a mixer, and pages that hold its state."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import vllm.model_executor.layers.mamba.linear.minimax_linear_attn  # noqa: F401 - defines vllm::linear_attention
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from linearize.mixers import Mixer
from linearize.serve.vllm import rows
from linearize.serve.vllm.metadata import RowsBackend
from linearize.serve.vllm.pages import Layout


def widths(mixer: Mixer) -> dict[str, tuple[int, ...]]:
    """What the mixer reads of each token -> its shape there, by the names of `rows.run`."""
    shape = mixer.shape
    query, key = (shape.heads, shape.key_dim), (shape.kv_heads, shape.key_dim)
    found: dict[str, tuple[int, ...]] = {"q": query, "k": key, "v": (shape.kv_heads, shape.value_dim)}
    if mixer.uses_hidden:
        found["hidden"] = (shape.hidden_dim(),)
    if mixer.needs_plain:
        found |= {"plain_q": query, "plain_k": key}
    if mixer.uses_first:
        found["first"] = found["v"]
    return found


class MixerLayer(MambaBase):
    """A converted layer's state in vLLM, and the mixer that brings it forward.

    To vLLM the state is one run of bytes, of the same length in every layer; the layer cuts it into the tensors that
    its own mixer carries (float32 sums and normalizer, the ring of the window in the model's dtype, the convolution's
    last tokens), so layers may have different mixers.

    Args:
        mixer: the module's own; its parameters are loaded later.
        prefix: the layer's name in vLLM.
        page: bytes of a state, the largest among the model's layers.
        vllm_config: of the engine.
    """

    def __init__(self, mixer: Mixer, prefix: str, page: int, vllm_config: Any) -> None:
        self.mixer, self.prefix, self.page = mixer, prefix, page
        self.layout = Layout.of(mixer, vllm_config.model_config.dtype)
        self.views: dict[str, Tensor] = {}
        self.widths = widths(mixer)
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"two layers of one model are called {prefix}")
        context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[RowsBackend]:
        return RowsBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.page,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.views = self.layout.views(self.kv_cache[0])

    def attend(self, inputs: dict[str, Tensor]) -> Tensor:
        """The mixer's output [T, H, V] for the tokens of a step, in the dtype of v.

        Args:
            inputs: see `rows.run`.
        """
        shape = self.mixer.shape
        v = inputs["v"]
        # one tensor, as the operator takes it: what it writes is all that a compiled graph around it has to know
        packed = torch.cat([inputs[name].flatten(1).to(v.dtype) for name in self.widths], 1)
        out = v.new_zeros(v.shape[0], shape.heads * shape.value_dim)
        torch.ops.vllm.linear_attention(packed, out, v.new_empty(0), self.prefix)
        return out.unflatten(1, (shape.heads, shape.value_dim))

    def _forward(self, hidden_states: Tensor, output: Tensor, positions: Tensor) -> None:
        """What the operator runs: `attend` on the packed inputs, into `output` [T, H * V]."""
        parts = hidden_states.split([prod(width) for width in self.widths.values()], 1)
        inputs = {
            name: part.unflatten(1, width)
            for (name, width), part in zip(self.widths.items(), parts, strict=True)
        }
        out = output.unflatten(1, (self.mixer.shape.heads, self.mixer.shape.value_dim))
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            # vLLM measures how much memory a step takes: a step of one long text
            given: dict[str, Any] = {name: x[None] for name, x in inputs.items()}
            if "plain_q" in given:
                given["plain"] = (given.pop("plain_q"), given.pop("plain_k"))
            out.copy_(self.mixer.chunked(**given)[0])
            return
        rows.run(self.mixer, inputs, metadata[self.prefix].groups, self.views, out)
