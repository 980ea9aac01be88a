"""The `linearize` command: parse, dispatch, and turn errors into messages and exit codes.

Exit codes: 0 done, 2 the caller's mistake or the machine's (message on standard error, no traceback), 130 interrupted
(Ctrl-C), 143 terminated (SIGTERM). Anything else is a bug of this package and shows its traceback. Heavy imports happen
inside the commands, so that help is instant.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from collections.abc import Sequence

from linearize import launched, signals
from linearize.cli.parser import build_parser, parse
from linearize.console import error_console, messages, sound_streams
from linearize.errors import LinearizeError

NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can(no|')t allocate|unable to allocate|failed to map segment",
    re.IGNORECASE,
)
"""What allocators say that raise no MemoryError, and the loader of libraries."""
OF_THE_MACHINE = {
    errno.EMFILE: "too many files are open{where}; allow more of them (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine{where}; close some",
    errno.ENOMEM: "out of memory{where}; free some",
    errno.EFBIG: "a file grew larger than it may here{where}; allow it (ulimit -f), or use another file system,",
    errno.EIO: "the disk answers with an error{where}; look at it (dmesg), or use another one,",
    errno.EROFS: "the file system is read-only{where}; use another one",
    errno.ESTALE: "a file on a network drive is gone{where}; mount it again",
}
"""Errors that no command is the cause of -> what to say, and to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        sound_streams()
    try:
        with signals.heard():
            code = _answered(arguments)
    except KeyboardInterrupt as stop:
        code = _fail(_interrupted(arguments, stop), signals.exit_code(stop))
    if argv is None:  # the process ends here
        signals.end_quietly()
    return code


def _answered(arguments: list[str]) -> int:
    """Run one command; what the user or the machine has done wrong becomes a message."""
    try:
        options = parse(build_parser(), arguments)
        options.line = shlex.join(["linearize", *arguments])
        if launched.several() and arguments[:1] != ["run"]:
            raise LinearizeError(
                f"{launched.count()} processes were started, and `linearize run` alone uses more than one: start "
                f"`linearize {' '.join(arguments[:1])}` without a launcher"
            )
        with messages():
            code: int = options.command(options)
        sys.stdout.flush()  # a reader that went away shows here and not at exit
        return code
    except LinearizeError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # `linearize recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError, ImportError) as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        said = (str(error).strip().splitlines() or [""])[0][:200]
        return _fail(f"out of memory{f' ({said})' if said else ''}; free some and try again", 2)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # wherever a path was looked at first
            name = repr(str(error.filename))
            name = name if len(name) <= 80 else f"{name[:80]}..."
            return _fail(f"{name} is too long for a file or folder here; give a shorter name", 2)
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in OF_THE_MACHINE:
            return _fail(f"{OF_THE_MACHINE[error.errno].format(where=where)} and try again", 2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        goes_on = "go on with --resume" if arguments[:1] == ["run"] else "try again"
        return _fail(f"the disk is full{where}; free some space and {goes_on}", 2)


def _interrupted(arguments: list[str], stop: KeyboardInterrupt) -> str:
    what = "terminated" if isinstance(stop, signals.Terminated) else "interrupted"
    if arguments[:1] == ["sample"]:
        command = shlex.join(["linearize", *arguments])
        return f"{what}; what was written is kept, and the same command goes on: {command}"
    if arguments[:1] == ["blocks"]:
        command = shlex.join(["linearize", *arguments])
        return f"{what}; what was written is kept, and the same command goes on: {command}"
    if arguments[:1] != ["run"]:
        return what
    again = arguments if "--resume" in arguments else [*arguments, "--resume"]
    return f"{what}; resume with: {launched.command()} {shlex.join(again)}"


def _fail(message: str, code: int) -> int:
    if not launched.shows_errors():
        return code
    style = "red" if code == 2 else ""
    error_console().print(message, style=style, markup=False, highlight=False, soft_wrap=True)
    return code
