"""Preference stages: pairs of answers, learned against the teacher as reference."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from linearize import data, objectives
from linearize.config.schema import DataConfig
from linearize.data.packing import IGNORED
from linearize.data.tokens import Tokens
from linearize.distill.device import sent
from linearize.distill.finetune import FinetuneTrainer
from linearize.errors import DataError

log = logging.getLogger(__name__)


class PreferenceTrainer(FinetuneTrainer):
    """A stage whose objectives are of the level "pair"; see `FinetuneTrainer`."""

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Pairs of the whole optimizer step, in all processes."""
        return sent(torch.tensor(self.course.phase(self.state.global_step).batch), device)

    def micro_step(self, model: nn.Module, batch: dict[str, Tensor], count: Tensor | None) -> Tensor:
        assert count is not None
        student, reference = self.predictions(model, batch, teacher=True, fused=True)
        assert reference is not None
        loss = objectives.pair_backward(
            student,
            objectives.next_targets(batch["labels"], batch["position_ids"]),
            batch["side"],
            self.stage.objective,
            teacher=reference,
            beta=self.stage.dpo_beta,
            count=count,
        )
        return loss[None]


class Pairs(Dataset[dict[str, Tensor]]):
    """One pair to a sequence: the chosen answer after its prompt, the rejected one after its own, then padding.

    The three are documents that do not see each other. An item holds what a packed sequence does (`PackedDataset`),
    with -100 on prompts, and `side` [T] int64: 1 on tokens of the chosen answer, -1 of the rejected one, else 0.
    """

    def __init__(
        self, pairs: list[tuple[list[int], list[int], list[int]]], *, length: int, padding: int
    ) -> None:
        self.pairs = pairs
        self.length = length
        self.padding = padding

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt, *answers = self.pairs[index]
        spare = self.length - 2 * len(prompt) - sum(map(len, answers))
        ids: list[int] = []
        positions: list[int] = []
        side: list[int] = []
        for sign, answer in zip((1, -1), answers, strict=True):
            ids += prompt + answer
            positions += range(len(prompt) + len(answer))
            side += [0] * len(prompt) + [sign] * len(answer)
        input_ids = torch.tensor(ids + [self.padding] * spare)
        sides = torch.tensor(side + [0] * spare)
        return {
            "input_ids": input_ids,
            "position_ids": torch.tensor(positions + list(range(spare))),
            "labels": torch.where(sides == 0, IGNORED, input_ids),
            "side": sides,
        }


def pairs(tokenizer: Any, config: DataConfig, *, tokens: int, seed: int) -> Pairs:
    """The pairs of a token budget, in an order that the seed fixes; ones that do not fit a sequence are left out.

    Args:
        tokenizer: of the model.
        config: `source` of the template preference, and the length that a pair may have.
        tokens: budget; ``ceil(tokens / T)`` pairs at most.
        seed: of the order.

    Raises:
        DataError: the source is missing or unreadable, no pair fits, or no pair prefers anything.
    """
    if tokenizer is None:
        raise DataError("the model has no tokenizer; put the tokenizer's files in its folder")
    encode, wanted, found, dropped = Tokens(tokenizer), math.ceil(tokens / config.length), [], 0
    for document in data.load_texts(
        config.source, split=config.split, template=config.template, tokenizer=tokenizer, seed=seed
    ):
        if len(document.parts) != 3:
            raise DataError(
                f"{config.source}: plain text holds no pairs; give rows with prompt, chosen and rejected"
            )
        prompt, chosen, rejected = encode.parts(document)
        if not document.framed:
            end = [] if encode.end is None else [encode.end]
            prompt, chosen, rejected = encode.begin + prompt, chosen + end, rejected + end
        if 2 * len(prompt) + len(chosen) + len(rejected) > config.length:
            dropped += 1
            continue
        found.append((prompt, chosen, rejected))
        if len(found) == wanted:
            break
    if not found:
        raise DataError(
            f"{config.source}: no pair fits into {config.length:,} tokens (prompt and answer, twice); raise data.length"
        )
    if dropped:
        log.info("%s: %d pairs longer than %d tokens are left out", config.source, dropped, config.length)
    _check_preferred(found, config.source)
    return Pairs(found, length=config.length, padding=encode.end or 0)


def _check_preferred(found: list[tuple[list[int], list[int], list[int]]], source: Any) -> None:
    """Refuse pairs of which none has two answers: what comes of a pair is the difference of the two.

    Tokens are compared, so that answers count as the same which a chat template makes the same.
    """
    same = sum(chosen == rejected for _, chosen, rejected in found)
    if same == len(found):
        raise DataError(
            f"{source}: chosen and rejected are the same answer in all pairs that are read ({same:,}), so that nothing "
            "would be learned; look at what wrote the two columns, and give pairs that differ"
        )
    if same:
        log.warning(
            "%s: %s of %s pairs have one answer as chosen and as rejected, and teach nothing; take them out",
            source,
            f"{same:,}",
            f"{len(found):,}",
        )
