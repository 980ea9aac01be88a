"""Run tests with the kernels that they launch emulated: `python scripts/kernels/emulate [--arch 80] TESTS [-k CASE]`.

What is not understood here goes to pytest. Name one case: a launch takes seconds to minutes. See CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def main() -> int:
    """Pytest's exit code; 5 where no case was chosen."""
    parser = argparse.ArgumentParser(prog="emulate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--arch", type=int, default=90, choices=(80, 90), help="of the GPU (default: 90)")
    options, rest = parser.parse_known_args()
    if not rest:
        parser.error(
            "name a test, as tests/kernels/test_slots_triton.py -k mild-float32: all of them would take very long"
        )
    sys.path[:0] = [str(ROOT / "scripts" / "kernels"), str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)

    from emulate import plugin

    os.environ[plugin.ARCH] = str(options.arch)

    import pytest

    # slow cases too: what is slow by the interpreter is chosen by name here
    return int(pytest.main(["-p", "no:xdist", "-m", "not gpu", *rest], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
