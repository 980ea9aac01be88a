"""What vLLM tells a layer about a step: which tokens are whose, found once for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)

from linearize.serve.vllm.rows import Decodes, Group, groups


@dataclass
class RowsMetadata(LinearAttentionMetadata):
    """vLLM's own, and the groups of the step.

    Attributes:
        groups: see `linearize.serve.vllm.rows`.
    """

    groups: list[Group]


class RowsBuilder(LinearAttentionMetadataBuilder):
    """Makes `RowsMetadata`; the lengths on the host are there already, so no layer waits for the device.

    A step in which every sequence takes one token is held in memory that stays, for vLLM's CUDA graphs of decode.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.decodes = Decodes(max(vllm_config.scheduler_config.max_num_seqs, captured), device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> RowsMetadata:
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        if self.decodes.fits(starts):
            found = [self.decodes.group(made.state_indices_tensor, made.seq_lens)]
        else:
            found = groups(starts, made.state_indices_tensor, made.seq_lens)
        return RowsMetadata(**vars(made), groups=found)


class RowsBackend(LinearAttentionBackend):
    """vLLM's linear attention with another builder."""

    @staticmethod
    def get_name() -> str:
        return "LINEARIZE"

    @staticmethod
    def get_builder_cls() -> type[RowsBuilder]:
        return RowsBuilder
