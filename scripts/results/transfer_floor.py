"""What a step of attention transfer (LoLCATs' mixer) has to compute and to move at least, by shapes alone.

    python scripts/results/transfer_floor.py

And of its weights, where a stage compares those: tiles of both matrices and of their gradients, which are made anew.

Products of the frozen pass, the causal half of the teacher's softmax, and bytes of what stands between them: loss and
rotary embedding by operations (each reads and writes the text) and fused, and key-value heads that are repeated.
"""

from __future__ import annotations

from typing import Any

from linearize.bench.subjects import SHAPES
from linearize.eval.tables import markdown

REACHED, BANDWIDTH = 800e12, 4e12
"""FLOP/s that products reach in the profile of 8B on an H200, and bytes a second that short kernels do."""
LOSS, FUSED_LOSS = 58, 10
"""Bytes a number of the heads' outputs: two widened to float32, difference, square, mean, and their gradients; or read
twice in sixteen bits, forward and backward, and one gradient written."""
TURN, FUSED_TURN = 20, 4
"""Bytes a number of q and k: two products, half of it negated, joined, a sum; or read once and written once."""
TILES = 200e12
"""FLOP/s that tiles of 64 x 64 weights are reckoned with, exponentials and logarithms between the products; a guess."""
MATRICES = {"hedgehog": (2, 6), "mohawk": (1, 5)}
"""Composition -> features in head dims, and products of them a pair of tokens: forward (two passes over the keys where
rows are normalized), two for the queries' gradient and two for the keys'. The teacher's scores are made four times."""
BLOCK = 64
STEPS = (
    ("smollm2-135m", 16, 1024), ("llama-3.2-1b", 8, 2048), ("llama-3-8b", 4, 2048), ("smollm2-135m", 2, 32_768),
)  # fmt: skip


def row(name: str, batch: int, length: int) -> dict[str, Any]:
    """A shape's floors."""
    shape = SHAPES[name]
    tokens, layers, dim = batch * length, shape["num_hidden_layers"], shape["head_dim"]
    heads, shared, width = shape["num_attention_heads"], shape["num_key_value_heads"], shape["hidden_size"]
    q, k = heads * dim, shared * dim
    tail = q * width + 3 * width * shape["intermediate_size"]
    products = 2 * tokens * (layers * (width * (q + 2 * k) + tail) - tail)
    softmax = 2 * (length + 1) * q * tokens * layers
    text = tokens * layers
    before = text * (LOSS * q + TURN * (q + k) + 2 * 2 * (q + k))
    now = text * (FUSED_LOSS * q + FUSED_TURN * (q + k))
    return {
        "shape": f"{name}, {batch} x {length:,}",
        "products": f"{products / 1e12:.1f} TFLOP, {1e3 * products / REACHED:.0f} ms",
        "of the last layer left out": f"{2e-12 * tokens * tail:.2f} TFLOP",
        "loss, rotation, repeated heads": f"{before / 1e9:.0f} GB, {1e3 * before / BANDWIDTH:.0f} ms",
        "now": f"{now / 1e9:.0f} GB, {1e3 * now / BANDWIDTH:.0f} ms",
        "teacher's softmax": f"{softmax / 1e12:.1f} TFLOP",
        "a token, products": f"{products / tokens / 1e6:,.0f} MFLOP",
        "a token, softmax": f"{softmax / tokens / 1e6:,.0f} MFLOP",
    }


def matrices(name: str, batch: int, length: int) -> dict[str, Any]:
    """What comparing the weights of all layers computes."""
    shape = SHAPES[name]
    heads, dim = shape["num_attention_heads"], shape["head_dim"]
    pairs = batch * length * (length + BLOCK) / 2 * shape["num_hidden_layers"] * heads
    made = {"shape": f"{name}, {batch} x {length:,}"}
    for composition, (features, products) in MATRICES.items():
        flops = 2 * pairs * dim * (4 + features * products)
        a_token = flops / batch / length
        made[composition] = (
            f"{flops / 1e12:.1f} TFLOP, {1e3 * flops / TILES:.0f} ms, {a_token / 1e6:,.0f} MFLOP a token"
        )
    return made


if __name__ == "__main__":
    print(markdown([row(*step) for step in STEPS]))
    print()
    print(markdown([matrices(*step) for step in STEPS]))
