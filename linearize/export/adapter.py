"""A low-rank adapter beside a converted model: written, and loaded once it has been seen to be one of that model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from linearize.errors import CheckpointError
from linearize.modes import open_up

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def load_adapter(model: PreTrainedModel, path: str | Path) -> PeftModel:
    """The model with an adapter on it; peft alone only warns of an adapter that was made for another model.

    Args:
        model: converted; on an error it is left with an empty adapter on it and is not to be used.
        path: a folder that peft wrote, such as the `adapter` of a run with ``lora: {merge: false}``.

    Raises:
        CheckpointError: no adapter there, a damaged one, or one whose tensors are not those that the model's layers
            ask for; the message names the first.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: no {name} there; an adapter's folder holds {CONFIG} and {WEIGHTS} (pickled weights are "
                "never loaded)"
            )
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged ({error}); fetch it again") from error
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        with torch.device("meta"):  # no memory is taken before the shapes are compared
            adapted = PeftModel(model, config, low_cpu_mem_usage=True)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: no adapter of this model can be made of it ({error}); it was made for another "
            "model, or the file was edited"
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check(folder, wanted, found)
    set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    return adapted.eval()


def _check(folder: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Refuse an adapter that would leave some layers without, or of which some would be left over."""
    remedy = "give it to the model that it was trained on"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            said = f"holds nothing for {name}, which this model asks for"
        elif name not in wanted:
            said = f"holds {name}, which this model has no place for"
        elif found[name] != wanted[name]:
            said = f"{name} is {list(found[name])}, and {list(wanted[name])} is asked for"
        else:
            continue
        raise CheckpointError(f"{folder}: this adapter was made for another model: {said}; {remedy}")


def save_adapter(model: PeftModel, path: Path, *, base: Path) -> None:
    """Write an adapter; `PeftModel.from_pretrained(linearize.load(base), path)` loads it.

    Args:
        model: with the adapter on it.
        path: a folder, replaced where it exists.
        base: checkpoint of the model under the adapter, which is not the teacher.
    """
    shutil.rmtree(path, ignore_errors=True)
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base)
    # "auto" would ask the hub whether the vocabulary has grown.
    model.save_pretrained(str(path), save_embedding_layers=False)
    open_up(path)
