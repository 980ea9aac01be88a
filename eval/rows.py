"""One row for every score: what `linearize eval` writes into results.json, and the file that holds the rows.

The file is ``{"format": 1, "rows": [...]}``; each row is a `Score` as plain JSON (what is not finite is written
"Infinity" or "NaN"). Rows are added a measurement at a time, each time with one atomic write: whatever stops the
process, what was measured is there, and the next call goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from linearize import plain_json
from linearize.errors import CheckpointError
from linearize.storing import read_json, write_json

FORMAT = 1
STUDENT = "student"
TEACHER = "teacher"


@dataclass(frozen=True)
class Score:
    """One number about one model.

    A score is told apart by model, role, suite, task, metric, against, length, by and bucket; the rest says what it is
    worth and how to get it again.
    """

    model: str
    """Display name: the run folder or the MODEL argument; a control carries the name of the model it belongs to."""
    role: str
    """student: the model that was given, converted or not. teacher: what it is compared with. Anything else is the name
    of a control: "untrained swap", "swa_sinks", "linear branch off", "window off", or the name of a `--control`."""
    suite: str
    """quick, standard, long, efficiency, tasks (of lm-eval), or the name of a suite's file."""
    task: str
    """text, mqar, passkey, ..., "mmlu (5-shot)", decoding, generation, prefill, decode."""
    metric: str
    """One of `METRICS`; lm-eval's own for its tasks."""
    value: float
    """In the metric's unit; shares are of 1."""
    low: float | None
    """Lower end of the 95 % interval (bootstrap over windows or Wilson's for shares); None where there is none."""
    high: float | None
    """Upper end."""
    n: int
    """What the value is a mean of: tokens, items or repetitions."""
    length: int | None = None
    """Tokens of the context: the window, the prompt, the cache."""
    by: str = ""
    """What `bucket` divides: "position" (token in the window), "distance" (tokens back to the earlier occurrence),
    "depth" (share of the haystack before the needle), "batch" (sequences), "metric" (that a relative score is of); ""
    for a score over everything."""
    bucket: str = ""
    """For example "64-128" (from, up to but without), "0.25", "8"; "" for a score over everything."""
    against: str = ""
    """Role that the score compares with: "teacher" for KL and relative scores, "student" for paired differences."""
    seed: int = 0
    """Of the items and of the bootstrap."""
    version: str = ""
    """Of this package, with lm-eval's where that scored: "linearize 0.2.0", "linearize 0.2.0, lm-eval 0.4.9"."""
    command: str = ""
    """The command line that measured it."""
    key: str = ""
    """Digest of the model's files, the role, the settings and the version: rows that share it were measured together,
    and are not measured again."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in the order above."""
        return asdict(self)


@dataclass(frozen=True)
class Metric:
    """How to read a metric."""

    about: str
    better: str
    """higher, lower, or "" where neither is."""
    share: bool = False
    """Whether it is a share of 1, shown in percent."""


METRICS: dict[str, Metric] = {
    "ppl": Metric("perplexity, exp(mean negative log-likelihood)", "lower"),
    "ppl_hit": Metric("perplexity of tokens whose bigram occurred earlier in the window (Zoology's AR hits)", "lower"),
    "ppl_other": Metric("perplexity of all other tokens", "lower"),
    "nll_difference": Metric("mean NLL minus that of the role in `against`, over the same tokens, nats", "lower"),
    "kl": Metric("KL(teacher || model) a token, nats", "lower"),
    "kl_hit": Metric("KL(teacher || model) at tokens whose bigram occurred earlier in the window, nats", "lower"),
    "kl_passkey": Metric("KL(teacher || model) at the tokens of a pass key, nats", "lower"),
    "agreement": Metric("tokens at which the model's most likely token is the teacher's", "higher", share=True),
    "exact": Metric("items whose greedy continuation is the answer", "higher", share=True),
    "recalled": Metric("answers that the greedy continuation holds, a mean over items (RULER)", "higher", share=True),
    "choice": Metric("items whose answer is likelier than every distractor", "higher", share=True),
    "answer_nll": Metric("NLL of the answer a token, nats", "lower"),
    "relative": Metric("(score - chance) / (teacher's - chance)", "higher", share=True),
    "decode_agreement": Metric("tokens that decoding step by step predicts as prefill does", "higher", share=True),
    "decode_difference": Metric("largest difference of log-probabilities between decoding and prefill", "lower"),
    "repetition": Metric("generated 4-grams that occurred before in the same text", "lower", share=True),
    "distinct_1": Metric("different tokens among the generated ones", "", share=True),
    "distinct_2": Metric("different bigrams among the generated ones", "", share=True),
    "generated": Metric("tokens generated before the end token", ""),
    "milliseconds": Metric("wall time of a prefill, or of a decoding step", "lower"),
    "tokens_per_second": Metric("tokens through a prefill, or decoded, a second", "higher"),
    "cache_bytes": Metric("bytes of the cache of one sequence", "lower"),
    "peak_bytes": Metric("most memory that the device had allocated", "lower"),
    "crossover": Metric("context from which the student is faster (or smaller) than the teacher, tokens", "lower"),
}  # fmt: skip
"""Every metric of our own; a row may also carry a metric of an lm-eval task."""

