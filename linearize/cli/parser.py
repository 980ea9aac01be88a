"""Subcommands and options. Overrides (`key=value`) may stand anywhere after the command."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from linearize.cli import (
    bench_options,
    blocks_options,
    eval_options,
    export_options,
    given,
    launch_options,
    plan_options,
    push_options,
    run_options,
    sample_options,
    text_options,
)
from linearize.config.overrides import FORM
from linearize.errors import LinearizeError
from linearize.registry import closest
from linearize.version import __version__

MODEL_HELP = "hub id, checkpoint folder, GGUF file, or an alias such as smollm2-135m"
RECIPE_HELP = "name of a shipped recipe (see `linearize recipes`) or a YAML file"
OVERRIDE_HELP = (
    "change any field of the recipe, such as stages.transfer.lr=5e-3 or layers=[0,2]; 'stages.*.tokens=2M' changes "
    "it in every stage"
)

EXAMPLES = """\
examples:
  linearize run smollm2-135m lolcats                         convert, train, evaluate, export
  linearize run ./my-llama lolcats stages.transfer.tokens=2M mixer.window.size=32 --out runs/small
  linearize run ./my-llama lolcats --budget 10m              as much training as ten minutes hold
  linearize run ./my-llama my_recipe.yaml --resume           go on after an interruption
  linearize inspect smollm2-135m hedgehog                    what would change; loads no weights
  linearize launch node ./my-llama lolcats                   on every card of this machine
  linearize plan llama-3-70b lolcats --gpus 8xH100           what each stage would need and cost
  linearize blocks plan llama-3-405b lolcats stages.transfer.clip_by=layer    transfer where no card holds it
  linearize select smollm2-135m lolcats --keep 7             which layers stay softmax; writes a recipe
  linearize eval runs/small --suite quick                    beside its teacher and the controls
  linearize compare runs/small runs/large                    on one page, offline
  linearize generate runs/small --prompt "The sea was" --temperature 0.8
  linearize serve runs/small --port 8000                     for any client of OpenAI's API
  linearize export runs/small --quantize int8                a smaller checkpoint of it
  linearize push runs/small me/small --dry-run               what would go to the hub, and its card
  linearize recipes show lolcats layers.every=4              the composed YAML
  linearize parts gate low_rank                              what a layer is made of, and the options
