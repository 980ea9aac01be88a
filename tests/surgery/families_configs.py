"""Tiny configs of every causal language model of transformers: a rule for each kind of field name, and a few hints."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

RULES: list[tuple[str, int]] = [
    (r"(dim_model_base|rotary_dim)", 16),
    (r"(num_)?query_groups|num_buckets|position_bias_num_buckets", 8),
    (r".*(vocab|unk_index|mask_index).*", VOCABULARY),
    (
        r".*(max_position|n_positions|n_ctx|max_seq_len|model_max_length|context_length|max_distance|max_\w+_positions).*",
        512,
    ),
    (r".*(sliding_window(_size)?|attention_window_size|keep_window_size|local_attention|window_size)", 9),
    (r".*(chunk_size|chunk_length|floor_scale|n_floor|rel_extent)", 8),
    (r".*(index_topk|index_topk_blocks|indexer_budget)", 4),
    (r".*(index_block_size)", 4),
    (r"mamba_n_heads|mamba_num_heads|linear_num_value_heads", 8),
    (r"n_mamba_heads", 2),
    (r".*(n_groups|ngroups)", 1),
    (r".*(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|num_experts_per_token)", 2),
    (r"topk_group", 1),
    (r"n_group|num_expert_group", 2),
    (r".*(shared_experts?|zero_expert_num)", 1),
    (r".*(num_experts|n_routed_experts|num_local_experts)", 4),
    (r".*(moe|expert)\w*(intermediate|ffn|hidden)\w*size", 32),
    (
        r".*(intermediate\w*size|ffn\w*|dff|dim_ff|d_inner|n_inner|feed_forward_size|intermediate_size_mlp)",
        96,
    ),
    (r"q_lora_rank|\w*lora_rank|\w*(gate|gated_norm|laurel|adapter|lowrank|lru)\w*rank|hc_lowrank", 16),
    (r"qk_(rope|nope)_head_dim", 8),
    (r"embed_dim_per_\w+|hidden_size_per_layer_input|\w*router_hidden_size|d_rel", 16),
    (r".*(head_dim|head_size|d_head|dim_head|headdim|kv_channels|d_kv)", 16),
    (r".*(d_state|state_size)", 16),
    (r"mamba_d_ssm|lru_width|attention_hidden_size", 64),
    (r".*dt_rank|time_step_rank", 8),
    (r".*(key_value_heads|kv_heads)(_per_layer)?", 2),
    (r".*(heads|n_head)(_per_layer)?", 4),
    (r".*(layer_period|layer_interval|every_n_layers|sliding_window_pattern)", 2),
    (r".*layer_offset", 1),
    (r".*(hidden_layers|num_layers|n_layers?|_layers_per_stack|decoder_layers|encoder_layers|num_blocks)", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_kv_shared_layers", 1),
    (r"num_nextn_predict_layers|num_mtp_layers", 0),
    (
        r".*(hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|embed_proj_dim|embed_dim|adapter_in_dim)",
        64,
    ),
]
"""Field name -> size; the first pattern that fits the whole name wins. Only numbers in the default are replaced."""

HINTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {"01": {"num_attention_heads": 4}}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"hash_seed": 0, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"n_mamba_heads": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the names do not say: sizes whose default is None, numbers that must agree with others."""


def types() -> list[str]:
    """Every model type for which transformers has a causal language model."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.startswith("linearized_")]


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A config of the type with two layers (one of each kind in hybrids) of width 64.

    Raises:
        Exception: whatever the type's own checks say about the numbers.
    """
    return _shrunk(CONFIG_MAPPING[model_type], changes)


def _shrunk(cls: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    default = cls()
    values: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            values[name] = _shrunk(type(value), {})
        elif isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_"):
            size = _size(name)
            if size is not None and (value or name in SPECIAL):
                values[name] = size
    values |= SPECIAL
    if vars(default).get("kv_lora_rank"):
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has no groups
    if vars(default).get("head_dim") == vars(default).get("qk_rope_head_dim", 0):
        values["head_dim"] = values["qk_rope_head_dim"]  # the rotated part of latent attention's heads
    values |= _per_layer(default, values)
    if hasattr(default, "is_decoder"):
        values["is_decoder"] = True
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict):
        values["rope_parameters"] = _rope(rope)
    return cls(**{**values, **HINTS.get(cls.model_type, {}), **changes})


def _size(name: str) -> int | None:
    if name in SPECIAL:
        return SPECIAL[name]
    if re.fullmatch(r".*_token_(id|index)", name):
        return 3
    return next((size for pattern, size in RULES if re.fullmatch(pattern, name)), None)


def _per_layer(default: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry a layer, cut to a layer of each kind; and the number of layers that this takes."""
    count = vars(default).get("num_hidden_layers")
    if not isinstance(count, int):
        return {}
    lists = {
        name: value
        for name, value in vars(default).items()
        if isinstance(value, (list, tuple)) and len(value) == count and count > 2
    }
    kinds = list(zip(*(map(str, value) for name, value in lists.items() if "type" in name), strict=True))
    chosen = sorted({kind: place for place, kind in reversed(list(enumerate(kinds)))}.values())[:4]
    chosen = chosen if len(chosen) > 1 else [*chosen, *(i for i in (0, 1, 2) if i not in chosen)][:2]
    return {
        "num_hidden_layers": len(chosen),
        **{
            name: [
                _size(name) if isinstance(value[place], int) and _size(name) else value[place]
                for place in chosen
            ]
            for name, value in lists.items()
        },
    }


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings whose lists fit a head of 16."""
    made: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            made[name] = _rope(value)
        elif name == "mrope_section":
            made[name] = [2, 1, 1] if rope.get("partial_rotary_factor", 1.0) == 0.5 else [4, 2, 2]
        else:
            made[name] = value
    return made
