"""Options of the commands that make text: `linearize generate` and `linearize serve`."""

from __future__ import annotations

import argparse

from linearize.cli import given


def generate(parser: argparse.ArgumentParser) -> None:
    """Of `generate`."""
    parser.add_argument("path", metavar="PATH", help=given.PATH_HELP)
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
    draft = parser.add_argument_group("speculative decoding")
    draft.add_argument(
        "--draft",
        metavar="MODEL",
        help="a model with the same tokens that drafts what PATH then checks, several tokens in one launch: the same "
        "text, sooner where the draft is quick and often right (docs/speculative.md)",
    )
    draft.add_argument(
        "--draft-tokens", type=given.positive, metavar="K", help="drafted in a round (default: 4, at most 64)"
    )
    draft.add_argument(
        "--draft-state", metavar="FILE", help="with --state: what the draft has read of the same text"
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
    given.device(parser)


def serve(parser: argparse.ArgumentParser) -> None:
    """Of `serve`."""
    parser.usage = "%(prog)s PATH [--host ADDRESS] [--port N] [--token TEXT] [--slots N] [...]"
    parser.epilog = (
        "POST /v1/chat/completions and /v1/completions, GET /v1/models, /health and /metrics. "
        "docs/serve.md has what is supported."
    )
    parser.add_argument("path", metavar="PATH", help=given.PATH_HELP)
    parser.add_argument(
        "--name", metavar="NAME", help="what clients call the model (default: PATH's last part)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen (default: 127.0.0.1, this machine alone); others want a token",
    )
    parser.add_argument(
        "--port",
        type=given.port,
        default=8000,
        metavar="N",
        help="default: 8000; 0 takes a free one, and says which",
    )
    parser.add_argument(
        "--token",
        metavar="TEXT",
        help="what clients must give (default: that of LINEARIZE_TOKEN, which no list of processes shows, or none)",
    )
    parser.add_argument(
        "--engine",
        choices=["auto", "slots", "vllm"],
        default="auto",
        help="vLLM's server, or this package's slots; auto is vLLM where it is installed and has all that is asked for",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--slots",
        type=given.slots,
        default=16,
        metavar="N",
        help="texts that are made at once (default: 16)",
    )
    limits.add_argument(
        "--queue",
        type=given.count,
        default=256,
        metavar="N",
        help="texts that wait for a slot; beyond them requests are refused with 429 (default: 256)",
    )
    limits.add_argument(
        "--max-prompt-tokens", type=given.positive, default=4096, metavar="N", help="default: 4096"
    )
    limits.add_argument(
        "--max-new-tokens",
        type=given.positive,
        default=1024,
        metavar="N",
        help="default: 1024; softmax layers hold both for every slot",
    )
    limits.add_argument(
        "--max-body",
        type=given.positive,
        default=2**20,
        metavar="BYTES",
        help="of a request (default: 1048576)",
    )
    limits.add_argument(
        "--timeout",
        type=given.seconds,
        default=300.0,
        metavar="SECONDS",
        help="from a request's arrival to its end (default: 300)",
    )
    limits.add_argument(
        "--grace",
        type=given.not_negative,
        default=10.0,
        metavar="SECONDS",
        help="that running texts have to end once the server is asked to stop (default: 10)",
    )
    parser.add_argument(
        "--piece",
        type=given.positive,
        metavar="TOKENS",
        help="of prompts that are read between two steps of the texts in slots: more reads long prompts sooner, less "
        "lets the others wait for a shorter time (default: 512, on a GPU 2048)",
    )
    parser.add_argument(
        "--prompts",
        type=given.positive,
        default=8,
        metavar="N",
        help="that are read together, each with the memory of a slot (default: 8)",
    )
    parser.add_argument(
        "--no-graph", action="store_true", help="run steps one by one also where CUDA graphs could hold them"
    )
    given.device(parser)
