"""`linearize bench recipes`: a training step of the whole model with every recipe's mixers, beside the softmax model's.

All weights train: bfloat16 weights with the mixers' own in float32, or, as the stages of a run have it, float32 weights
under bfloat16 autocast. The loss is the next token's from hidden states, which never holds the logits of all tokens; no
optimizer steps. With `--captured` a step is recorded and replayed in one CUDA graph, as the stages of a run have it.
Every row is written as it comes.

With `--only` several processes may share a folder and a device: each compiles in a model of few layers, and what runs
the whole model they do one after the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from linearize.bench import report, whole
from linearize.bench.profiles import kept, profiled
from linearize.bench.runner import LOST
from linearize.bench.subjects import TEACHER, chosen, convert, layers_of_each, random_model
from linearize.bench.whole import Budget, Row, Stopped, Stopwatch, Table, empty, reported
from linearize.cli.console import console, quiet_libraries
from linearize.errors import LinearizeError
from linearize.patch import changed

WARM_BATCH = 2
"""Of the model that only compiles: a batch of one would be another kernel, since Triton makes constants of ones."""
CAPTURED = "captured"
"""Added to a row's way where a CUDA graph is replayed."""


def main(options: argparse.Namespace) -> int:
    """Measure, print every row as it comes, and write recipes.json and recipes.md.

    Args:
        options: shape, recipes (names), batch, length (tuples), precision (bf16 or autocast), device, largest (halve a
            batch that does not fit), profile, captured (replay a CUDA graph), only (no teacher, in turns with others),
            warm (compile and measure nothing), budget (seconds after which nothing new is begun), out (folder).

    Raises:
        LinearizeError: no such recipe or shape, or no CUDA device, without which nothing is captured either.
    """
    names = chosen(options.recipes)
    device = device_of(options.device)
    if options.captured and device.type != "cuda":
        raise LinearizeError("--captured records CUDA graphs: leave out --device cpu, or --captured")
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
                    captured=options.captured,
                )
            )
        return 0
    table = Table(options.out, say, about(device), report.given(options))
    budget = Budget(options.budget)
    beside = not options.only or TEACHER in options.recipes
    for name in [TEACHER, *names] if beside else names:
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
    turn = FileLock(options.out / "turn.lock") if options.only else nullcontext()
    way = f"{options.precision}, {CAPTURED}" if options.captured else options.precision
    if options.only and not budget.spent:
        # what fails here fails again where it makes a row
        with reported():
            compiled_ahead(
                name,
                options.shape,
                options.batch,
                options.length,
                options.precision,
                device,
                captured=options.captured,
            )
    for length in options.length:
        batches = sorted(options.batch, reverse=options.largest)[: 1 if options.largest else None]
        while batches:
            batch = batches.pop(0)
            key = {"measured": "train", "shape": options.shape, "recipe": name, "way": way}
            row: Row = {**key, "batch": batch, "length": length}
            if budget.spent:
                yield row | empty("not run: the budget is spent")
                continue
            found: Row = {}
            with reported() as notes:
                if step is None:
                    model = build(name, options.shape, options.precision, device)
                    step = Step(model, device, options.precision, captured=options.captured)
            with turn:
                if step is not None:
                    with reported() as notes:
                        found = step.measured(batch, length)
                profile: Row = {}
                if not notes and options.profile and step is not None:
                    with reported() as unseen:
                        profile = step.profiled(found["milliseconds"])
                    profile = profile or {"note": unseen[0]}
                if step is not None:
                    step.release()
                whole.release()  # the frames of a failure are gone only now
            budget.leave_out(found)
            row["way"] = found.get("way", way)
            yield row | (empty(notes[0]) if notes else found)
            if notes and options.largest and batch > 1 and "out of memory" in notes[0]:
                batches = [batch // 2]
            elif "busy" in profile:
                kept(options.out, row | profile)
                say(f"       {100 * profile['busy']:5.1f} % busy, {profile['kernels']} kernels")
            elif profile:
                say(f"       not profiled: {profile['note']}")
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
        captured: whether a step is recorded and replayed.

    Attributes:
        obstacle: why the steps that are measured are not recorded, though they were to be, or None.
    """

    def __init__(self, model: Any, device: torch.device, precision: str, *, captured: bool = False) -> None:
        from linearize.distill import headless

        self.model, self.device, self.precision, self.captured = model, device, precision, captured
        self.watch = Stopwatch(device)
        self.obstacle: str | None = None
        self._call: Callable[[], Any] | None = None
        with self.computing():
            self.head = headless.recognize(model, device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a forward pass, as in the stages of a run, over rows of one text each."""
        with ExitStack() as stack:
            stack.enter_context(without_masks())
            if self.precision == "autocast":
                stack.enter_context(
                    torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)
                )
            yield

    def call(self, batch: int, length: int) -> Callable[[], Tensor]:
        """One step on these many tokens; gives the loss."""
        from linearize.distill.captured import Captured
        from linearize.distill.finetune import predicts
        from linearize.objectives import next_targets, token_backward

        vocabulary = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (batch, length), generator=generator).to(self.device)
        given = {"input_ids": ids, "targets": next_targets(ids)}
        self.model.train()
        recording = Captured(self.model.parameters(), "benchmark") if self.captured else None
        self.obstacle = None

        def run(given: dict[str, Tensor], count: Tensor | None) -> Tensor:
            with self.computing():
                prediction = predicts(self.model, {"input_ids": given["input_ids"]}, self.head)
            return token_backward(prediction, given["targets"], {"next_token": 1.0}, count=count)

        def step() -> Tensor:
            self.model.zero_grad(set_to_none=True)
            if recording is None:
                return run(given, None)
            loss = recording(run, given, None)
            self.obstacle = recording.obstacle
            return loss

        return step

    def measured(self, batch: int, length: int) -> Row:
        """What a row holds: tokens a second, milliseconds, peak GiB, and seconds of the first step, which compiles.

        A step that cannot be recorded is measured as it runs without; the row says so, and why.

        Raises:
            LinearizeError: the loss is no number.
        """
        if not self.captured:
            return self._measured(batch, length)
        why: str | None
        try:
            found, why = self._measured(batch, length), self.obstacle
        except (torch.OutOfMemoryError, LinearizeError):
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            if any(sign in text for sign in LOST):
                raise
            found, why = {}, f"{type(error).__name__}: {text[:200]}"
        if not found:
            # outside of the handler, which holds the frames of what failed
            self.release()
            whole.release()
            self.captured = False
            try:
                found = self._measured(batch, length)
            finally:
                self.captured = True
        if why is not None:
            found |= {
                "way": self.precision,
                "note": f"not recorded: {why}{'; ' * bool(found['note'])}{found['note']}",
            }
        return found

    def _measured(self, batch: int, length: int) -> Row:
        """`measured`, recorded or not, as `captured` says.

        Raises:
            LinearizeError: see `measured`.
        """
        from linearize.distill.captured import WARM_UP

        step, losses = self.call(batch, length), []
        first = self.watch.once(lambda: losses.append(step()))
        self.watch.forget_peak()
        # those before a recording, and the one that records
        for _ in range(WARM_UP if self.captured else 0):
            step()
        again = self.watch.once(step)
        seconds, count = self.watch.seconds(step, again)
        peak, loss = self.watch.peak(), float(losses[0])
        if not loss < float("inf"):
            raise LinearizeError(f"the loss is {loss}")
        self._call = step
        return {
            "tokens_per_second": round(batch * length / seconds, 1),
            "milliseconds": round(1e3 * seconds, 3),
            "peak_gib": peak,
            "first_seconds": round(first, 2),
            "steps": count,
            "loss": round(loss, 4),
            "note": "" if self.head is not None else "the head is not recognized: all logits were held",
        }

    def profiled(self, milliseconds: float) -> Row:
        """See `profiles.profiled`; of the step that was measured last, which took so long."""
        assert self._call is not None, "nothing has been measured"
        return profiled(self._call, self.watch, milliseconds)

    def release(self) -> None:
        """Let go of gradients, and of what was recorded."""
        self._call = None
        self.model.zero_grad(set_to_none=True)


