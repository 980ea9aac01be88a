"""A converted attention layer: the model's own module, whose attention function runs a mixer, or still the teacher."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.errors import UnsupportedModelError
from linearize.mixers import Mixer
from linearize.mixers.offloaded import device_of
from linearize.mixers.position import rotate_back
from linearize.surgery import arguments, handed_on, teaching
from linearize.surgery.cache import LinearizedCacheLayer, adopt
from linearize.surgery.generated import subclass
from linearize.surgery.masks import read_mask
from linearize.surgery.projections import output_projection

NAME = __name__.replace(".", "_")
"""Under which the attention function is registered with transformers; another one in a remote-code file."""


class Switch:
    """What all converted layers of one model do: `student`, `teacher`, or `observe` (attention transfer).

    One object is shared by the layers, so that a context manager flips them together, under any wrapper (peft, DDP).

    Attributes:
        mode, observer: what is done.
        trusts: masks are taken at their word, and no call has padding; see `control.trusting`.
        spread: what computes a mixer's chunked form where several processes hold each sequence; see `spreading`.
    """

    def __init__(self) -> None:
        self.mode = "student"
        self.observer: Callable[[LayerCall], Tensor | None] | None = None
        self.trusts = False
        self.spread: Callable[..., Tensor] | None = None

    def chunked(self, mixer: Mixer, *given: Tensor, **masks: Any) -> Tensor:
        """The mixer's chunked form of q, k and v, wherever the rest of their sequences is."""
        return mixer.chunked(*given, **masks) if self.spread is None else self.spread(mixer, *given, **masks)


@dataclass
class Frame:
    """What the module's forward knows and its attention function needs.

    Attributes:
        hidden_states: [B, T, D].
        rotation: cos and sin [B, T, R] of the rotary embedding, or None where the module gets none.
        cache: the layer's converted cache, or None.
        offset: column of the first new token in the mask, [] tensor in static caches; None: no new token is padding.
        first: what the first converted layer hands on in this call, or None where no layer mixes its values.
    """

    hidden_states: Tensor
    rotation: tuple[Tensor, Tensor] | None = None
    cache: LinearizedCacheLayer | None = None
    offset: int | Tensor | None = 0
    first: handed_on.FirstLayer | None = None


