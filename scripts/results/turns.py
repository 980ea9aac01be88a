"""Programs that know nothing of turns, on a device on which others time: see `linearize/bench/quiet.py`.

    python scripts/results/turns.py follow DIR PID...              these, and what they begin, stand still for others
    python scripts/results/turns.py alone DIR SECONDS COMMAND...   meanwhile the others stand still, so long at most

`follow` ends with the last of its processes, `alone` as its command does.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from linearize.bench import quiet

EVERY = 0.5
"""Seconds between two looks at what was begun."""


def main(arguments: list[str]) -> int:
    """One of the two."""
    match arguments:
        case ["follow", folder, *pids] if pids and all(pid.isdecimal() for pid in pids):
            while quiet.follow(Path(folder), [int(pid) for pid in pids]):
                time.sleep(EVERY)
            return 0
        case ["alone", folder, seconds, *command] if seconds.isdecimal() and command:
            with quiet.alone(Path(folder), int(seconds)):
                return subprocess.run(command).returncode
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
