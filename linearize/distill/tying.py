"""Tied embeddings, apart for the time of a stage.

Small models share one table between their first and last layer, and distilling all weights hurts it: RADLADS
(Goldstein et al. 2025, arXiv 2505.03005) had poor results until the two were apart during distillation, with the
trained head thrown away afterwards. The reason is not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from linearize.models.unwrapped import unwrapped


@contextmanager
def untied(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Inside, the output head is a copy of the embedding table, and trains if that does; then it is the table again.

    Args:
        model: nothing happens to one whose embeddings are not tied.
        on: false does nothing.
    """
    base = unwrapped(model)
    table, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not on or head is None or head.weight is not table.weight:
        yield
        return
    shared = table.weight
    before, base.config.tie_word_embeddings = base.config.tie_word_embeddings, False
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    try:
        yield
    finally:
        head.weight = shared
        base.config.tie_word_embeddings = before