class LinearizedAttention(nn.Module):
    """Mixin in front of a model's attention class; see `convert_module`."""

    layer_idx: int
    config: Any
    mixer: Mixer
    linearize_switch: Switch
    teacher_config: Any
    linearize_hands = False
    """Whether its values are those that other layers mix with theirs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with one private argument more, which transformers passes through."""
        # transformers 5.24 calls the ordinary generation cache `cache`, as 5.17 calls the paged one of generate_batch()
        ordinary, given = (Cache, EncoderDecoderCache), kwargs.get("cache")
        if kwargs.get("block_table") is not None or not (given is None or isinstance(given, ordinary)):
            raise UnsupportedModelError(
                "continuous batching stores keys and values in pages, which a recurrent state does not have; "
                "use generate() instead of generate_batch()"
            )
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, ordinary)), None)
        frame = Frame(hidden, _rotation(args, kwargs), first=kwargs.pop(handed_on.NAME, None))
        if self.mixer.uses_first and frame.first is None:
            raise handed_on.missing(self.named())
        if cache is not None and self.linearize_switch.mode == "student":
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            frame.cache = adopt(cache, self.layer_idx)
            frame.offset = frame.cache.mask_offset(hidden.shape[1])
            frame.cache.awaits = True
        answer = super().forward(*args, **kwargs, linearize_frame=frame)
        if frame.cache is not None:
            frame.cache.awaits = False
        return answer

    def teacher(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The attention function that the model would run without surgery: q, k, v [B, H, T, K] -> [B, T, H, V]."""
        family = sys.modules[family_of(self)]
        eager: Any = getattr(family, "eager_attention_forward", None)
        # a family may keep functions of its own under transformers' names
        functions = getattr(family, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
        function = functions.get_interface(self.teacher_config._attn_implementation, eager)
        return function(self, query, key, value, mask, **kwargs)

    def named(self) -> str:
        """The layer, for messages."""
        return f"layer {self.layer_idx} ({type(self).__name__})"


def family_of(layer: LinearizedAttention) -> str:
    """Name of the module that a converted layer's own class comes from."""
    own = (cls for cls in type(layer).__mro__ if not issubclass(cls, LinearizedAttention))
    return next(cls for cls in own if cls is not nn.Module).__module__


def _rotation(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The rotary embedding among a forward's arguments, whether named or not."""
    if "position_embeddings" in kwargs:
        return kwargs["position_embeddings"]
    pairs = (x for x in args if isinstance(x, tuple) and len(x) == 2)
    return next((pair for pair in pairs if all(isinstance(x, Tensor) for x in pair)), None)


@dataclass
class LayerCall:
    """One converted layer's inputs and the teacher's answer, as attention transfer sees them; no tensor has a graph.

    Attributes:
        layer_idx: the layer's number.
        module: the attention module.
        q, k, v: [B, T, H, K], [B, T, N, K], [B, T, N, V], after q/k norm and RoPE.
        hidden_states: [B, T, D], the module's input.
        valid, starts: [B, T] bool or None: not padding, begins a document.
        teacher: [B, T, H, V], softmax output before the output projection.
        gaps: whether padding stands between tokens; None: nobody has looked.
        context: what else the mixer reads, see `context`.
    """

    layer_idx: int
    module: LinearizedAttention
    q: Tensor
    k: Tensor
    v: Tensor
    hidden_states: Tensor
    valid: Tensor | None
    starts: Tensor | None
    teacher: Tensor
    gaps: bool | None = None
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def mixer(self) -> Mixer:
        return self.module.mixer

    def student(self) -> Tensor:
        """The mixer's output [B, T, H, V] in its chunked form, with a graph to the mixer's parameters."""
        masks: dict[str, Any] = {"valid": self.valid, "starts": self.starts, "gaps": self.gaps}
        switch = self.module.linearize_switch
        return switch.chunked(self.mixer, self.q, self.k, self.v, **masks, **self.context)

    def project(self, y: Tensor) -> Tensor:
        """Heads [B, T, H, V] -> the layer's output [B, T, D], through the model's own output projection."""
        output = output_projection(self.module)
        return output(y.flatten(2).to(next(output.parameters()).dtype))

    def weights(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Normalized attention weights of teacher and student for some query rows, each [B, H, R, T]."""

        masks: dict[str, Any] = {"valid": self.valid, "starts": self.starts, "rows": rows}
        with torch.no_grad():
            softmax = teacher_mixer(self.mixer)
            teacher = softmax.parallel(self.q, self.k, None, **masks, sink=self.context.get("sink"))
        student = self.mixer.parallel(self.q, self.k, None, **masks, **self.context)
        return teacher.transpose(1, 2), student.transpose(1, 2)


def teacher_mixer(mixer: Mixer) -> Mixer:
    """The softmax mixer of the same layer: the teacher's attention in our own form, which can give its weights."""
    from linearize.mixers import build

    return build({"window": {"name": "full"}}, mixer.shape)


def hand_on(module: LinearizedAttention, frame: Frame, v: Tensor) -> None:
    """Leave the values [B, T, N, V] of the layer whose values others mix with theirs, in whatever mode it runs."""
    if module.linearize_hands and frame.first is not None:
        frame.first.put(v)


def context(
    module: LinearizedAttention, frame: Frame, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None
) -> dict[str, Any]:
    """What a layer's mixer reads beside q, k and v, by the names of `mixers.beside.Beside`."""
    found: dict[str, Any] = {}
    mixer, observed = module.mixer, module.linearize_switch.mode == "observe"
    if mixer.uses_first:
        assert frame.first is not None, "forward refuses to run without"
        first = frame.first.taken(v, module)
        found["first"] = first.detach() if observed else first
    if mixer.uses_hidden:
        found["hidden"] = frame.hidden_states.detach() if observed else frame.hidden_states
    if sink is not None:
        found["sink"] = sink.detach() if observed else sink
    if mixer.needs_plain:
        rotation = frame.rotation if mixer.shape.rotary == "half" else None
        if rotation is None and mixer.shape.rotary == "half":
            raise UnsupportedModelError(
                f"{module.named()} was called without position_embeddings, "
                "so queries and keys cannot be rotated back"
            )
        found["plain"] = (
            (q, k) if rotation is None else (rotate_back(q, *rotation), rotate_back(k, *rotation))
        )
    return found


def linearized_attention(
    module: LinearizedAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of converted layers, as transformers calls it: q, k, v [B, H, T, K] -> [B, T, H, V]."""
    frame: Frame = kwargs.pop("linearize_frame")
    switch = module.linearize_switch
    hand_on(module, frame, value.transpose(1, 2))
    if switch.mode == "teacher":
        return module.teacher(query, key, value, attention_mask, **kwargs)
    batch, _, tokens, _ = query.shape
    why = arguments.refusal(kwargs, tokens=tokens, mask=attention_mask)
    why = why or arguments.changed(kwargs, module.mixer.shape)
    if why is not None:
        raise UnsupportedModelError(f"{module.named()}: {why}")
    shape, carries = module.mixer.shape, frame.cache is not None
    local = {"window": shape.sliding_window, "chunk": shape.chunk}
    reading = read_mask(
        attention_mask, batch, tokens, frame.offset, **local, carries=carries, trusted=switch.trusts
    )
    valid, starts, gaps = reading.valid, reading.starts, reading.gaps
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    sink = kwargs.get("s_aux")
    if switch.mode == "observe":
        with torch.no_grad():
            # before anybody has looked at a mask it may say more than where documents begin
            known = starts if switch.trusts and switch.spread is None else None
            output = teaching.by_documents(module.teacher_config, shape, q, k, v, known, sink)
            if output is None:
                output, _ = module.teacher(query, key, value, attention_mask, **{**kwargs, "dropout": 0.0})
        assert switch.observer is not None
        call = LayerCall(
            layer_idx=module.layer_idx,
            module=module,
            q=q.detach(),
            k=k.detach(),
            v=v.detach(),
            hidden_states=frame.hidden_states.detach(),
            valid=valid,
            starts=starts,
            teacher=output.detach(),
            gaps=gaps,
            context=context(module, frame, q.detach(), k.detach(), v.detach(), sink),
        )
        instead = switch.observer(call)
        return output if instead is None else instead.to(output.dtype).contiguous(), None
    extra = context(module, frame, q, k, v, sink)
    if frame.cache is not None:
        output = frame.cache.attend(module.mixer, q, k, v, valid=valid, starts=starts, gaps=gaps, **extra)
    else:
        output = switch.chunked(module.mixer, q, k, v, valid=valid, starts=starts, gaps=gaps, **extra)
    # contiguous, as transformers' own functions answer: families that read it through `view` count on that
    return output.to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, linearized_attention)
# without a mask function of the same name transformers would drop every mask, padding included
AttentionMaskInterface.register(NAME, sdpa_mask)


def convert_module(attention: nn.Module, mixer: Mixer, switch: Switch) -> LinearizedAttention:
    """Turn one attention module into a converted one, in place.

    The module keeps its projections, norms and positions; it gains `mixer`, and a private copy of its config names
    our attention function, so `model.set_attn_implementation` keeps governing the teacher and the kept layers.
    """
    made = cast(LinearizedAttention, attention)
    made.teacher_config = made.config
    made.config = copy.copy(made.config)
    made.config._attn_implementation_internal = NAME
    attention.__class__ = subclass(type(attention), LinearizedAttention)
    if (
        "_old_forward" in attention.__dict__
    ):  # accelerate has hung a hook around the forward of the class before
        attention._old_forward = MethodType(type(attention).forward, attention)  # type: ignore[assignment]
    if not any(parameter.is_meta for parameter in mixer.parameters()):
        # a model that transformers is about to load stands on the meta device, though not with every parameter
        mixer = mixer.to(device_of(made))
    made.mixer = mixer
    made.linearize_switch = switch
    return made
