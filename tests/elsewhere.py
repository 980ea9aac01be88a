"""What another process does with files: states of texts gone on from, an export read in pieces."""

from __future__ import annotations

from pathlib import Path

import compositions
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from linearize import surgery
from linearize.decode import load_state
from linearize.decode.arguments import cache_name

LENGTHS = {"odd": (21, 8), "short": (2, 9), "one": (13, 1)}
"""Tokens of the text and of what follows: odd numbers, fewer than windows and convolutions hold, a single one."""
MIXERS = {str(n): mixer for n, mixer in enumerate(compositions.registered())}
OTHERS = {
    "softmax": ("llama", None, {}),
    "sliding": ("mistral", None, {}),
    "hybrid": ("llama", [1], tiny.LAWCAT),
    "gemma2": ("gemma2", [1, 2], tiny.LOLCATS),
    "gpt2": ("gpt2", [0], tiny.LOLCATS),
    "terraced": (
        "gemma3",
        "all",
        {"window": {"name": "terraced", "size": 4}, "feature_map": {"name": "relu"}},
    ),
}


def made(name: str):
    """A small model by the name of what is in it: the same in every process."""
    if name in OTHERS:
        family, layers, mixer = OTHERS[name]
        model = tiny.model(family)
    else:
        model, layers, mixer = tiny.model("llama", num_hidden_layers=2), "all", MIXERS[name]
    if layers is not None:
        model = surgery.convert(model, mixer, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


def ids_of(length: str):
    text, more = LENGTHS[length]
    return tiny.tokens(1, text + more).split([text, more], 1)


@torch.no_grad()
def go_on(folder: str) -> None:
    """Every state of a folder, gone on from."""
    found = {}
    for path in sorted(Path(folder).glob("*.state")):
        name, length = path.stem.split("-")
        model = made(name)
        cache = load_state(path, model).cache(model)
        found[path.stem] = model(ids_of(length)[1], **{cache_name(model): cache}).logits
    save_file(found, Path(folder) / "logits.safetensors")


@torch.no_grad()
def read_in_pieces(folder: Path) -> None:
    """An export whose pinned tokens may seem six away, by transformers: a text whole, in pieces and token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder / "converted", dtype=torch.float32).eval()
    assert model.model.layers[0].self_attn.mixer.window.far.most == 6
    ids = load_file(folder / "ids.safetensors")["ids"]
    whole = model(input_ids=ids).logits
    cache, parts, at = None, [], 0
    for piece in (20, 1, 1, 9, 1, 18):
        made = model(input_ids=ids[:, at : at + piece], past_key_values=cache, use_cache=True)
        cache, at = made.past_key_values, at + piece
        parts.append(made.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    save_file({"logits": whole}, folder / "logits.safetensors")
