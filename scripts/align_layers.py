"""What a mixer can learn of a layer: some layers of a model, each aligned alone on its own inputs, no model around it.

Minutes on a CPU where a training of the whole model takes a card: which mixer, which rate, which start take how much of
the error that its window alone leaves. Rows as they come, resumable, with a table.

    python scripts/align_layers.py scripts/align_layers.yaml
    python scripts/align_layers.py scripts/align_layers.yaml --only weights,shares --layers 9 --steps 50
    python scripts/align_layers.py scripts/align_layers.yaml --far 8192 data.validation=LONG.parquet

The file names a recipe and variants: overrides of it, and a rate. A row is a variant's layer: the squared error of its
output behind the output projection over the teacher's squared size, on sequences that it was not fitted to: calibrated
(`linearize.mixers.calibration` on the layer alone), with the window alone, from where the training begins, and aligned.
With `--far` also what is left of the window's error in longer texts of `data.validation`, by position: a branch whose
sum grows with the text may be worse than none where it never was.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from sheet import ROOT, Sheet, markdown, names, number, plan_of

from linearize import data, models, surgery
from linearize.config import compose
from linearize.config.schema import Recipe
from linearize.errors import LinearizeError
from linearize.mixers import calibration
from linearize.mixers.combine import SHUT
from linearize.mixers.seams import some
from linearize.registry import closest

KEYS = ("recipe", "variants")
OWN = ("rate", "recipe", "overrides", "start")
"""What a variant may say."""
HELD, FITTED = 8, 8
"""Sequences that errors are of, and that the calibration sees."""
TOGETHER = 4
"""Sequences whose errors are found at once."""
FAR = 2
"""Longer texts, one at a time."""
WARM_UP, LAST = 10, 0.1
"""Steps in which the rate rises, and the share of it that a line ends at."""


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    try:
        plan = plan_of(options.plan, KEYS, needed=("recipe",))
        wanted = {name: _variant(plan, name, options) for name in options.only or plan["variants"]}
        sheet = Sheet(options.out or ROOT / "docs" / "results" / f"{options.plan.stem}.json", table)
        settings = {"model": options.model, "length": options.length, "sequences": options.sequences}
        settings |= {"steps": options.steps, "batch": options.batch, "layers": options.layers}
        settings |= {"far": options.far} if options.far else {}
        if sheet.rows and sheet.found["settings"] != {name: str(value) for name, value in settings.items()}:
            raise LinearizeError(f"{sheet.path} holds rows of other settings; give another --out")
        sheet.about("align_layers.py", given, settings)
        sheet.found["variants"] = {
            **sheet.found.get("variants", {}),
            **{n: plan["variants"][n] for n in wanted},
        }
        for name, (recipe, rate) in wanted.items():
            missing = [layer for layer in options.layers if f"{name}, {layer}" not in sheet.rows]
            start = plan["variants"][name].get("start", "window")
            far = _far_calls(recipe, options, missing) if missing and options.far else {}
            for call in _calls(recipe, options, missing) if missing else ():
                row = _aligned(call, start, rate, options, far.get(call.layer_idx))
                sheet.rows[f"{name}, {call.layer_idx}"] = {"variant": name, "layer": call.layer_idx, **row}
                sheet.write()
                print(f"{name:45} {call.layer_idx:3} {row['window']:.4f} -> {row['aligned']:.4f}", flush=True)
    except (LinearizeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(sheet.found))
    return 0


def _variant(plan: dict[str, Any], name: str, options: argparse.Namespace) -> tuple[Recipe, float]:
    """A variant's recipe and rate."""
    if name not in plan["variants"]:
        raise LinearizeError(f"--only: no variant '{name}'; {closest(name, plan['variants'])}")
    found = plan["variants"][name]
    if not isinstance(found, dict) or "rate" not in found or not found.keys() <= set(OWN):
        raise LinearizeError(
            f"variant '{name}': a mapping of {', '.join(OWN)}, the first of them needed; got {found}"
        )
    own = [f"data.length={options.length}", *found.get("overrides", []), *options.overrides]
    return compose(found.get("recipe", plan["recipe"]), own), float(found["rate"])


def _far_calls(recipe: Recipe, options: argparse.Namespace, layers: list[int]) -> dict[int, Any]:
    """Layer -> its call on longer texts."""
    longer = argparse.Namespace(model=options.model, length=options.far, sequences=FAR)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, length=options.far))
    return {call.layer_idx: call for call in _calls(recipe, longer, layers, split="validation")}


def _calls(
    recipe: Recipe, options: argparse.Namespace, layers: list[int], split: str = "train"
) -> Iterator[Any]:
    """Each of the layers on all sequences, the teacher's own inputs."""
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = models.load_teacher(options.model)
    surgery.convert(model, recipe.mixer, layers=layers)
    tokens = options.sequences * options.length
    packed = data.packed(tokenizer, recipe.data, tokens=tokens, seed=recipe.run.seed, split=split)
    items = [packed[index] for index in range(options.sequences)]
    batch = {key: torch.stack([item[key] for item in items]) for key in ("input_ids", "position_ids")}
    seen: list[Any] = []

    def observe(call: Any) -> torch.Tensor:
        seen.append(call)
        return call.teacher

    with torch.no_grad(), surgery.observe(model, observe):
        model.base_model(**batch, use_cache=False)
    while seen:
        yield seen.pop(0)


def _error(call: Any) -> float:
    """Squared error of the output over the teacher's squared size, on the last sequences."""
    wrong, size = _by_position(call, slice(len(call.q) - HELD, len(call.q)), TOGETHER)
    return float(wrong.sum() / size.sum())


