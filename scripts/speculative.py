"""Tokens/s with a draft and without, and how many drafted tokens are taken: written text, several lengths of prompts.

Without a draft a model decodes in the same engine, one CUDA graph for each token where there is CUDA. Times are of
decoding alone, from the first new token to the last. Where the greedy texts differ, which rounding may do, the row says
after how many tokens, and by how much the model preferred its own token there. Rows that FILE has are not made again.

    python scripts/speculative.py smollm2-135m --drafts runs/demo/checkpoint --context 512 4096 16384 \
        --draft-tokens 2 4 8 --batch 1 --temperature 0 0.8 --out docs/results/speculative-h200.json
    python scripts/speculative.py smollm2-135m --drafts runs/a --pairs runs/a=runs/b runs/c=runs/a --out FILE
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor

from linearize.bench import quiet
from linearize.cli.checkpoint import load
from linearize.data.builtin import sample
from linearize.decode import Decoder, Draft, Sampling
from linearize.decode.speculator import Speculator
from linearize.errors import LinearizeError

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Measure and write, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="PATH", help="the model whose text it is: a conversion or any model")
    parser.add_argument("--drafts", nargs="+", required=True, metavar="MODEL", help="one after the other")
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=[],
        metavar="PATH=DRAFT",
        help="then texts of other models with drafts of theirs",
    )
    parser.add_argument(
        "--context", type=int, nargs="+", default=[512], metavar="TOKENS", help="of the prompt"
    )
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4, 8], metavar="K")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="ROWS")
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[0.0], metavar="X", help="0 is greedy"
    )
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="new ones of each text")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="the fastest counts")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--compile", action="store_true", help="steps and rounds, as `linearize generate` does"
    )
    parser.add_argument(
        "--turn", type=Path, metavar="DIR", help="where processes that share the device stand still meanwhile"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    model, tokenizer = _loaded(options.path, options)
    rows, before = _before(options)
    command = shlex.join(["python", "scripts/speculative.py", *(arguments or sys.argv[1:])])
    found: dict[str, Any] = {
        "command": before if command in before else "; ".join(filter(None, [before, command])),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "machine": (torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU")
        + f", torch {torch.__version__}",
        "dtype": options.dtype,
        "tokens": options.tokens,
        "rows": rows,
    }
    places = [
        (context, batch, heat)
        for context in options.context
        for batch in options.batch
        for heat in options.temperature
    ]
    models = {options.path: list(options.drafts)}
    for pair in options.pairs:
        path, _, draft = pair.partition("=")
        models.setdefault(path, []).append(draft)
    with nullcontext() if options.turn is None else quiet.known(options.turn):
        for path, drafts in models.items():
            model, tokenizer = _loaded(path, options)
            for name in drafts:
                Draft(*_loaded(name, options)).check(model, tokenizer)
            for place in places:
                _place(found, path, drafts, place, options)
    return 0


def _place(
    found: dict[str, Any],
    path: str,
    drafts: list[str],
    place: tuple[int, int, float],
    options: argparse.Namespace,
) -> None:
    """Rows of one model at one length, batch and temperature, but for those that are there."""
    known = {_key(row, options.path) for row in found["rows"]}
    own = {"model": path, **_row(place)} | ({"compiled": True} if options.compile else {})
    wanted = [
        (name, ahead)
        for name in drafts
        for ahead in options.draft_tokens
        if _key({**own, "draft": name, "draft_tokens": ahead}, options.path) not in known
    ]
    if not wanted and _key(own, options.path) in known:
        return
    model, tokenizer = _loaded(path, options)
    ids = _prompts(tokenizer, *place[:2])
    row, alone = _without(model, ids, place, options)
    if _key({**own, **row}, options.path) not in known:
        _add(found, {**own, **row}, options)
    for name, ahead in wanted:
        made = _with(model, _loaded(name, options)[0], ids, place, ahead, alone, options)
        _add(found, {**own, "draft": name, **made}, options)


_held: dict[str, tuple[Any, Any]] = {}


def _loaded(path: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """A model and its tokenizer, kept: one may draft for several."""
    if path not in _held:
        model, tokenizer = load(path, options.device)
        _held[path] = model.to(getattr(torch, options.dtype)), tokenizer
    return _held[path]


def _before(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Rows of earlier calls with the same FILE, and their commands."""
    if not options.out.is_file():
        return [], ""
    found = json.loads(options.out.read_text(encoding="utf-8"))
    return found["rows"], found["command"]


def _key(row: dict[str, Any], path: str) -> tuple[Any, ...]:
    """What tells rows apart; rows of old have no model, which was the command's."""
    names = ("context", "batch", "temperature", "draft", "draft_tokens", "compiled")
    return row.get("model", path), *(row.get(name) for name in names)


