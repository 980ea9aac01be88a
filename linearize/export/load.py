"""Load a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from linearize import auto
from linearize.errors import CheckpointError, ModelNotFoundError
from linearize.export.provenance import check_places, check_plan
from linearize.export.quantized import check_codes, check_readable
from linearize.models.boundary import boundary
from linearize.models.check import check_checkpoint
from linearize.models.config import causal_class, read_config
from linearize.models.generation import with_cache
from linearize.models.rehearsal import check_report, rehearse
from linearize.models.resolve import resolve
from linearize.models.soft_cap import capped, honor_soft_cap
from linearize.models.sound import check_finite
from linearize.surgery import converted
from linearize.surgery.inspection import attention_layers

REMEDY = "export or download it again"
FROM_THE_FILES = frozenset(
    {"quantization_config", "key_mapping", "variant", "subfolder", "state_dict", "config"}
)
"""Options of `from_pretrained` that change what is read; the files are not held against the config then."""
FOR_THE_HUB = frozenset(
    {"cache_dir", "force_download", "local_files_only", "proxies", "token", "subfolder", "variant"}
)
"""Options of a download that only transformers itself takes; what it fetched is looked at once it is loaded."""


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
    auto.install()
    kwargs = {"dtype": "auto", "use_safetensors": True, **kwargs, "trust_remote_code": False}
    folder: Path | None = None
    if Path(path).is_dir() or Path(path).is_absolute() or str(path).startswith("."):
        folder = Path(path)
    elif not FOR_THE_HUB & set(kwargs):
        folder = _fetched(str(path), kwargs.pop("revision", None))
    source: Any = AutoModelForCausalLM
    judge, shown = not FROM_THE_FILES & set(kwargs), False
    if folder is not None:
        source, config, shown = _look(folder, judge=judge)
        kwargs.setdefault("config", config)
    with boundary(f"{path}", REMEDY):
        loaded: Any = source.from_pretrained(
            folder or path, output_loading_info=True, **{"ignore_mismatched_sizes": True, **kwargs}
        )
    model: PreTrainedModel = loaded[0]
    check_report(path, loaded[1], model)
    check_codes(path, model)
    check_finite(path, model)
    if folder is not None and judge and not shown and converted(model):
        check_places(folder, model.config, attention_layers(model))
    with_cache(model)
    if capped(model.config):  # a softmax model; a converted one is set so as it is made
        honor_soft_cap(model)
    return model.eval()


def _fetched(name: str, revision: str | None) -> Path:
    """The folder of a hub model's files."""
    try:
        return resolve(f"{name}@{revision}" if revision else name)
    except ModelNotFoundError as error:
        raise CheckpointError(str(error)) from error


def check_folder(folder: Path, *, judge: bool = True) -> tuple[type[PreTrainedModel], Any]:
    """Class and config of a checkpoint folder, all of whose files have been looked at.

    Args:
        folder: of the checkpoint.
        judge: also hold the tensors, if they are plain, and the plan against the config.

    Raises:
        CheckpointError, UnsupportedModelError: see `load`.
    """
    cls, config, _ = _look(folder, judge=judge)
    return cls, config


def _look(folder: Path, *, judge: bool) -> tuple[type[PreTrainedModel], Any, bool]:
    """See `check_folder`; and whether the family shows its attention layers without weights."""
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
    check_readable(folder, config)
    quantized = getattr(config, "quantization_config", None)
    shown = False
    if judge:
        if not quantized:  # names and shapes of codes are torchao's
            rehearse(folder, cls, config, tensors)
        if isinstance(getattr(config, "linearize", None), dict):
            shown = bool(check_plan(folder, config))
    return cls, config, shown
