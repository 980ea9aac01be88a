"""fla's RWKV-7 (Peng et al. 2025, arXiv 2503.14456): its time mixing can be ours, the model around it cannot."""

from __future__ import annotations

from collections.abc import Iterator

from linearize.export.layouts.difference import Difference
from linearize.export.layouts.layer import ForeignLayer, Given
from linearize.export.layouts.norm import head_norm
from linearize.export.layouts.rwkv7_rule import rule_differences


class RWKV7(ForeignLayer):
    """RWKV-7's rule under a layer norm of each head, inside layer norms and an MLP of squared ReLU with token shift."""

    name = "RWKV-7"
    model = "rwkv7"

    def differences(self, given: Given) -> Iterator[Difference]:
        yield Difference(
            "body",
            "RMS norms and SwiGLU",
            "layer norms, and an MLP of squared ReLU with token shift; none of a teacher's",
        )
        yield from rule_differences(given)
        norm = head_norm(given.mixer)
        if norm is None or not norm.centered:
            ours = f"{given.mixer['normalizer']['name']}"
            yield Difference("normalizer", ours, "a layer norm of each head (group_norm, kind layer)")