"""


class UsageError(LinearizeError):
    """The command line cannot be understood."""


class Parser(argparse.ArgumentParser):
    """argparse with errors as exceptions, a did-you-mean for commands and choices, and no option twice."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("action", None, given.Once)
        self.register("action", "store", given.Once)

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong is not None:
            what, given, valid = wrong.groups()
            names = re.findall(r"[\w-]+", valid)
            kind = what if what.startswith("-") else what.lower()
            message = f"unknown {kind} '{given}'; {closest(given, names)}"
        raise UsageError(f"{self.prog}: {message}\nsee {self.prog} --help")


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; leftovers of argparse that look like overrides go to `overrides`, anything else is an error.

    Raises:
        UsageError: unknown command, option or argument, each with the nearest valid one.
    """
    words = list(arguments)
    if words[:1] == ["help"]:  # as git, pip and cargo answer to it
        words = [*words[1:], "--help"]
    options, rest = parser.parse_known_args(words)
    if not hasattr(options, "overrides"):
        if rest:
            _refuse(options, rest)
        return options
    overrides = [text for text in rest if not text.startswith("-") and ("=" in text or text.startswith("~"))]
    unknown = [text for text in rest if text not in overrides]
    if unknown:
        _refuse(options, unknown)
    options.overrides = [*options.overrides, *overrides]
    return options


def _refuse(options: argparse.Namespace, unknown: list[str]) -> NoReturn:
    parser: Parser = options.parser
    problems = []
    for text in unknown:
        if text.startswith("-") and len(text) > 1:
            name = text.split("=", 1)[0]
            valid = [
                flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")
            ]
            problems.append(f"unknown option '{name}'; {closest(name, valid)}")
        else:
            problems.append(
                f"unexpected argument '{text}'" + (f"; {FORM}" if hasattr(options, "overrides") else "")
            )
    raise UsageError(
        "\n".join(f"{parser.prog}: {problem}" for problem in problems) + f"\nsee {parser.prog} --help"
    )


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="linearize",
        description="Turn the attention of a pretrained model into linear attention, and keep the model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"linearize {__version__}")
    parser.set_defaults(parser=parser, command=_show_help)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for group in (_converting, _judging, _using, _measuring, _listing):
        group(commands)
    return parser


def _converting(commands: Any) -> None:
    """What makes a model, or says beforehand what it would take."""
    run = _add(commands, "run", "convert a model by a recipe: train, evaluate, export", "linearize.cli.run")
    _recipe_arguments(run)
    run_options.add(run)

    inspect = _add(
        commands, "inspect", "show what a recipe would replace; loads no weights", "linearize.cli.inspection"
    )
    _recipe_arguments(inspect)
    inspect.usage = "%(prog)s MODEL RECIPE [key=value ...] [--length TOKENS]"
    inspect.add_argument(
        "--length",
        type=given.positive,
        metavar="TOKENS",
        help="also compare the memory at this context length",
    )

    launch = _add(commands, "launch", "`run` in several processes, by a preset", "linearize.cli.launching")
    launch.add_argument(
        "preset", metavar="PRESET", help="node (one machine), nodes (several) or slurm (its queue)"
    )
    _recipe_arguments(launch)
    launch_options.add(launch)

    planning = _add(commands, "plan", "what each stage would need and cost", "linearize.cli.planning")
    plan_options.plan(planning, _recipe_arguments)
    blocks = _add(
        commands, "blocks", "attention transfer of a model that fits nowhere", "linearize.cli.blocks"
    )
    blocks.set_defaults(command=_show_help)
    steps = blocks.add_subparsers(title="steps", metavar="STEP", parser_class=Parser)
    for step, summary in blocks_options.STEPS.items():
        getattr(blocks_options, step)(
            _add(steps, step, summary, "linearize.cli.blocks", step), _recipe_arguments
        )
    _select_arguments(
        _add(commands, "select", "choose the layers that stay softmax", "linearize.cli.selection")
    )


def _judging(commands: Any) -> None:
    """What says how good one is."""
    eval_options.add(
        _add(
            commands, "eval", "judge a model beside its teacher and the controls", "linearize.cli.evaluation"
        )
    )
    compare = _add(
        commands,
        "compare",
        "put what was measured on one page, HTML and markdown",
        "linearize.cli.comparison",
    )
    compare.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="run folder, its checkpoint or eval folder, a folder that eval wrote, or its results.json",
    )
    compare.add_argument(
        "--out",
        type=given.folder,
        metavar="DIR",
        help="where page.html and page.md go (default: runs/compare-A-B)",
    )


def _using(commands: Any) -> None:
    """What is done with one."""
    text_options.generate(_add(commands, "generate", "continue a prompt", "linearize.cli.generation"))
    text_options.serve(_add(commands, "serve", "answer as OpenAI's API does", "linearize.cli.serving"))
    sample = _add(commands, "sample", "let a model write training text", "linearize.cli.sampling")
    sample_options.add(sample, MODEL_HELP)
    given.device(sample)

    export = _add(
        commands,
        "export",
        "quantize an exported checkpoint, or write it for another library",
        "linearize.cli.exporting",
    )
    export_options.export(export)
    given.device(export)

    push = _add(
        commands, "push", "put an exported checkpoint on the Hugging Face hub", "linearize.cli.pushing"
    )
    push_options.push(push)


def _measuring(commands: Any) -> None:
    """What says how fast this machine is."""
    bench = _add(commands, "bench", "measure speed on this machine's GPU", "linearize.cli.bench")
    bench.set_defaults(command=_show_help)
    what = bench.add_subparsers(title="benchmarks", metavar="WHAT", parser_class=Parser)
    bench_options.kernels(
        _add(
            what, "kernels", "time every operator beside fla's and softmax", "linearize.cli.bench", "kernels"
        )
    )
    bench_options.decode(
        _add(what, "decode", "tokens/s of a converted model and its teacher", "linearize.cli.bench", "decode")
    )
    bench_options.recipes(
        _add(
            what,
            "recipes",
            "training tokens/s of every recipe beside the softmax model",
            "linearize.cli.bench",
            "recipes",
        )
    )
    bench_options.train(
        _add(
            what,
            "train",
            "training tokens/s of every stage, as a run makes it",
            "linearize.cli.bench",
            "train",
        )
    )


def _listing(commands: Any) -> None:
    """What there is to convert by."""
    recipes = _add(
        commands, "recipes", "list the shipped recipes, or show one composed", "linearize.cli.recipes"
    )
    actions = recipes.add_subparsers(title="actions", metavar="ACTION", parser_class=Parser)
    _add(actions, "list", "list them, as without an action", "linearize.cli.recipes")
    show = _add(actions, "show", "print the composed and checked YAML", "linearize.cli.recipes", "show")
    show.add_argument("recipe", metavar="NAME", help=RECIPE_HELP)
    show.usage = "%(prog)s NAME [key=value ...]"
    _override_argument(show)
    _parts_arguments(
        _add(commands, "parts", "what a layer can be put together from, with options", "linearize.cli.parts")
    )


def _show_help(options: argparse.Namespace) -> int:
    options.parser.print_help()
    return 0


def _add(commands: Any, name: str, summary: str, module: str, function: str = "main") -> Parser:
    parser: Parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(parser=parser, command=_late(module, function))
    return parser


def _late(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    def command(options: argparse.Namespace) -> int:
        return getattr(importlib.import_module(module), function)(options)

    return command


def _recipe_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    _override_argument(parser)


def _override_argument(parser: Parser) -> None:
    # Only for the help: argparse gives up on `nargs="*"` once an option stands between two overrides, so
    # `parse` collects them from what is left over.
    group = parser.add_argument_group("overrides")
    group.description = f"key=value: {OVERRIDE_HELP}; ~key removes a field"
    parser.set_defaults(overrides=[])


def _parts_arguments(parser: Parser) -> None:
    parser.add_argument("part", nargs="?", metavar="PART", help="such as gate (default: all of them)")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="one of its choices, such as low_rank: every option of it"
    )


def _select_arguments(parser: Parser) -> None:
    _recipe_arguments(parser)
    parser.usage = (
        "%(prog)s MODEL RECIPE [key=value ...] [--keep N] [--by kl|recall|passkey] [--give NAME] [--out DIR]"
    )
    parser.add_argument(
        "--keep",
        type=given.positive,
        metavar="N",
        help="layers that stay softmax (default: as many as a recipe keeps that keeps every n-th, else a quarter)",
    )
    parser.add_argument(
        "--give",
        metavar="NAME",
        help="what those layers become in the recipe that is written: a mixer of its `mixers:`, such as halo's nope",
    )
    parser.add_argument(
        "--by",
        choices=("kl", "recall", "passkey"),
        default="kl",
        help="what restoring lowers: KL to the teacher over all tokens (default), at those that repeat a pair, or at "
        "pass keys in noise",
    )
    parser.add_argument(
        "--tokens",
        type=given.tokens,
        default=20_000,
        metavar="N",
        help="training tokens of the alignment before, and of the calibration at most (default: 20k; 0: neither)",
    )
    parser.add_argument(
        "--windows",
        type=given.positive,
        default=4,
        metavar="N",
        help="windows of held-out text and pass keys that choose, and as many others that compare (default: 4)",
    )
    parser.add_argument(
        "--length", type=given.window, default=512, metavar="TOKENS", help="of a window (default: 512)"
    )
    parser.add_argument(
        "--draws", type=given.count, default=3, metavar="N", help="random placements beside (default: 3)"
    )
    parser.add_argument(
        "--out",
        type=given.folder,
        metavar="DIR",
        help="where recipe, scores and picture go (default: runs/select-<model>-<recipe>); what it holds is not "
        "measured again",
    )
