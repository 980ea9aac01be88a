"""A training step that is measured: forward and backward of a whole model on random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.bench import whole
from linearize.bench.profiles import profiled
from linearize.bench.runner import LOST
from linearize.bench.whole import Row, Stopwatch
from linearize.errors import LinearizeError
from linearize.patch import changed

if TYPE_CHECKING:
    from linearize.distill.blocks import Blocks

COMPILED, CAPTURED = "compiled", "captured"
"""Added to a row's way where blocks are compiled, and where a CUDA graph is replayed."""


def way_of(precision: str, *, compiled: bool, captured: bool) -> str:
    """What a row says of how its steps run."""
    return ", ".join([precision, *[COMPILED] * compiled, *[CAPTURED] * captured])


class Step:
    """Forward and backward of a model on random tokens.

    Args:
        model: a causal language model of transformers.
        device: where it is.
        precision: bf16 or autocast.
        compiled: whether the model's blocks are compiled.
        captured: whether a step is recorded and replayed.
        like: blocks whose compiled form these share.
        beside: a folder of processes that stand still while it is timed, see `quiet`.

    Attributes:
        blocks: what is compiled, and why it is not.
        obstacle: why the steps that are measured are not recorded, though they were to be, or None.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        precision: str,
        *,
        compiled: bool = False,
        captured: bool = False,
        like: Blocks | None = None,
        beside: Path | None = None,
    ) -> None:
        from linearize.distill.blocks import Blocks, repeated
        from linearize.objectives import headless

        self.compiled, self.blocks = compiled, Blocks([], "benchmark")
        self.model, self.device, self.precision, self.captured = model, device, precision, captured
        self.watch = Stopwatch(device, beside=beside)
        self.obstacle: str | None = None
        self._call: Callable[[], Any] | None = None
        with self.computing():
            self.head = headless.recognize(model, device)
        if compiled:  # not for that one token
            self.blocks = Blocks(repeated(model), "benchmark", like)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a forward pass, as in the stages of a run, over rows of one text each."""
        from linearize import surgery

        with ExitStack() as stack:
            stack.enter_context(without_masks())
            if self.compiled and surgery.converted(self.model):
                stack.enter_context(surgery.trusting(self.model))
            stack.enter_context(self.blocks.compiled())
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
                "way": way_of(self.precision, compiled=self.compiled, captured=False),
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
            "note": "; ".join(self._notes()),
        }

    def _notes(self) -> Iterator[str]:
        if self.head is None:
            yield "the head is not recognized: all logits were held"
        if self.compiled and self.blocks.obstacle is not None:
            yield f"blocks are not compiled: {self.blocks.obstacle}"

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
