"""Load a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from linearize import auto
from linearize.errors import CheckpointError, ModelNotFoundError
from linearize.export.provenance import check_layers, check_recipe, check_rotation
from linearize.models.boundary import boundary
from linearize.models.check import check_checkpoint
from linearize.models.config import causal_class, read_config
from linearize.models.rehearsal import check_report, rehearse
from linearize.models.sound import check_finite

REMEDY = "export or download it again"
FROM_THE_FILES = frozenset(
    {"quantization_config", "key_mapping", "variant", "subfolder", "state_dict", "config"}
)
"""Options of `from_pretrained` that change what is read; the files are not held against the config then."""


def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A converted model, ready for `generate()`.

    Args:
        path: a folder that `save` wrote, or a hub id of one.
        **kwargs: handed to `from_pretrained` (`dtype`, `device_map`, ...). Code in the checkpoint is never run.

    Raises:
        CheckpointError: no checkpoint there, or one that is truncated, corrupt, of another format, does not fit its
            config or holds no finite numbers.
        UnsupportedModelError: a family that this version of transformers does not know.
    """
    folder = Path(path)
    auto.install()
    kwargs = {"dtype": "auto", "use_safetensors": True, **kwargs, "trust_remote_code": False}
    source: Any = AutoModelForCausalLM
    if folder.is_dir() or folder.is_absolute() or str(path).startswith("."):
        source, config = _checked(folder, judge=not FROM_THE_FILES & set(kwargs))
        kwargs.setdefault("config", config)
    with boundary(f"{path}", REMEDY):
        loaded: Any = source.from_pretrained(
            path, output_loading_info=True, **{"ignore_mismatched_sizes": True, **kwargs}
        )
    model: PreTrainedModel = loaded[0]
    check_report(folder, loaded[1], model)
    check_finite(path, model)
    check_rotation(folder, model)
    return model.eval()


def _checked(folder: Path, *, judge: bool) -> tuple[type[PreTrainedModel], Any]:
    """Class and config of a checkpoint folder, all of whose files have been looked at."""
    try:
        tensors = check_checkpoint(folder)
    except ModelNotFoundError as error:
        raise CheckpointError(str(error)) from error
    config = read_config(folder, len(tensors))
    if "linearize" in vars(config) and not config.model_type.startswith(auto.TYPE_PREFIX):
        raise CheckpointError(
            f"{folder / 'config.json'} holds a plan (linearize), and its model_type '{config.model_type}' is of "
            f"models that follow none; put '{auto.TYPE_PREFIX}{config.model_type}' back, or {REMEDY}"
        )
    cls, config = causal_class(folder, config)
    quantized = getattr(config, "quantization_config", None)
    if judge and not quantized:
        rehearse(folder, cls, config, tensors)
        if isinstance(getattr(config, "linearize", None), dict):
            check_layers(folder, config)
            check_recipe(folder, config)
    return cls, config
