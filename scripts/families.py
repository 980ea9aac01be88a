"""Write docs/families.md from what tests/surgery/test_all_families.py finds, running what has no result yet.

python scripts/families.py                    # in build/families
python scripts/families.py --results FOLDER   # goes on with the results there
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
TEST = "tests/surgery/test_all_families.py"
INTRODUCTION = """# Model families

What `linearize` does with every causal language model type of transformers {transformers} (torch {torch}). Written by
`python scripts/families.py` from the results of `{test}`,
which builds each type tiny with random weights, saves it, loads it from the file, and holds an identity (softmax)
composition and a hybrid (LoLCATs) against the untouched model: plain, left-padded and packed rows, prefill and single
tokens with a cache, greedy generation from left-padded rows, teacher mode, a step of attention transfer, a step with
adapters on q, k, v and o, and the export, reloaded in another process. A second hybrid, whose linear branch sees
queries and keys before the rotation (`position: {{recurrent: false}}`), is held with padding and with a cache, or
refused by name where how they are turned does not follow from what the layer is handed (Hunyuan norms them behind the
rotation): the note "no rotation off in a branch". Exact means: every difference below
{tolerance:g} of the largest logit; between two forms of one hybrid, below four times what the same forms of the
untouched model differ by, if that is more. A type that is refused is refused before anything is trained. Encoders of
images and sound, and attention to an encoder's output, stay as they are.

{counts}
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the test where results are missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "families")
    parser.add_argument("--only-write", action="store_true", help="run nothing, write what there is")
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "LINEARIZE_FAMILIES": str(options.results.resolve())}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-m", "slow", TEST]
    ran = 0 if options.only_write else subprocess.run(command, cwd=ROOT, env=environment).returncode
    verdicts = [json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))]
    (ROOT / "docs" / "families.md").write_text(page(verdicts), encoding="utf-8")
    print(f"written: docs/families.md, {len(verdicts)} model types", file=sys.stderr)
    return ran


def page(verdicts: list[dict[str, Any]]) -> str:
    """The page's text."""
    groups = {
        kind: [verdict for verdict in verdicts if verdict["verdict"] == kind]
        for kind in ("exact", "refused", "failed", "not built")
    }
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in groups.items() if found)
    parts = [
        INTRODUCTION.format(
            transformers=transformers.__version__,
            torch=torch.__version__,
            test=TEST,
            tolerance=1e-5,
            counts=f"{len(verdicts)} types: {counts}.",
        )
    ]
    if groups["exact"]:
        rows = [
            f"| {verdict['model_type']} | {verdict['layers']} | {_largest(verdict):.0e} | {_notes(verdict)} |"
            for verdict in groups["exact"]
        ]
        head = "| type | layers converted | identity off by | notes |\n|---|---|---|---|\n"
        parts.append("## Exact\n\n" + head + "\n".join(rows) + "\n")
    for kind, title, column in (
        ("refused", "Refused", "reason"),
        ("failed", "Known faults: neither exact nor refused", "what is wrong"),
        ("not built", "Not built here, so not known", "transformers' reason"),
    ):
        if groups[kind]:
            rows = [f"| {verdict['model_type']} | {_reason(verdict)} |" for verdict in groups[kind]]
            parts.append(f"## {title}\n\n| type | {column} |\n|---|---|\n" + "\n".join(rows) + "\n")
    known = {verdict["model_type"] for verdict in verdicts}
    missing = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known]
    if missing:
        parts.append(f"## Not run\n\nThe command goes on with these: {', '.join(missing)}.\n")
    return "\n".join(parts)


def _largest(verdict: dict[str, Any]) -> float:
    return max(value for name, value in verdict["differences"].items() if name.startswith("identity"))


def _notes(verdict: dict[str, Any]) -> str:
    return _cell("; ".join(verdict["notes"]))


def _reason(verdict: dict[str, Any]) -> str:
    found = verdict["problems"] if verdict["verdict"] == "failed" else [verdict["reason"]]
    return _cell("; ".join(found))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
