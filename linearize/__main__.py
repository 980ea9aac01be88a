"""`python -m linearize`: the same as the `linearize` command, also from a folder where it is not installed."""

from __future__ import annotations

import sys

from linearize.cli import main

sys.exit(main())
