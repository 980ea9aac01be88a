"""Our chunked operators against fla's own reference maths (fla-core's `naive` functions), on the CPU in float32.

Random inputs with 67 tokens, one query head to a key head, the same scale on both sides. Needs fla-core and einops
beside this package:

    pip install --no-deps --target /tmp/fla fla-core==0.6.0 einops
    PYTHONPATH=/tmp/fla:. python scripts/results/fla_comparison.py --json docs/results/fla-comparison.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import metadata

import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.gsa.naive import naive_recurrent_gsa
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from torch import Tensor
from torch.nn import functional as F

from linearize.kernels.gated_delta import delta_chunk
from linearize.kernels.gated_linear import gated_linear_chunk
from linearize.kernels.generalized_delta import generalized_delta_chunk
from linearize.kernels.linear import linear_chunk
from linearize.kernels.slots import slots_chunk
from linearize.mixers import LayerShape, build

BATCH, TOKENS, HEADS, K, V, SLOTS = 2, 67, 4, 16, 24, 8
SCALE = K**-0.5


def draw(*shape: int) -> Tensor:
    """Standard normal numbers [B, T, H, ...]."""
    return torch.randn(BATCH, TOKENS, HEADS, *shape)


def head_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, T, H, ...] -> [B, H, T, ...], the layout of fla's older references."""
    return tuple(x.transpose(1, 2) for x in tensors)


def comparisons() -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Rule -> a function that gives our output and fla's, both [B, T, H, V]."""
    docs = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    empty, norms = torch.zeros(BATCH, HEADS, K, V), torch.zeros(BATCH, HEADS, K)
    q, k, v = draw(K), draw(K), draw(V)
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    per_head, per_feature = F.logsigmoid(draw()), F.logsigmoid(draw(K))
    beta = torch.sigmoid(draw())

    def linear() -> tuple[Tensor, Tensor]:
        phi_q, phi_k = q.softmax(-1), k.softmax(-1)
        numerator, denominator, _ = linear_chunk(phi_q * SCALE, phi_k, v, docs, (empty, norms))
        return numerator / denominator[..., None], naive_recurrent_linear_attn(
            phi_q, phi_k, v, normalize=True
        )[0]

    def decayed(log_decay: Tensor, reference: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        ours = gated_linear_chunk(q * SCALE, k, v, log_decay, docs, (empty, None), normalize=False)[0]
        return ours, reference()

    def retention() -> tuple[Tensor, Tensor]:
        shape = LayerShape(HEADS, HEADS, K, V, SCALE)
        gate = build({"feature_map": {"name": "relu"}, "gate": {"name": "fixed"}}, shape).recurrent.gate
        same = q[..., :K], k[..., :K], v[..., :K]
        ours = gated_linear_chunk(
            same[0] * SCALE, same[1], same[2], gate(None, k), docs, (empty[..., :K], None), normalize=False
        )
        return ours[0], naive_retention(*head_first(*same)).transpose(1, 2)

    def delta() -> tuple[Tensor, Tensor]:
        ours = delta_chunk(unit_q * SCALE, unit_k, v, beta, None, docs, empty)[0]
        return ours, delta_rule_recurrence(*head_first(unit_q, unit_k, v, beta))[0].transpose(1, 2)

    def gated_delta() -> tuple[Tensor, Tensor]:
        ours = delta_chunk(unit_q * SCALE, unit_k, v, beta, per_head, docs, empty)[0]
        return ours, naive_recurrent_gated_delta_rule(unit_q, unit_k, v, beta, per_head, scale=SCALE)[0]

    def rwkv7() -> tuple[Tensor, Tensor]:
        a, b = -unit_k, unit_k * torch.sigmoid(draw(K))
        ours = generalized_delta_chunk(q * SCALE, k, v, a, b, per_feature, docs, empty)[0]
        return ours, dplr_recurrence(*head_first(q, k, v, a, b, per_feature))[0].transpose(1, 2)

    def slots() -> tuple[Tensor, Tensor]:
        gate = F.logsigmoid(draw(SLOTS)) / 8
        writes = -gate.expm1()
        state = torch.zeros(BATCH, HEADS, K, SLOTS), torch.zeros(BATCH, HEADS, SLOTS, V)
        ours = slots_chunk(q * SCALE, k, v, writes, gate, docs, state)[0]
        return ours, naive_recurrent_gsa(q, k, v, writes, gate, scale=SCALE)[0]

    return {
        "linear attention, normalized": linear,
        "decay per head (simple GLA, Mamba-2)": lambda: decayed(
            per_head, lambda: naive_recurrent_simple_gla(q, k, v, per_head)[0]
        ),
        "decay per feature (GLA)": lambda: decayed(
            per_feature, lambda: naive_recurrent_gla(q, k, v, per_feature)[0]
        ),
        "retention (RetNet)": retention,
        "delta rule (DeltaNet)": delta,
        "gated delta rule (Gated DeltaNet)": gated_delta,
        "generalized delta rule (RWKV-7)": rwkv7,
        "gated slots (GSA)": slots,
    }


def main() -> None:
    """Compare, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = {}
    for name, compare in comparisons().items():
        ours, theirs = compare()
        rows[name] = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"{name:40} relative error {rows[name]:.1e}")
    versions = {package: metadata.version(package) for package in ("torch", "fla-core")}
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"versions": versions, "tokens": TOKENS, "relative_error": rows}, file, indent=1)
            file.write("\n")
    assert max(rows.values()) < 1e-5, "an operator computes another function than fla's"


if __name__ == "__main__":
    main()
