"""The steps of a stage: how many, and how many sequences of which length each of them takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from linearize.config.schedule import Over

if TYPE_CHECKING:
    from linearize.config.schema import StageConfig


@dataclass(frozen=True)
class Phase:
    """Steps that are alike.

    Attributes:
        first: its first step, from 0.
        steps: how many.
        batch, length: sequences of a step, and tokens of each.
        trained: tokens before it.
    """

    first: int
    steps: int
    batch: int
    length: int
    trained: int

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.length


@dataclass(frozen=True)
class Course:
    """A stage's token budget in steps.

    Attributes:
        phases: one after the other, at least one of at least one step.
        budget: tokens that were asked for; whole steps may leave some.
    """

    phases: tuple[Phase, ...]
    budget: int

    @classmethod
    def of(cls, stage: StageConfig, length: int) -> Course:
        """Whole optimizer steps that fit in the stage's tokens, at least one.

        Args:
            stage: its tokens and batch size, and its length where it has one of its own.
            length: tokens of a sequence where it has none.
        """
        own = None if stage.data is None else stage.data.length
        return cls.planned(stage.tokens, Over.of(stage.batch_size), Over.of(length if own is None else own))

    @classmethod
    def planned(cls, tokens: int, batches: Over, lengths: Over) -> Course:
        """From a budget of tokens, and the two values over it."""
        phases: list[Phase] = []
        step = trained = 0
        while True:
            place = (step, trained, tokens)
            batch, length = batches.at(*place), lengths.at(*place)
            size = batch * length
            steps = max((tokens - trained) // size, 0 if phases else 1)
            for over in (batches, lengths):
                part = over.part(*place) + 1
                if part < len(over.starts):
                    ahead = over.begins(part, tokens) - (step if over.by_step else trained)
                    steps = min(steps, ahead if over.by_step else -(-ahead // size))
            if steps <= 0:
                return cls(tuple(phases), tokens)
            phases.append(Phase(step, steps, batch, length, trained))
            step, trained = step + steps, trained + steps * size

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.phases[-1].first + self.phases[-1].steps

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.trained(self.steps)

    @cached_property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(phase.length for phase in self.phases)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Batch and length of every phase, each pair once."""
        return list(dict.fromkeys((phase.batch, phase.length) for phase in self.phases))

    @property
    def heaviest(self) -> tuple[int, int]:
        """The batch and length that memory has to hold: a pass takes a whole sequence at least."""
        return max(self.shapes, key=lambda shape: (shape[1], shape[0]))

    def phase(self, step: int) -> Phase:
        """The phase of a step; the last one's for those behind the end."""
        return max((phase for phase in self.phases if phase.first <= step), key=lambda phase: phase.first)

    def trained(self, step: int) -> int:
        """Tokens of the steps before `step`."""
        phase = self.phase(step)
        return phase.trained + (step - phase.first) * phase.step_tokens

    def value(self, over: Over, step: int) -> Any:
        """A value over the stage, at a step."""
        return over.at(step, self.trained(step), self.budget)
