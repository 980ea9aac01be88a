"""The converted model: generated subclasses of the base model and of its causal language model, and their config."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import output_capturing

from linearize.errors import CheckpointError, LinearizeError, UnsupportedModelError
from linearize.mixers.base import Part
from linearize.models.soft_cap import honor_soft_cap
from linearize.surgery import handed_on
from linearize.surgery.attention import LinearizedAttention, Switch, convert_module
from linearize.surgery.cache import adopt, check_past_recording
from linearize.surgery.filing import file_config, file_model
from linearize.surgery.generated import subclass
from linearize.surgery.given import looking
from linearize.surgery.rotation import table_problems
from linearize.surgery.schema import FORMAT, mixer_of, module_problems, plan_problems, refused, upgraded
from linearize.surgery.seen import seen_problems

TYPE_PREFIX = "linearized_"


def _own(cls: type, mixin: type) -> Any:
    """The family's own class under a generated one."""
    family = (PreTrainedModel, PreTrainedConfig)  # `fully_shard` puts a class of its own in front
    return next(base for base in cls.__mro__ if issubclass(base, family) and not issubclass(base, mixin))


class LinearizedConfig:
    """Mixin in front of a model's config class: `model_type` is `linearized_<base>`, `linearize` holds the plan.

    The plan is ``{"format": 2, "mixers": {name: normalized mixer section}, "layers": {module path: {"mixer": name, and
    the layer's shape}}}``: names of the registry and plain numbers, nothing that a loader would import or run. Format 1
    had one section, "mixer", for all layers.
    """

    linearize: dict[str, Any]

    @classmethod
    def is_custom_code(cls) -> bool:
        """What the base class says, see `LinearizedModel.is_custom_code`."""
        return _own(cls, LinearizedConfig).is_custom_code()


class LinearizedModel:
    """Mixin in front of a base model (no head).

    Its base class, a `PreTrainedModel`, is known at run time alone: hence the ignored types here and below.
    """

    linearize_around: ClassVar[dict[str, Any]] = {"forward": looking}

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        attach(self)  # type: ignore[arg-type]
        problems = table_problems(self, self.config.linearize)  # type: ignore[attr-defined]
        if problems:
            raise CheckpointError(refused(problems))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Part):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls) -> bool:
        """What the base class says: transformers would read it off the module that a class stands in.

        Custom code is not trusted with its own initialization, which fills buffers that no checkpoint holds.
        """
        return _own(cls, LinearizedModel).is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers searches the source of the class's module, which here is not the model's
        return _own(cls, LinearizedModel)._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return _own(cls, LinearizedModel)._can_set_experts_implementation()


