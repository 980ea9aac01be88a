"""Weight-only quantization of an export: torchao's codes, through transformers, in safetensors.

Linear layers outside the mixers are quantized; activations are not. What a conversion adds stays as it was trained:
mixers are float32, as are their states, and embeddings, the head and norms keep their dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from linearize.errors import LinearizeError, UnsupportedModelError
from linearize.export.load import check_folder, load
from linearize.export.origin import read_note, recorded
from linearize.export.plain import check_plain
from linearize.export.quantized import check_torchao, codes, stored_bytes
from linearize.export.save import save
from linearize.models.tokenizer import load_tokenizer
from linearize.surgery.inspection import skeleton

FORMS = ("int8", "int4", "float8")
GROUPS = (64, 32)
"""Weights that share a scale in `int4`: the first that divides every layer's inputs."""


def quantize(path: str | Path, form: str, out: str | Path, *, device: str = "cpu") -> Path:
    """Write a quantized copy of an exported checkpoint.

    Args:
        path: a folder that `save` wrote, its weights plain.
        form: int8, or float8 (e4m3): one scale an output channel. int4: a scale and a zero point for each group of 64
            (or 32) inputs; on the CPU, and for models that are not in bfloat16, a code takes a byte, since torchao
            packs two into one for CUDA and bfloat16 alone.
        out: the new folder.
        device: where the codes are made, "cpu" or "cuda".

    Returns:
        The new folder, which a fresh process has loaded and compared with the model.

    Raises:
        LinearizeError: torchao is not installed, or there is no such form.
        UnsupportedModelError: no layer can be quantized, or not in this form.
        CheckpointError: no converted checkpoint, one that is quantized already or holds adapters, or the new folder
            cannot be written.
    """
    path, out = Path(path), Path(out)
    if form not in FORMS:
        raise LinearizeError(f"quantize={form!r}: there are {', '.join(FORMS)}")
    check_torchao(f"quantizing to {form}")
    _, config = check_folder(path)
    check_plain(path, config, "codes cannot take them in")
    if out.resolve() == path.resolve():
        raise LinearizeError(f"{out} is the checkpoint that is to be quantized; give another folder")
    empty = skeleton(config)
    names = _linear(path, empty)
    from transformers import TorchAoConfig

    packed = form == "int4" and device == "cuda" and str(config.dtype) == "torch.bfloat16"
    given = TorchAoConfig(_config(path, form, names, packed), modules_to_not_convert=_kept(empty))
    placed = {"device_map": device} if device != "cpu" else {}
    model: Any = load(path, quantization_config=given, **placed)
    note = read_note(path)
    about = _described(form, len(codes(model)), packed, model)
    return save(
        model,
        out,
        tokenizer=load_tokenizer(path),
        recipe=note.get("recipe"),
        metrics=note.get("metrics"),
        base=recorded(note),
        remote_code=any(path.glob("modeling_*.py")),
        about=about,
        check=True,
    )


def sizes(before: Path, after: Path) -> tuple[int, int]:
    """Bytes of the weight files of two checkpoints."""
    first, second = (
        sum(file.stat().st_size for file in one.glob("*.safetensors")) for one in (before, after)
    )
    return first, second


def _kept(model: Any) -> list[str]:
    """Patterns of modules that stay plain, as transformers takes them: the mixers and the head."""
    head = model.get_output_embeddings()
    return [r".*\.mixer", *(name for name, module in model.named_modules() if module is head)]


def _linear(path: Path, model: Any) -> dict[str, nn.Linear]:
    """Layers that transformers will quantize."""
    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".mixer." not in f"{name}."
    }
    if not found:
        raise UnsupportedModelError(
            f"{path}: none of its layers is an nn.Linear (GPT-2 has layers of its own kind), and torchao quantizes no "
            "other; keep the plain checkpoint"
        )
    return found


def _config(path: Path, form: str, names: dict[str, nn.Linear], packed: bool) -> Any:
    """torchao's own config of a form."""
    import torch
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
        PerRow,
    )

    if form == "int8":
        return Int8WeightOnlyConfig()
    if form == "float8":
        return Float8WeightOnlyConfig(granularity=PerRow())
    group = next((size for size in GROUPS if all(x.in_features % size == 0 for x in names.values())), None)
    if group is None:
        name = next(name for name, x in names.items() if x.in_features % GROUPS[-1])
        raise UnsupportedModelError(
            f"{path}: int4 shares a scale among {GROUPS[-1]} inputs, and {name} has {names[name].in_features}, which "
            "that does not divide; take --quantize int8"
        )
    if packed:
        return Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    return IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]  # torch does not declare it
        granularity=PerGroup(group),
        mapping_type=MappingType.ASYMMETRIC,
    )


def _described(form: str, count: int, packed: bool, model: Any) -> str:
    """What is stored how, for the card."""
    width = " (two codes a byte)" if packed else " (one code a byte)" if form == "int4" else ""
    dtype, size = str(model.dtype).removeprefix("torch."), f"{stored_bytes(model) / 2**20:,.0f} MiB"
    return (
        f"Quantized: the weights of {count} linear layers are {form}{width}, by torchao, weights alone; activations "
        f"are {dtype}. Mixers and their states are float32; embeddings, head and norms are as they were. {size} of "
        "weights. Loading needs `pip install torchao`."
    )
