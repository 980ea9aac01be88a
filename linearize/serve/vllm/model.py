"""The model class: vLLM's transformers backend around the family's own code, mixers where it looks for attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR
from vllm.model_executor.models.transformers.fusers import AttentionFuser
from vllm.model_executor.models.utils import maybe_prefix

from linearize.auto import TYPE_PREFIX
from linearize.errors import UnsupportedModelError
from linearize.export.registration import register
from linearize.mixers.base import wide
from linearize.mixers.window.full import FullWindow
from linearize.mixers.window.length import log_scaled
from linearize.serve.vllm.group import Here, check_kept, parted
from linearize.serve.vllm.kinds import as_exported, number, sections
from linearize.serve.vllm.layer import MixerLayer
from linearize.serve.vllm.settings import page_bytes
from linearize.surgery import arguments
from linearize.surgery.attention import Frame, LinearizedAttention, context, hand_on

FUNCTION = "linearize_vllm"
"""Under which `attend` is registered with transformers."""


def attend(
    module: LinearizedAttention, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function of converted layers in vLLM: q, k, v [1, H, T, K] -> [1, T, H, V].

    Raises:
        UnsupportedModelError: the family hands over something that the mixer was not converted with.
    """
    frame: Frame = kwargs.pop("linearize_frame")
    why = arguments.refusal(kwargs, tokens=query.shape[2], mask=mask)
    why = why or arguments.changed(kwargs, module.mixer.shape)
    if why is None and kwargs.get("s_aux") is not None:
        why = "has attention sinks of its own, which are not served; use linearize generate"
    if why is None and frame.shifted is not None:
        why = "its projections read the token before (shift_projections), which is not served; use linearize generate"
    if why is not None:
        raise UnsupportedModelError(f"{module.named()}: {why}")
    here = cast(Here, module.linearize_here)
    shape = module.mixer.shape
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q, k, v = here.own(q, shape.heads), here.own(k, shape.kv_heads), here.own(v, shape.kv_heads)
    hand_on(module, frame, v)
    found = context(module, frame, q, k, v)
    plain = found.pop("plain", ())
    layer = getattr(module, VLLM_ATTN_ATTR)
    if not isinstance(layer, MixerLayer):
        q, k = plain or (q, k)
        made = softmax(module, layer, q, k, v, found.get("hidden"), kwargs.get("position_ids"))
        return here.handed(made), None
    inputs = {"q": q, "k": k, "v": v, **found, **dict(zip(("plain_q", "plain_k"), plain, strict=False))}
    return here.handed(layer.attend({name: x[0] for name, x in inputs.items()})[None]), None


def softmax(
    module: LinearizedAttention,
    layer: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """A mixer that is softmax over the whole text, by vLLM's own attention: [1, T, H, V].

    Args:
        module: the converted one.
        layer: holds its pages of keys and values.
        q, k, v: [1, T, H, K], [1, T, N, K], [1, T, N, V], as the mixer's window sees them.
        hidden: [1, T, D], for an output part that reads it.
        positions: [1, T] of the tokens in their texts.

    Raises:
        UnsupportedModelError: scores grow with the text, and the family does not say where its tokens stand.
    """
    mixer = module.mixer
    window = cast(FullWindow, mixer.window)
    if window.log_base:
        if positions is None:
            raise UnsupportedModelError(
                f"layer {module.layer_idx} ({type(module).__name__}): its scores grow with the text (log_base), and "
                "the family hands attention no positions; use linearize generate"
            )
        q = log_scaled(
            q, (positions + 1).clamp_max(window.size or torch.iinfo(torch.int64).max), window.log_base
        )
    made = layer(q[0].flatten(1), k[0].flatten(1), v[0].flatten(1)).view(*v.shape[:2], mixer.shape.heads, -1)
    if mixer.output is None:
        return made
    return mixer.output(wide(made), None if hidden is None else wide(hidden)).to(v.dtype)


ALL_ATTENTION_FUNCTIONS.register(FUNCTION, attend)


class LinearizedForCausalLM(TransformersForCausalLM, HasInnerState, IsHybrid):
    """Any converted checkpoint, of any family that vLLM's transformers backend runs."""

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> LinearizedForCausalLM:
        experts = vllm_config.model_config.is_moe and cls is LinearizedForCausalLM
        return super().__new__(LinearizedMoEForCausalLM if experts else cls)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        model = vllm_config.model_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        return ((page_bytes(model.hf_config, model.dtype, ranks),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        return (get_temporal_copy_spec,)

    @property
    def _from_config_kwargs(self) -> dict[str, Any]:
        given = dict(super()._from_config_kwargs)
        # the config may have come from another process, where its class was made
        register(given["config"].model_type.removeprefix(TYPE_PREFIX))
        return {**given, "config": as_exported(given["config"])}

    def _decorate_for_torch_compile(self) -> None:
        if not self.model_config.enforce_eager:
            super()._decorate_for_torch_compile()

    def recursive_replace(self) -> None:
        """As the backend does it, but for the mixers, whose parts stay this package's own."""
        self.converted = {
            name: module for name, module in self.named_modules() if isinstance(module, LinearizedAttention)
        }
        strange = next((name for name, module in self.named_modules() if isinstance(module, Conv1D)), None)
        if strange is not None:
            raise UnsupportedModelError(
                f"{strange} is a Conv1D, whose weight lies the other way round, and vLLM's transformers backend reads "
                "none; families like GPT-2 run by linearize generate"
            )
        mixers = {name: module.mixer for name, module in self.converted.items()}
        by_number = {number(path): section for path, section in sections(self.config).items()}
        self.parted = list(parted(self.converted, by_number, self.tp_group))
        for layer in self.parted:
            layer.prepare(self.quant_config)
        for module in self.converted.values():
            del module.mixer
        super().recursive_replace()
        if self.parted:
            for name, _ in self.attention_fusers.values():
                check_kept(name, self.get_submodule(name))
        for name, module in self.converted.items():
            module.mixer = mixers[name]
            cast(Any, module).linearize_here = Here()
            module.config._attn_implementation_internal = FUNCTION
            module.linearize_switch.trusts = True
            self.attention_fusers[module.layer_idx] = (name, AttentionFuser(type(module).__name__))
        for layer in self.parted:
            layer.finish()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As the backend does it; of mixers each process takes its heads' part."""
        for layer in self.parted:
            layer.loaders()
        return super().load_weights(weights)

    def _create_attention_instances(self, prefix: str = "") -> None:
        self.by_prefix = {
            maybe_prefix(prefix, f"{name}.{VLLM_ATTN_ATTR}"): module
            for name, module in self.converted.items()
        }
        super()._create_attention_instances(prefix)

    def _get_attn_cls(self) -> Any:
        own = super()._get_attn_cls()
        page = page_bytes(self.config, self.model_config.dtype, self.tp_group.world_size)

        def made(*, prefix: str, **kwargs: Any) -> Any:
            module = self.by_prefix.get(prefix)
            if module is None:
                return own(prefix=prefix, **kwargs)
            mixer = module.mixer
            if mixer.has_fixed_state:
                return MixerLayer(mixer, prefix, page, self.vllm_config)
            shape = mixer.shape
            softmax = {"scale": shape.scaling, "logits_soft_cap": shape.softcap}
            return Attention(
                prefix=prefix, **{**kwargs, **softmax, "per_layer_sliding_window": shape.sliding_window}
            )

        return made


class LinearizedMoEForCausalLM(TransformersMoEForCausalLM, LinearizedForCausalLM):
    """The same for families with experts."""
