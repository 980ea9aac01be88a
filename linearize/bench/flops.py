"""Floating-point operations of a token in each training stage, and the peaks that a rate is a share of.

Model FLOPs: matrix products that the stage's mathematics needs, a multiplication and an addition as two. With N for the
weights of the matrices in the layers, V x D for the head, P for the mixers' own parameters, A for the adapters' and
S = 2 (T + 1) x heads x head dim for the scores and values of each softmax layer, over the causal half of T tokens:

| stage | body | head | softmax of the teacher | mixers | adapters |
|---|---|---|---|---|---|
| transfer | 2 N' | | S | 6 P | |
| weights, matrix | 2 N' | | S + W | 6 P | |
| lora | 4 N | 4 V D | | 4 P | 6 A |
| lora_kl | 6 N | 6 V D | S | 4 P | 6 A |
| mixers | 4 N | 4 V D | | 6 P | |
| mixers_kl | 6 N | 6 V D | S | 6 P | |
| all | 6 N | 6 V D | | 6 P | |
| all_kl | 8 N | 8 V D | S | 6 P | |

W = (T + 1) x heads x (head dim + 3 F) is both matrices of a layer with F features, the teacher's scores, the
student's products and their two gradients. N' is what stands in front of the last converted layer's output
projection: nothing behind it runs, softmax neither. Of a mixture's experts those count that a token goes to. Layers
that stay softmax have S forward and 2 S backward in the student too. What a recurrent branch does with its state and
a window with its keys is not counted, nor what checkpointing computes again: MFU of a converted model is a lower
bound of what the card did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linearize.models.layers import head_sizes, most

PEAKS = {
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.0,
    "GH200": 989.4,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
}
"""Part of a device's name -> dense bfloat16 TFLOP/s of its data sheet; the first that fits counts."""


@dataclass(frozen=True)
class Passes:
    """How often each part is gone through, a forward pass as one and a product of the backward pass as one."""

    body: int
    head: int = 0
    teacher: int = 0
    """Softmax layers of the teacher."""
    student: int = 0
    """Softmax layers that the student keeps."""
    mixers: int = 0
    adapters: int = 0
    matrices: int = 0
    """Weights of student and teacher compared."""


PASSES = {
    "transfer": Passes(body=1, teacher=1, mixers=3),
    "weights": Passes(body=1, teacher=1, mixers=3, matrices=1),
    "matrix": Passes(body=1, teacher=1, mixers=3, matrices=1),
    "lora": Passes(body=2, head=2, student=3, mixers=2, adapters=3),
    "lora_kl": Passes(body=3, head=3, teacher=1, student=3, mixers=2, adapters=3),
    "mixers": Passes(body=2, head=2, student=3, mixers=3),
    "mixers_kl": Passes(body=3, head=3, teacher=1, student=3, mixers=3),
    "all": Passes(body=3, head=3, student=3, mixers=3),
    "all_kl": Passes(body=4, head=4, teacher=1, student=3, mixers=3),
}
"""Stage -> passes of a token."""


def per_token(model: nn.Module, stage: str, length: int) -> float:
    """Model FLOPs of a token.

    Args:
        model: of a stage: converted or not, with adapters or without.
        stage: of `PASSES`.
        length: tokens of a sequence, over which softmax attention averages.
    """
    from linearize import surgery
    from linearize.mixers.window.full import FullWindow
    from linearize.models import experts
    from linearize.models.unwrapped import unwrapped

    base = unwrapped(model)
    met = experts.shares(base)
    mixers = [layer.mixer for layer in surgery.converted(base)]
    own = {id(p) for mixer in mixers for p in mixer.parameters()}
    tables = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
    head = base.get_output_embeddings().weight
    ends = stage in ("transfer", "weights", "matrix")
    behind = _behind(base, mixers) if ends else frozenset()
    sizes = {"body": 0.0, "adapters": 0.0, "mixers": 0.0}
    for name, parameter in base.named_parameters():
        if id(parameter) in tables or parameter is head or id(parameter) in behind:
            continue
        kind = "mixers" if id(parameter) in own else "adapters" if ".lora_" in name else "body"
        counts = parameter.dim() > 1 or kind == "mixers"
        sizes[kind] += parameter.numel() * met.get(id(parameter), 1.0) if counts else 0
    softmax = softmax_layer(base.config.get_text_config(), length)
    layers = base.config.get_text_config().num_hidden_layers
    run = 1 + surgery.converted(base)[-1].layer_idx if ends else layers
    kept = layers - sum(1 for mixer in mixers if not isinstance(mixer.window, FullWindow))
    passes = PASSES[stage]
    matrices = sum(matrix_layer(mixer, length) for mixer in mixers) if passes.matrices else 0.0
    return (
        2.0
        * (
            passes.body * sizes["body"]
            + passes.head * head.numel()
            + passes.mixers * sizes["mixers"]
            + passes.adapters * sizes["adapters"]
        )
        + softmax * (passes.teacher * run + passes.student * kept)
        + matrices
    )


def _behind(model: nn.Module, mixers: Sequence[nn.Module]) -> frozenset[int]:
    """Ids of the parameters that a pass meets behind the last converted layer's attention."""
    from linearize import surgery
    from linearize.distill.shards import blocks

    layers = blocks(model)
    last = max(number for number, layer in enumerate(layers) if set(mixers) & set(layer.modules()))
    attention = surgery.converted(layers[last])[-1]
    outward = {
        id(p)
        for path in surgery.projections(attention)["o"]
        for p in attention.get_submodule(path).parameters()
    }
    before = {id(p) for p in attention.parameters()} - outward
    return frozenset(id(p) for layer in layers[last:] for p in layer.parameters() if id(p) not in before)


def matrix_layer(mixer: Any, length: int) -> float:
    """FLOPs that the weights of one layer and its teacher take a token, forward and backward, see W above."""
    features = 0 if mixer.update is None else mixer.update.feature_dim
    return (length + 1.0) * mixer.shape.heads * (mixer.shape.key_dim + 3 * features)


def softmax_layer(config: Any, length: int) -> float:
    """FLOPs that scores and values of one layer take a token, forward, over the causal half of `length` keys."""
    heads, dim = most(config, "num_attention_heads") or 1, max(head_sizes(config))
    return 2.0 * (length + 1) * heads * dim


def peak(device: torch.device, given: float | None = None) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None where nobody knows.

    Args:
        device: where the step runs.
        given: TFLOP/s that count instead.
    """
    if given is not None:
        return 1e12 * given
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * value for part, value in PEAKS.items() if part in name), None)