class LinearizedCausalLM(LinearizedModel):
    """Mixin in front of a causal language model."""

    linearize_around: ClassVar[dict[str, Any]] = {}  # its base model looks already

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers loads; the plan is then held against what the layers show.

        Raises:
            CheckpointError: names each number that is not the layer's own.
        """
        made = super().from_pretrained(path, *args, **kwargs)  # type: ignore[misc]
        model = made[0] if isinstance(made, tuple) else made
        if not next(model.parameters()).is_meta:
            plain = {id(layer) for layer in converted(model) if layer.mixer.needs_plain}
            problems = seen_problems(model, model.config.linearize, plain)
            if problems:
                raise CheckpointError(f"{path}: {refused(problems)}")
        return made

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        prepare = super()._prepare_cache_for_generation  # type: ignore[misc]
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        # the first name is that of transformers 5.24, the second the one before it
        cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
        layers = converted(self)  # type: ignore[arg-type]
        if cache is not None and layers and layers[0].linearize_switch.mode == "student":
            for layer in layers:
                adopt(cache, layer.layer_idx)
            if getattr(generation_config, "is_assistant", False):
                check_past_recording(cache)
                cache.activate_past_recording()
        return result

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: pages of keys and values have no place for a recurrent state."""
        raise UnsupportedModelError(
            "generate_batch (continuous batching) cannot hold recurrent states; use generate()"
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers saves, without the `auto_map` of a remote-code export, whose file is not copied along."""
        config = self.config  # type: ignore[attr-defined]
        if getattr(config, "auto_map", None):
            del config.auto_map
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """`Linearized<Base>Config`, with its own `model_type`."""
    made = subclass(base, LinearizedConfig, model_type=TYPE_PREFIX + base.model_type)
    file_config(made, base)
    return made


def model_class(
    base: type[PreTrainedModel], config: type[PreTrainedConfig], *, head: bool
) -> type[PreTrainedModel]:
    """`Linearized<Base>` of a causal language model (`head`) or of a base model, which looks at its arguments."""
    made = subclass(base, LinearizedCausalLM if head else LinearizedModel, config_class=config)
    file_model(made, base)
    return made


def attach(model: PreTrainedModel) -> None:
    """Convert the attention modules that `model.config.linearize` names, in place, with freshly initialized mixers.

    Raises:
        CheckpointError: the plan is of an unknown format, or names modules or parts that do not exist.
    """
    plan = upgraded(getattr(model.config, "linearize", None))
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        found = plan.get("format") if isinstance(plan, dict) else plan
        raise CheckpointError(
            f"config.linearize: format {found!r} is neither 1 nor {FORMAT}; the checkpoint was written by another "
            "version of linearize, or its config.json was edited"
        )
    prefix = model.base_model_prefix + "." if model.base_model is model else ""
    problems = plan_problems(plan)
    names = {} if problems else {path: path.removeprefix(prefix) for path in plan["layers"]}
    problems += module_problems(model, names)
    if problems:
        raise CheckpointError(refused(problems, 5))
    model.config.linearize = plan
    honor_softcap(model, plan)
    switch = Switch()
    for path in plan["layers"]:
        attention = model.get_submodule(names[path])
        convert_module(attention, mixer_of(plan, path), switch)
        _keep_in_float32(model, f"{names[path]}.mixer")
    handed_on.mark(converted(model))
    base = body(model)
    if base is not model:
        _become(base, model_class(type(base), type(model.config), head=False))
    _register_outputs(model)


def honor_softcap(model: PreTrainedModel, plan: dict[str, Any]) -> None:
    """Set a model whose layers have a soft cap to the attention function that computes it."""
    capped = any(numbers.get("softcap") for numbers in plan["layers"].values())
    if capped:
        honor_soft_cap(model)


def _keep_in_float32(model: PreTrainedModel, path: str) -> None:
    """Load a module in float32 whatever the model's dtype, beside those that the family names itself."""
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), path}


def _become(model: PreTrainedModel, cls: type) -> None:
    model.__class__ = cls
    _register_outputs(model)


def _register_outputs(model: PreTrainedModel) -> None:
    # transformers files, at construction and by class, what `output_hidden_states` records; a new class is not there
    registry = getattr(output_capturing, "_CAN_RECORD_REGISTRY", None)
    if registry is not None and getattr(model, "_can_record_outputs", None) is not None:
        dict.__setitem__(registry, str(type(model)), model._can_record_outputs)


def linearized(model: PreTrainedModel, plan: dict[str, Any]) -> PreTrainedModel:
    """Give a loaded model its converted classes and layers, in place."""
    config = model.config
    config.__class__ = config_class(type(config))
    config.linearize = plan
    attach(model)
    _become(model, model_class(type(model), type(config), head=True))
    return model


def body(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head, which looks at arguments; a model that has none itself.

    Llama 4's causal model names an attribute for it that it does not have.
    """
    base = cast(PreTrainedModel, model.base_model)
    if base is not model or model.get_output_embeddings() is None:
        return base
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inside[0] if len(inside) == 1 else base


def converted(model: nn.Module) -> list[LinearizedAttention]:
    """The converted attention modules in layer order, under any wrapper."""
    layers = [module for module in model.modules() if isinstance(module, LinearizedAttention)]
    return sorted(layers, key=lambda layer: layer.layer_idx)


def refuse_converted(model: nn.Module) -> None:
    """Raise LinearizeError where a model has been converted: what is left of its softmax could not be told apart."""
    if converted(model):
        raise LinearizeError(
            "the model is converted already; load the teacher again to convert it another way"
        )
