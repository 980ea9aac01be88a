"""One forward of a few tokens that records every call of the attention function, on the meta device or loaded.

Since transformers 5 every attention module hands q, k, v (after q/k norm and RoPE) to a registered function. The probe
stands in for it, adds nothing to the residual stream, and feeds each module the same token at every position, so that
its queries differ by their rotation alone, whatever mixes tokens in the layers before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from linearize.errors import UnsupportedModelError
from linearize.surgery.standing_in import standing_in

NAME = "linearize_probe"
TOKENS = 4
FIRST = 512
"""Tokens among which one is looked for whose embedding is not zero."""

FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
)
"""What a model's own code raises when it is run in a way that it does not know."""


@dataclass
class Call:
    """One call of the attention function; tensors [1, H, T, K]."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    arguments: dict[str, Any]


@dataclass
class Visit:
    """One run of an attention module's forward.

    Attributes:
        hidden_states: [1, T, D], its input.
        rotation: the rotary embedding that it was given, in whatever form its family has, or None.
        given: tensors among its arguments, so that a mask that it made itself can be told.
        calls: of its attention function.
    """

    hidden_states: Tensor
    rotation: Any
    given: list[Tensor]
    calls: list[Call] = field(default_factory=list)


@dataclass
class Probe:
    """What one forward showed.

    Attributes:
        visits: id of each attention module that ran -> its runs, in order.
        local_sizes: storage of a mask -> window or chunk that it was made for.
    """

    visits: dict[int, list[Visit]] = field(default_factory=dict)
    local_sizes: dict[int, int] = field(default_factory=dict)

    def local_size(self, mask: Any) -> int | None:
        """Window or chunk that transformers built a mask for, or None for all tokens or a mask unknown."""
        return self.local_sizes.get(_storage(mask)) if isinstance(mask, Tensor) else None


def probe(
    model: PreTrainedModel, modules: list[nn.Module], *, own: bool = False, cached: bool = False
) -> Probe:
    """Run a few tokens and record what the attention modules hand to their attention function.

    Args:
        model: loaded or on the meta device.
        modules: its attention modules.
        own: under the name of the attention function that the model is set to, since some families take another way
            for names that they know; else under the probe's own.
        cached: with a cache.

    Raises:
        UnsupportedModelError: the model's forward does not run this way; the message names where it stops.
    """
    first: Exception | None = None
    ways: list[Any] = [nullcontext()]
    if next(model.parameters()).is_meta:
        ways.append(standing_in(model))
    for way in ways:
        with way:
            for inputs in _inputs(model):
                seen = Probe()
                try:
                    with recording(model, modules, seen, own=own), evaluating(model), torch.no_grad():
                        model(**inputs, use_cache=cached)
                    return seen
                except FAILURES as error:
                    first = first or error
    assert first is not None
    raise UnsupportedModelError(
        f"{type(model).__name__}: its forward does not run on {TOKENS} plain tokens with an attention function other "
        f"than its own (it stops in {place(first)}), so its queries and keys cannot be reached; convert a model "
        "family that does (Llama, Qwen, Gemma, GPT-2, ...)"
    ) from first


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Ways to hand the same few tokens over, the ordinary one first.

    On the meta device a model that looks at its mask's values stops: then a mask on the CPU may do, or one that is
    ready made, which transformers passes through.
    """
    parameter = next(model.parameters())
    ids = torch.full((1, TOKENS), _token(model), dtype=torch.int64, device=parameter.device)
    mask = torch.ones(1, TOKENS, dtype=torch.int64, device=parameter.device)
    yield {"input_ids": ids, "attention_mask": mask}
    if parameter.is_meta:
        yield {"input_ids": ids, "attention_mask": torch.ones(1, TOKENS, dtype=torch.int64)}
    ready = torch.zeros(1, 1, TOKENS, TOKENS, dtype=parameter.dtype, device=parameter.device)
    yield {"input_ids": ids, "attention_mask": ready}


