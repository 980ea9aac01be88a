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

from linearize.serve.vllm.rows import Group, groups


@dataclass
class RowsMetadata(LinearAttentionMetadata):
    """vLLM's own, and the groups of the step.

    Attributes:
        groups: see `linearize.serve.vllm.rows`.
    """

    groups: list[Group]


class RowsBuilder(LinearAttentionMetadataBuilder):
    """Makes `RowsMetadata`; the lengths on the host are there already, so no layer waits for the device."""

    # groups differ from step to step
    _cudagraph_support = AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> RowsMetadata:
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        return RowsMetadata(**vars(made), groups=groups(starts, made.state_indices_tensor, made.seq_lens))


class RowsBackend(LinearAttentionBackend):
    """vLLM's linear attention with another builder."""

    @staticmethod
    def get_name() -> str:
        return "LINEARIZE"

    @staticmethod
    def get_builder_cls() -> type[RowsBuilder]:
        return RowsBuilder
