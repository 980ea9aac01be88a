"""What rounding a model's linear layers costs it: a teacher, and the same with mixers that nothing has trained.

The weights are rounded as `linearize export --quantize` rounds them, and as torchao does with other groups and for CUDA
(packed: two codes a byte, ranges by tinygemm or HQQ), then computed in float32, so that no card is needed. Printed for
each form: how far the logits are from those of plain weights (norm of the difference, as a share), and KL, on held-out
text and on ids drawn at random; perplexity on the text.

    python scripts/quantized_figures.py smollm2-135m lolcats

Needs torchao (`make test-quantize` puts it into .venv/quantize; PYTHONPATH).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import pyarrow.parquet
import torch
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    quantize_,
)
from torchao.quantization import quant_primitives as primitives

from linearize import models, surgery
from linearize.config import compose
from linearize.data import builtin
from linearize.export.rounding import in_dtype

Round = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    """Measure and print, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--tokens", type=int, default=256, metavar="N")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    options = parser.parse_args()
    folder = models.resolve(options.model)
    tokenizer = models.load_tokenizer(folder)
    teacher: Any = in_dtype(models.load_teacher(str(folder), device="cpu")[0].eval(), torch.bfloat16).float()
    recipe = compose(options.recipe)
    torch.manual_seed(0)
    converted = surgery.convert(copy.deepcopy(teacher), recipe.mixer, recipe.layers, recipe.mixers).eval()
    column = pyarrow.parquet.read_table(builtin.sample("validation")).column(builtin.COLUMN).to_pylist()
    text = torch.tensor([tokenizer("\n\n".join(column), verbose=False)["input_ids"][: options.tokens]])
    dice = torch.Generator().manual_seed(0)
    ids = {"text": text, "random": torch.randint(teacher.config.vocab_size, text.shape, generator=dice)}
    named = {"teacher": teacher, f"{options.recipe}, untrained": converted}
    layers = {name: _layers(model) for name, model in named.items()}
    plain = {
        name: found for name, found in layers["teacher"].items() if all(name in x for x in layers.values())
    }
    weights = {name: layer.weight.data for name, layer in plain.items()}
    wanted = {key: _logits(model, ids) for key, model in named.items()}
    print(
        f"{len(weights)} layers; logits apart, KL: on {text.numel()} tokens of text, on random ids; perplexity"
    )
    for key in named:
        print(f"{'plain':22} {key:20} {'':32} {_perplexity(wanted[key]['text'], text):8.2f}", flush=True)
    for form in options.forms:
        rounded = {name: FORMS[form](weight) for name, weight in weights.items()}
        for key, model in named.items():
            for name, weight in rounded.items():
                layers[key][name].weight.data = weight
            found = _logits(model, ids)
            cells = "   ".join(_apart(found[kind], wanted[key][kind]) for kind in ids)
            print(f"{form:22} {key:20} {cells} {_perplexity(found['text'], text):8.2f}", flush=True)


def _layers(model: Any) -> dict[str, Any]:
    """Linear layers by their names, without the head; in a conversion a layer is where it was in the teacher."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and ".mixer." not in f"{name}."
    }


@torch.no_grad()
def _logits(model: Any, ids: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {kind: model(one, use_cache=False).logits.float() for kind, one in ids.items()}


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> str:
    share = (found - wanted).norm() / wanted.norm()
    p, q = wanted.log_softmax(-1), found.log_softmax(-1)
    return f"{share:.4f} {(p.exp() * (p - q)).sum(-1).mean():.4f}"


def _perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).exp())


def _by(config: Any) -> Round:
    """Rounded by one of torchao's configs."""

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        layer: Any = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.clone()
        quantize_(layer, config)
        return layer.weight.dequantize().float()

    return rounded


def _four(group: int) -> Round:
    whole = {"weight_dtype": torch.int4, "mapping_type": MappingType.ASYMMETRIC}
    return _by(IntxWeightOnlyConfig(granularity=PerGroup(group), **whole))


def _packed(group: int, *, hqq: bool = False) -> Round:
    """As Int4WeightOnlyConfig rounds for `tile_packed_to_4d`, which itself wants a card."""
    block, limits = (1, group), (torch.int32, 0, 15)

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.bfloat16()
        if hqq:
            codes, scale, zero, _ = primitives._choose_qparams_and_quantize_affine_hqq(
                weight, nbits=4, group_size=group, axis=1, compute_dtype=weight.dtype, device="cpu"
            )
            codes = codes.int()
            scale, zero = (x.reshape(len(weight), -1) for x in (scale, zero))
        else:
            scale, zero = primitives._choose_qparams_affine_tinygemm(
                weight,
                MappingType.ASYMMETRIC,
                block,
                *limits,
                scale_dtype=weight.dtype,
                zero_point_dtype=weight.dtype,
            )
            codes = primitives._quantize_affine_tinygemm(weight, block, scale, zero, *limits)
        return primitives._dequantize_affine_tinygemm(
            codes, block, scale, zero, *limits, output_dtype=torch.float32
        )

    return rounded


FORMS: dict[str, Round] = {
    "int4, 64": _four(64),
    "int4 packed, 64": _packed(64),
    "int4 packed, 64, HQQ": _packed(64, hqq=True),
    "int4 packed, 32, HQQ": _packed(32, hqq=True),
    "int4, 32": _four(32),
    "int8": _by(Int8WeightOnlyConfig()),
    "float8": _by(Float8WeightOnlyConfig(granularity=PerRow())),
}
"""Name, with the inputs that share a scale -> how a weight is rounded."""


if __name__ == "__main__":
    main()
