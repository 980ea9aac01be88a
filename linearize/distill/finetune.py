"""End-to-end stages: the converted model trained on text, on its teacher's predictions, or on both.

The teacher is the same model with its adapters off and its softmax attention back on, so it costs one more
forward pass and no second copy of the weights. Only a stage after which the base weights have changed needs a
copy; the runner gives it.

No tensor of all tokens' logits is made where the heads of both are recognized (`headless`) and every objective is
`fused`: the losses take final hidden states, and make logits a slice of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linearize import objectives, surgery
from linearize.distill import answers, processes, window_dropout
from linearize.distill.blocks import around_attention, repeated
from linearize.distill.device import sent
from linearize.distill.lent import is_lent
from linearize.distill.stage import StageTrainer
from linearize.kernels.distill import Head
from linearize.models.unwrapped import unwrapped
from linearize.objectives import Final, TopK
from linearize.objectives.headless import predict_final, recognize
from linearize.objectives.whole import whole_logits


class FinetuneTrainer(StageTrainer):
    """A stage whose objectives are of the level "model".

    Args:
        model: prepared by `trainable.prepare`.
        teacher: a model to compare with instead of the same model in teacher mode.
        **settings: see `StageTrainer`.
    """

    def __init__(self, model: nn.Module, *, teacher: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.teacher = teacher
        if is_lent(teacher) and self.passes.captured.obstacle is None:
            self.passes.captured.forgo("its teacher's blocks come and go")
        self.needs_teacher = needs_teacher(self.stage.objective) and not self.stage.top_k
        self._heads: tuple[Head, Head] | tuple[None, None] | None = None

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Labeled tokens of the whole optimizer step, in all processes, so that accumulation equals one large batch."""
        targets = [
            objectives.next_targets(batch["labels"], batch.get("position_ids")) for batch in batch_samples
        ]
        labeled = torch.stack([(target != -100).sum() for target in targets]).sum()
        labeled = sent(labeled, device)
        processes.add_up([labeled])
        return (labeled // self.sequences.size).clamp_min(1)  # each of a group has counted the same sequences

    def compiled_parts(self) -> list[nn.Module]:
        spread = self.sequences.size > 1
        models = [model for model in (self.trained_model, self.teacher) if model is not None]
        return [
            part
            for model in models
            for part in (around_attention(model, softmax=True) if spread else repeated(model))
        ]

    def micro_step(self, model: nn.Module, batch: dict[str, Tensor], count: Tensor | None) -> Tensor:
        """The step's loss [1], this micro-batch's share of it."""
        targets = objectives.next_targets(batch["labels"], batch.get("position_ids"))
        fused = objectives.fused(self.stage.objective) and answers.of_batch(batch) is None
        if fused:  # heads are told by a pass over one token, which is nobody else's
            with self.computing():
                self._recognized(model, batch["input_ids"].device)
        # checkpointed blocks compute their mixers once more as they are
        spread = partial(self.sequences.spread, again=not self.stage.gradient_checkpointing)
        with spread({**batch, "targets": targets}, [model, self.teacher]) as (own, _):
            return self._backward(model, own, own["targets"], count, fused=fused)

    def _backward(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        targets: Tensor,
        count: Tensor | None,
        *,
        fused: bool,
    ) -> Tensor:
        known = answers.of_batch(batch)
        teacher: Tensor | Final | TopK | None
        student, teacher = self.predictions(model, batch, teacher=self.needs_teacher, fused=fused)
        teacher = teacher if known is None else known
        loss = objectives.token_backward(student, targets, self.stage.objective, teacher=teacher, count=count)
        return loss[None]

    def around_pass(self) -> AbstractContextManager[None]:
        # the teacher's passes know no mixers
        return window_dropout.windows_off(surgery.converted(self.trained_model) if self.off else [], self.off)

    def predictions(
        self, model: nn.Module, batch: dict[str, Tensor], *, teacher: bool, fused: bool
    ) -> tuple[Tensor | Final, Tensor | Final | None]:
        """What student and, if asked for, teacher predict: logits [B, T, V], or what the heads make them of.

        Args:
            model: the student, put in training mode.
            batch: as in `micro_step`.
            teacher: whether it is needed.
            fused: whether the losses take hidden states.
        """
        head = teacher_head = theirs = None
        with self.computing():
            if fused:
                head, teacher_head = self._recognized(model, batch["input_ids"].device)
            if teacher:
                theirs = teacher_predicts(model, batch, self.teacher, teacher_head)
        model.train()
        with self.computing():
            return predicts(model, batch, head), theirs

    def _recognized(self, model: nn.Module, device: torch.device) -> tuple[Head, Head] | tuple[None, None]:
        """The heads of student and teacher; recognized at the first step, and both or neither."""
        if self._heads is None:
            head = recognize(model, device)
            other = head if head is None or self.teacher is None else recognize(self.teacher, device)
            self._heads = (None, None) if head is None or other is None else (head, other)
        return self._heads


def needs_teacher(objective: dict[str, float]) -> bool:
    """Whether one of the objectives compares with the teacher's logits."""
    return any(getattr(objectives.get(name), "needs_teacher", False) for name in objective)


def predict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits [B, T, V] in the compute dtype; packed documents apart."""
    given = {name: batch.get(name) for name in ("attention_mask", "position_ids")}
    return whole_logits(model, batch["input_ids"], **given)


def predicts(model: nn.Module, batch: dict[str, Tensor], head: Head | None) -> Tensor | Final:
    """`predict`, or hidden states if the head is known."""
    return predict(model, batch) if head is None else predict_final(model, batch, head)


def predict_teacher(model: nn.Module, batch: dict[str, Tensor], teacher: nn.Module | None = None) -> Tensor:
    """The teacher's logits [B, T, V], without a graph and without dropout."""
    found = teacher_predicts(model, batch, teacher, None)
    assert isinstance(found, Tensor)
    return found


def teacher_predicts(
    model: nn.Module, batch: dict[str, Tensor], teacher: nn.Module | None, head: Head | None
) -> Tensor | Final:
    """`predict_teacher`, or its hidden states if the head is known."""
    source = model if teacher is None else teacher
    training = source.training
    source.eval()
    try:
        with torch.no_grad(), as_teacher(model) if teacher is None else nullcontext():
            return predicts(source, batch, head)
    finally:
        source.train(training)


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """Adapters off and the original attention on, inside the block."""
    if not hasattr(model, "disable_adapter"):
        with surgery.mode(model, "teacher"):
            yield
        return
    # peft marks the active adapter as trainable when it switches it back on; a stage may have frozen it.
    frozen = [p for name, p in model.named_parameters() if ".lora_" in name and not p.requires_grad]
    adapted: Any = model
    try:
        with adapted.disable_adapter(), surgery.mode(unwrapped(model), "teacher"):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
