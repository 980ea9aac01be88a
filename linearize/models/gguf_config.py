"""What a GGUF file says of its model, and whether transformers' config of it says the same."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import CheckpointError, UnsupportedModelError
from linearize.models.boundary import boundary
from linearize.models.config import MOST_LAYERS
from linearize.models.gguf_keys import unplaced
from linearize.models.layers import head_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
LISTS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type"))
SIZES = ("block_count", "embedding_length", "context_length")
"""Without these transformers takes its defaults, which are those of another model."""
ELSEWHERE = "give a safetensors checkpoint of the model instead"


def read_metadata(file: Path) -> dict[str, Any]:
    """The key-value section of a GGUF file, with the special tokens looked up in the vocabulary.

    The lists (vocabulary, merges) are left out; in their place stand `special`: role -> token, `tensors`: name ->
    shape, and `parameters`, their number.

    Raises:
        CheckpointError: not a GGUF file, cut short, or without the sizes of its model.
    """
    from gguf import GGUFReader

    with boundary(f"{file}", "fetch it again", verb="is not a whole GGUF file"):
        reader = GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items() if key not in LISTS}
        tokens = reader.fields.get("tokenizer.ggml.tokens")
        metadata["special"] = {
            role: _token(file, key, metadata[key], tokens)
            for role, key in SPECIAL.items()
            if tokens is not None and key in metadata
        }
        metadata["tensors"] = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    metadata["parameters"] = sum(math.prod(shape) for shape in metadata["tensors"].values())
    _check_sizes(file, metadata)
    return metadata


def read_gguf_config(file: Path, metadata: dict[str, Any]) -> PreTrainedConfig:
    """transformers' config of a GGUF file, with what it leaves out put in; no weight is read.

    Args:
        file: the GGUF file.
        metadata: of `read_metadata`.

    Raises:
        UnsupportedModelError: transformers cannot read files of this architecture, or the file describes what the
            config cannot say; names the key.
    """
    from transformers import AutoConfig

    architecture = metadata["general.architecture"]
    varied = [
        f"{key} = {value}"
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.") and isinstance(value, list) and len(set(value)) > 1
    ]
    remedy = f"{varied[0]} differs between layers; {ELSEWHERE}" if varied else ELSEWHERE
    with boundary(
        f"{file}",
        remedy,
        verb=f"is of architecture '{architecture}', which transformers cannot convert",
        kind=UnsupportedModelError,
    ):
        config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    complete(file, config, metadata)
    return config


def complete(file: Path, config: Any, metadata: dict[str, Any]) -> None:
    """Put into a config what the file says and transformers does not carry over, or refuse what it has no place for.

    Args:
        file: for messages.
        config: transformers' config of the file; changed in place.
        metadata: of `read_metadata`.

    Raises:
        UnsupportedModelError: names the key and both values.
    """
    said = _said(metadata)
    _check_heads(file, config, said)
    for key, value, instead in unplaced(config, said):
        raise _other(file, key, value, instead)
    _set_window(file, config, said)
    scaling = said.get("rope.scaling.type")
    rope = getattr(config, "rope_parameters", None) or {}
    if scaling not in (None, "none") and scaling not in (rope.get("rope_type"), rope.get("type")):
        raise _other(file, "rope.scaling.type", scaling, "transformers would rotate without it")
    if any(name.startswith("rope_") for name in metadata["tensors"]) and rope.get("rope_type") == "default":
        raise _other(
            file, "rope_freqs.weight", "factors of the rotary frequencies", "transformers leaves them out"
        )


def _token(file: Path, key: str, number: Any, tokens: Any) -> str:
    held = len(tokens.data)
    if not isinstance(number, int) or not 0 <= number < held:
        raise CheckpointError(
            f"{file} says {key} {number!r}, and its vocabulary holds the tokens 0 to {held - 1:,}; set it with the "
            "gguf package's gguf-set-metadata, or take another file of the model"
        )
    return str(tokens.contents(number))


def _check_sizes(file: Path, metadata: dict[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError(f"{file} names no architecture (general.architecture); fetch it again")
    said = _said(metadata)
    for key in SIZES:
        if not isinstance(said.get(key), int) or said[key] < 1:
            raise CheckpointError(
                f"{file} does not say its {architecture}.{key} (found {said.get(key)!r}), so its model's size is "
                "unknown; fetch it again"
            )
    if "attention.head_count" not in said:
        raise CheckpointError(f"{file} does not say its {architecture}.attention.head_count; fetch it again")
    heads, groups = (said.get(f"attention.head_count{kind}") for kind in ("", "_kv"))
    whole = [number for number in (heads, groups) if isinstance(number, int)]  # else a list, a number a layer
    if min(whole, default=1) < 1 or (len(whole) == 2 and whole[0] % whole[1]):
        raise CheckpointError(
            f"{file} says {architecture}.attention.head_count {heads} and head_count_kv {groups}, and every key-value "
            "head serves as many of the heads; fetch it again"
        )
    blocks = {
        int(found.group(1)) for name in metadata["tensors"] if (found := re.match(r"blk\.(\d+)\.", name))
    }
    layers = said["block_count"]
    if layers > MOST_LAYERS or (blocks and max(blocks) + 1 != layers):
        raise CheckpointError(
            f"{file} says {architecture}.block_count {layers:,}, and holds the tensors of {len(blocks)} layers; fetch "
            "it again"
        )
    embedding = metadata["tensors"].get("token_embd.weight")
    if embedding is not None and said["embedding_length"] not in embedding:
        raise CheckpointError(
            f"{file} says {architecture}.embedding_length {said['embedding_length']:,}, and its token_embd.weight is "
            f"{embedding}; fetch it again"
        )


def _said(metadata: dict[str, Any]) -> dict[str, Any]:
    """The keys of the file's own architecture, without its name in front."""
    prefix = f"{metadata['general.architecture']}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _check_heads(file: Path, config: Any, said: dict[str, Any]) -> None:
    known = head_sizes(config)
    for key in (f"attention.{side}_length{kind}" for side in ("key", "value") for kind in ("", "_swa")):
        value = said.get(key)
        if value is not None and known and value not in known:
            raise _other(file, key, value, f"the config's heads would have {sorted(known)[0]}")


def _set_window(file: Path, config: Any, said: dict[str, Any]) -> None:
    key = "attention.sliding_window"
    window, found = said.get(key) or None, getattr(config, "sliding_window", None)
    if window is not None and window >= said["context_length"]:
        window = None  # wider than any text
    if window == found:
        return
    simple = hasattr(config, "sliding_window") and "sliding_attention" not in (
        getattr(config, "layer_types", None) or ()
    )
    if not simple or hasattr(config, "use_sliding_window"):
        raise _other(file, key, window, f"config.sliding_window would be {found}")
    config.sliding_window = window


def _other(file: Path, key: str, value: Any, instead: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{file}: says {key}: {value}, which transformers does not convert ({instead}), so it would be another model; "
        f"{ELSEWHERE}"
    )
