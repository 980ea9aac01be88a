"""`linearize bench recipes`: a training step of the whole model with every recipe's mixers, beside the softmax model's.

All weights train: bfloat16 weights with the mixers' own in float32, or, as the stages of a run have it, float32 weights
under bfloat16 autocast. The loss is the next token's from hidden states, which never holds the logits of all tokens; no
optimizer steps. Every row is written as it comes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.bench import report, whole
from linearize.bench.subjects import TEACHER, chosen, convert, layers_of_each, random_model
from linearize.bench.whole import Budget, Row, Stopped, Stopwatch, Table, empty, reported
from linearize.cli.console import console, quiet_libraries
from linearize.errors import LinearizeError

WARM_BATCH = 2
"""Of the model that only compiles: a batch of one would be another kernel, since Triton makes constants of ones."""
LONGEST = 12
"""Kernels of a profile."""


def main(options: argparse.Namespace) -> int:
    """Measure, print every row as it comes, and write recipes.json and recipes.md.

    Args:
        options: shape, recipes (names), batch, length (tuples), precision (bf16 or autocast), device, largest (halve a
            batch that does not fit), profile, warm (compile and measure nothing), budget (seconds after which nothing
            new is begun), out (folder).

    Raises:
        LinearizeError: no such recipe or shape, or no CUDA device.
    """
    names = chosen(options.recipes)
    device = device_of(options.device)
    quiet_libraries()
    torch.set_float32_matmul_precision("high")  # as a run has it
    random_model("meta", torch.float32, options.shape)
    if options.warm:
        for name in names:
            say(
                warmed(
                    name,
                    options.shape,
                    (*options.batch, WARM_BATCH),
                    options.length,
                    options.precision,
                    device,
                )
            )
        return 0
    table = Table(options.out, say, about(device), report.given(options))
    budget = Budget(options.budget)
    for name in [TEACHER, *names]:
        try:
            for row in rows(name, options, device, budget):
                table.add(row)
        except Stopped as stop:
            raise LinearizeError(f"{name}: {stop}; what was measured is in {table.path}") from stop
    say(f"recipes.json and recipes.md in {options.out}")
    return 0


def rows(name: str, options: argparse.Namespace, device: torch.device, budget: Budget) -> Iterator[Row]:
    """The rows of one recipe, or of the teacher."""
    model, step = None, None
    for length in options.length:
        batches = sorted(options.batch, reverse=options.largest)[: 1 if options.largest else None]
        while batches:
            batch = batches.pop(0)
            key = {"measured": "train", "shape": options.shape, "recipe": name, "way": options.precision}
            row: Row = {**key, "batch": batch, "length": length}
            if budget.spent:
                yield row | empty("not run: the budget is spent")
                continue
            found: Row = {}
            with reported() as notes:
                if step is None:
                    model = build(name, options.shape, options.precision, device)
                    step = Step(model, device, options.precision)
                found = step.measured(batch, length)
            if model is not None:
                model.zero_grad(set_to_none=True)
            whole.release()  # the frames of a failure are gone only now
            budget.leave_out(found)
            yield row | (empty(notes[0]) if notes else found)
            if notes and options.largest and batch > 1 and "out of memory" in notes[0]:
                batches = [batch // 2]
            elif not notes and options.profile and step is not None:
                with reported() as notes:
                    profile = step.profiled(batch, length, found["milliseconds"])
                    keep_profile(options.out, row | profile)
                    say(f"       {100 * profile['busy']:5.1f} % busy, {profile['kernels']} kernels")
                for note in notes:
                    say(f"       not profiled: {note}")
    del model, step
    whole.release()


def build(name: str, shape: str, precision: str, device: torch.device, **changes: Any) -> Any:
    """A subject's model, all of whose weights train."""
    dtype = torch.float32 if precision == "autocast" else torch.bfloat16
    model = convert(random_model(device, dtype, shape, **changes), name)
    return model.requires_grad_(True)