@contextmanager
def without_masks() -> Iterator[None]:
    """Around passes over rows that hold one text each, without padding: no mask is made, and nobody looks for one.

    As transformers has it where it may look: it waits for the device to learn that no documents are packed, and while a
    graph is recorded it makes a mask in place of looking, so that other kernels would run than in the steps before.
    """
    from transformers import masking_utils

    with (
        changed(masking_utils, "find_packed_sequence_indices", lambda *_: None),
        changed(masking_utils, "is_tracing", lambda *_: False),
    ):
        yield


def warmed(
    name: str,
    shape: str,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    precision: str,
    device: torch.device,
    *,
    captured: bool = False,
) -> str:
    """Compile what a recipe's training and decoding need, in a model of few layers; gives a line to print.

    What stands between the kernels is compiled for each batch and length.
    """
    from linearize.decode import Decoder

    started, layers = time.monotonic(), layers_of_each(name)
    with reported() as notes:
        compiled_ahead(name, shape, batches, lengths, precision, device, captured=captured)
        model = build(name, shape, "bf16", device, num_hidden_layers=layers).requires_grad_(False)
        for batch in (1, 64):
            ids = torch.zeros(batch, 128, dtype=torch.int64, device=device)
            Decoder(model, batch, length=256, capture=False).generate(ids, None, 4)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return f"{time.monotonic() - started:4.0f} s  {name}{': ' + notes[0] if notes else ''}"


def compiled_ahead(
    name: str,
    shape: str,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    precision: str,
    device: torch.device,
    *,
    captured: bool = False,
) -> None:
    """Compile what this process' training steps of these sizes need, in a model of few layers.

    A step that will be recorded runs once as it does before its recording, and leaves nothing behind.
    """
    model = build(name, shape, precision, device, num_hidden_layers=layers_of_each(name))
    step = Step(model, device, precision, captured=captured)
    for batch in dict.fromkeys(batches):
        for length in lengths:
            step.call(batch, length)()
            step.release()


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