def _prompts(tokenizer: Any, context: int, rows: int) -> Tensor:
    """[B, T] stretches of the built-in text, each from another place."""
    texts = pyarrow.parquet.read_table(sample("train"))["text"].to_pylist()
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= context * rows:
            break
    if len(ids) < context * rows:
        raise LinearizeError(f"{context * rows:,} tokens of prompts, and the built-in text has {len(ids):,}")
    return torch.tensor(ids[: context * rows]).view(rows, context)


def _sampling(heat: float) -> Sampling:
    return Sampling(True, heat) if heat else Sampling()


@torch.no_grad()
def _without(
    model: Any, ids: Tensor, place: tuple[int, int, float], options: argparse.Namespace
) -> tuple[dict[str, Any], Tensor | None]:
    row = _row(place)
    try:
        compiling = {} if options.compile else None
        length = place[0] + options.tokens
        decoder = Decoder(model, place[1], _sampling(place[2]), length=length, compile=compiling)
        decoder.prepare()
        seconds = []
        decoder.read(ids, None)
        with quiet.alone(options.turn):
            for _ in range(options.repeats):
                decoder.read(ids, None)
                began = _now(model)
                decoder.run(options.tokens - 1)
                seconds.append(_now(model) - began)
        made = decoder.generate(ids, None, options.tokens).cpu()
    except (LinearizeError, RuntimeError) as error:
        return row | {"refused": " ".join(str(error).split())[:200]}, None
    return row | {"tokens_per_second": round(place[1] * (options.tokens - 1) / min(seconds), 1)}, made


@torch.no_grad()
def _with(
    model: Any,
    draft: Any,
    ids: Tensor,
    place: tuple[int, int, float],
    ahead: int,
    alone: Tensor | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    row = {**_row(place), "draft_tokens": ahead}
    length = place[0] + options.tokens
    try:
        made = Speculator(
            model, draft, place[1], ahead, _sampling(place[2]), length=length, tokens=options.tokens,
            compile={} if options.compile else None,
        )  # fmt: skip
        made.prepare()
        seconds, taken, rounds = [], 0, 0
        made.generate(ids, None, 1)
        with quiet.alone(options.turn):
            for repeat in range(options.repeats):
                torch.manual_seed(repeat)
                text = made.generate(ids, None, options.tokens).cpu()
                seconds.append(made.seconds)
                taken, rounds = taken + int(made.accepted.sum()), rounds + int(made.rounds.sum())
    except (LinearizeError, RuntimeError) as error:
        return row | {"refused": " ".join(str(error).split())[:200]}
    row |= {
        "tokens_per_second": round(place[1] * (options.tokens - 1) / min(seconds), 1),
        "taken": round(taken / (rounds * ahead), 3),
        "tokens_a_round": round(options.repeats * place[1] * (options.tokens - 1) / rounds, 2),
        "graph": made.graph is not None,
    }
    if made.obstacle is not None:
        row["obstacle"] = made.obstacle
    if alone is not None and not place[2]:
        row |= _apart(model, ids, alone, text)
    return row


def _apart(model: Any, ids: Tensor, alone: Tensor, text: Tensor) -> dict[str, Any]:
    """How many of a batch's texts are the same, and of the first that is not, where and by how much."""
    differs = alone != text
    found: dict[str, Any] = {"same_texts": int((~differs.any(1)).sum())}
    if bool(differs.any()):
        row = int(differs.any(1).int().argmax())
        first = int(differs[row].int().argmax())
        whole = torch.cat([ids[row], alone[row, :first]])[None].to(model.device)
        top = model(whole).logits[0, -1].float().topk(2).values
        found |= {"differs_after": first, "preferred_by": round(float(top[0] - top[1]), 4)}
    return found


def _row(place: tuple[int, int, float]) -> dict[str, Any]:
    return {"context": place[0], "batch": place[1], "temperature": place[2]}


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _add(found: dict[str, Any], row: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what there is, so that nothing is lost."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(json.dumps(row), flush=True)
    found["rows"].append(row)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(_table(found), encoding="utf-8")


def _table(found: dict[str, Any]) -> str:
    lines = [
        "# Tokens/s with a draft and without",
        "",
        f"`{found['command']}`, {found['date']}, commit {found['commit']}, {found['machine']}, {found['dtype']}, "
        f"{found['tokens']} new tokens of each text.",
        "",
        "| model | prompt | rows | temperature | draft | drafted in a round | tokens/s | taken | tokens a round "
        "| same texts | compiled |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in found["rows"]:
        place = [row["context"], row["batch"], row["temperature"], row.get("draft", "none")]
        cells = [row.get("model", ""), *place]
        names = ("draft_tokens", "tokens_per_second", "taken", "tokens_a_round", "same_texts")
        cells += [*(row.get(name, "") for name in names), "yes" if row.get("compiled") else ""]
        if "refused" in row:
            cells[6] = row["refused"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, *(["", found["note"]] if "note" in found else [])]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
