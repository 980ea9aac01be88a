"""`linearize generate PATH --prompt TEXT`: continue a prompt."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def main(options: argparse.Namespace) -> int:
    """Print the prompt and what the model adds, as it comes where the decoding allows it.

    Control tokens that `--prompt` spells are control tokens; with `--chat` it is a message, in which they are text.
    """
    from transformers import set_seed

    from linearize.cli.checkpoint import load
    from linearize.errors import LinearizeError
    from linearize.eval.generation import generate
    from linearize.eval.limits import check_numbers

    sampling: dict[str, Any] = {}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    elif options.top_p < 1:
        raise LinearizeError(
            f"--top-p {options.top_p:g}: nothing is sampled at temperature 0; give --temperature too"
        )
    if options.compile and options.no_graph:
        raise LinearizeError(
            "--compile: it is the graph that is compiled, so leave out --no-graph or --compile"
        )
    counts = {"max_new_tokens": options.max_new_tokens, "num_beams": options.num_beams}
    check_numbers({**counts, **sampling})  # before the seconds that the model takes
    model, tokenizer = load(options.path, options.device)
    set_seed(options.seed)
    stream = options.num_beams == 1
    if not options.chat:
        _write(options.prompt)
    try:
        texts = generate(
            model,
            tokenizer,
            options.prompt,
            **counts,
            chat=options.chat,
            on_text=_write if stream else None,
            graph=False if options.no_graph else None,
            compile=options.compile,
            **sampling,
        )
    except LinearizeError:
        _write("\n")  # the message on a line of its own
        raise
    _write("\n" if stream else texts[0] + "\n")
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
