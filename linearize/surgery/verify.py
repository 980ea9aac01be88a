"""Hold a converted model against the untouched one, once, on its real weights, before anything is trained.

Two views must give what the untouched model gives, whole and with a cache, with left padding: teacher mode, which is
what a student learns from, and a softmax over what a mixer gets to see (q, k, v, padding, a state in place of a cache),
which tells whether that is all that the attention depends on. Each layer's answer is compared, then replaced by the
untouched model's, so that one difference is found where it arises and rounding does not add up over the depth.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.errors import UnsupportedModelError
from linearize.surgery.control import mode
from linearize.surgery.inspection import AttentionLayer
from linearize.surgery.layer_call import teacher_mixer
from linearize.surgery.model import converted
from linearize.surgery.probe import FAILURES, evaluating, place

LENGTH = 16
"""Tokens of the prompt."""

STEPS = 2
"""Tokens after it, one a call."""

PADDING = 5
"""Padding in front of the first of the two rows."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference, as a part of the layer's largest output; other dtypes and TF32 have `COARSE`."""

COARSE = 0.08


@dataclass
class Answer:
    """What one call of the model gave: every layer's output [B, T, D] by path, and the logits [B, T, V]."""

    form: str
    layers: dict[str, Tensor]
    logits: Tensor
    valid: Tensor


def answers(
    model: PreTrainedModel, layers: list[AttentionLayer], forced: list[Answer] | None = None
) -> Iterator[Answer]:
    """Run the model whole, then in pieces with a cache, and show what each layer gives.

    Args:
        model: untouched or converted.
        layers: its attention layers.
        forced: answers that the layers' own are replaced by, call for call.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    length = LENGTH if limit is None else min(LENGTH, limit - STEPS)
    if length < 2:
        return
    table: Any = model.get_input_embeddings()
    words, device = table.weight.shape[0], table.weight.device
    # ordinary words: special tokens stand at either end of a vocabulary
    numbers = torch.arange(2 * (length + STEPS), device=device) * 17
    ids = (numbers % max(words // 2, 1) + words // 8).clamp_max(words - 1).view(2, -1)
    mask = torch.ones_like(ids)
    mask[0, : min(PADDING, length - 1)] = 0
    named = inspect.signature(model.forward).parameters
    positions = (mask.cumsum(1) - 1).clamp_min(0) if "position_ids" in named else None
    cache_name = "cache" if "cache" in named else "past_key_values"
    calls = [("the whole sequence", 0, length, False), ("a prompt with a cache", 0, length, True)]
    calls += [("one token with a cache", length + step, length + step + 1, True) for step in range(STEPS)]
    cache: Any = None
    for number, (form, start, stop, cached) in enumerate(calls):
        if start and cache is None:
            return  # keeps its own states, out of reach
        inputs: dict[str, Any] = {"attention_mask": mask[:, :stop], "use_cache": cached}
        if positions is not None:
            inputs["position_ids"] = positions[:, start:stop]
        if cache is not None:
            inputs[cache_name] = cache
        with ExitStack() as stack:
            seen: dict[str, Tensor] = {}
            for layer in layers:
                given = None if forced is None else forced[number].layers[layer.path]
                hook = layer.module.register_forward_hook(_watch(seen, layer.path, given))
                stack.callback(hook.remove)
            output = model(ids[:, start:stop], **inputs)
        cache = getattr(output, cache_name, None) if cached else None
        yield Answer(form, seen, output.logits, mask[:, start:stop].bool())


def _watch(seen: dict[str, Tensor], path: str, given: Tensor | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        seen[path] = first
        if given is None:
            return None
        return (given, *output[1:]) if isinstance(output, tuple) else given

    return hook


@contextmanager
def softmax_view(model: nn.Module, chosen: list[Any] | None = None) -> Iterator[None]:
    """Inside, converted layers, all of them or some, are a softmax over what their mixers see."""
    layers = converted(model) if chosen is None else chosen
    mixers = [layer.mixer for layer in layers]
    try:
        for layer in layers:
            layer.mixer = teacher_mixer(layer.mixer).to(next(layer.parameters()).device)
        yield
    finally:
        for layer, mixer in zip(layers, mixers, strict=True):
            layer.mixer = mixer


class Reference:
    """The untouched model's answers, taken before surgery.

    Args:
        model: loaded, not on the meta device.
        layers: the layers that will be converted.

    Raises:
        UnsupportedModelError: the model does not run on left-padded rows and with a cache.
    """

    def __init__(self, model: PreTrainedModel, layers: list[AttentionLayer]) -> None:
        self.layers = layers
        with _named_failures(model, "before surgery"), evaluating(model), torch.no_grad():
            self.answers = list(answers(model, layers))
        for answer in self.answers:
            if not bool(answer.logits[answer.valid].isfinite().any()):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: gives no finite number on {answer.form}, before any surgery; its weights "
                    f"are damaged or overflow in {answer.logits.dtype}"
                )

    def hold(self, model: PreTrainedModel) -> None:
        """Compare the model after surgery.

        Raises:
            UnsupportedModelError: a view differs; the message names the first layer and the largest difference.
        """
        with _named_failures(model, "after surgery"), evaluating(model), torch.no_grad():
            with mode(model, "teacher"):
                self._compare("in teacher mode", list(answers(model, self.layers, self.answers)))
            with softmax_view(model), mode(model, "student"):
                self._compare(
                    "as a softmax over its queries, keys, values and padding",
                    list(answers(model, self.layers, self.answers)),
                )

    def _compare(self, view: str, found: list[Answer]) -> None:
        worst: tuple[float, str] | None = None
        first: tuple[AttentionLayer | None, Answer, float, float] | None = None
        for expected, answer in zip(self.answers, found, strict=False):
            pairs: list[tuple[AttentionLayer | None, Tensor, Tensor]] = [
                (layer, expected.layers[layer.path], answer.layers[layer.path]) for layer in self.layers
            ]
            for layer, ours, theirs in [*pairs, (None, expected.logits, answer.logits)]:
                difference, scale = _difference(ours, theirs, expected.valid)
                if difference <= tolerance(ours) * scale:
                    continue
                if first is None:
                    first = layer, expected, difference, scale
                if worst is None or not difference <= worst[0]:
                    worst = difference, answer.form
        if first is None or worst is None:
            return
        layer, answer, difference, scale = first
        name = (
            "the logits" if layer is None else f"{layer.path} ({type(layer.module).__bases__[-1].__name__})"
        )
        raise UnsupportedModelError(
            f"{name}: differs from the untouched model by {difference:.2g} (its values reach {scale:.2g}) {view}, on "
            f"{answer.form}; the largest difference of all layers is {worst[0]:.2g}, on {worst[1]}. Its attention "
            "depends on more than linearize sees, so it cannot be converted"
        )


@contextmanager
def _named_failures(model: PreTrainedModel, when: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its forward fails {when} on left-padded rows and with a cache (in "
            f"{place(error)}: {type(error).__name__}), so it cannot be converted"
        ) from error


def _difference(ours: Tensor, theirs: Tensor, valid: Tensor) -> tuple[float, float]:
    """Largest difference on real tokens, and the largest value; tokens on which the model itself fails are left out."""
    known = valid & ours.isfinite().flatten(2).all(-1)
    a, b = ours[known].double(), theirs[known].double()
    if not a.numel():
        return 0.0, 0.0
    return (a - b).abs().max().item(), a.abs().max().item()


def tolerance(values: Tensor) -> float:
    """Largest difference that rounding explains, as a part of the largest value."""
    rounded = values.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return COARSE if rounded else TOLERANCE.get(values.dtype, COARSE)
