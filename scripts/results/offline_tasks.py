"""HellaSwag and MMLU for `linearize eval --include-path`, made from released files where no hub can be reached.

    python scripts/results/offline_tasks.py OUT --mmlu DATA --hellaswag FILE
    linearize eval MODEL --tasks mmlu_files,hellaswag_files --include-path OUT

Args: OUT, a folder to make; DATA, the folder of MMLU's release that has `dev/` and `test/` with a CSV file a subject
(with a header line or without, answers as letters or numbers); FILE, HellaSwag's `hellaswag_val.jsonl`, or the text
with six lines an item (context, label, four endings) that is made from it for llama.cpp.

What is asked and how it is scored are lm-eval's own definitions, included from the installed package; only their data
is read from here. The text of six lines has lost where the context's second half begins, which lm-eval writes with a
capital: its items are asked as they stand there, so their scores are compared with each other alone. Prints the digest
of each source, so that a figure can say what it was made from.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

MMLU, HELLASWAG = "mmlu_files", "hellaswag_files"
Item = dict[str, object]


def subject(file: Path) -> list[Item]:
    """A subject's questions in the fields that lm-eval's definition reads.

    Raises:
        SystemExit: a line is no question with four choices and an answer.
    """
    with file.open(encoding="utf-8", newline="") as opened:
        lines = [line for line in csv.reader(opened) if line]
    if lines and lines[0][-1].strip().lower() == "answer":
        lines = lines[1:]
    items: list[Item] = []
    for number, line in enumerate(lines, 1):
        answer = line[-1].strip() if len(line) == 6 else ""
        if not answer or answer not in "ABCD0123":
            raise SystemExit(
                f"{file}: item {number} is not a question, four choices and A to D: {line!r:.120}"
            )
        items.append({"question": line[0], "choices": line[1:5], "answer": "ABCD0123".index(answer) % 4})
    return items


def stories(file: Path) -> Iterator[Item]:
    """HellaSwag's items; those of a text have their context whole in `ctx_a`.

    Raises:
        SystemExit: the file is neither of the two forms.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    if lines and lines[0].startswith("{"):
        yield from (json.loads(line) for line in lines)
        return
    if not lines or len(lines) % 6:
        raise SystemExit(f"{file}: {len(lines)} lines; JSON lines, or six lines an item, are needed")
    for start in range(0, len(lines), 6):
        context, label, *endings = lines[start : start + 6]
        label_of, _, rest = context.partition(": ")
        if not rest or label not in ("0", "1", "2", "3"):
            raise SystemExit(f"{file}: line {start + 1} is no context and label of an item: {context!r:.120}")
        yield {"activity_label": label_of, "ctx_a": rest, "ctx_b": "", "endings": endings, "label": label}


def write_lines(file: Path, items: Iterable[Item]) -> int:
    """JSON lines; the number of items."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def write_task(file: Path, definition: Path, name: str, data: dict[str, Path], **more: object) -> None:
    """A definition of lm-eval under another name, its data these files."""
    files = {split: str(path.resolve()) for split, path in data.items()}
    given = {"include": str(definition), "task": name, "dataset_path": "json", "dataset_name": None, **more}
    file.write_text(
        yaml.safe_dump({**given, "dataset_kwargs": {"data_files": files}}, sort_keys=False), "utf-8"
    )


def mmlu(folder: Path, out: Path, tasks: Path) -> int:
    """Every subject as a task, and the group over all items; the number of items.

    Raises:
        SystemExit: no subject is there, or one that lm-eval does not have.
    """
    found = sorted((folder / "test").glob("*_test.csv"))
    if not found:
        raise SystemExit(
            f"{folder}: no test/*_test.csv; give the folder of MMLU's release that has dev/ and test/"
        )
    total = 0
    for file in found:
        name = file.name.removesuffix("_test.csv")
        definition = tasks / "mmlu" / "default" / f"mmlu_{name}.yaml"
        if not definition.is_file():
            raise SystemExit(f"{file}: lm-eval has no subject '{name}'")
        data = {split: out / "data" / f"{name}.{split}.jsonl" for split in ("dev", "test")}
        for split, path in data.items():
            count = write_lines(path, subject(folder / split / f"{name}_{split}.csv"))
        total += count
        write_task(
            out / f"{name}.yaml", definition, f"{MMLU}_{name}", data, tag=f"{MMLU}_subjects", num_fewshot=5
        )
    mean = {"metric": "acc", "weight_by_size": True}
    group = {"group": MMLU, "task": [f"{MMLU}_subjects"], "aggregate_metric_list": [mean]}
    (out / "mmlu.yaml").write_text(yaml.safe_dump(group, sort_keys=False), encoding="utf-8")
    return total


def digest(place: Path) -> str:
    """Of a file, or of all CSV files below a folder in the order of their names."""
    files = [place] if place.is_file() else sorted(place.rglob("*.csv"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    """Write the folder; 0 when it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--mmlu", type=Path, metavar="DATA")
    parser.add_argument("--hellaswag", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    if given.mmlu is None and given.hellaswag is None:
        parser.error("nothing to make: give --mmlu DATA, --hellaswag FILE, or both")
    for place in (given.mmlu, given.hellaswag):
        if place is not None and not place.exists():
            parser.error(f"{place} is not there")
    try:
        import lm_eval
    except ImportError:
        parser.error("lm-eval is not installed: pip install '.[eval]'")
    tasks = Path(lm_eval.__file__).parent / "tasks"
    given.out.mkdir(parents=True, exist_ok=True)
    if given.mmlu is not None:
        print(f"{MMLU}: {mmlu(given.mmlu, given.out, tasks):,} items, sha256 {digest(given.mmlu)}")
    if given.hellaswag is not None:
        data = given.out / "data" / "hellaswag.validation.jsonl"
        count = write_lines(data, stories(given.hellaswag))
        definition = tasks / "hellaswag" / "hellaswag.yaml"
        files = {"train": data, "validation": data}  # no worked examples are drawn from it
        write_task(given.out / "hellaswag.yaml", definition, HELLASWAG, files)
        print(f"{HELLASWAG}: {count:,} items, sha256 {digest(given.hellaswag)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
