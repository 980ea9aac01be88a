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

from linearize.errors import UnsupportedModelError
from linearize.models.boundary import boundary
from linearize.models.gguf_config import ELSEWHERE, complete, read_gguf_config, read_metadata
from linearize.models.gguf_tensors import check_used, recording
from linearize.models.rehearsal import check_report, quiet
from linearize.patch import changed
from linearize.progress import count

log = logging.getLogger(__name__)


def convert(file: Path, out: Path) -> None:
    """Write the checkpoint that a GGUF file holds into the folder `out`.

    The weights become float32, which holds what every quantized form decodes to exactly: four bytes a parameter in the
    cache, and twice as much memory while it is written.

    Args:
        file: the GGUF file.
        out: an existing folder.

    Raises:
        CheckpointError: the file is not GGUF, it is cut short, or lacks tensors.
        UnsupportedModelError: transformers cannot read GGUF files of this architecture, or not all that this one says
            or holds.
        OSError: `out` cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    metadata = read_metadata(file)
    read_gguf_config(file, metadata)  # what cannot be converted is said before anything is read
    architecture, size = metadata["general.architecture"], metadata["parameters"]
    log.info(
        "%s: %s, %s parameters; takes %.2g GB in the cache as float32, and memory for twice that",
        *(file.name, architecture, count(size), 4e-9 * size),
    )
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # `check_report` names them
        "trust_remote_code": False,
    }
    options["quantization_config"] = GgufConfig(gguf_file=file.name, dequantize=True)
    with boundary(
        f"{file}",
        ELSEWHERE,
        verb=f"is of architecture '{architecture}', which transformers cannot convert",
        kind=UnsupportedModelError,
    ):
        log.info("1 of 3: decoding the weights")
        # its bar does not obey transformers' switch for bars
        with changed(reader, "tqdm", partial(tqdm, disable=True)), recording(reader) as used, quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(**source, **options)
        log.info("2 of 3: reading the vocabulary")
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    model, report = loaded
    check_report(file, report, model, "what the file says of its model")
    check_used(file, metadata["tensors"], used)
    complete(file, model.config, metadata)
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
    log.info("3 of 3: writing the checkpoint")
    try:
        model.save_pretrained(out)
    except SafetensorError as error:  # it wraps what the system says
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
    tokenizer.save_pretrained(out)
    note = {key: value for key, value in metadata.items() if key.startswith("general.")}
    (out / "gguf.json").write_text(json.dumps({"file": file.name, **note}, indent=2) + "\n", encoding="utf-8")


def write_config(file: Path, out: Path) -> None:
    """Write the config of a GGUF file into the folder `out`, from its metadata alone. Raises as `convert`."""
    config = read_gguf_config(file, read_metadata(file))
    config._name_or_path = ""
    config.save_pretrained(out)


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
