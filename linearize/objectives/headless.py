"""Forward passes that stop before the head, for losses that make the logits a slice at a time.

The whole model runs as ever, adapters and router included, but its head hands on one column and keeps its input. What
a family does to its logits afterwards (Granite's scaling, Gemma 2's soft cap) is read from the config and believed only
if the model itself, given known numbers in place of its head's, gives what that says. A head that is anything but a
plain linear layer, one with adapters or hooks included, or a family that does something else, keeps the path over
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linearize.kernels.distill import Head
from linearize.kernels.distill.reference import shape_logits
from linearize.models.unwrapped import unwrapped
from linearize.objectives import Final

PROBE = (-8.0, -1.0, -0.25, 0.5, 2.0, 24.0)
"""Logits, far enough apart that another scale or cap would show."""


def recognize(model: nn.Module, device: torch.device) -> Head | None:
    """The model's head, if its logits are `Head`'s; runs the model on one token.

    Args:
        model: a causal language model or a PeftModel of one.
        device: of its inputs.

    Returns:
        The head, or None.
    """
    module = _plain_head(model)
    if module is None:
        return None
    numbers = torch.tensor(PROBE)
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _answering(module, lambda hidden: numbers.to(hidden)[None, None]):
            token = torch.zeros(1, 1, dtype=torch.int64, device=device)
            # positions as packed text has them: counted by itself, a model may reach behind a table that counts from 0
            found = model(input_ids=token, position_ids=token, use_cache=False).logits
    except RuntimeError:
        return None  # a family that insists on the width of its vocabulary
    finally:
        for part, before in training.items():
            part.training = before
    if found.shape != (1, 1, len(PROBE)):
        return None
    slack = 4 * torch.finfo(found.dtype).eps
    for scale, softcap in _candidates(unwrapped(model).config.get_text_config()):
        head = Head(module.weight, module.bias, scale, softcap)
        expected = shape_logits(numbers.double(), head)
        if torch.allclose(found[0, 0].double().cpu(), expected, rtol=slack, atol=slack):
            return head
    return None


def _plain_head(model: nn.Module) -> nn.Linear | None:
    """The head as long as calling it is its matrix product and nothing else."""
    head = unwrapped(model).get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    return None if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks else head


def _candidates(config: Any) -> Iterator[tuple[float, float | None]]:
    """Scales and soft caps that the config can mean."""
    softcaps = {getattr(config, "final_logit_softcapping", None), None}
    scales = [1.0]
    for name in ("logit_scale", "lm_head_multiplier"):
        scales += [float(getattr(config, name, None) or 1.0)]
    scales += [1.0 / float(getattr(config, "logits_scaling", None) or 1.0)]
    for softcap in sorted(softcaps, key=lambda x: x is None):
        for scale in dict.fromkeys(scales):
            yield scale, softcap


@contextmanager
def _answering(head: nn.Linear, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the head gives `answer(hidden)`."""
    replaced: Any = head
    replaced.forward = answer
    try:
        yield
    finally:
        del replaced.forward


def predict_final(model: nn.Module, batch: dict[str, Tensor], head: Head) -> Final:
    """Final hidden states [B, T, D] in place of logits; packed documents apart.

    Args:
        model: as it was recognized.
        batch: input_ids, and attention_mask or position_ids if there are any.
        head: from `recognize`; its scale and cap count, the tensors are those that the model has now.
    """
    module = unwrapped(model).get_output_embeddings()
    seen: list[tuple[Tensor, torch.dtype]] = []

    def keep(hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        seen.append(
            (
                hidden,
                torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else module.weight.dtype,
            )
        )
        return hidden[..., :1].clone()  # a view would be in the way of hooks on what the model gives

    with _answering(module, keep):
        model(
            input_ids=batch["input_ids"],
            attention_mask=batch.get("attention_mask"),
            position_ids=batch.get("position_ids"),
            use_cache=False,
        )
    [(hidden, dtype)] = seen
    return Final(hidden, Head(module.weight, module.bias, head.scale, head.softcap), dtype)
