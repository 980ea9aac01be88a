"""The five downstream tasks, through lm-eval (EleutherAI's evaluation harness), on local files and with no network.

Each task is one file of `eval/tasks/`, an ordinary lm-eval task YAML whose `data_files` entry is looked up in the
folder that the caller names. lm-eval is an optional dependency, the extra `eval` of this package.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from linearize.data.files import expanded, mode_of
from linearize.data.readers import read_jsonl
from linearize.data.tokens import Tokens
from linearize.errors import DataError, LinearizeError, NotFiniteError
from linearize.eval.lm_requests import Share, distinct
from linearize.patch import changed
from linearize.progress import Meter
from linearize.registry import closest

TASK_FOLDER = Path(__file__).parent / "tasks"
_TYPES: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "list": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
}


@cache
def task_names() -> list[str]:
    """Names of the tasks that `run_tasks` knows, sorted."""
    return sorted(path.stem for path in TASK_FOLDER.glob("*.yaml"))


def expand(tasks: str | Sequence[str]) -> list[str]:
    """Check task names and expand "all"; order kept, repetitions dropped.

    Raises:
        LinearizeError: a name that is no task; the message offers the nearest one.
    """
    names: dict[str, None] = {}
    for task in [tasks] if isinstance(tasks, str) else tasks:
        if task == "all":
            names.update(dict.fromkeys(task_names()))
        elif task in task_names():
            names[task] = None
        else:
            raise LinearizeError(f"unknown task '{task}': {closest(str(task), [*task_names(), 'all'])}")
    return list(names)


def check_data(tasks: Sequence[str], data_dir: str | Path, limit: int | None = None) -> dict[str, int]:
    """Read every task's file and check each item's columns, before any model runs. Arguments and errors as `items_of`.

    Returns:
        task -> number of requests that the model will get (one for each choice of each item).
    """
    requests = {}
    for task, items in items_of(tasks, data_dir, limit).items():
        choices = (
            "context_options" if "context_options" in _config(task)["metadata"]["columns"] else "choices"
        )
        requests[task] = sum(len(item.get(choices, [None])) for item in items)
    return requests


def items_of(
    tasks: Sequence[str], data_dir: str | Path, limit: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The items of tasks, out of their files, every column checked.

    Args:
        tasks: names, or "all".
        data_dir: folder that holds `<task>.jsonl`.
        limit: how many items of a task will be used; None or 0 = all.

    Returns:
        task -> items.

    Raises:
        DataError: folder or file missing, empty, not JSON lines, or an item without a column; names the line.
        LinearizeError: unknown task.
    """
    folder = expanded(str(data_dir))
    found: dict[str, list[dict[str, Any]]] = {}
    for task in expand(tasks):
        config = _config(task)
        columns: dict[str, str] = config["metadata"]["columns"]
        path = folder / config["dataset_kwargs"]["data_files"]["test"]
        expected = f"task '{task}' reads {path}, JSON lines with {_described(columns)}"
        if not str(data_dir) or not stat.S_ISDIR(mode_of(folder) or 0):
            raise DataError(
                f"no folder '{data_dir}' with the evaluation tasks: {expected}. Set eval.task_data, or --task-data of "
                "`linearize eval`, to the folder"
            )
        if not stat.S_ISREG(mode_of(path) or 0):
            raise DataError(f"{path} not found: {expected}")
        found[task] = _read(path, columns, expected)[: limit or None]
    return found


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    data_dir: str | Path,
    limit: int | None = None,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Zero-shot scores of `model`, as lm-eval computes them.

    PIQA and ARC: the choice with the largest summed log-probability (acc), and with that divided by the choice's length
    in bytes (acc_norm). WinoGrande: which of two contexts makes the common continuation likelier. LAMBADA: greedy exact
    match of the last word (acc) and the word's perplexity. Neither the model's mode, nor the tokenizer, nor any random
    generator is changed.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        tokenizer: its tokenizer.
        tasks: names out of `task_names()`, or "all".
        data_dir: folder that holds `<task>.jsonl`.
        limit: items of each task, from the start; None or 0 = all.
        batch_size: sequences in one forward pass.
        autocast: dtype for torch.autocast on the model's device; None runs in the model's own dtype.
        progress: show a progress bar.

    Returns:
        task -> metric -> value; accuracies are shares of 1. "<metric>_stderr" stands beside each accuracy, and "items"
        is the number of items.

    Raises:
        LinearizeError: lm-eval is not installed, or a task is unknown.
        DataError: see `check_data`.
        NotFiniteError: the model gives NaN for an item.
    """
    names = expand(tasks)
    if not names:
        return {}
    requests = check_data(names, data_dir, limit)
    lm_eval = import_lm_eval()
    total = sum(requests.values())
    training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        stack.enter_context(quiet())
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="linearize-tasks-"))
        bar = Meter("tasks", total, unit="requests")
        meter = stack.enter_context(bar) if progress else None
        # A copy, because the harness gives a tokenizer without a pad token one.
        wrapped = language_model()(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            mixed_precision_dtype=autocast,
            softmax_dtype=torch.float32,  # log-probabilities of bf16 logits would be rounded to an eighth
        )
        wrapped.share = None if meter is None else Share(meter, total)
        wrapped.encode = Tokens(wrapped.tokenizer)
        results = lm_eval.simple_evaluate(
            wrapped,
            tasks=[inline(name, Path(data_dir).expanduser(), scratch) for name in names],
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            limit=limit or None,
            bootstrap_iters=0,
            log_samples=False,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    return {name: _scores(results, name) for name in names}


def _config(task: str) -> dict[str, Any]:
    return yaml.safe_load((TASK_FOLDER / f"{task}.yaml").read_text(encoding="utf-8"))


def inline(task: str, data_dir: Path, scratch: str) -> dict[str, Any]:
    """The task's config with an absolute data file, and the parsed copy of it kept out of the user's cache."""
    config = _config(task)
    file = config["dataset_kwargs"]["data_files"]["test"]
    config["dataset_kwargs"] = {
        "data_files": {"test": str((data_dir / file).resolve())},
        "cache_dir": scratch,
    }
    for metric in config["metric_list"]:
        if metric["aggregation"] == "perplexity":
            metric["aggregation"] = _perplexity
    return config


def _perplexity(loglikelihoods: Sequence[float]) -> float:
    """The harness's own, inf in place of an error where it overflows."""
    mean = sum(loglikelihoods) / len(loglikelihoods)
    return math.exp(-mean) if mean > -700 else math.inf


