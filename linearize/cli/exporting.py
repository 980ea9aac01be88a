"""`linearize export PATH --quantize FORM` or `--layout NAME`: a further checkpoint of one that is there."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from linearize.console import console, quiet_libraries, size


def main(options: argparse.Namespace) -> int:
    """Quantize, check in a fresh process, and say what it has saved; or write another layout."""
    from linearize.cli.checkpoint import export_of, pick_device
    from linearize.errors import CheckpointError, LinearizeError

    quiet_libraries()
    from linearize.models import resolve
    from linearize.storing import check_place

    out = options.out or default(options.path, options.quantize or options.layout)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already; give another folder with --out, or remove it")
    if options.layout and options.device != "auto":
        raise LinearizeError("--device: layouts are written on the CPU; leave the option out")
    check_place(out, "give another one with --out")
    folder = resolve(export_of(options.path))
    if options.layout:
        from linearize.export.layouts import export_layout

        lines = [f"checkpoint  {out}  {export_layout(folder, options.layout, out)}"]
    else:
        from linearize.export.quantize import quantize, sizes

        quantize(folder, options.quantize, out, device=pick_device(options.device))
        before, after = sizes(folder, out)
        lines = [
            f"checkpoint  {out}  {size(after)} of weights, {size(before)} before",
            f"judge it    linearize eval {shlex.quote(str(out))}",
        ]
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)
    return 0


def default(path: str, form: str) -> Path:
    """Beside the run, or beside the checkpoint where there is no run."""
    folder = Path(path).resolve()
    if folder.name == "checkpoint" and (folder.parent / "recipe.yaml").is_file():
        folder = folder.parent
    name = f"{folder.name}.gguf" if form == "gguf" else f"{folder.name}-{form}"
    return folder.with_name(name) if folder.is_dir() else Path(name)
