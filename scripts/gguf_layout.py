"""Load a GGUF export with llama.cpp, and compare tokens and logits with the conversion that it was written from.

    python scripts/gguf_layout.py runs/demo/checkpoint runs/demo.gguf

Needs llama-cpp-python (`make test-layouts` compiles it). The exit code is 1 where tokens differ, or logits by more than
the tolerance.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TEXT = "In the year 1875 the river rose, and the miller's\n\n  corn  was moved: 12,345 lb. Ünïcode 你好."


def main(arguments: list[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the checkpoint")
    parser.add_argument("file", type=Path, metavar="FILE", help="its export")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of logits, as a share of the largest")
    options = parser.parse_args(arguments)
    import llama_cpp
    import numpy

    import linearize
    from linearize.models.tokenizer import load_tokenizer

    ids = load_tokenizer(options.run)(options.text).input_ids
    model = llama_cpp.Llama(
        str(options.file), n_ctx=len(ids) + 8, logits_all=True, verbose=False, n_threads=os.cpu_count()
    )
    theirs = model.tokenize(options.text.encode(), special=True)
    model.eval(ids)
    found = torch.from_numpy(numpy.array(model.scores[: len(ids)]))
    model.close()
    with torch.no_grad():
        wanted = linearize.load(options.run, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    same = float((found.argmax(-1) == wanted.argmax(-1)).double().mean())
    print(f"tokens      {'the same' if theirs == ids else 'others'}, {len(ids)} of them")
    print(
        f"logits      differ by at most {apart:.1e} of the largest; the likeliest token is the same in {same:.0%}"
    )
    return int(theirs != ids or not apart < options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
