"""On a GPU, in under three minutes: decoding in a CUDA graph gives the tokens of `model.generate`, and how fast it is.

    PYTHONPATH=. python scripts/kernels/check_decode_gpu.py [--recipes all|A,B] [--seconds 170]

Random models, nothing downloaded. Exit code 1 if any check fails; a check that the time does not allow is listed.
Half precision may choose another token where two score alike, so float32 must agree wholly and bfloat16 for a while.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from linearize import surgery
from linearize.bench.subjects import converted, random_model
from linearize.config import compose, list_recipes
from linearize.decode import Decoder, Sampling
from linearize.decode.cache import tensors
from linearize.decode.choice import obstacles

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
tiny: Any = importlib.import_module("tiny")
mixed: Any = importlib.import_module("mixed")
LOLCATS = {"feature_map": {"name": "hedgehog", "dim": 16}, "window": {"name": "sliding", "size": 6}}
"""As narrow as the Triton kernels take."""
STEPS = 200
"""Tokens that are timed."""
START = time.monotonic()


def say(text: str) -> None:
    sys.stdout.write(f"{time.monotonic() - START:6.1f} s  {text}\n")
    sys.stdout.flush()


def hybrid(family: str, layers: Any, mixer: dict) -> Any:
    model = surgery.convert(tiny.model(family), mixer, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model.cuda()


def same_tokens(model: Any, sampling: Sampling = Sampling(), tokens: int = 40, **options: Any) -> str:  # noqa: B008
    """Two batches of left-padded prompts one after another, through one decoder and through `generate`."""
    decoder = Decoder(model, 2, sampling, eos=[2], pad=0, length=128)
    for length in (20, 70):
        ids, mask, _ = (x.cuda() for x in tiny.left_padded(length=length))
        torch.manual_seed(1)
        made = decoder.generate(ids, mask, tokens)
        torch.manual_seed(1)
        wanted = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, **{"do_sample": False, **options}
        )
        assert decoder._graph is not None, "not captured"
        if not torch.equal(made, wanted[:, length:]):
            width = min(made.shape[1], wanted.shape[1] - length)
            differ = (made[:, :width] != wanted[:, length : length + width]).any(0).int()
            return f"DIFFERS from token {int(differ.argmax())} of {wanted.shape[1] - length} (prompt of {length})"
    return "same tokens"


def families() -> dict[str, Callable[[], str]]:
    checks: dict[str, Callable[[], str]] = {}
    for family in ("llama", "gemma2", "gemma3", "gpt2", "mistral", "qwen3_moe"):
        for layers in ("all", [1, 2]):
            checks[f"{family}, layers {layers}"] = lambda f=family, x=layers: same_tokens(
                hybrid(f, x, LOLCATS)
            )
    drawn = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    sampling = Sampling(True, 0.8, 20, 0.9)
    for family in ("llama", "gemma2"):
        checks[f"{family}, mixers by layer"] = lambda f=family: same_tokens(mixed.mixed(f).cuda())
    checks["sampling"] = lambda: same_tokens(hybrid("llama", "all", LOLCATS), sampling, **drawn)
    return checks


def recipes(names: list[str]) -> dict[str, Callable[[], str]]:
    """Every recipe's mixers in a small Llama: whether its step can be captured at all."""

    def check(name: str) -> str:
        found = compose(name)
        model = surgery.convert(
            tiny.model("llama", head_dim=16), found.mixer, found.layers, found.mixers
        ).cuda()
        return "; ".join(obstacles(model)) or same_tokens(model, tokens=24)

    return {f"recipe {name}": lambda n=name: check(n) for name in names}


def static_cache() -> str:
    """transformers' own generate with a static cache, which compiles the step of a converted model by itself."""
    model = hybrid("llama", [1, 2], LOLCATS)
    ids, mask, _ = (x.cuda() for x in tiny.left_padded(length=20))
    given = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    plain = model.generate(ids, **given)
    static = model.generate(ids, cache_implementation="static", **given)
    return "same tokens" if torch.equal(plain, static) else "DIFFERS"


@cache
def large(dtype: torch.dtype) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """SmolLM2-135M's shape converted, a prompt, and what `generate` makes of it."""
    student, _ = converted(random_model("cuda", dtype), "lolcats")
    ids = torch.randint(49_152, (1, 300), generator=torch.Generator().manual_seed(0)).cuda()
    wanted = student.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=65,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return student, ids, wanted[0, 300:]


def timed(dtype: torch.dtype, batch: int, how: dict[str, Any] | None) -> str:
    """One way to decode it: how far it goes with `generate`, and how long a token takes."""
    student, ids, wanted = large(dtype)
    start = time.monotonic()
    decoder = Decoder(student, batch, compile=how)
    decoder.prepare()
    prepared = time.monotonic() - start
    made = decoder.generate(ids.expand(batch, -1), None, 65)
    agree = int((made[0] == wanted).int().cumprod(0).sum())
    torch.cuda.synchronize()
    start = time.perf_counter()
    decoder.run(STEPS)
    torch.cuda.synchronize()
    each = (time.perf_counter() - start) / STEPS
    held = sum(x.numel() * x.element_size() for x in tensors(decoder.cache).values()) / 2**20
    found = (
        f"first {agree} of 65 tokens as generate, {1e3 * each:.3f} ms a token, {batch / each:.0f} tokens/s, "
        f"{held:.1f} MiB of state, prepared in {prepared:.1f} s"
    )
    return found + (" DIFFERS" if agree < (65 if dtype == torch.float32 else 8) else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default="all")
    parser.add_argument("--seconds", type=float, default=170.0)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    names = [name for name, _ in list_recipes()] if options.recipes == "all" else options.recipes.split(",")
    half, tuned = torch.bfloat16, {"options": {"coordinate_descent_tuning": True}}
    checks: dict[str, Callable[[], str]] = {
        "llama first": lambda: same_tokens(hybrid("llama", "all", LOLCATS)),
        "135M, batch 1, graph": lambda: timed(half, 1, None),
        "135M, batch 64, graph": lambda: timed(half, 64, None),
        "135M, float32, graph": lambda: timed(torch.float32, 1, None),
        **families(),
        "static cache, compiled": static_cache,
        "135M, batch 1, compiled graph": lambda: timed(half, 1, {}),
        "135M, batch 1, tuned graph": lambda: timed(half, 1, tuned),
        "135M, batch 64, compiled graph": lambda: timed(half, 64, {}),
        **recipes(names),
    }
    failed = []
    for name, check in checks.items():
        if time.monotonic() - START > options.seconds:
            say(f"{name}: no time left")
            continue
        try:
            found = check()
        except Exception as error:
            traceback.print_exc(limit=-6)
            found = f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        if "DIFFERS" in found or "FAILED" in found:
            failed.append(name)
        say(f"{name}: {found}")
    say(f"{len(failed)} failed: {', '.join(failed)}" if failed else "all agree")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