def _read(path: Path, columns: dict[str, str], expected: str) -> list[dict[str, Any]]:
    items = []
    try:
        rows = list(read_jsonl(path))
    except DataError as error:
        raise DataError(f"{error}; {expected}") from error
    for place, item in rows:
        for column, kind in columns.items():
            if not _TYPES[kind](item.get(column)):
                raise DataError(f"{path}, {place}: no column '{column}' of type {kind}; {expected}")
        options = item.get("choices", item.get("context_options"))
        if options is not None and not 0 <= item["gold"] < len(options):
            rule = f"gold {item['gold']} is no index of its {len(options)} choices"
            raise DataError(f"{path}, {place}: {rule}; {expected}")
        items.append(item)
    if not items:
        raise DataError(f"{path} is empty; {expected}")
    return items


def _described(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def import_lm_eval() -> Any:
    """The package, with what this one uses of it.

    Raises:
        LinearizeError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise LinearizeError(
            f"the evaluation tasks need lm-eval ({error}): pip install 'lm-eval>=0.4.13'"
        ) from error
    return lm_eval


@cache
def language_model() -> type:
    """lm-eval's model class over a model in memory; made late, since lm-eval is optional."""
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        """HFLM on a model in memory, without its progress bar, its KV cache or its look-up on the hub."""

        share: Share | None = None
        encode: Tokens

        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **kwargs: Any,
        ) -> list[int]:
            """As HFLM's, except that a control token which an item spells is text."""
            ids = self.encode([string])[0]
            if add_special_tokens is not False:
                ids = self.encode.begin + ids
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found = super().loglikelihood(requests, disable_tqdm=True)
            values = zip(requests, found, strict=True)
            wrong = next((request for request, (value, _) in values if math.isnan(value)), None)
            if wrong is not None:  # a comparison with NaN would be an answer, and a score
                raise NotFiniteError(
                    f"task '{wrong.task_name}', item {wrong.doc_id + 1}: the log-likelihood is nan; the model's "
                    "weights are damaged, or too large for its arithmetic: take another checkpoint"
                )
            return found

        def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> Any:
            longest = max((len(answer) for _, _, answer in requests), default=0)
            if longest > self.max_length:
                raise DataError(
                    f"an answer of {longest:,} tokens, and the model holds {self.max_length:,}; leave the task out"
                )
            rows = (tuple(read[-self.max_length :]) for read in distinct(requests))
            with self._counted(sum(map(len, rows))):
                return super()._loglikelihood_tokens(requests, *args, **options)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            with self._counted(sum(len(self.tok_encode(request.args[0])) for request in requests)):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            with self._counted(len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Tensor:
            made: Tensor = super()._model_generate(context, *args, **options)
            if self.share is not None:
                self.share.advance(len(context))
            return made

        def _counted(self, units: int) -> AbstractContextManager[None]:
            return nullcontext() if self.share is None else self.share.of(units)

        def _model_call(
            self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
        ) -> Tensor:
            # The harness pads on the right and reads no padded position, so a causal model needs no mask.
            with (
                torch.no_grad(),
                torch.autocast(
                    inps.device.type,
                    dtype=self.mixed_precision_dtype,
                    enabled=self.mixed_precision_dtype is not None,
                ),
            ):
                logits = self.model(input_ids=inps, use_cache=False).logits
            if self.share is not None:
                self.share.advance(inps.numel())
            return logits

        def get_model_info(self) -> dict[str, Any]:
            return {}

    return LanguageModel


@contextmanager
def quiet(*, offline: bool = True) -> Iterator[None]:
    """No harness log below an error, no bars, no git, and offline no request; everything as before on leaving."""
    import datasets
    import huggingface_hub.constants
    import lm_eval.api.task
    import lm_eval.evaluator

    logger = logging.getLogger("lm_eval")
    level = logger.level
    bars = datasets.are_progress_bars_disabled()
    with ExitStack() as stack:
        # The environment variables are read at import, long ago by now: these are the values they end up in.
        if offline:
            stack.enter_context(changed(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(changed(datasets.config, "HF_HUB_OFFLINE", True))
        stack.enter_context(changed(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)))
        # It asks git for the commit of the working directory, whose complaints would go to the terminal, and lists
        # the machine's packages, which takes seconds; a run folder has its own environment.json.
        stack.enter_context(changed(lm_eval.evaluator, "get_git_commit_hash", lambda: None))
        stack.enter_context(changed(lm_eval.evaluator, "add_env_info", lambda results: None))
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            logger.setLevel(level)
            if not bars:
                datasets.enable_progress_bars()


def _scores(results: dict[str, Any], task: str) -> dict[str, float]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.07, "alias": ...}` without the filter's name and what is no number."""
    scores: dict[str, float] = {}
    for key, value in results["results"][task].items():
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr") and isinstance(value, int | float):
            scores[metric] = float(value)
    items = results["n-samples"][task]["effective"]
    for metric in [name for name in scores if name.startswith("acc")]:
        # The sample standard error of a share, in closed form; the harness would tie it to its bootstrap.
        scores[f"{metric}_stderr"] = (scores[metric] * (1 - scores[metric]) / max(1, items - 1)) ** 0.5
    scores["items"] = items
    return scores
