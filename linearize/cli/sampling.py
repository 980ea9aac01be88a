"""`linearize sample MODEL`: text that the model writes itself, as a file, and what was kept of it."""

from __future__ import annotations

import argparse
import re
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.cli.given import stated
from linearize.config.ranges import Range
from linearize.config.rules import RULES
from linearize.config.schema import RunConfig, TeacherConfig
from linearize.console import console, quiet_libraries
from linearize.errors import CheckpointError, LinearizeError

if TYPE_CHECKING:
    from rich.table import Table

    from linearize.sample import Sampled

WHAT = {
    "kept": "kept",
    "short": "dropped, too short",
    "loop": "dropped, loops",
    "duplicate": "dropped, begins as another",
}


def main(options: argparse.Namespace) -> int:
    """Write the text, copy it into one file, and show what became of it."""
    settings = TeacherConfig(**{field.name: getattr(options, field.name) for field in fields(TeacherConfig)})
    _check(settings)
    unused = [] if settings.temperature > 0 else stated(options, "--top-k", "--top-p")
    if unused:
        raise LinearizeError(
            f"{', '.join(unused)} with --temperature 0: the likeliest token is taken, and nothing drawn; leave out "
            "one of the two"
        )
    out = options.out or Path("runs") / f"{_stem(options.model)}-text.parquet"
    if out.exists():
        raise LinearizeError(f"{out} exists; choose another file with --out, or delete it")
    if not options.tokens:
        raise LinearizeError("--tokens 0: there is nothing to write; give a number above 0")

    from linearize import models  # after the options are known to be right: importing takes seconds
    from linearize.distill import memory
    from linearize.distill.device import resolve_device, resolve_weights
    from linearize.distill.identity import fingerprint
    from linearize.errors import DataError, UnsupportedModelError
    from linearize.sample import sample
    from linearize.storing import check_place

    quiet_libraries()
    check_place(out, "choose another file with --out")
    run = RunConfig(device=options.device)
    device = resolve_device(run)
    teacher = fingerprint(options.model)
    tokenizer = models.load_tokenizer(models.resolve(options.model))

    def load() -> Any:
        weights = resolve_weights(run, device)
        return models.load_teacher(options.model, dtype=weights, device=str(device), for_text=True)[0]

    less = "Take a smaller --batch or --length, or --device cpu"
    try:
        with memory.watched(f"while {options.model} wrote text", lambda: less):
            found = sample(
                options.tokens,
                settings,
                teacher=teacher,
                tokenizer=tokenizer,
                load=load,
                compile=options.compile,
            )
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{options.model}: {error}") from error
    except DataError as error:
        raise DataError(_as_options(str(error))) from error
    _copy(found.files, out)
    screen = console()
    screen.print(table(found))
    if found.made:
        speed = found.made / max(found.seconds, 1e-9)
        screen.print(
            f"{found.made:,} tokens in {found.seconds:.1f} s: {speed:,.0f} tokens/s on {_name(device)}"
        )
    else:
        screen.print("all of it was in the cache")
    for line in (f"text    {out}", f"cache   {found.folder}"):
        screen.print(line, markup=False, soft_wrap=True)
    return 0


def table(found: Sampled) -> Table:
    """Documents and tokens by what became of them."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    shown.add_column("what")
    for name in ("documents", "tokens", "%"):
        shown.add_column(name, justify="right")
    counts = asdict(found.counts)
    total = max(1, sum(counts["tokens"].values()))
    for what, words in WHAT.items():
        tokens = counts["tokens"][what]
        shown.add_row(words, f"{counts['documents'][what]:,}", f"{tokens:,}", f"{100 * tokens / total:.1f}")
    ended = 100 * counts["ended"] / max(1, counts["documents"]["kept"])
    shown.caption = f"{ended:.0f} % of the kept documents were ended by the model, the others cut"
    shown.caption_justify = "left"
    return shown


def _check(settings: TeacherConfig) -> None:
    """The ranges of `data.teacher`."""
    for name, rule in RULES[TeacherConfig].items():
        assert isinstance(rule, Range)
        if problem := rule.problem(getattr(settings, name)):
            raise LinearizeError(f"--{name.replace('_', '-')}: {problem}")


def _copy(parts: list[Path], out: Path) -> None:
    """All parts into one file, which is there whole or not at all."""
    import pyarrow.parquet as pq

    partial = out.with_name(f".partial-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        columns = ["text", "source", "tokens"]
        if out.suffix == ".parquet":
            first = pq.read_table(parts[0], columns=columns).schema.remove_metadata()
            with pq.ParquetWriter(partial, first, compression="zstd") as writer:
                for part in parts:
                    writer.write_table(pq.read_table(part, columns=columns).replace_schema_metadata(None))
        else:
            import json

            with partial.open("w", encoding="utf-8") as file:
                for part in parts:
                    for row in pq.read_table(part, columns=columns).to_pylist():
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.replace(out)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written ({error.strerror or error}); choose another file with --out: what was sampled is "
            "in the cache, and the same command goes on from there"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _as_options(said: str) -> str:
    """A message about settings of a recipe in the words of this command: data.teacher.top_k is --top-k here."""
    return re.sub(r"data\.teacher\.(\w+)", lambda found: f"--{found[1].replace('_', '-')}", said)


def _name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _stem(model: str) -> str:
    name = Path(model.rstrip("/")).name
    return (name.rsplit(".", 1)[0] if name.lower().endswith(".gguf") else name) or "model"
