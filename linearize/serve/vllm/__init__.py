"""The plugin that lets vLLM serve a converted checkpoint: one class for every family, one layer for every mixer.

vLLM finds `register` by its entry point (`vllm.general_plugins`) and runs it in each of its processes. Nothing of vLLM
is patched: a model class over its transformers backend, a layer with a state of fixed size, and the operator
`torch.ops.vllm.linear_attention` that vLLM has already.
"""

from __future__ import annotations

MODEL = "linearize.serve.vllm.model:LinearizedForCausalLM"
"""Where the class is, for vLLM to import where it builds a model."""


def register() -> None:
    """Make known to vLLM every architecture that `linearize` exports; idempotent."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from linearize import auto
    from linearize.serve.vllm.settings import LinearizedSettings
    from linearize.surgery.generated import PREFIX

    auto.install()
    names: set[str] = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names |= {name} if isinstance(name, str) else set(name)
    known = ModelRegistry.get_supported_archs()
    for architecture in sorted(PREFIX + name for name in names):
        MODELS_CONFIG_MAP.setdefault(architecture, LinearizedSettings)
        if architecture not in known:
            ModelRegistry.register_model(architecture, MODEL)