_REQUIRED = ("model", "role", "suite", "task", "metric", "value", "low", "high", "n")
_FIELDS = {field.name for field in fields(Score)}


def key_of(*parts: Any) -> str:
    """A digest of plain values: the `key` of the rows of one measurement."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Scores:
    """The rows of a results.json.

    Args:
        path: the file; an existing one is continued.
        remedy: what to do where it is damaged, as a sentence.

    Raises:
        CheckpointError: it is damaged or holds something else.
    """

    def __init__(self, path: Path, remedy: str = "") -> None:
        self.path = path
        self.rows: list[Score] = []
        if path.exists():
            remedy = remedy or f"Delete {path.name} to measure again, or take another --out"
            document = read_json(path, remedy)
            try:
                self.rows = parse(document)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}. {remedy}") from error

    def of(self, key: str) -> list[Score]:
        """The rows of one measurement; [] when it has not been made."""
        return [row for row in self.rows if row.key == key]

    def add(self, rows: Sequence[Score]) -> None:
        """Write the rows of one measurement, all of them at once."""
        if not rows:
            return
        self.rows.extend(rows)
        write_json(self.path, {"format": FORMAT, "rows": [row.to_dict() for row in self.rows]})


def parse(document: Mapping[str, Any]) -> list[Score]:
    """The rows of a results.json that has been read.

    Raises:
        ValueError: another format, or rows that are none.
    """
    if document.get("format") != FORMAT or not isinstance(document.get("rows"), list):
        raise ValueError(f"it holds no scores of format {FORMAT}")
    return list(_rows(document["rows"]))


def _rows(found: Iterable[Any]) -> Iterable[Score]:
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict) or not all(name in row for name in _REQUIRED):
            raise ValueError(f"row {number} is no score")
        # JSON has no words for numbers that are not finite, see plain_json
        row = row | {name: plain_json.restored(row[name]) for name in ("value", "low", "high")}
        # rows of a later version may say more
        row = {name: value for name, value in row.items() if name in _FIELDS}
        wrong = [name for name, value in row.items() if not _KINDS[name](value)]
        if wrong or not _fits(row.get("by", ""), row.get("bucket", "")):
            raise ValueError(f"row {number} is no score ({wrong[0] if wrong else 'bucket'})")
        yield Score(**row)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_FIELDS, _is_text),
    "value": plain_json.is_number,
    **dict.fromkeys(("low", "high"), lambda value: value is None or plain_json.is_number(value)),
    "length": lambda value: value is None or _is_count(value),
    **dict.fromkeys(("n", "seed"), _is_count),
}
"""Field -> whether a value is one of it: a file that was edited, or is another program's, ends in a message."""


def _fits(by: str, bucket: str) -> bool:
    """Whether a bucket is one of what it divides; other divisions than ours may have any."""
    forms = {"position": r"\d{1,18}-\d{1,18}", "depth": r"\d{1,18}(\.\d+)?", "batch": r"\d{1,18}"}
    form = forms.get("position" if by == "distance" else by)
    return form is None or re.fullmatch(form, bucket, re.ASCII) is not None
