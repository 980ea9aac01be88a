"""Cross-entropy and KL over the vocabulary from final hidden states, against plain torch that holds all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import ours


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """Heads of SmolLM2-135M (49,152 words from 576 numbers), Llama-3.2-1B and Llama-3.1-8B, and one of 256,000 words.

    A row of the last is read in more than one block of words by every kernel.
    """
    small = [_case(tokens // 8, 576, 49_152), _case(tokens // 16, 2048, 128_256)]
    return small + [_case(tokens // 8, 4096, words) for words in (128_256, 256_000)]


def _case(tokens: int, width: int, vocabulary: int) -> Case:
    def inputs(draw: Draw) -> Tensors:
        return {
            "hidden": draw.normal(tokens, width),
            "head": draw.normal(vocabulary, width, scale=2 * width**-0.5),
            "teacher": draw.normal(tokens, width),
            "targets": draw.whole(vocabulary, tokens),
            "weights": torch.full((tokens,), 1 / tokens, device=draw.device),
        }

    def build(inputs: Tensors) -> Call:
        head = ours("distill", "Head")(inputs["head"])
        loss = ours("distill", "distill_loss")
        hidden, targets, weights = inputs["hidden"], inputs["targets"], inputs["weights"]
        teacher = inputs["teacher"], head
        return lambda: loss(hidden, head, targets, weights, next_token=0.5, divergence=0.5, teacher=teacher)

    def plain(inputs: Tensors) -> Call:
        def call() -> Tensor:
            student = F.linear(inputs["hidden"], inputs["head"]).float()
            with torch.no_grad():
                teacher = F.linear(inputs["teacher"], inputs["head"]).float().log_softmax(-1)
            own = student.log_softmax(-1)
            divergence = F.kl_div(own, teacher, log_target=True, reduction="none").sum(-1)
            loss = 0.5 * F.nll_loss(own, inputs["targets"], reduction="none") + 0.5 * divergence
            return (loss * inputs["weights"]).sum()

        return call

    product = 2.0 * tokens * width * vocabulary
    forward_bytes = 2.0 * (vocabulary + 2 * tokens) * width
    return Case(
        "distill",
        f"{tokens:,} tokens, width {width:,}, vocabulary {vocabulary:,}, cross-entropy and KL",
        tokens,
        inputs,
        ("hidden",),
        (forward_bytes, 2 * forward_bytes + 2 * tokens * width),
        (2 * product, 3 * product),
        (Contender("linearize", build, kind="ours"), Contender("torch, all logits in float32", plain)),
        remark="the head does not train, as with LoRA; peak MiB is beyond the inputs",
    )
