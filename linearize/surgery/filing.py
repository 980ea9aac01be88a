"""What transformers keeps under a class's name or a model type, kept for a generated class as well.

A renaming of weights that is filed under the base's name alone would otherwise not be applied to its subclass: the
checkpoint would load with random numbers in the place of the renamed tensors.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.models.auto import modeling_auto, tokenization_auto


def file_config(made: type[PreTrainedConfig], base: type[PreTrainedConfig]) -> None:
    """Give a config class's model type what its base's has: conversions of weights and the choice of a tokenizer."""
    new, old = made.model_type, base.model_type
    _file_conversions(new, old)
    # the name by which other libraries look up how a family's experts are converted
    patterns = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    if old in patterns:
        patterns.setdefault(new, patterns[old])
    incorrect: set[str] = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())
    if old in incorrect:
        incorrect.add(new)
    if old in tokenization_auto.TOKENIZER_MAPPING_NAMES:
        name = tokenization_auto.TOKENIZER_MAPPING_NAMES[old]
        tokenization_auto.TOKENIZER_MAPPING_NAMES.setdefault(new, name)


def file_model(made: type[PreTrainedModel], base: type[PreTrainedModel]) -> None:
    """Give a model class's name what its base's has: conversions of weights, and that its labels are shifted."""
    _file_conversions(made.__name__, base.__name__)
    # `Trainer` shifts labels under label smoothing, and pipelines accept a class, where its name stands there
    heads = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if base.__name__ in heads.values():
        assert made.config_class is not None
        heads.setdefault(made.config_class.model_type, made.__name__)


def _file_conversions(new: str, old: str) -> None:
    found = conversion_mapping.get_checkpoint_conversion_mapping(old)
    if found is not None and conversion_mapping.get_checkpoint_conversion_mapping(new) is None:
        conversion_mapping.register_checkpoint_conversion_mapping(new, found)
