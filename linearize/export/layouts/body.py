"""The model around the converted layers: Llama's, which foreign layouts have, or another one, said by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from linearize.auto import TYPE_PREFIX
from linearize.export.layouts.difference import Difference

LIKE_LLAMA = ("llama", "mistral", "qwen2", "smollm3")
"""Families that compute embedding, norm, attention, norm, SwiGLU, norm, head as Llama does."""
OTHERWISE = {
    "cohere": "layer norms, attention and MLP side by side, scaled logits",
    "gemma": "norms that multiply by 1 + weight, scaled embeddings, GELU",
    "gemma2": "norms that multiply by 1 + weight, also behind attention and MLP, scaled embeddings, GELU, capped "
    "scores and logits",
    "gemma3_text": "norms that multiply by 1 + weight, also behind attention and MLP and on queries and keys, scaled "
    "embeddings, GELU",
    "gpt2": "layer norms with biases, learned positions, GELU",
    "gpt_neox": "layer norms with biases, GELU, attention and MLP side by side",
    "granite": "factors on embeddings, scores, residuals and logits",
    "mixtral": "experts in the place of the MLP",
    "olmo2": "norms behind attention and MLP instead of before, and on queries and keys",
    "phi": "layer norms with biases, GELU, attention and MLP side by side",
    "phi3": "queries, keys and values in one matrix",
    "qwen3": "norms on queries and keys",
    "qwen3_moe": "norms on queries and keys, experts in the place of the MLP",
}
"""Of families that are asked for: what they do otherwise."""
LAYER = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    *(f"self_attn.{role}_proj.weight" for role in "qkvo"),
}
"""Tensors of a layer, without those of its mixer."""
BIASES = {f"self_attn.{role}_proj.bias" for role in "qkvo"}
OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@dataclass
class Body:
    """What a foreign config says of the model.

    Attributes:
        family: model_type without our prefix.
        layers, hidden, intermediate, vocabulary: sizes.
        eps: epsilon of the RMS norms.
        tied: whether the head is the embeddings.
        longest: tokens that the teacher was made for.
        rope: base of its rotary positions where they have no other numbers, else None.
        rope_type: as the config calls them.
        tokens: bos, eos and pad token ids.
        dtype: of the stored weights, as configs name it.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    eps: float
    tied: bool
    longest: int
    rope: float | None
    rope_type: str
    tokens: dict[str, Any]
    dtype: str


def family_of(config: Any) -> str:
    """The base model's own `model_type`."""
    return str(config.model_type).removeprefix(TYPE_PREFIX)


def body_of(config: Any) -> Body:
    """The numbers of a config that `body_differences` finds nothing in."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = str(rope.get("rope_type", "default"))
    plain = kind == "default" and float(rope.get("partial_rotary_factor", 1.0)) == 1.0
    return Body(
        family=family_of(config),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        eps=float(config.rms_norm_eps),
        tied=bool(config.tie_word_embeddings),
        longest=config.max_position_embeddings,
        rope=float(rope["rope_theta"]) if plain and "rope_theta" in rope else None,
        rope_type=kind,
        tokens={
            f"{role}_token_id": getattr(config, f"{role}_token_id", None) for role in ("bos", "eos", "pad")
        },
        dtype=str(config.dtype or "float32").removeprefix("torch."),
    )


def body_differences(config: Any, names: Iterable[str]) -> list[Difference]:
    """What a model has around its attention that Llama has not.

    Args:
        config: of the converted model.
        names: of its tensors; those of mixers are passed over.
    """
    family = family_of(config)
    if family not in LIKE_LLAMA:
        ours = OTHERWISE.get(family, "a family that is not known to compute as Llama does")
        known = ", ".join(LIKE_LLAMA)
        return [Difference("body", f"{family} ({ours})", f"Llama's, as in the families {known}")]
    found = []
    if config.hidden_act not in ("silu", "swish"):
        found.append(Difference("body", f"an MLP with {config.hidden_act}", "SwiGLU"))
    strange = []
    for name in names:
        start, _, rest = name.removeprefix("model.layers.").partition(".")
        inside = start.isdigit() and (rest in LAYER | BIASES or rest.startswith("self_attn.mixer."))
        if name not in OUTSIDE and not inside:
            strange.append(name)
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        found.append(Difference("body", f"the tensor {strange[0]}{more}", "no such tensor"))
    return found
