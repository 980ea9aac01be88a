"""Tokens per second of checkpoints in vLLM at growing context and concurrency, in the environment of `make test-vllm`.

    .venv-vllm/bin/python scripts/vllm_figures.py teacher=FOLDER converted=FOLDER --out docs/results/serve.json

Each checkpoint and context runs in a process of its own: random prompts of one length, all asked at once, greedy.
Prefill ends where every text has its first token, decode is what comes after, a request is both; the best of so many
turns. Texts that fit is how many of that length the given memory holds. Every process adds its rows to the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import resource
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve_results import put

COLUMNS = {
    "name": "checkpoint",
    "context": "context",
    "texts": "texts at once",
    "prefill": "prefill tokens/s",
    "decode": "decode tokens/s",
    "requests": "requests/s",
    "fit": "texts that fit",
    "mib": "MiB a text",
    "peak": "peak of the process, MiB",
}


def measure(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one checkpoint and context."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(asked["memory"]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM, SamplingParams
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    context, new = asked["context"], asked["new"]
    llm = LLM(
        asked["path"],
        skip_tokenizer_init=True,
        enforce_eager=asked["eager"],
        enable_prefix_caching=False,
        max_model_len=context + new,
        max_num_seqs=max(asked["texts"]),
        dtype=asked["dtype"],
    )
    core = llm.llm_engine.engine_core.engine_core
    fit = get_max_concurrency_for_kv_cache_config(llm.llm_engine.vllm_config, core.scheduler.kv_cache_config)
    words, dice = llm.llm_engine.vllm_config.model_config.get_vocab_size(), random.Random(0)

    def timed(texts: int, tokens: int) -> tuple[float, float, float]:
        """Tokens/s until every text has its first token, and of the tokens behind that; texts a second of the whole."""
        given = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        made = {str(text): 0 for text in range(texts)}
        began = time.perf_counter()
        for text in made:
            prompt = {"prompt_token_ids": dice.choices(range(words), k=context)}
            llm.llm_engine.add_request(text, prompt, given)
        first, had = 0.0, 0
        while llm.llm_engine.has_unfinished_requests():
            made |= {each.request_id: len(each.outputs[0].token_ids) for each in llm.llm_engine.step()}
            if not first and min(made.values()):
                first, had = time.perf_counter(), sum(made.values())
        if set(made.values()) != {tokens}:
            raise RuntimeError(f"texts of other lengths than {tokens}: {made}")
        ended = time.perf_counter()
        return (
            texts * context / (first - began),
            (texts * tokens - had) / (ended - first),
            texts / (ended - began),
        )

    timed(1, 2)
    rows = []
    for texts in asked["texts"]:
        turns = [timed(texts, new) for _ in range(asked["turns"])]
        prefill, decode, requests = (max(each) for each in zip(*turns, strict=True))
        row = {
            "name": asked["name"],
            "context": context,
            "texts": texts,
            "prefill": prefill,
            "decode": decode,
        }
        row |= {"requests": f"{requests:.3f}", "fit": fit, "mib": asked["memory"] * 1024 / fit}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append({**{name: _short(value) for name, value in row.items()}, "peak": round(peak)})
        print(rows[-1], file=sys.stderr)
    return rows


def _short(value: Any) -> Any:
    return round(value, 1) if isinstance(value, float) else value


def table(result: dict[str, Any]) -> str:
    """The section of the page."""
    told = f"{result['date']}, commit {result['commit']}, {result['machine']}"
    lines = ["# In vLLM", "", f"    {result['command']}", "", f"{told}. {result['note']}".strip(), ""]
    lines += ["| " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    for row in result["rows"]:
        shown = (f"{row[key]:,}" if isinstance(row[key], int | float) else row[key] for key in COLUMNS)
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=32, help="tokens that each text is continued by")
    parser.add_argument("--memory", type=int, default=2, help="GiB for states, keys and values")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=2, help="of which the best counts")
    parser.add_argument(
        "--note", default="", help="a sentence for the page, such as what else the machine had to do"
    )
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if "=" not in given.checkpoints[0]:  # a process of our own
        Path(given.out).write_text(json.dumps(measure(json.loads(Path(given.checkpoints[0]).read_text()))))
        return
    import torch
    import transformers
    import vllm

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    versions = f"vllm {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    result: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/vllm_figures.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}; {versions}; {given.dtype}",
        "note": given.note,
        "rows": [],
    }
    asked, answer = Path(f"{given.out}.asked"), Path(f"{given.out}.answer")
    for context, checkpoint in itertools.product(given.contexts, given.checkpoints):
        name, path = checkpoint.split("=", 1)
        own = {**vars(given), "out": "", "context": context, "name": name, "path": path}
        asked.write_text(json.dumps(own))
        subprocess.run([sys.executable, __file__, str(asked), "--out", str(answer)], check=True)
        result["rows"] += json.loads(answer.read_text())
        asked.unlink(), answer.unlink()
        put(given.out, "vllm", result, table(result))


if __name__ == "__main__":
    main()
