"""Register the generated classes of one base family with transformers' Auto classes."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from linearize.errors import UnsupportedModelError
from linearize.surgery.model import config_class, model_class


def register(base_type: str) -> type[PreTrainedModel]:
    """Make and register `linearized_<base_type>`: config, base model, causal language model.

    Args:
        base_type: a model type of transformers ("llama").

    Returns:
        The causal language model's class.

    Raises:
        UnsupportedModelError: transformers has no causal language model of that type.
    """
    base_config = CONFIG_MAPPING[base_type]
    # typed for models that have several classes to an entry, which causal language models do not
    heads: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    bases: Any = MODEL_MAPPING
    if base_config not in heads:
        raise UnsupportedModelError(
            f"model type '{base_type}': transformers {transformers.__version__} has no causal language model for it"
        )
    return register_classes(base_config, heads[base_config], bases.get(base_config, None))


def register_classes(
    base_config: type[PreTrainedConfig],
    causal_lm: type[PreTrainedModel],
    base_model: type[PreTrainedModel] | None,
) -> type[PreTrainedModel]:
    """Register the generated subclasses of three given classes; see `register`."""
    config = config_class(base_config)
    model = model_class(causal_lm, config, head=True)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    if base_model is not None:
        AutoModel.register(config, model_class(base_model, config, head=False), exist_ok=True)
    # for a tokenizer whose files name no class
    tokenizer: Any = TOKENIZER_MAPPING.get(base_config, None)
    if tokenizer is not None:
        TOKENIZER_MAPPING.register(config, tokenizer, exist_ok=True)
    return model
