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

    model, tokenizer = load(options.path, options.device)
    set_seed(options.seed)
    sampling: dict[str, Any] = {}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    stream = options.num_beams == 1
    if not options.chat:
        _write(options.prompt)
    try:
        texts = generate(
            model,
            tokenizer,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            chat=options.chat,
            on_text=_write if stream else None,
            graph=False if options.no_graph else None,
            compile=options.compile,
            num_beams=options.num_beams,
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