def _token(model: PreTrainedModel) -> int:
    """The first token whose embedding is not zero, as that of padding is at first: of zeros no rotation is seen."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or weight.dim() != 2:
        return 0
    return int((weight[:FIRST] != 0).any(1).to(torch.int64).argmax())


@contextmanager
def recording(model: PreTrainedModel, modules: list[nn.Module], seen: Probe, *, own: bool) -> Iterator[None]:
    """Inside, every attention function that `modules` ask for is the recorder."""
    known = {id(module) for module in modules}
    real = AttentionInterface.get_interface

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = _named(module, args, kwargs)
        hidden = named["hidden_states"] if "hidden_states" in named else args[0]
        given = list(_tensors((args, kwargs)))
        visit = Visit(hidden, named.get("position_embeddings"), given)
        seen.visits.setdefault(id(module), []).append(visit)
        same = hidden[:, :1].expand_as(hidden)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": same}
        return (same, *args[1:]), kwargs

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **extra: Any
    ) -> tuple[Tensor, None]:
        if id(module) in seen.visits:
            call = Call(query, key, value, attention_mask, extra)
            seen.visits[id(module)][-1].calls.append(call)
        batch, heads, tokens, _ = query.shape
        return query.new_zeros(batch, tokens, heads, value.shape[3]), None

    def make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
        mask = sdpa_mask(
            *args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        )
        if isinstance(mask, Tensor) and kwargs.get("local_size") is not None:
            seen.local_sizes[_storage(mask)] = kwargs["local_size"]
            kept.append(mask)  # a storage's address is its name while it lives
        return mask

    def choose(interface: Any, name: str, default: Any) -> Any:
        function = real(interface, name, default)

        def recorder(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (record if id(module) in known else function)(module, *args, **kwargs)

        return recorder

    kept: list[Tensor] = []
    configs = _configs(model)
    makers = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
    names = {key: config._attn_implementation_internal for key, config in configs.items()}
    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    AttentionInterface.register(NAME, record)
    AttentionMaskInterface.register(NAME, make_mask)
    try:
        if own:
            AttentionInterface.get_interface = choose  # type: ignore[method-assign,assignment]
            if next(model.parameters()).is_meta:
                # the masks' own makers look at values, to see whether they can be left out
                for name in set(names.values()) & set(ALL_MASK_ATTENTION_FUNCTIONS):
                    ALL_MASK_ATTENTION_FUNCTIONS[name] = make_mask
        else:
            for config in configs.values():
                config._attn_implementation_internal = NAME
        yield
    finally:
        AttentionInterface.get_interface = real  # type: ignore[method-assign]
        ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.update(makers)
        # the functions hold on to the model's tensors
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)
        for hook in hooks:
            hook.remove()
        for key, config in configs.items():
            config._attn_implementation_internal = names[key]


def _configs(model: PreTrainedModel) -> dict[int, Any]:
    owned = (getattr(module, "config", None) for module in model.modules())
    return {id(config): config for config in owned if isinstance(config, PreTrainedConfig)}


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name, those given by position too."""
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    except TypeError:
        return kwargs
    named = dict(bound.arguments)
    parameters = inspect.signature(module.forward).parameters
    rest = next((name for name, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    return {**named, **named.pop(rest, {})} if rest else named


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors inside nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _storage(tensor: Tensor) -> int:
    """A name for the memory that a tensor and its views share, on the meta device too."""
    return tensor.untyped_storage()._cdata


def made_elsewhere(mask: Any, given: list[Tensor]) -> bool:
    """Whether a mask shares memory with a tensor that the module was given: it did not make a new one."""
    return not isinstance(mask, Tensor) or _storage(mask) in {_storage(tensor) for tensor in given}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode; each module returns to the mode that it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def place(error: Exception) -> str:
    """Innermost line of the model's own code on the way to an error: "modeling_x.py, line 7"."""
    found, trace = "its forward", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "modeling_" in code.co_filename.rsplit("/", 1)[-1] and "modeling_utils" not in code.co_filename:
            found = f"{code.co_filename.rsplit('/', 1)[-1]}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found
