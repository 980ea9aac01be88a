"""Load exports in fla's layout with fla itself, and compare logits with the conversion that they were written from.

python scripts/fla_layout.py                          # models with random mixers, of every layer that is written
python scripts/fla_layout.py --pair RUN RUN-fla       # a checkpoint of yours, and its export
python scripts/fla_layout.py --json FILE              # also as rows, written one by one

Needs fla-core, flash-linear-attention (0.6) and einops. On a card all of fla's kernels run, short texts through its
recurrent ones and long ones through its chunks, products in full float32; without a card Triton's interpreter runs what
it can, short texts, in minutes. Where flash-attn is not installed, torch takes its place in softmax layers.
The exit code is 1 where logits differ by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # tensor cores would round products to TF32
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = (48, 200, 1024) if CUDA else (24,)
FIRST, LAST = (32, 40) if CUDA else (12, 15)
"""Tokens read at once, and in all, where a cache is carried."""
DTYPES = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)
TOLERANCE = 1e-3
"""Of the largest difference of logits in float32, as a share of the largest logit."""
ROUNDED = 4.0
"""The same in bfloat16, as a multiple of what that rounding costs the conversion itself."""
RECURRENT = 64
"""Tokens up to which fla's layers take their recurrent kernels."""


def main(arguments: list[str] | None = None) -> int:
    """Compare, print a line for each, and say whether all agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", nargs=2, metavar=("RUN", "EXPORT"), type=Path, help="a checkpoint and its export"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args(arguments)
    if not CUDA:
        _first_config()
    _attention()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fla-layout-") as scratch:
        pairs = [(options.pair[0].name, *options.pair)] if options.pair else list(cases(Path(scratch)))
        # short texts of all layers first: long ones take fla's chunks, which are tuned for minutes
        for lengths in (LENGTHS[:1], LENGTHS[1:]):
            for name, ours, theirs in pairs if lengths else ():
                for found in compared(name, ours, theirs, lengths):
                    rows.append(found)
                    if options.json:
                        text = json.dumps({"device": device_name(), "rows": rows}, indent=2)
                        options.json.write_text(text + "\n", encoding="utf-8")
    wrong = [row for row in rows if not row["apart"] < row["tolerance"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} agree, {device_name()}")
    return int(bool(wrong))


def cases(folder: Path) -> Any:
    """Name, checkpoint and export of a model of every layer that is written."""
    import laid_out
    from laid_out import DELTA, WINDOW, recipe

    from linearize.export.layouts import export_layout

    near = {"layers": {"use": {"near": [0, 2]}}, "mixers": {"near": WINDOW}}
    sizes = SIZES if CUDA else {}
    for name, mixer, changes in (
        ("gla", recipe("gla"), {}),
        ("gla, another epsilon", recipe("gla"), {"rms_norm_eps": 1e-6}),
        ("gla, no decay", recipe("gla", gate={"name": "none"}), {}),
        ("gla between softmax", recipe("gla"), {"layers": [1]}),
        ("gla between windows", recipe("gla"), near),
        ("delta_net", DELTA, {}),
        ("gated_deltanet", {**DELTA, "gate": {"name": "mamba2"}}, {}),
        ("transformer", recipe("softmax"), {}),
    ):
        ours, theirs = folder / name, folder / f"{name}-fla"
        laid_out.saved(ours, mixer, **{**sizes, "max_position_embeddings": 2048, **changes})
        export_layout(ours, "fla", theirs)
        yield name, ours, theirs


@torch.no_grad()
def compared(name: str, ours: Path, theirs: Path, lengths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A row for each length and dtype, and one for decoding with a cache beside the shortest."""
    import fla.models
    from transformers import AutoModelForCausalLM

    import linearize
    from linearize.kernels import dispatch

    assert fla.models is not None
    device = "cuda" if CUDA else "cpu"
    wanted: Any = {dtype: linearize.load(ours, dtype=dtype).to(device) for dtype in DTYPES}
    rounded: dict[int, float] = {}
    for dtype in DTYPES:
        loaded: Any = AutoModelForCausalLM.from_pretrained(theirs, dtype=dtype, output_loading_info=True)
        model, report = loaded
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
            report
        )
        model = model.to(device).eval()
        for length in lengths:
            ids = torch.randint(0, 250, (2, length), generator=torch.Generator().manual_seed(length)).to(
                device
            )
            with dispatch.kernels("torch"):
                expected = wanted[torch.float32](ids).logits
                if dtype != torch.float32:
                    rounded[length] = distance(wanted[dtype](ids).logits, expected)
            if dtype == torch.float32 and model.config.model_type == "delta_net" and length > RECURRENT:
                print(f"{name:24} float32   {length} tokens: fla's chunks of DeltaNet take no float32")
                continue
            allowed = TOLERANCE if dtype == torch.float32 else ROUNDED * rounded[length]
            found = model(ids, use_cache=False).logits
            yield row(name, dtype, f"{length} tokens", distance(found, expected), allowed)
        if dtype == torch.float32 and lengths[0] == LENGTHS[0]:
            ids = ids[:, :LAST]
            with dispatch.kernels("torch"):
                expected = wanted[dtype](ids).logits[:, FIRST - 1 :]
            answer = model(ids[:, :FIRST], use_cache=True)
            logits = [answer.logits[:, -1:]]
            for place in range(FIRST, LAST):
                cache = answer.past_key_values
                answer = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
                logits.append(answer.logits)
            what = f"{FIRST} tokens, then {LAST - FIRST} with a cache"
            yield row(name, dtype, what, distance(torch.cat(logits, 1), expected), TOLERANCE)


def distance(found: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def row(name: str, dtype: torch.dtype, what: str, apart: float, allowed: float) -> dict[str, Any]:
    """What was compared, printed."""
    kind = str(dtype).removeprefix("torch.")
    print(f"{name:24} {kind:9} {what:32} {apart:.2e} (allowed {allowed:.1e})", flush=True)
    return {"name": name, "dtype": kind, "what": what, "apart": apart, "tolerance": allowed}


def device_name() -> str:
    """The card, or the interpreter."""
    return torch.cuda.get_device_name() if CUDA else "Triton's interpreter"


def _first_config() -> None:
    """Take each kernel's first configuration: the interpreter cannot time them."""
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())

    Autotuner.run = run


def _attention() -> None:
    """Torch in the place of flash-attn's function, in the calls that fla makes of it, where that is missing."""
    from fla.layers import attn

    def attend(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
        assert causal
        place = torch.arange(k.shape[1], device=q.device)
        age = place[-q.shape[1] :, None] - place
        seen = age >= 0
        if window_size[0] >= 0:
            seen &= age <= window_size[0]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        made = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return made.transpose(1, 2)

    if attn.flash_attn_func is None:
        attn.flash_attn_func = attend


if __name__ == "__main__":
    sys.exit(main())