class Step:
    """Forward and backward of a model on random tokens.

    Args:
        model: a causal language model of transformers.
        device: where it is.
        precision: bf16 or autocast.
    """

    def __init__(self, model: Any, device: torch.device, precision: str) -> None:
        from linearize.distill.headless import recognize

        self.model, self.device, self.precision = model, device, precision
        self.watch = Stopwatch(device)
        with self.computing():
            self.head = recognize(model, device)

    def computing(self) -> AbstractContextManager[Any]:
        """Around a forward pass, as in the stages of a run."""
        if self.precision != "autocast":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def call(self, batch: int, length: int) -> Callable[[], Tensor]:
        """One step on these many tokens; gives the loss."""
        from linearize.distill.finetune import predicts
        from linearize.objectives import next_targets, token_backward

        vocabulary = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (batch, length), generator=generator).to(self.device)
        targets = next_targets(ids)

        def step() -> Tensor:
            self.model.zero_grad(set_to_none=True)
            self.model.train()
            with self.computing():
                prediction = predicts(self.model, {"input_ids": ids}, self.head)
            return token_backward(prediction, targets, {"next_token": 1.0})

        return step

    def measured(self, batch: int, length: int) -> Row:
        """What a row holds: tokens a second, milliseconds, peak GiB, and seconds of the first step, which compiles.

        Raises:
            LinearizeError: the loss is no number.
        """
        step, losses = self.call(batch, length), []
        first = self.watch.once(lambda: losses.append(step()))
        self.watch.forget_peak()
        again = self.watch.once(step)
        seconds, count = self.watch.seconds(step, again)
        peak, loss = self.watch.peak(), float(losses[0])
        if not loss < float("inf"):
            raise LinearizeError(f"the loss is {loss}")
        return {
            "tokens_per_second": round(batch * length / seconds, 1),
            "milliseconds": round(1e3 * seconds, 3),
            "peak_gib": peak,
            "first_seconds": round(first, 2),
            "steps": count,
            "loss": round(loss, 4),
            "note": "" if self.head is not None else "the head is not recognized: all logits were held",
        }

    def profiled(self, batch: int, length: int, milliseconds: float) -> Row:
        """The longest kernels of one step, and the part of an unobserved step's time in which the device is busy."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        step = self.call(batch, length)
        kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with profile(activities=[kind]) as recorded:
            step()
            self.watch.wait()
        name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        kernels = sorted(recorded.key_averages(), key=lambda event: -getattr(event, name))
        kernels = [event for event in kernels if getattr(event, name) > 0]
        spent = sum(getattr(event, name) for event in kernels) / 1e3
        return {
            "milliseconds": milliseconds,
            "busy_milliseconds": round(spent, 3),
            "busy": round(min(1.0, spent / milliseconds), 4),
            "kernels": sum(event.count for event in kernels),
            "longest": [
                {
                    "name": event.key[:120],
                    "count": event.count,
                    "milliseconds": round(getattr(event, name) / 1e3, 3),
                }
                for event in kernels[:LONGEST]
            ],
        }


def keep_profile(folder: Path, row: Row) -> None:
    """Write a profile beside those that are there."""
    path = folder / "recipes-profile.json"
    whole.write(path, whole.merged(whole.read(path), row))


def warmed(
    name: str,
    shape: str,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    precision: str,
    device: torch.device,
) -> str:
    """Compile what a recipe's training and decoding need, in a model of few layers; gives a line to print.

    What stands between the kernels is compiled for each batch and length.
    """
    from linearize.decode import Decoder

    started, layers = time.monotonic(), layers_of_each(name)
    with reported() as notes:
        model = build(name, shape, precision, device, num_hidden_layers=layers)
        step = Step(model, device, precision)
        for batch in dict.fromkeys(batches):
            for length in lengths:
                step.call(batch, length)()
        del step
        model.zero_grad(set_to_none=True)
        model = build(name, shape, "bf16", device, num_hidden_layers=layers).requires_grad_(False)
        for batch in (1, 64):
            ids = torch.zeros(batch, 128, dtype=torch.int64, device=device)
            Decoder(model, batch, length=256, capture=False).generate(ids, None, 4)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return f"{time.monotonic() - started:4.0f} s  {name}{': ' + notes[0] if notes else ''}"


def device_of(name: str) -> torch.device:
    """Where to measure.

    Raises:
        LinearizeError: there is no CUDA device, and the CPU was not asked for.
    """
    from linearize.bench.clock import require_cuda

    if name == "cpu":
        return torch.device("cpu")
    require_cuda()
    return torch.device("cuda", torch.cuda.current_device())


def about(device: torch.device) -> dict[str, Any]:
    """The device, for the table."""
    from linearize.bench.clock import described

    return described() if device.type == "cuda" else {"name": "CPU"}


def say(line: str) -> None:
    """Print at once."""
    console().print(line, markup=False, soft_wrap=True, highlight=False)
