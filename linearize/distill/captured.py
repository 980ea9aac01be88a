"""A micro-step in one CUDA graph: recorded once, then replayed, so that the device never waits for Python.

Packed batches have one shape, and a micro-step reads nothing back: forward, losses and backward are one list of
kernels. The first ones run one by one, on real batches (kernels compile, masks are checked, libraries allocate); then
the list is recorded and replayed on buffers that stay where they are, the gradients' among them. Whatever cannot be
recorded goes on one by one, as does a batch of another kind, of another shape for one; when such batches come again and
again, as where a stage's length or batch changes, they are recorded in place of the old ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from linearize.recording import record

log = logging.getLogger(__name__)

WARM_UP = 3
"""Micro-steps that run one by one before the recording."""

MicroStep = Callable[[dict[str, Tensor], Tensor | None], Tensor]
"""(batch, count of labeled tokens) -> detached losses [N]; adds to the parameters' gradients."""


class Captured:
    """Micro-steps of one stage, from a CUDA graph as soon as there is one.

    Args:
        parameters: everything that trains.
        name: of the stage, for the log.
        obstacle: why nothing is to be recorded, or None.

    Attributes:
        graph: the recording, or None: there is none yet, or there will be none.
        obstacle: why there will be none, or None.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], name: str, obstacle: str | None = None) -> None:
        self.parameters, self.name = list(parameters), name
        self.graph: torch.cuda.CUDAGraph | None = None
        self.obstacle = obstacle
        self._key: Hashable = None
        self._newest: Hashable = None
        self._seen = 0
        self._inputs: dict[str, Tensor] = {}
        self._losses: Tensor | None = None
        self._receivers: list[nn.Parameter] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._side: torch.cuda.Stream | None = None

    def __call__(
        self, run: MicroStep, batch: dict[str, Tensor], count: Tensor | None, kind: Hashable = None
    ) -> Tensor:
        """One micro-step: `run`, or its recording.

        Args:
            run: the micro-step; on the host it reads nothing that may change but `kind` and the shapes of its tensors.
            batch: tensors on the device.
            count: see `StageTrainer.micro_step`.
            kind: tells micro-steps apart that do other things with the same shapes.
        """
        if self.obstacle is not None:
            return run(batch, count)
        given = batch if count is None else {**batch, "": count}
        key = (kind, *((name, tuple(x.shape), x.dtype, x.device) for name, x in given.items()))
        if key != self._newest:
            self._newest, self._seen = key, 0
        if key != self._key and self._seen >= WARM_UP:
            if self.graph is not None:
                log.info("stage '%s': its steps have changed; they are recorded anew", self.name)
            self.release()
            self._key = key
        if key != self._key:
            self._seen += 1
            return self._aside(run, batch, count)
        if self.graph is None:
            try:
                self._record(run, given)
            except (RuntimeError, ValueError) as error:
                self.forgo(" ".join(str(error).split())[:200] or type(error).__name__)
                return run(batch, count)
        assert self.graph is not None and self._losses is not None
        torch._foreach_copy_(list(self._inputs.values()), [given[name] for name in self._inputs])
        self._gradients_in_place()
        self.graph.replay()
        return self._losses.clone()

    def release(self) -> None:
        """Let go of the recording and its memory."""
        self.graph, self._losses, self._key, self._seen = None, None, None, 0
        self._inputs, self._gradients = {}, []

    def forgo(self, why: str) -> None:
        """Record nothing from here on, and say why in the log."""
        self.release()
        self.obstacle = why
        log.info(
            "stage '%s' runs without a CUDA graph, more slowly where batches are small: %s", self.name, why
        )

    def _aside(self, run: MicroStep, batch: dict[str, Tensor], count: Tensor | None) -> Tensor:
        """On a stream of its own, as what is to be recorded must have run before."""
        current = torch.cuda.current_stream()
        self._side = self._side or torch.cuda.Stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            losses = run(batch, count)
        current.wait_stream(self._side)
        self._receivers = [p for p in self.parameters if p.grad is not None]
        return losses

    def _record(self, run: MicroStep, given: dict[str, Tensor]) -> None:
        """Record `run`; nothing is computed yet.

        Raises:
            RuntimeError: something in it cannot be recorded.
        """
        self._inputs = {name: x.clone() for name, x in given.items()}
        for parameter in self._receivers:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._gradients.append((parameter, parameter.grad))
        known = {id(parameter) for parameter in self._receivers}
        inputs = {name: x for name, x in self._inputs.items() if name}
        graph, losses = record(lambda: run(inputs, self._inputs.get("")))
        strays = [p for p in self.parameters if p.grad is not None and id(p) not in known]
        for parameter in strays:
            parameter.grad = None
        if strays:
            raise RuntimeError(f"{len(strays)} parameters got their first gradient while it was recorded")
        self.graph, self._losses = graph, losses

    def _gradients_in_place(self) -> None:
        """Gradients where the recording adds to them: zero where the optimizer has let go of them."""
        fresh: list[Any] = []
        for parameter, gradient in self._gradients:
            if parameter.grad is gradient:
                continue
            if parameter.grad is None:
                fresh.append(gradient)
            else:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        if fresh:
            torch._foreach_zero_(fresh)
