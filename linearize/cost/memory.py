"""Memory of a training step by part, in bytes: formulas of what the trainer keeps, held against measured peaks.

Letters: d hidden width, f width of the feed-forward layer, q and v widths of all query heads and of all key heads, t
tokens of a micro-batch. Activations follow what compiled blocks keep for backward (Korthikanti et al. 2022, arXiv
2205.05198, eq. 1, with flash attention, bfloat16 products and SwiGLU); constants that were fitted say so.
"""

from __future__ import annotations

from dataclasses import dataclass

KEPT = {
    "arwkv": 16_777, "radlads_rwkv7": 16_841, "lizard": 16_439, "gated_deltaproduct": 16_147, "hedgecats": 15_357,
    "gdn2": 13_840, "lawcat": 13_249, "gated_delta_window": 10_569, "kda": 10_390, "supra": 9_192,
    "gated_deltanet": 9_053, "radlads_rwkv6": 8_245, "t2r": 6_155, "lolcats": 5_973,
}  # fmt: skip
"""Recipe -> bytes that its mixer keeps a token and layer at q = 576: docs/training.md, saved_bytes.py."""
MOVED = {
    "arwkv": 22_865, "radlads_rwkv7": 22_865, "lizard": 18_787, "hedgecats": 19_973, "gdn2": 16_928, "lawcat": 15_185,
    "kda": 12_338, "gated_delta_window": 14_105, "supra": 15_380, "gated_deltanet": 12_205, "radlads_rwkv6": 11_325,
    "t2r": 10_003, "lolcats": 5_961,
}  # fmt: skip
"""The same where torch decides, which is nearer to what passes write and read: what is made again is moved too."""
UNKNOWN = KEPT["lawcat"]
"""Of a recipe that nobody has measured: the median of the larger ones."""
KEPT_AT = 576
WORKSPACE = 0.2 * 2**30
"""Libraries' workspaces, the batch, tables and masks. Fitted to the transfer rows of train-h200.json."""
SLICE = 2**26
"""Logits of a slice on a GPU, `kernels.distill.slices.ELEMENTS`; test_cost.py holds them equal."""


@dataclass(frozen=True)
class Sizes:
    """A model in a stage, in numbers of parameters and widths.

    Attributes:
        total: parameters of the student, adapters and mixers included.
        teacher: of the original.
        trained: that train.
        whole: of mixers and adapters, which no process has a part of alone.
        body: of the trained ones, those of matrices in the layers.
        head: of the output matrix.
        head_trained: whether it trains.
        base_trained: whether base weights do (then the residual stream is float32).
        apart: whether the teacher is a copy of its own, since base weights have changed.
        layers, hidden, inner, query, key: numbers and widths d, f, q, v.
        mixer: bytes that a layer's attention keeps a token.
        moved: the same, nothing of it made again.
    """

    total: int
    teacher: int
    trained: int
    whole: int
    body: int
    head: int
    head_trained: bool
    base_trained: bool
    apart: bool
    layers: int
    hidden: int
    inner: int
    query: int
    key: int
    mixer: float
    moved: float


def mixer_bytes(recipe: str | None, query: int, key: int) -> tuple[float, float]:
    """Bytes a token and layer that attention keeps, and that it would keep if nothing were made again.

    Args:
        recipe: name; None for softmax, which keeps q, its output, keys and values, and those for each query head where
            nothing is made again.
        query, key: widths of all query heads, with which it grows, and of all key heads.
    """
    if recipe is None:
        return 4.0 * query + 4.0 * key, 8.0 * query
    grows = query / KEPT_AT
    return KEPT.get(recipe, UNKNOWN) * grows, MOVED.get(recipe, MOVED["lawcat"]) * grows


def block_bytes(sizes: Sizes) -> float:
    """Bytes a token and layer that a compiled block keeps for backward.

    The residual stream before both norms, 4 d each where base weights train (float32, as embeddings are), else 2 d;
    gate and up, 4 f. What norms and activations give is made again. Beside frozen weights f more, by which the peaks of
    a6d87c3 and abbae10 lie above that.
    """
    stream, inner = (8.0, 4.0) if sizes.base_trained else (4.0, 5.0)
    return stream * sizes.hidden + sizes.mixer + inner * sizes.inner


def moved_bytes(sizes: Sizes) -> float:
    """Bytes a token and layer that memory traffic is counted in multiples of: a block's, nothing of it made again."""
    if sizes.base_trained:
        return 12.0 * sizes.hidden + sizes.moved + 6 * sizes.inner
    return 8.0 * sizes.hidden + sizes.moved + 4 * sizes.inner


def transfer_bytes(sizes: Sizes) -> float:
    """Bytes a token that one layer of attention transfer holds; no graph spans layers.

    What the mixer moves, kept or in gradients, twice, but for gradients of the frozen q, k and v, which nobody makes;
    12 q for the two outputs compared in float32 and 4 d of the stream; or the frozen feed-forward layer, 6 f and 4 d,
    if that is more.
    """
    mixer = 2 * sizes.moved - 2 * (sizes.query + 2 * sizes.key)
    return max(mixer + 12.0 * sizes.query, 6.0 * sizes.inner) + 4 * sizes.hidden


def parts(sizes: Sizes, kind: str, tokens: int, *, checkpointing: bool = False) -> dict[str, float]:
    """Bytes by part of a step.

    Weights: 2 a parameter that does not train. What trains: 4 of master, 4 of gradient, 8 of AdamW's moments, and 2 of
    the bfloat16 copies that products keep. A teacher of its own, 2 a parameter, where base weights have changed.
    Losses: slices of logits, two for each model (`kernels.distill`), and the trained head's gradient in float32 and
    once more in bfloat16. With checkpointing, a layer's input and one whole layer.

    Args:
        sizes: of the model.
        kind: of the stage, a key of `bench.flops.PASSES`.
        tokens: of a micro-batch.
        checkpointing: whether activations are computed twice.
    """
    found = {
        "frozen": 2.0 * (sizes.total - sizes.trained),
        "masters": 4.0 * sizes.trained + 2.0 * sizes.body,
        "gradients": 4.0 * sizes.trained,
        "adamw": 8.0 * sizes.trained,
        "teacher": 2.0 * sizes.teacher if sizes.apart else 0.0,
        "workspace": WORKSPACE,
    }
    if kind == "transfer":
        return found | {"activations": tokens * transfer_bytes(sizes), "logits": 0.0}
    each = block_bytes(sizes)
    stream = (4.0 if sizes.base_trained else 2.0) * sizes.hidden
    layers = each + sizes.layers * stream if checkpointing else sizes.layers * each
    sides = 2 if "kl" in kind else 1
    head = 8.0 * sizes.head if sizes.head_trained else 0.0
    return found | {"activations": tokens * layers, "logits": 4.0 * SLICE * sides + head}
