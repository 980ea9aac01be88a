"""Tiny models of families that do more in their attention than q, k, v and padding, or keep more in their cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import COMMON, VOCABULARY, WITHOUT_GROUPS
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEADS = {**COMMON, "head_dim": 8}
LATENT = {
    **COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
INDEXED = {**LATENT, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
SHARED = {
    **HEADS,
    "sliding_window": 9,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}

FAMILIES: dict[str, dict] = {
    "opt": {
        **{key: value for key, value in WITHOUT_GROUPS.items() if key != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": INDEXED,
    "glm_moe_dsa": INDEXED,
    "minimax_m3_vl_text": {
        **HEADS,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rotary_dim": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
        "moe_intermediate_size": 16,
        "shared_intermediate_size": 16,
        "dense_intermediate_size": 48,
    },
    "doge": HEADS,
    "diffllama": HEADS,
    "hrm_text": {
        **{key: value for key, value in WITHOUT_GROUPS.items() if key != "num_hidden_layers"},
        "head_dim": 8,
        "num_layers_per_stack": 2,
        "H_cycles": 2,
        "L_cycles": 2,
    },
    "zamba2": {
        **COMMON,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 2,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "use_mem_rope": True,
        "adapter_rank": 4,
    },
    "llama4_text": {
        **HEADS,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "no_rope_layers": [1, 1, 1, 0],
        "moe_layers": [1, 3],
    },
    "gemma3n_text": {
        **SHARED,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {**SHARED, "global_head_dim": 8, "num_global_key_value_heads": 2},
    "falcon_h1": {**HEADS, **MAMBA, "mamba_d_ssm": 64},
    "zaya": HEADS,
    "bamba": {**HEADS, **MAMBA, "attn_layer_indices": [1, 3]},
    "lfm2": {**HEADS, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "qwen3_next": {
        **HEADS,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gptj": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 512,
        "rotary_dim": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "jetmoe": {
        **{key: value for key, value in COMMON.items() if key != "num_attention_heads"},
        "kv_channels": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def config(family: str, **changes: object) -> PreTrainedConfig:
    """A tiny config of the family."""
    return AutoConfig.for_model(family, **{**FAMILIES[family], **changes})


def model(family: str, **changes: object) -> PreTrainedModel:
    """A random model whose attention is far from uniform and whose norms and biases are none of zero and one."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def through_files(family: str, folder: Path, **changes: object) -> PreTrainedModel:
    """The same model, saved and loaded again."""
    model(family, **changes).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def skip_before(family: str) -> None:
    """Skip a test where the installed transformers has no such family yet."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"{family} came after transformers {transformers.__version__}")


def skip_before_the_interface(model: PreTrainedModel) -> None:
    """Skip a test where the installed transformers has the model's family compute its attention by itself."""
    if not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        family = model.config.model_type
        pytest.skip(f"{family} came to the attention interface after transformers {transformers.__version__}")
