"""What a mixer keeps for backward, in bytes a token and layer, of every recipe in SmolLM2-135M's shape in bfloat16.

    PYTHONPATH=. python scripts/kernels/saved_bytes.py [--recipes all|A,B] [--tensors]

Needs no GPU: kernels are recorded and not launched, and what stands between them is partitioned as Inductor's input is.
Three columns: part by part; compiled as torch would; compiled as `linearize.mixers.compiled` does, keeping little. What
the mixer was given (q, k, v, hidden states, which the model holds in any case) counts. --tensors lists what is kept.
Of recipes with several mixers, the first.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from linearize.bench.subjects import SMOLLM2_135M, chosen, mixers_of
from linearize.kernels import dispatch, launch
from linearize.mixers import LayerShape, Mixer, build, compiled

SHAPE = LayerShape(
    heads=SMOLLM2_135M["num_attention_heads"],
    kv_heads=SMOLLM2_135M["num_key_value_heads"],
    key_dim=SMOLLM2_135M["head_dim"],
    value_dim=SMOLLM2_135M["head_dim"],
    scaling=SMOLLM2_135M["head_dim"] ** -0.5,
    model_dim=SMOLLM2_135M["hidden_size"],
    rotary="half",
)
LENGTHS = (1024, 2048)
"""Their difference is what a token costs: copies of weights are in both."""
WAYS = ("part by part", "compiled", "keeping little")


def main() -> int:
    """Print a line a recipe as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default="all", help="names, by commas")
    parser.add_argument("--tensors", action="store_true", help="list what is kept")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'recipe':26}" + "".join(f"{way:>16}" for way in WAYS), flush=True)
    for name in chosen(options.recipes.split(",")):
        mixer = build(mixers_of(name)[0], SHAPE)
        print(f"{name:26}" + "".join(f"{per_token(mixer, way):16,.0f}" for way in WAYS), flush=True)
        if options.tensors:
            for kept in sorted(saved(mixer, LENGTHS[0], WAYS[-1]), key=lambda x: -x.numel() * x.itemsize):
                print(f"    {str(kept.dtype)[6:]:10} {tuple(kept.shape)}")
    return 0


def per_token(mixer: Mixer, way: str) -> float:
    """Bytes that a token more makes it keep."""
    short, long = (sum(x.untyped_storage().nbytes() for x in saved(mixer, n, way)) for n in LENGTHS)
    return (long - short) / (LENGTHS[1] - LENGTHS[0])


def saved(mixer: Mixer, tokens: int, way: str) -> list[Tensor]:
    """A tensor of each storage that one forward pass keeps, parameters apart."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(1, tokens, *size, generator=generator).to(torch.bfloat16).requires_grad_()

    own = {x.untyped_storage().data_ptr() for x in mixer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    heads = [(SHAPE.heads, SHAPE.key_dim), *[(SHAPE.kv_heads, SHAPE.key_dim)] * 2]
    q, k, v = (drawn(*size) for size in heads)
    given: dict[str, Any] = {"hidden": drawn(SHAPE.hidden_dim())} if mixer.uses_hidden else {}
    if mixer.needs_plain:
        given["plain"] = (drawn(*heads[0]), drawn(*heads[1]))
    if mixer.uses_first:
        given["first"] = drawn(*heads[2])
        own.add(given["first"].untyped_storage().data_ptr())  # one tensor for all layers
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with launch.record(), dispatch.kernels("triton"), running(way), hooks:
        made = mixer.chunked(q, k, v, **given)
    assert made.requires_grad
    return [*kept.values()]


@contextmanager
def running(way: str) -> Iterator[None]:
    """Mixers run like that, partitioned and not compiled any further."""
    before = os.environ.get(compiled.VARIABLE), compiled.BACKEND, compiled.keeping_little
    os.environ[compiled.VARIABLE] = "never" if way == WAYS[0] else "always"
    compiled.BACKEND = "aot_eager_decomp_partition"
    if way == WAYS[1]:
        compiled.keeping_little = torch._dynamo.lookup_backend(compiled.BACKEND)
    compiled._made.clear()
    torch._dynamo.reset()
    try:
        yield
    finally:
        os.environ.pop(compiled.VARIABLE)
        os.environ |= {} if before[0] is None else {compiled.VARIABLE: before[0]}
        compiled.BACKEND, compiled.keeping_little = before[1:]
        compiled._made.clear()


if __name__ == "__main__":
    sys.exit(main())
