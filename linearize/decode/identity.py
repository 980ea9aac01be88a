"""Which model and tokenizer a state belongs to, told by what they are in memory and not by their names."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from linearize.data.store import tokenizer_digest
from linearize.errors import LinearizeError
from linearize.export.reloading import fingerprints

INCIDENTAL = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "use_cache",
}
"""Entries of a config that change nothing of what a state holds; dtypes are told apart by themselves."""
READ_AGAIN = (
    "read the text again with this one (linearize generate PATH --prompt-file TEXT --save-state STATE)"
)


def identity(model: Any, tokenizer: Any = None) -> dict[str, str]:
    """Checksums of config, weights and tokenizer, and the dtype that the model computes in.

    Args:
        model: of transformers; its weights are summed up, as `export` does to compare checkpoints.
        tokenizer: None leaves it out, as does one whose rules cannot be seen (no fast tokenizer).

    Raises:
        LinearizeError: some weights are not in memory.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise LinearizeError(
            "some weights are offloaded to disk or not loaded, so a state cannot be told apart from another model's; "
            "load the model whole"
        )
    found = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": _digest(_plain(model.config.to_dict())),
        "weights": _digest(fingerprints(model)),
    }
    rules = None if tokenizer is None else tokenizer_digest(tokenizer)
    return found if rules is None else {**found, "tokenizer": rules[:16]}


def check_identity(state: dict[str, str], here: dict[str, str]) -> None:
    """Refuse a state of another model; what one of the two does not say is not compared.

    Args:
        state, here: `identity` of what read the text, and of what is to go on.

    Raises:
        LinearizeError: names the first difference.
    """
    for name, said in HOW.items():
        if name in state and name in here and state[name] != here[name]:
            raise LinearizeError(said.format(state=state[name], here=here[name], again=READ_AGAIN))


HOW = {
    "dtype": "the state was read in {state} and this model computes in {here}; load it in {state}, or {again}",
    "config": "the state is another model's: its config ({state}) is not this one's ({here}); give the model that read "
    "the text, or {again}",
    "weights": "the state is another model's: its weights ({state}) are not this one's ({here}), which may have been "
    "trained or rounded since; give the model that read the text, or {again}",
    "tokenizer": "the state's text was split by another tokenizer ({state}) than this one ({here}), so ids mean other "
    "words; give the one that belongs to the model, or {again}",
}
"""Part of an identity -> what is said where it differs, the most telling first."""


def checksum(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """SHA-256 of named tensors on the CPU and plain facts about them."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(config: Any) -> Any:
    if isinstance(config, dict):
        return {str(key): _plain(value) for key, value in config.items() if key not in INCIDENTAL}
    return [_plain(value) for value in config] if isinstance(config, list | tuple) else config


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
