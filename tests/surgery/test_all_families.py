"""Every causal language model type of the installed transformers: exact through files, or refused before training.

LINEARIZE_FAMILIES names a folder that keeps a JSON file for each type; a type that has one is not run again.
`scripts/families.py` writes docs/families.md from it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import families_configs
import pytest
from families_checks import Judge, Verdict
from families_reader import Reader

SECONDS = 120


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", families_configs.types())
def test_exact_or_refused(model_type: str, reader: Reader, tmp_path: Path) -> None:
    kept = Path(os.environ["LINEARIZE_FAMILIES"]) if "LINEARIZE_FAMILIES" in os.environ else tmp_path
    path = kept / f"{model_type}.json"
    if path.is_file():
        verdict = Verdict(**json.loads(path.read_text()))
    else:
        with _limit(SECONDS):
            verdict = Judge(model_type, tmp_path, reader).run()
        path.write_text(json.dumps(dataclasses.asdict(verdict), indent=1) + "\n")
    if verdict.verdict == "not built":
        pytest.skip(f"not built: {verdict.reason}")
    assert verdict.verdict in ("exact", "refused"), "\n".join(verdict.problems)


class _limit:
    """Raise TimeoutError inside the block after some seconds of this process; the machine may be busy."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def late(*_: object) -> None:
            raise TimeoutError(f"longer than {self.seconds} s")

        self.before = signal.signal(signal.SIGPROF, late)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self.before)
