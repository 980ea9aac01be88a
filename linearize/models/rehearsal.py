"""Loading on the meta device first: transformers' own renaming and tying, and no memory for what will not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import CheckpointError, UnsupportedModelError
from linearize.models.boundary import boundary
from linearize.models.shards import FLOATS, Stored

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

TABLES = 4 * 2**30
"""Bytes that a model may compute for itself (rotary tables, causal masks) whatever the size of its weights."""

HARMLESS = re.compile(
    r"(^|[._])(inv_freq|position_ids|masked_bias|cos_cached|sin_cached|causal_mask|tril)$"  # computed anew
    r"|(^|\.)attn(ention)?\.bias$"  # GPT-2's causal mask
    r"|vision|visual|image|audio|speech|video|multi_?modal|(^|[._])mm_|connector|perceiver"  # other senses
    r"|(^|\.)(score|classifier|qa_outputs|pooler|v_head|value_head|reward_head|cls|dropout|summary)\."  # other tasks
)
"""Names of tensors that a language model may leave out of what a checkpoint holds, and stay the same model."""

AHEAD = re.compile(r"(^|[._])(mtp|nextn|eagle|medusa|draft)")
"""Names of heads that guess tokens ahead. They stand beside the model's layers or behind the last, and in none."""

GUESSES = re.compile(r"(\.layers\.\d+)\.(eh_proj|enorm|hnorm|shared_head)\.")
"""What a layer that guesses tokens ahead has and no other: it joins an embedding to the last hidden state."""


def rehearse(
    folder: Path, cls: type[PreTrainedModel], config: PreTrainedConfig, tensors: dict[str, Stored]
) -> PreTrainedModel:
    """The model on the meta device, as loading these tensors would make it; takes no memory.

    Args:
        folder: of the checkpoint, for messages.
        cls: the model's class.
        config: its config.
        tensors: what the weight files hold.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or one that the config does not ask for; the config
            describes no model, or one whose tables are out of all proportion.
        UnsupportedModelError: the weights are stored as codes.
    """
    import torch

    codes = sorted(name for name, x in tensors.items() if x.dtype not in FLOATS and name.endswith("weight"))
    if codes:
        raise UnsupportedModelError(
            f"{folder}: {len(codes)} of its weights are stored as {tensors[codes[0]].dtype} ({codes[0]}, ...), which "
            "is how quantized models are; give the model's unquantized checkpoint"
        )
    state = {
        name: torch.empty(x.shape, dtype=getattr(torch, FLOATS.get(x.dtype, "int64")), device="meta")
        for name, x in tensors.items()
    }
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with (
        quiet(),
        boundary(
            f"the model that {folder / 'config.json'} describes",
            "fetch the checkpoint again, or upgrade transformers if the model is newer than it",
            verb="cannot be made",
        ),
    ):
        loaded: Any = cls.from_pretrained(
            None, config=config, state_dict=state, device_map="meta", dtype=torch.bfloat16, **options
        )
    model, report = loaded
    check_report(folder, report, model)
    stored = sum(tensor.nelement() for tensor in state.values())
    tables = sum(buffer.nelement() for buffer in model.buffers())
    if 4 * tables > TABLES + 16 * stored:
        name, largest = max(model.named_buffers(), key=lambda pair: pair[1].nelement())
        raise CheckpointError(
            f"{folder / 'config.json'} asks for tables of {4 * tables / 2**30:,.0f} GiB ({name} is "
            f"{list(largest.shape)}) beside weights of {4 * stored / 2**30:.2g}; look at max_position_embeddings, or "
            "fetch the checkpoint again"
        )
    return model


def check_report(
    folder: str | Path, report: dict[str, Any], model: nn.Module, says: str = "config.json"
) -> None:
    """Refuse what transformers would fill with random numbers or leave out, and only warn of.

    Args:
        folder: of the checkpoint, for messages.
        report: transformers' loading info.
        model: what was loaded.
        says: what describes the model there.

    Raises:
        CheckpointError: names the first tensor of each kind and the remedy.
    """
    unfit = sorted(report["mismatched_keys"])
    if unfit:
        name, found, wanted = unfit[0]
        raise CheckpointError(
            f"{folder}: {len(unfit)} tensors do not fit {says} ({name} is {list(found)}, and {list(wanted)} is "
            "asked for); fetch the checkpoint again"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's tensors ({_few(missing)}); parameters are missing, so fetch "
            "the checkpoint again or export it again"
        )
    unexpected = sorted(report["unexpected_keys"])
    guessing = {found[1] for name in unexpected if (found := GUESSES.search(name))}
    dropped = [name for name in unexpected if _matters(name, model, guessing)]
    if dropped:
        raise CheckpointError(
            f"{folder} holds {len(dropped)} tensors that {says} does not ask for ({_few(dropped)}), and without "
            "them it would be another model; look at num_hidden_layers and the like, or fetch the checkpoint again"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' report of what does not fit: `check_report` says it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _matters(name: str, model: nn.Module, guessing: set[str]) -> bool:
    """Whether leaving the tensor out may change what the model computes.

    It may if its place lies inside a repeated layer, or if it is a parameter of a module that is there, or of one that
    would stand beside the embeddings. Whole branches elsewhere belong to other senses and tasks.
    """
    from torch import nn

    if HARMLESS.search(name) or _guesses_ahead(name, model, guessing):
        return False
    if AHEAD.search(name) and not _in_a_layer(name, model):
        return False
    *path, _ = name.split(".")
    module: nn.Module = model
    base = getattr(model, "base_model", None)
    for depth, part in enumerate(path):
        if isinstance(module, nn.ModuleList):
            return True
        inner = module._modules.get(part)
        if inner is None:
            return module not in (model, base) or depth == len(path) - 1
        module = inner
    return True


def _in_a_layer(name: str, model: nn.Module) -> bool:
    """Whether the tensor's place lies inside a repeated layer that the model has."""
    from torch import nn

    for start in (model, getattr(model, "base_model", model)):
        module: nn.Module = start
        for part in name.split("."):
            inner = module._modules.get(part)
            if inner is None:
                break
            if isinstance(module, nn.ModuleList):
                return True
            module = inner
    return False


def _guesses_ahead(name: str, model: nn.Module, guessing: set[str]) -> bool:
    """Whether the tensor is of a layer behind the last one, which guesses tokens ahead (num_nextn_predict_layers).

    Args:
        name: of the tensor.
        model: what was loaded.
        guessing: ``.layers.N`` of the layers that hold what such a layer alone has; without it, a layer behind the
            last is one that num_hidden_layers leaves out.
    """
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_hidden_layers", None)
    ahead = [
        getattr(text, key, 0) for key in ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")
    ]
    index = re.search(r"\.layers\.(\d+)(?=\.)", name)
    if index is None or index[0] not in guessing or not isinstance(layers, int):
        return False
    return layers <= int(index.group(1)) < layers + max(n if isinstance(n, int) else 0 for n in ahead)
