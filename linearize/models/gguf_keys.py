"""What each key under a GGUF file's architecture means for its model, and whether a config says the same.

The keys are those of the `gguf` package (`gguf.constants.Keys`). One that is not listed here is taken to change the
model, because transformers passes over what it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from linearize.models.layers import head_sizes

SAME: dict[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.scale": ("attention_multiplier",),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.max_alibi_bias": (),
    "attention.causal": ("is_causal",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attention.relative_buckets_count": ("relative_attention_num_buckets",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "router_logit_softcapping": ("router_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_shared_count": ("n_shared_experts", "num_shared_experts"),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "nextn_predict_layers": (),
    "decoder_start_token_id": ("decoder_start_token_id",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.dt_b_c_rms": (),
}
"""Key -> names that a config may have for it."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.head_count": (0,),
    "attention.causal": (True,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
}
"""Values that say what a model without the key does; of every other key, zero."""
ROPE: dict[str, str] = {
    "rope.scale_linear": "factor",
    "rope.scaling.factor": "factor",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_theta",
}
"""Key -> its name in a config's `rope_parameters`, one of them or one a layer type."""
SCORING = {1: "softmax", 2: "sigmoid"}
"""Values of `expert_gating_func`."""
CHECKED = frozenset(
    {
        "attention.key_length",
        "attention.key_length_swa",
        "attention.sliding_window",
        "attention.value_length",
        "attention.value_length_swa",
        "rope.scaling.type",
    }
)
"""`linearize.models.gguf_config` looks at these."""
HARMLESS = frozenset(
    {
        "context_length",  # how long texts were; no weight or formula of its own
        "expert_feed_forward_length",  # the tensors' shapes say it, and one that does not fit is refused
        "expert_shared_feed_forward_length",
        "feed_forward_length",
        "pooling_type",  # of an embedding of the whole text, which a decoder does not give
        "rope.scaling.finetuned",  # a note
        "tensor_data_layout",  # a note of the first converters
        "vocab_size",
    }
)
PER_LAYER = frozenset({"attention.head_count", "attention.head_count_kv"})
"""Lists of these are refused, or folded, by transformers' own reading."""


def unplaced(config: Any, said: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """The keys of a file that a config does not say: key, value, and what stands in its place.

    Args:
        config: transformers' config of the file.
        said: the keys of the file's architecture, without its name in front.
    """
    ropes = _ropes(config)
    for key, value in said.items():
        if key in CHECKED or key in HARMLESS or (key in PER_LAYER and isinstance(value, list)):
            continue
        if key in ROPE:
            places = {
                f"config.rope_parameters.{ROPE[key]}": rope[ROPE[key]] for rope in ropes if ROPE[key] in rope
            }
            if any(_equal(rope.get(ROPE[key]), value) for rope in ropes):
                continue
            if key.endswith("original_context_length") and said.get("rope.scaling.type") in (None, "none"):
                continue  # of a scaling that there is not
        elif key in ("rope.dimension_count", "rope.dimension_count_swa"):
            sizes = _rotated(config, ropes)
            if value in sizes and _head(said) in (None, *head_sizes(config)):
                continue
            # rotated as said, in heads of another width
            part = "the width of its heads" if value in sizes else "the rotated part of its heads"
            places = {part: sorted(sizes)[0]} if sizes else {}
        elif key == "attention.sliding_window_pattern":
            kinds = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]
            if kinds and kinds == _pattern(value, len(kinds)):
                continue
            places = {"config.layer_types": getattr(config, "layer_types", None)}
        elif key == "expert_gating_func":
            if getattr(config, "scoring_func", "softmax") == SCORING.get(value):
                continue
            places = {"config.scoring_func": getattr(config, "scoring_func", "softmax")}
        elif key in SAME:
            places = {f"config.{name}": getattr(config, name) for name in SAME[key] if hasattr(config, name)}
            if any(_equal(found, value) for found in places.values()) or _default(config, key, value):
                continue
            # a place that holds nothing says as little as none
            places = {name: found for name, found in places.items() if found is not None}
        else:
            yield key, value, "an unknown key"
            continue
        if not places and value in NEUTRAL.get(key, (0,)):
            continue
        if places:
            name, found = next(iter(places.items()))
            yield key, value, f"{name} would be {found}"
        else:
            yield key, value, "the config has no place for it"


def _ropes(config: Any) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    each = [part for part in rope.values() if isinstance(part, dict)]
    return each or [rope]


def _rotated(config: Any, ropes: list[dict[str, Any]]) -> set[int]:
    """How many dimensions of a head a config rotates."""
    if isinstance(getattr(config, "rotary_dim", None), int):
        return {config.rotary_dim}
    whole = getattr(config, "partial_rotary_factor", None) or 1.0
    shares = {rope.get("partial_rotary_factor") or whole for rope in ropes}
    # families with two kinds of layers count the dimensions of a frequency table, not of the rotated ones
    kinds = {1.0} if len(ropes) > 1 else set()
    return {int(size * share) for size in head_sizes(config) for share in shares | kinds}


def _head(said: dict[str, Any]) -> int | None:
    """Width of a head as the file has it; some families' config takes it from the rotated dimensions."""
    length: int | None = said.get("attention.key_length")
    width, heads = said.get("embedding_length"), said.get("attention.head_count")
    if not length and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        length = width // heads
    return length


def _pattern(value: Any, layers: int) -> list[bool]:
    if isinstance(value, list):
        return [bool(entry) for entry in value]
    return [bool(value) and (layer + 1) % value != 0 for layer in range(layers)]


def _default(config: Any, key: str, value: Any) -> bool:
    """Whether a value is what the model does without a place for it, computed from other sizes."""
    if key == "attention.head_count_kv" and not hasattr(config, "num_key_value_heads"):
        return bool(_equal(getattr(config, "num_attention_heads", None), value))
    if key == "attention.scale":
        base = getattr(config, "query_pre_attn_scalar", None)
        sizes = {base} if base else head_sizes(config)
        return any(_equal(size**-0.5, value) for size in sizes)
    return False


def _equal(found: Any, value: Any) -> bool:
    # the file keeps float32
    if isinstance(found, float) and isinstance(value, int | float):
        return math.isclose(found, value, rel_tol=1e-5)
    return bool(found == value)
