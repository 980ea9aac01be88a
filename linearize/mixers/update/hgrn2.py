"""HGRN2's rule: what is not forgotten is written, key = 1 - decay (Qin et al. 2024, arXiv 2404.07904, eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.additive import Additive


@UPDATES.register("hgrn2")
class HGRN2(Additive):
    """S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T.

    Limitations: the features of the key are not used, only its gate; a teacher's key geometry is lost unless the
    gate is made from the key (Liger's ``key_pool``).
    """

    decays: ClassVar[tuple[str, ...]] = ("feature",)
    dense = False
    takes_products = False
    uses_keys = False

    @dataclass
    class Config(Additive.Config):
        pass

    def keys(self, stream: Stream) -> Tensor:
        assert stream.log_decay is not None
        # a log decay of zero (padding) writes nothing
        return -stream.log_decay.expm1()
