"""What a mixer keeps for backward, in bytes a token and layer, of every recipe in SmolLM2-135M's shape in bfloat16.

    PYTHONPATH=. python scripts/kernels/saved_bytes.py [--recipes all|A,B] [--tensors] [--blocks] [--spread]

Needs no GPU: kernels are recorded and not launched, and what stands between them is partitioned as Inductor's input is.
Three columns: part by part; compiled as torch would; compiled as `linearize.mixers.compiled` does, keeping little. What
the mixer was given (q, k, v, hidden states, which the model holds in any case) counts. --tensors lists what is kept.
Of recipes with several mixers, the first.

--blocks counts the model's whole blocks instead, norms and feed-forward layers with them, of which the middle of three
stands for all: part by part but for a compiled mixer; compiled as torch would; and keeping little, as stages do.

--spread counts a mixer of the second of two processes that hold a sequence together: part by part, and where it is
computed once more in backward, as end-to-end stages have it.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from linearize import surgery
from linearize.across import Across
from linearize.bench.subjects import SMOLLM2_135M, TEACHER, chosen, convert, mixers_of, random_model
from linearize.bench.training_step import without_masks
from linearize.distill import blocks
from linearize.distill.blocks import Blocks, repeated
from linearize.kernels import dispatch, launch
from linearize.mixers import LayerShape, Mixer, build, compiled, spread

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
    parser.add_argument("--blocks", action="store_true", help="of whole blocks; recipes, or teacher")
    parser.add_argument("--spread", action="store_true", help="of sequences that two processes hold together")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.spread:
        print(f"{'recipe':26}{'part by part':>16}{'computed again':>16}", flush=True)
        for name in chosen(options.recipes.split(",")):
            mixer = build(mixers_of(name)[0], SHAPE)
            line = "".join(f"{per_token_spread(mixer, again):16,.0f}" for again in (False, True))
            print(f"{name:26}{line}{'' if spread.at_once(mixer) else '  (in turn)'}", flush=True)
        return 0
    print(f"{'recipe':26}" + "".join(f"{way:>16}" for way in WAYS), flush=True)
    if options.blocks:
        names = options.recipes.split(",")
        for name in [*[TEACHER] * (TEACHER in names), *(chosen(names) if names != [TEACHER] else [])]:
            print(f"{name:26}" + "".join(f"{of_a_block(name, way):16,.0f}" for way in WAYS), flush=True)
        return 0
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
    q, k, v, given = drawn(mixer, tokens)
    kept, hooks = keeping(mixer, given)
    with launch.record(), dispatch.kernels("triton"), running(way), hooks:
        made = mixer.chunked(q, k, v, **given)
    assert made.requires_grad
    return [*kept.values()]


def drawn(mixer: Mixer, tokens: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """q, k and v of one sequence, and what else a mixer reads."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(1, tokens, *size, generator=generator).to(torch.bfloat16).requires_grad_()

    heads = [(SHAPE.heads, SHAPE.key_dim), *[(SHAPE.kv_heads, SHAPE.key_dim)] * 2]
    q, k, v = (numbers(*size) for size in heads)
    given: dict[str, Any] = {"hidden": numbers(SHAPE.hidden_dim())} if mixer.uses_hidden else {}
    if mixer.needs_plain:
        given["plain"] = (numbers(*heads[0]), numbers(*heads[1]))
    if mixer.uses_first:
        given["first"] = numbers(*heads[2])
    return q, k, v, given


def keeping(mixer: Mixer, given: dict[str, Any]) -> tuple[dict[int, Tensor], Any]:
    """What is kept inside the second: a tensor of each storage, parameters and the first layer's values apart."""
    own = {x.untyped_storage().data_ptr() for x in mixer.parameters()}
    if mixer.uses_first:
        own.add(given["first"].untyped_storage().data_ptr())  # one tensor for all layers
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    return kept, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)


def per_token_spread(mixer: Mixer, again: bool) -> float:
    """Bytes that a token more makes the second of two processes keep."""
    short, long = (of_a_stretch(mixer, tokens, again) for tokens in LENGTHS)
    return (long - short) / (LENGTHS[1] - LENGTHS[0])


def of_a_stretch(mixer: Mixer, tokens: int, again: bool) -> int:
    """Bytes that one forward pass over a half of a sequence keeps; the other half's process is a fake of torch's."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    q, k, v, given = drawn(mixer, tokens)
    kept, hooks = keeping(mixer, given)
    across = Across(dist.group.WORLD, 1, 2, torch.arange(2 * tokens)[None])
    with launch.record(), dispatch.kernels("triton"), running(WAYS[0]), hooks:
        made = spread.chunked(across, mixer, q, k, v, **given, again=again)
    assert made.requires_grad
    if again:  # held by what computes again, which hooks do not see
        beside = [x for x in (given.get("hidden"), *given.get("plain", ())) if x is not None]
        kept |= {x.untyped_storage().data_ptr(): x for x in (q, k, v, *beside)}
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def of_a_block(name: str, way: str) -> float:
    """Bytes that a token more makes a block keep, beside two others."""
    found = []
    for layers in (2, 3):
        model = random_model("cpu", torch.bfloat16, num_hidden_layers=layers, vocab_size=64)
        model = convert(model, name).train().requires_grad_(True)
        found.append([in_blocks(model, tokens, way) for tokens in LENGTHS])
    short, long = (three - two for two, three in zip(*found, strict=True))
    return (long - short) / (LENGTHS[1] - LENGTHS[0])


def in_blocks(model: Any, tokens: int, way: str) -> int:
    """Bytes that one forward pass of all blocks keeps, parameters apart."""
    own = {x.untyped_storage().data_ptr() for x in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    ids = torch.zeros(1, tokens, dtype=torch.int64)
    whole = Blocks(repeated(model) if way != WAYS[0] else [], "bytes")
    with ExitStack() as stack:
        stack.enter_context(launch.record())
        stack.enter_context(dispatch.kernels("triton"))
        stack.enter_context(running("keeping little" if way == WAYS[0] else way))
        stack.enter_context(without_masks())
        if surgery.converted(model):
            stack.enter_context(surgery.trusting(model))
        stack.enter_context(whole.compiled())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x))
        made = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert made.requires_grad
    assert way == WAYS[0] or whole.obstacle is None, whole.obstacle
    return sum(kept.values())


@contextmanager
def running(way: str) -> Iterator[None]:
    """Mixers run like that, partitioned and not compiled any further."""
    before = os.environ.get(compiled.VARIABLE), compiled.BACKEND, compiled.keeping_little
    assert blocks.keeping_little is before[2]
    os.environ[compiled.VARIABLE] = "never" if way == WAYS[0] else "always"
    compiled.BACKEND = "aot_eager_decomp_partition"
    if way == WAYS[1]:
        compiled.keeping_little = blocks.keeping_little = torch._dynamo.lookup_backend(compiled.BACKEND)
    compiled._made.clear()
    torch._dynamo.reset()
    try:
        yield
    finally:
        os.environ.pop(compiled.VARIABLE)
        os.environ |= {} if before[0] is None else {compiled.VARIABLE: before[0]}
        compiled.BACKEND, compiled.keeping_little = before[1:]
        blocks.keeping_little = before[2]
        compiled._made.clear()


if __name__ == "__main__":
    sys.exit(main())