def _by_position(call: Any, rows: slice, together: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of the output and the teacher's squared size [T], both summed over sequences."""
    wrong = size = torch.zeros(call.q.shape[1])
    with torch.no_grad():
        for first in range(rows.start, rows.stop, together):
            part = some(call, slice(first, min(first + together, rows.stop)))
            mine, teacher = part.project(part.student()), part.project(part.teacher)
            wrong = wrong + (mine - teacher).square().sum((0, 2))
            size = size + teacher.square().sum((0, 2))
    return wrong, size


def _far(call: Any, module: Any, length: int) -> dict[str, float]:
    """Error over the teacher's size in texts of `call`, up to `length` tokens and in each doubling behind it."""
    wrong, size = _by_position(dataclasses.replace(call, module=module), slice(0, len(call.q)), 1)
    begin, end, found = 0, length, {}
    while begin < len(wrong):
        end = min(end, len(wrong))
        found[f"{begin}-{end}"] = float(wrong[begin:end].sum() / size[begin:end].sum())
        begin, end = end, 2 * end
    return found


def _aligned(call: Any, start: str, rate: float, options: argparse.Namespace, far: Any) -> dict[str, Any]:
    """Train one mixer by its layer's output; the rate falls along a line.

    Args:
        start: what it begins with, the `window` alone or as `calibrated`.
        far: the layer's call on longer texts, or None.
    """
    began = time.perf_counter()
    calibration.calibrate(some(call, slice(FITTED)))
    row: dict[str, Any] = {"calibrated": _error(call)}
    fitted = {name: value.clone() for name, value in call.mixer.state_dict().items()}
    if not call.mixer.combine.lower(SHUT):
        raise LinearizeError("a variant's mixer cannot be its window alone; see `Combine.lower`")
    row["window"] = _error(call)
    alone = _far(far, call.module, options.length) if far is not None else {}
    if start == "calibrated":
        call.mixer.load_state_dict(fitted)
    parameters = [parameter.requires_grad_() for parameter in call.mixer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 - (1 - LAST) * step / options.steps)
    )
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        size = call.project(call.teacher).square().mean()
    for _ in range(options.steps):
        first = options.batch * int(
            torch.randint((options.sequences - HELD) // options.batch, (), generator=drawn)
        )
        part = some(call, slice(first, first + options.batch))
        loss = (part.project(part.student()) - part.project(part.teacher)).square().mean() / size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        falling.step()
    if far is not None:
        row["far"] = {
            at: {"window": alone[at], "aligned": error}
            for at, error in _far(far, call.module, options.length).items()
        }
    return {**row, "aligned": _error(call), "rate": rate, "seconds": time.perf_counter() - began}


def table(found: dict[str, Any]) -> str:
    """A line for each variant: what its window alone leaves, and what is left of that, in each layer."""
    rows, settings = list(found["rows"].values()), found.get("settings", {})
    layers = sorted({row["layer"] for row in rows})
    far = list(dict.fromkeys(at for row in rows for at in row.get("far", {})))
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = {row["layer"]: row for row in rows if row["variant"] == name}
        cells = [
            " / ".join(number(own[layer][key], 4) for key in ("window", "calibrated", "aligned"))
            if layer in own
            else ""
            for layer in layers
        ]
        kept = [row["aligned"] / row["window"] for row in own.values()]
        variant = found["variants"].get(name, {})
        changes = " ".join(f"`{change}`" for change in variant.get("overrides", []))
        rate = f"{next(iter(own.values()))['rate']:g}"
        lines.append([name, rate, *cells, _percent(kept), *(_far_left(own, at) for at in far), changes])
    titles = ["variant", "rate", *(f"layer {layer}" for layer in layers), "left, %"]
    titles += [*(f"left at {at}, %" for at in far), "what differs"]
    head = [
        f"# Layers of {settings.get('model')} aligned alone",
        "",
        f"`{found.get('command')}`, {found.get('date')}, commit {found.get('commit')}, on a CPU.",
        f"{settings.get('steps')} steps of {settings.get('batch')} x {settings.get('length')} tokens."
        + (" Left at: in longer texts, between these tokens." if far else ""),
        "",
        "Squared error of a layer's output over the teacher's squared size, on sequences that nothing was fitted to: "
        "with the window alone / calibrated, branch and all / aligned. Left: of the window's error, mean over the "
        "layers. The alignment begins with the window alone, or as calibrated where a variant says so.",
        "",
        "",
    ]
    return "\n".join(head) + markdown(titles, lines)


def _percent(shares: list[float]) -> str:
    return f"{100 * sum(shares) / len(shares):.0f}" if shares else ""


def _far_left(own: dict[int, dict[str, Any]], at: str) -> str:
    return _percent(
        [row["far"][at]["aligned"] / row["far"][at]["window"] for row in own.values() if "far" in row]
    )


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="onto every variant")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", type=names, default=[])
    parser.add_argument(
        "--layers", type=lambda text: [int(part) for part in text.split(",")], default=[3, 9, 15]
    )
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=56, help="of them eight are held out")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step")
    parser.add_argument(
        "--far", type=int, default=0, metavar="TOKENS", help="of longer texts to look at as well"
    )
    parser.add_argument("--out", type=Path, help="JSON; docs/results/PLAN.json by default")
    options = parser.parse_intermixed_args(arguments)
    if options.sequences < HELD + max(FITTED, options.batch):
        least = HELD + max(FITTED, options.batch)
        parser.error(
            f"--sequences {options.sequences}: {HELD} are held out, others calibrated on; at least {least}"
        )
    return options


if __name__ == "__main__":
    raise SystemExit(main())
