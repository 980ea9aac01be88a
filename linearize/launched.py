"""What a launcher (torchrun, accelerate launch) has said to this process: how many there are, and which one it is.

Read from the environment alone, so that a command line that only fails needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from linearize.errors import LinearizeError

VARIABLES = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_RANK",
    "GROUP_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""What makes a process one of several."""

speaks: list[Callable[[], bool]] = []
"""Asked for whether an error is this process's to show; without an entry the first process shows it."""


def count() -> int:
    """Processes in all; 1 without a launcher.

    Raises:
        LinearizeError: a variable is no number.
    """
    return max(1, _number("WORLD_SIZE", 1))


def several() -> bool:
    """Whether there are more than one."""
    return count() > 1


def rank() -> int:
    """Number of this process, from 0; on the machine that was named first, 0 is there.

    Raises:
        LinearizeError: there are several, and this one has no number.
    """
    if not several():
        return 0
    if "RANK" not in os.environ:
        raise LinearizeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but RANK is not: start with torchrun or accelerate launch, "
            "or unset WORLD_SIZE"
        )
    return _number("RANK", 0)


def first() -> bool:
    """Whether this is the process that writes, logs and measures."""
    return rank() == 0


def local() -> int:
    """Number of this process on its machine, from 0."""
    return _number("LOCAL_RANK", rank()) if several() else 0


def shows_errors() -> bool:
    """Whether an error is this process's to show: of several that fail together the first to get here."""
    return all(asked() for asked in speaks) if speaks else first()


def command() -> str:
    """What starts `linearize` as this process was started."""
    here, everywhere = _number("LOCAL_WORLD_SIZE", count()), count()
    if everywhere == 1:
        return "linearize"
    if here == everywhere:
        return f"torchrun --nproc-per-node {here} -m linearize"
    nodes = f"--nnodes {everywhere // here} --nproc-per-node {here}"
    return f"torchrun {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m linearize"


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that is none of them."""
    return {key: value for key, value in environment.items() if key not in VARIABLES}


def _number(variable: str, otherwise: int) -> int:
    given = os.environ.get(variable)
    if given is None:
        return otherwise
    try:
        return int(given)
    except ValueError:
        raise LinearizeError(
            f"{variable}={given} is set by the launcher and is no number: unset it"
        ) from None
