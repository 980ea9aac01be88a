"""torchrun that ends as its processes did: `python -m linearize.cli.torchrun`, with the arguments of torchrun.

torchrun itself answers a failure, a signal and a wrong recipe alike, by 1 and a traceback of its own. Here a signal
gives 128 and its number, as it does without a launcher, and anything else the exit code of the process that was the
first to fail, whose own words are on standard error already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from linearize import signals

SAID = (2, *(signals.code_of(number) for number in signals.STOPPING))
"""Exit codes whose reason the process has told."""


def main(argv: Sequence[str]) -> int:
    """Run torchrun; gives the exit code.

    Args:
        argv: its arguments.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(list(argv))
    except SignalException as stop:
        return signals.code_of(stop.sigval)
    except ChildFailedError as failed:
        code: int = failed.get_first_failure()[1].exitcode
        code = code if code > 0 else signals.code_of(-code)  # torch counts an end by a signal below zero
        if code not in SAID:
            sys.stderr.write(f"{failed}\n")
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
