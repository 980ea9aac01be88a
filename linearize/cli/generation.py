"""`linearize generate PATH --prompt TEXT`: continue a prompt, or read one and keep its state."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from linearize.cli.given import dest, stated

OF_TEXT = ("--max-new-tokens", "--temperature", "--top-p", "--seed", "--no-graph", "--compile")
"""Options that say how text is made, and beside --save-state nothing."""


def main(options: argparse.Namespace) -> int:
    """Print the prompt and what the model adds, as it comes where the decoding allows it.

    Control tokens that `--prompt` spells are control tokens; with `--chat` it is a message, in which they are text.
    """
    from transformers import set_seed

    from linearize.cli.checkpoint import load
    from linearize.console import error_console
    from linearize.decode.limits import check_numbers
    from linearize.decode.prefix_file import check_target, load_state
    from linearize.errors import LinearizeError
    from linearize.eval.generation import generate

    _check_states(options)
    sampling = _sampling(options)
    _check_draft(options)
    counts = {"max_new_tokens": options.max_new_tokens, "num_beams": options.num_beams}
    check_numbers({**counts, **sampling})  # before the seconds that the model takes
    prompt = options.prompt if options.prompt_file is None else _text(Path(options.prompt_file))
    if not prompt:
        raise LinearizeError("an empty prompt: give at least one character to continue")
    state = None if options.state is None else load_state(options.state)
    draft_state = _draft_state(options)
    if options.save_state is not None:
        check_target(options.save_state)
    model, tokenizer = load(options.path, options.device)
    if state is not None:
        state.check(model, tokenizer)  # before anything is printed
    if options.save_state is not None:
        return _save(options, model, tokenizer, prompt, state)
    draft = None if options.draft is None else _draft(options, draft_state)
    if draft is not None:
        draft.check(model, tokenizer, state)
    set_seed(options.seed)
    stream = options.num_beams == 1
    if not options.chat:
        _write(prompt)
    try:
        texts = generate(
            model,
            tokenizer,
            prompt,
            **counts,
            chat=options.chat,
            on_text=_write if stream else None,
            graph=False if options.no_graph else None,
            compile=options.compile,
            state=state,
            draft=draft,
            **sampling,
        )
    except LinearizeError:
        _write("\n")  # the message on a line of its own
        raise
    _write("\n" if stream else texts[0] + "\n")
    if draft is not None:
        error_console().print(f"draft      {draft.count}", markup=False, soft_wrap=True)
    return 0


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate` that sample; none is greedy."""
    from linearize.errors import LinearizeError

    if options.compile and options.no_graph:
        raise LinearizeError(
            "--compile: it is the graph that is compiled, so leave out --no-graph or --compile"
        )
    if options.temperature > 0:
        return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    for flag in ["--top-p"] if options.top_p < 1 else stated(options, "--seed"):
        value = getattr(options, dest(flag))
        raise LinearizeError(f"{flag} {value:g}: nothing is sampled at temperature 0; give --temperature too")
    return {}


def _check_states(options: argparse.Namespace) -> None:
    """Refuse options that mean nothing beside --state and --save-state."""
    from linearize.errors import LinearizeError

    flag = "--save-state" if options.save_state is not None else "--state"
    if options.save_state is None and options.state is None:
        return
    if options.chat:
        raise LinearizeError(
            f"--chat with {flag}: a template closes the message that is to go on; write its control tokens into the "
            "prompt, which is read as it stands"
        )
    if options.num_beams > 1:
        raise LinearizeError(
            f"--num-beams with {flag}: one text goes on from a state; leave out one of the two"
        )
    of_text = [] if options.save_state is None else stated(options, *OF_TEXT)
    if of_text:
        raise LinearizeError(
            f"{', '.join(of_text)} with --save-state: no text is made, the prompt is read and kept; give that with "
            "--state, to the call that goes on"
        )


def _check_draft(options: argparse.Namespace) -> None:
    """Refuse options that mean nothing with a draft, or without one."""
    from linearize.errors import LinearizeError

    given = {"--draft-tokens": options.draft_tokens, "--draft-state": options.draft_state}
    if options.draft is None:
        for name, value in given.items():
            if value is not None:
                raise LinearizeError(
                    f"{name} without --draft: nothing is drafted; name the model that drafts"
                )
        return
    if options.draft_state is not None and options.state is None:
        raise LinearizeError(
            "--draft-state without --state: the model itself must go on from that text; give its state too"
        )
    whys = {
        "--save-state": (options.save_state is not None, "no text is made, the prompt is read and kept"),
        "--num-beams": (options.num_beams > 1, "one text is drafted and checked"),
    }
    for name, (asked, why) in whys.items():
        if asked:
            raise LinearizeError(f"{name} with --draft: {why}; leave out one of the two")


def _draft_state(options: argparse.Namespace) -> Any:
    """What the draft has read, whatever else is wrong with the draft being told before a model is loaded."""
    from linearize.cli.checkpoint import export_of
    from linearize.decode.draft import check_tokens
    from linearize.decode.prefix_file import load_state
    from linearize.errors import ModelNotFoundError
    from linearize.models import resolve

    if options.draft is None:
        return None
    if options.draft_tokens is not None:
        check_tokens(options.draft_tokens)
    state = None if options.draft_state is None else load_state(options.draft_state)
    try:
        resolve(export_of(options.draft))
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"--draft: {error}") from error
    return state


def _draft(options: argparse.Namespace, state: Any) -> Any:
    """The model that drafts."""
    from linearize.cli.checkpoint import load
    from linearize.decode.draft import Draft

    tokens = {} if options.draft_tokens is None else {"tokens": options.draft_tokens}
    model, tokenizer = load(options.draft, options.device)
    return Draft(model, tokenizer, state=state, **tokens)


def _save(options: argparse.Namespace, model: Any, tokenizer: Any, prompt: str, after: Any) -> int:
    """Read the prompt and keep its state."""
    from linearize.decode.prefix_file import save_state
    from linearize.eval.generation import read_state

    state = read_state(model, tokenizer, prompt, after=after)
    path = save_state(state, options.save_state)
    size = f"{state.bytes / 2**20:.1f} MiB"
    grown = f"{size}, {state.grown / 2**20:.1f} of them keys and values of softmax layers, which grow with the text"
    _write(f"{path}: {state.tokens:,} tokens read; {grown if state.grown else size + ' at any length'}\n")
    _write(
        f"go on      linearize generate {shlex.quote(options.path)} --state {shlex.quote(str(path))} --prompt ...\n"
    )
    return 0


def _text(path: Path) -> str:
    """A prompt from a file.

    Raises:
        DataError: there is no such file, or it is no text in UTF-8.
    """
    from linearize.errors import DataError
    from linearize.models.files import instead_of_file

    other = instead_of_file(path)
    if other is not None:
        raise DataError(f"--prompt-file {path} is {other}; give a text file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"--prompt-file {path} is no text in UTF-8 (byte {error.start:,}); convert it first"
        ) from error
    except OSError as error:
        raise DataError(f"--prompt-file {path} cannot be read ({error.strerror or error})") from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
