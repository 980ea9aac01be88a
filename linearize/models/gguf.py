"""A GGUF file into an ordinary checkpoint folder: safetensors, config, tokenizer with chat template, generation config.

The weights are what `transformers` dequantizes. The tokenizer it converts needs help: which tokens are
special is read from the file's own metadata, because versions of transformers disagree (5.17 takes SmolLM2's
`<|im_start|>` for its end of text and sets no padding), and so is the way that text is cut before the
byte-pair merges.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from linearize.errors import CheckpointError, UnsupportedModelError
from linearize.patch import changed

log = logging.getLogger(__name__)

SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def convert(file: Path, out: Path) -> None:
    """Write the checkpoint that a GGUF file holds into the folder `out`, in float32.

    Args:
        file: the GGUF file.
        out: an existing folder.

    Raises:
        CheckpointError: the file is not GGUF, or it is cut short.
        UnsupportedModelError: transformers cannot read GGUF files of this architecture.
        OSError: `out` cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    metadata = read_metadata(file)
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    options: dict[str, Any] = {"dtype": torch.float32}
    options["quantization_config"] = GgufConfig(gguf_file=file.name, dequantize=True)
    try:
        # its bar does not obey transformers' switch for bars
        with changed(reader, "tqdm", partial(tqdm, disable=True)):
            model = AutoModelForCausalLM.from_pretrained(**source, **options)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, NotImplementedError) as error:
        architecture = metadata.get("general.architecture")
        raise UnsupportedModelError(
            f"{file}: transformers cannot convert GGUF files of architecture '{architecture}' ({error}); "
            "give a safetensors checkpoint of the model instead"
        ) from error
    set_tokenizer(tokenizer, metadata)
    tokenizer.model_max_length = int(
        getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    )
    ids = {f"{role}_id": getattr(tokenizer, f"{role}_id") for role in ("bos_token", "eos_token", "pad_token")}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)
    model.config._name_or_path = ""  # else the saved files name a folder of this machine
    if hasattr(model.config, "_model_name_or_path"):  # the GGUF's title, misfiled by the conversion
        del model.config._model_name_or_path
    try:
        model.save_pretrained(out)
    except SafetensorError as error:  # it wraps what the system says
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
    tokenizer.save_pretrained(out)
    note = {key: value for key, value in metadata.items() if key.startswith("general.")}
    (out / "gguf.json").write_text(json.dumps({"file": file.name, **note}, indent=2) + "\n", encoding="utf-8")


def read_metadata(file: Path) -> dict[str, Any]:
    """The key-value section of a GGUF file, with the special tokens looked up in the vocabulary.

    The lists (vocabulary, merges) are left out; in their place stands `special`: role -> token.

    Raises:
        CheckpointError: not a GGUF file, or cut short.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, EOFError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole GGUF file ({error}); fetch it again") from error
    metadata = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key not in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores")
    }
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    metadata["special"] = {
        role: tokens.contents(metadata[key])
        for role, key in SPECIAL.items()
        if tokens is not None and key in metadata
    }
    return metadata


def set_tokenizer(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Make a converted tokenizer follow the file: special tokens, text splitting, decoding; in place."""
    from tokenizers import decoders, pre_tokenizers

    for role, token in metadata["special"].items():
        setattr(tokenizer, role, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # what generating in batches needs
    tokenizer.clean_up_tokenization_spaces = False  # else decoding drops spaces before punctuation
    if metadata.get("tokenizer.chat_template"):
        tokenizer.chat_template = metadata["tokenizer.chat_template"]
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    backend = tokenizer.backend_tokenizer
    backend.decoder = decoders.ByteLevel()  # 5.17 adds a step that turns "▁" in the text into a space
    if metadata.get("tokenizer.ggml.pre") == "smollm":  # digits one by one, as llama.cpp splits for this name
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
