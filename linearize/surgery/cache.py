"""The cache of a converted layer: the model's own cache layer, with fixed states in place of growing keys and values.

There is no Cache class of ours. On first touch a layer of whatever cache the caller uses is replaced by a generated
subclass of its own type, which keeps that type's counters and mask sizes, so every mask stays what the teacher
would get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from linearize.errors import LinearizeError, UnsupportedModelError
from linearize.mixers import Mixer, State
from linearize.surgery.generated import subclass
from linearize.surgery.read import Read


class LinearizedCacheLayer(CacheLayerMixin):
    """Mixin in front of a transformers cache layer, which keeps the abstract rest; holds one mixer's `State`.

    Attributes:
        state: None until the first token.
        seen: tokens so far, in layer types that have no counter of their own.
        record_past: keep what is needed to take tokens back (assisted decoding).
        read: in the model's first converted layer, what masks have said of the tokens so far, or None.
        plain: no call had a mask so far.
        awaits: a converted layer is about to hand over its keys and values; nobody else may.
        forgotten: the state was emptied, and nothing has been written since.
        rehearses: it does so more than once for the same tokens, and this time they do not count.
    """

    supports_early_init = False
    # a layer type is filed globally under this name by every subclass that has one, so ours must not inherit it:
    # models that were never converted would get our layers
    _layer_type = None
    state: State | None
    mixer: Mixer | None
    record_past: bool
    seen: int
    read: Read | None = None
    plain = False
    awaits = False
    rehearses = False
    forgotten = False
    _snapshot: State | None
    _recorded: list[dict[str, Tensor]]
    _home: torch.device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the tokens and hand the new keys and values [B, N, T, K] straight to the attention function.

        Raises:
            LinearizeError: who calls is no converted layer, and would take the new keys for all there are.
        """
        if not self.awaits:
            raise LinearizeError(
                "a cache layer was filled by a converted layer, and softmax attention cannot go on with its state; "
                "start the teacher, or a model that was not converted, with an empty cache of its own"
            )
        if self.rehearses:
            return key_states, value_states
        self.is_initialized = True
        layer: Any = self
        if isinstance(self, StaticLayer) and _frozen(layer.cumulative_length):
            layer.cumulative_length = layer.cumulative_length.clone()
            _keep_address(layer.cumulative_length)
        if isinstance(self, StaticLayer) and layer.cumulative_length.device != key_states.device:
            layer.cumulative_length = layer.cumulative_length.to(key_states.device)
            _keep_address(layer.cumulative_length)
        self._count(key_states.shape[-2])
        return key_states, value_states

    def _count(self, tokens: int) -> None:
        """Add to the counter that the layer's type has, a tensor in static layers, an int in others."""
        layer: Any = self
        if isinstance(self, StaticLayer):
            layer.cumulative_length.add_(tokens)
            if hasattr(self, "cumulative_length_int"):
                layer.cumulative_length_int += tokens
        elif hasattr(self, "cumulative_length"):
            layer.cumulative_length += tokens
        else:
            self.seen += tokens

    def entered(self, valid: Tensor | None) -> tuple[State | None, Tensor | None]:
        """What `attend` will go on from, or None for nothing yet, and which tokens it will take for text.

        Args:
            valid: [B, T] bool as it will be given, or None.
        """
        return self.state, valid

    def attend(
        self,
        mixer: Mixer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        valid: Tensor | None,
        starts: Tensor | None,
        gaps: bool | None = None,
        **context: Any,
    ) -> Tensor:
        """Run the mixer on new tokens [B, T, H, K] and keep its state; `context` as in `surgery.context`."""
        fresh = self.state is None
        if self.state is None:
            self.state = mixer.initial_state(k.shape[0], k.dtype, k.device)
            if isinstance(self, StaticLayer):
                _keep_address(*self.state.tensors.values())
        elif any(_frozen(tensor) for tensor in self.state.tensors.values()):
            self.state = self.state.clone()
            if isinstance(self, StaticLayer):
                _keep_address(*self.state.tensors.values())
        if self.mixer is not mixer:
            self._check_mixer(mixer, fresh)
            self.mixer = mixer
        if self.record_past:
            if self._snapshot is None:
                self._snapshot = self.state.clone()
            seen = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if valid is None else valid
            borders = torch.zeros_like(seen) if starts is None else starts
            recorded = {"q": q, "k": k, "v": v, "valid": seen, "starts": borders}
            recorded |= {name: context[name] for name in ("hidden", "first") if name in context}
            if "plain" in context:
                recorded["plain_q"], recorded["plain_k"] = context["plain"]
            self._recorded.append(recorded)
        empty, self.forgotten = fresh or self.forgotten, False
        if k.shape[1] == 1 and starts is None and not (torch.is_grad_enabled() and q.requires_grad):
            return mixer.step(q, k, v, state=self.state, valid=valid, **context)
        self.state.empty = empty
        try:
            return mixer.chunked(q, k, v, valid=valid, starts=starts, state=self.state, gaps=gaps, **context)
        finally:
            self.state.empty = False

    def _check_mixer(self, mixer: Mixer, fresh: bool) -> None:
        """Refuse the mixer of another model; that of a copy, as of a copied cache, has the same parts and shapes.

        Raises:
            LinearizeError: it is one.
        """
        if fresh or self.mixer is None:
            return
        one, other = self.mixer, mixer
        if type(one) is not type(other) or one.shape != other.shape or _made_of(one) != _made_of(other):
            raise LinearizeError(
                "a cache layer was filled by another converted model, whose states are others; start each model "
                "with an empty cache"
            )

    def mask_offset(self, tokens: int) -> int | Tensor | None:
        """Column of the first of so many new tokens in the layer's mask; None where they cannot be padding."""
        return self.get_seq_length() - self.get_mask_sizes(tokens)[1]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        if isinstance(self, StaticLayer) or hasattr(self, "cumulative_length"):
            return super().get_seq_length()  # type: ignore[safe-super]  # the layer's own type has it
        return self.seen

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to allocate for keys and values: the state is made with the first token.

        Layers that also hold a convolution's or a recurrence's states (hybrids) make those with the same method, by
        keyword, and go on doing so.
        """
        if isinstance(self, LinearAttentionCacheLayerMixin) and not args:
            super().lazy_initialization(**kwargs)  # type: ignore[safe-super]

    def reset(self) -> None:
        """Forget everything."""
        self._beside("reset")
        self.state = self.mixer = self.read = None
        self.plain = False
        self._drop_record()
        self._count(-int(self.get_seq_length()))

    def _beside(self, method: str, *args: Any) -> None:
        """Do the same with the states of the convolution or recurrence that shares the layer (hybrids)."""
        if isinstance(self, LinearAttentionCacheLayerMixin):
            own = getattr(LinearAttentionCacheLayerMixin, method, None)
            if own is None:
                raise LinearizeError(
                    f"this version of transformers cannot {method} the states of a hybrid layer"
                )
            own(self, *args)

    def _each_beside(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change each such state; one tensor a layer before transformers counted them, a dict since."""
        if isinstance(self, LinearAttentionCacheLayerMixin):
            for name in ("conv_states", "recurrent_states"):
                held: Any = getattr(self, name, None)
                if isinstance(held, dict):
                    held.update({place: change(x) for place, x in held.items() if x is not None})
                elif held is not None:
                    setattr(self, name, change(held))

    def _drop_record(self) -> None:
        self._snapshot = None
        self._recorded = []

    def activate_past_recording(self) -> None:
        """Keep a snapshot and the tokens since, so that `crop` can take tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: restore the snapshot and replay what remains.

        Args:
            tokens_to_remove: minus the number of tokens to remove; positive values are an absolute length
                (transformers 5.17).

        Raises:
            RuntimeError: more tokens than were recorded since the last call.
        """
        self._beside("crop", tokens_to_remove)
        length = int(self.get_seq_length())
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        if remove == 0 or self.state is None:
            self._drop_record()
            return
        recorded = sum(call["k"].shape[1] for call in self._recorded)
        if self._snapshot is None or remove > recorded:
            raise RuntimeError(
                f"cannot take back {remove} tokens: a linear-attention state keeps only the {recorded} recorded "
                "since the last crop; call cache.activate_past_recording() before the tokens that may be taken back"
            )
        if self.read is not None:
            self.read = self.read.cut(length - remove)
        self.state = self._snapshot
        keep = recorded - remove
        if keep:
            past: dict[str, Any] = {
                name: torch.cat([call[name] for call in self._recorded], 1)[:, :keep]
                for name in self._recorded[0]
            }
            if "plain_q" in past:
                past["plain"] = (past.pop("plain_q"), past.pop("plain_k"))
            assert self.mixer is not None
            with torch.no_grad():
                self.mixer.chunked(**past, state=self.state)
        self._drop_record()
        self._count(-remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in the order of the surviving beams."""
        self._beside("reorder_cache", beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._each_beside(lambda x: x[indices])
        self._select(indices)

    def _select(self, indices: Tensor) -> None:
        if self.read is not None:
            self.read = self.read.select(indices)
        if self.state is not None:
            self.state.select(torch.arange(self.state.batch, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._each_beside(lambda x: x.repeat_interleave(repeats, dim=0))
        if self.read is not None:
            self.read = self.read.repeat(repeats)
        if self.state is not None:
            self.state.repeat(repeats)

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._beside("offload")
        if self.state is not None:
            self._home = next(iter(self.state.tensors.values())).device
            self.state.to("cpu")

    def prefetch(self) -> None:
        """Move the state back."""
        self._beside("prefetch")
        if self.state is not None and hasattr(self, "_home"):
            self.state.to(self._home)


def _made_of(mixer: Mixer) -> dict[str, Any]:
    """Names and shapes of a mixer's parts and parameters."""
    parts: dict[str, Any] = {name: type(part) for name, part in mixer.named_modules()}
    return {**parts, **{name + ".": x.shape for name, x in mixer.named_parameters()}}


def _keep_address(*tensors: Tensor) -> None:
    """Tell torch.compile that tensors written in place stay where they are, or it makes no CUDA graph of the step."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def _frozen(tensor: Tensor) -> bool:
    """Made in inference mode, so that it cannot be written in place outside of it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return tensor.is_inference()


def adopt(cache: Cache, index: int) -> LinearizedCacheLayer:
    """The converted cache layer of attention layer `index`, made in place on first touch.

    It can be compiled where its type can be, in a static cache: the state is written in place. transformers also takes
    that as the sign that kept layers need a mask for keys yet to come. A mixer whose state grows (window `full`) is
    compiled again as it does.

    Raises:
        LinearizeError: the layer already holds keys and values of the softmax model.
    """
    replicate = getattr(cache, "layer_class_to_replicate", None)
    if replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(replicate())
    layer = cache.layers[index]
    if isinstance(layer, LinearizedCacheLayer):
        return layer
    if not isinstance(layer, CacheLayerMixin):
        raise LinearizeError(
            f"cache layer {index} is a {type(layer).__name__}; converted layers need an attention cache layer"
        )
    if layer.get_seq_length() != 0:
        raise LinearizeError(
            f"cache layer {index} was filled by softmax attention; start a converted model with an empty cache"
        )
    # cache layers are ABCs, whose instances refuse a new __class__; an empty instance takes over their attributes
    made: LinearizedCacheLayer = object.__new__(subclass(type(layer), LinearizedCacheLayer))
    made.__dict__.update(layer.__dict__)
    made.state, made.mixer, made.read, made.seen = None, None, None, 0
    made.record_past = getattr(layer, "record_past", False)
    made._drop_record()
    cache.layers[index] = made
    return made


@contextmanager
def rehearsing(layer: LinearizedCacheLayer | None) -> Iterator[None]:
    """Inside, a layer takes keys and values that it has counted already."""
    if layer is None:
        yield
        return
    layer.rehearses = True
    try:
        yield
    finally:
        layer.rehearses = False


def check_past_recording(cache: Cache) -> None:
    """Refuse an assistant's cache whose kept sliding layers hand out more keys than their mask has.

    Told by trying it: transformers 5.17 does so once the window is full and several tokens were drafted in a row, in
    models that nobody converted as well.

    Raises:
        UnsupportedModelError: naming the layer and the ways out.
    """
    for index, layer in enumerate(cache.layers):
        kept = isinstance(layer, DynamicSlidingWindowLayer) and not isinstance(layer, LinearizedCacheLayer)
        if not kept:
            continue
        trial, keys = DynamicSlidingWindowLayer(2), torch.zeros(1, 1, 4, 1)
        trial.activate_past_recording()
        trial.update(keys, keys)
        if trial.get_mask_sizes(1)[0] != trial.update(keys[:, :, :1], keys[:, :, :1])[0].shape[-2]:
            raise UnsupportedModelError(
                f"layer {index} of the assistant stayed softmax with a sliding window, for which assisted generation "
                f"is broken in transformers {transformers.__version__}, converted or not; upgrade transformers, "
                "convert every layer of the assistant, or use prompt_lookup_num_tokens"
            )
        return
