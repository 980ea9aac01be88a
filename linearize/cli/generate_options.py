"""Options of `linearize generate`."""

from __future__ import annotations

import argparse

from linearize.cli import given


def generate(parser: argparse.ArgumentParser) -> None:
    """Beside the model and the device."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue, control tokens included")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a file in UTF-8, as it stands")
    parser.add_argument(
        "--save-state",
        metavar="FILE",
        help="read the prompt, write what decoding needs behind it, and make no text",
    )
    parser.add_argument(
        "--state",
        metavar="FILE",
        help="go on from a text that --save-state has read, in place of reading it again",
    )
    parser.add_argument(
        "--max-new-tokens", type=given.positive, default=128, metavar="N", help="default: 128"
    )
    parser.add_argument(
        "--temperature",
        type=given.not_negative,
        default=0.0,
        metavar="X",
        help="0 is greedy (default); above 0 samples",
    )
    parser.add_argument(
        "--top-p", type=given.share, default=1.0, metavar="X", help="sample from this share of the mass"
    )
    parser.add_argument(
        "--num-beams", type=given.positive, default=1, metavar="N", help="beam search (default: 1, none)"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument(
        "--no-graph",
        action="store_true",
        help="through transformers' generate, also where one CUDA graph could hold the decoding",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the graph's step first: worth it for long texts"
    )
    parser.add_argument(
        "--seed", type=given.count, default=0, metavar="N", help="of the sampling (default: 0)"
    )
