"""A converted attention layer: the model's own module, whose attention function runs a mixer, or still the teacher."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.errors import UnsupportedModelError
from linearize.mixers import Mixer, shift
from linearize.mixers.beside import Plain
from linearize.mixers.offloaded import device_of
from linearize.mixers.rotations import WAYS, rotate_back
from linearize.surgery import arguments, handed_on, teaching
from linearize.surgery.cache import LinearizedCacheLayer, adopt, rehearsing
from linearize.surgery.generated import subclass
from linearize.surgery.layer_call import LayerCall, Triple
from linearize.surgery.masks import Reading, read_mask

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
        rotation: the rotary embedding, cos and sin [B, T, R] or a complex tensor, or None where the module gets none.
        cache: the layer's converted cache, or None.
        offset: column of the first new token in the mask, [] tensor in static caches; None: no new token is padding.
        first: what the first converted layer hands on in this call, or None where no layer mixes its values.
        takes: the call is for q, k and v [B, T, H, K] alone, which are put here; see `shifted`.
        shifted: of layers that shift their projections' inputs, makes q, k and v of those; else None.
    """

    hidden_states: Tensor
    rotation: Any = None
    cache: LinearizedCacheLayer | None = None
    offset: int | Tensor | None = 0
    first: handed_on.FirstLayer | None = None
    takes: list[Tensor] | None = None
    shifted: Callable[[Reading], Triple] | None = None


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
        if shift.shifts_projections(self.mixer) and self.linearize_switch.mode != "teacher":
            frame.shifted = partial(self.shifted, frame, args, kwargs)
        answer = super().forward(*args, **kwargs, linearize_frame=frame)
        if frame.cache is not None:
            frame.cache.awaits = False
        return answer

    def shifted(
        self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any], reading: Reading
    ) -> Triple:
        """q, k, v [B, T, H, K] of a call whose projections read tokens mixed with those before them.

        Families make q, k and v each in their own way, in one product or several, with norms and rotations behind; the
        module's own forward knows, and so it runs once for each, and what else it makes is left.

        Args:
            frame: of the call.
            args, kwargs: the module's own arguments.
            reading: of the call's mask.

        Raises:
            UnsupportedModelError: another process holds the token before the first.
        """
        if self.linearize_switch.spread is not None:
            raise UnsupportedModelError(
                f"{self.named()}: its projections read the token before (mixer.update.shift_projections), and "
                "sequences that several processes hold hand on none in front of projections; set run.sequence=1"
            )
        hidden, cache = frame.hidden_states, frame.cache
        hidden = hidden.detach() if self.linearize_switch.mode == "observe" else hidden
        state, valid = (None, reading.valid) if cache is None else cache.entered(reading.valid)
        inputs = shift.inputs_of(self.mixer, hidden, valid=valid, starts=reading.starts, state=state)
        found = []
        with rehearsing(cache):
            for place, own in enumerate(inputs):
                takes: list[Tensor] = []
                taken = replace(frame, hidden_states=own, takes=takes, shifted=None)
                if "hidden_states" in kwargs:
                    super().forward(*args, **{**kwargs, "hidden_states": own}, linearize_frame=taken)
                else:
                    super().forward(own, *args[1:], **kwargs, linearize_frame=taken)
                # a number is compared, since torch's compiler makes a tensor of what else an assertion is given
                assert len(takes) == 3, "the module's forward has not come to its attention function"
                found.append(takes[place])
        return found[0], found[1], found[2]

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
        found["plain"] = _plain(module, frame, q, k)
    return found


def _plain(module: LinearizedAttention, frame: Frame, q: Tensor, k: Tensor) -> Plain:
    """q and k before the rotary embedding."""
    shape = module.mixer.shape
    if shape.rotary not in WAYS:
        return q, k
    if frame.rotation is None:
        raise UnsupportedModelError(
            f"{module.named()} was called without position_embeddings, so queries and keys cannot be rotated back"
        )
    rotation, name = frame.rotation, shape.rotary
    return rotate_back(q, rotation, name), rotate_back(k, rotation, name)


def _shifted(module: LinearizedAttention, frame: Frame, reading: Reading, given: Triple) -> Triple:
    """q, k and v of a call whose projections' inputs are shifted; while a layer is observed the teacher's, as given."""
    observed = module.linearize_switch.mode == "observe"
    assert frame.shifted is not None
    if observed and not (module.linearize_hands and frame.first is not None):
        return given
    made = frame.shifted(reading)
    hand_on(module, frame, made[2])
    return given if observed else made


def _own(module: LinearizedAttention, frame: Frame, reading: Reading) -> tuple[Any, ...]:
    """See `LayerCall.shifted`."""
    assert frame.shifted is not None
    q, k, v = frame.shifted(reading)
    return q, k, v, _plain(module, frame, q, k) if module.mixer.needs_plain else None


def reading_of(module: LinearizedAttention, mask: Any, batch: int, tokens: int, frame: Frame) -> Reading:
    """What a call's mask says of its new tokens, see `read_mask`."""
    shape = module.mixer.shape
    return read_mask(
        mask,
        batch,
        tokens,
        frame.offset,
        window=shape.sliding_window,
        chunk=shape.chunk,
        carries=frame.cache is not None,
        trusted=module.linearize_switch.trusts,
    )


def linearized_attention(
    module: LinearizedAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of converted layers, as transformers calls it: q, k, v [B, H, T, K] -> [B, T, H, V]."""
    frame: Frame = kwargs.pop("linearize_frame")
    switch = module.linearize_switch
    if frame.takes is not None:
        for x in (query, key, value):
            frame.takes.append(x.transpose(1, 2))
        batch, heads, tokens, _ = query.shape
        return query.new_zeros(batch, tokens, heads, value.shape[-1]), None
    if frame.shifted is None:
        hand_on(module, frame, value.transpose(1, 2))
    if switch.mode == "teacher":
        return module.teacher(query, key, value, attention_mask, **kwargs)
    batch, _, tokens, _ = query.shape
    why = arguments.refusal(kwargs, tokens=tokens, mask=attention_mask)
    why = why or arguments.changed(kwargs, module.mixer.shape)
    if why is not None:
        raise UnsupportedModelError(f"{module.named()}: {why}")
    shape = module.mixer.shape
    reading = reading_of(module, attention_mask, batch, tokens, frame)
    valid, starts, gaps = reading.valid, reading.starts, reading.gaps
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if frame.shifted is not None:
        q, k, v = _shifted(module, frame, reading, (q, k, v))
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
            shifted=None if frame.shifted is None else partial(_own, module, frame, reading),
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
