"""Update rules of the recurrent branch: features of q and k, and values -> Partial and state; one file each."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.mixers.base import NARROW, LayerShape, Part, Partial
from linearize.mixers.shift import ShiftedProjections
from linearize.mixers.state import State
from linearize.mixers.update.first_values import FirstValues
from linearize.mixers.update.start import LearnedStart
from linearize.registry import Registry, discover


@dataclass
class Stream:
    """What enters an update rule. Keys that nobody may see have zero features, zero log decay and `valid` false.

    Attributes:
        q: [B, T, H, F] features (in the one-token form T = 1).
        k: [B, T, M, F]; in the one-token form of a blockwise window, several keys or none may come with one query.
        v: [B, T, M, V].
        docs: [B, T] document numbers, non-decreasing; the carried state belongs to document 0.
        valid: [B, T] bool.
        log_decay: None, per head [B, T, M], or per feature [B, T, M, F].
        hidden: [B, T, D], the layer's input, for rules that read it.
        dtype: of the model's own q, k and v, from which these were widened.
        fresh: the state is empty and nobody looks at it afterwards.
        weights: v holds identity values, which show the weights of the keys.
        scale: None, or q and k are no features but [B, T, H, D] and [B, T, M, D] of weights 1 + z + z^2 / 2, z = scale
            q.k; then keys that nobody may see are told by `valid` alone, and the heads of v divide M.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    docs: Tensor
    valid: Tensor
    log_decay: Tensor | None = None
    hidden: Tensor | None = None
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    weights: bool = False
    fresh: bool = False

    def narrow(self, *tensors: Tensor, grows: bool = False) -> tuple[Tensor, ...]:
        """As Triton's kernels take them fastest: in the model's sixteen bits; products add up in float32.

        Args:
            grows: the rule answers with a sum over the text, which can pass what float16 holds: that is widened.
        """
        if self.dtype not in NARROW or not dispatch.use_triton(*tensors):
            return tensors
        dtype = torch.float32 if grows and self.dtype == torch.float16 else self.dtype
        return tuple(x.to(dtype) for x in tensors)

    def decays(self) -> Tensor | None:
        """`log_decay` for kernels that read a text: one per feature is as large as the keys, and `narrow` like them.

        bfloat16 rounds a log decay x by 2^-9 of itself, so over any stretch, where x adds up to X < 0, the decay exp(X)
        by at most 2^-9 |X| exp(X) <= 2^-9 / e: less than it rounds the key by. What float16 rounds slow decays by,
        2^-25 each, comes to 2^-9 after 65,536 tokens.
        """
        if self.log_decay is None or self.log_decay.dim() == 3:
            return self.log_decay
        return self.narrow(self.log_decay)[0]


@dataclass
class Transition:
    """What a text does to the state that it meets: each of its tensors becomes `kept` of it, and `added`.

    Attributes:
        kept: [B, M, F or 1] factors of the rows, or with `mixes` [B, M, F, F] from the left.
        added: name in the state -> what an empty one has become, [B, M, F, V] or [B, M, F].
        mixes: whether `kept` is a matrix.
    """

    kept: Tensor
    added: dict[str, Tensor]
    mixes: bool = False

    def __call__(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state behind the text."""
        return {name: self._kept(state[name]) + value for name, value in self.added.items()}

    def _kept(self, x: Tensor) -> Tensor:
        if self.mixes:
            return self.kept @ x
        return x * (self.kept if x.dim() == 3 else self.kept[..., None])


WIDEST = 256
"""Features or values of a head that the Triton kernels take."""


class Update(Part):
    """Base of the update rules: `make` and `reset_parameters` are all that a rule adds to its construction.

    Args:
        config: the rule's options.
        heads: heads of the recurrent state, M.
        feature_dim: F.
        value_dim: V.
        shape: the layer's numbers.
        running_sum: keep the sum of the weights too, for a normalizer that divides by it.

    Attributes:
        decays: kinds of gate that the rule takes: "none", "head", "feature".
        dense: whether the ungated rule can be computed under an arbitrary visibility mask, as keys that arrive late
            out of a window need it.
        sums_weights: whether the rule has weights that a running sum can add up.
        positive: whether it divides by sums of the features itself, so that none may be negative.
        uses_keys: whether it reads the features of the key.
        uses_hidden: whether it reads the layer's input.
        takes_products: whether without a gate it takes q and k as a map `projected` them; see `Stream.scale`.
        decay: the kind of gate that it runs under, one of `decays`; set by whoever wires the branch.
        at_zero: of the feature map, see there; set by whoever wires the branch.
        learned: the state that every text begins with, or None for an empty one.
        mix: [D], how much of the token before it reads in place of a token, or None for nothing (token shift).
        first: mixes values with those of the model's first converted layer, or None.
        inputs: how the layer's own projections read tokens mixed with those before them, or None: they do not.
    """

    decays: ClassVar[tuple[str, ...]] = ("none",)
    dense: ClassVar[bool] = False
    sums_weights: ClassVar[bool] = True
    positive: ClassVar[bool] = False
    uses_keys: ClassVar[bool] = True
    uses_hidden: ClassVar[bool] = False
    takes_products: ClassVar[bool] = False

    mix: Tensor | None

    def __init__(
        self,
        config: Any,
        heads: int,
        feature_dim: int,
        value_dim: int,
        shape: LayerShape,
        running_sum: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.heads, self.feature_dim, self.value_dim = heads, feature_dim, value_dim
        self.running_sum = running_sum
        self.decay = "none"
        self.at_zero = 0.0
        self.register_parameter("mix", None)
        self.learned: LearnedStart | None = None
        self.first: FirstValues | None = None
        self.inputs: ShiftedProjections | None = None
        self.make(shape)
        self.reset_parameters()

    def make(self, shape: LayerShape) -> None:
        """The rule's own parameters, without values, and what it takes from its config."""

    @classmethod
    def gate_dim(cls, config: Any, feature_dim: int) -> int:
        """Width of a gate per feature: F, unless the rule's memory has another axis."""
        return feature_dim

    def form(self) -> AbstractContextManager[None]:
        """Around a kernel's call: heads too wide for Triton run in torch, in linear memory too, unless forced."""
        wide = max(self.feature_dim, self.value_dim) > WIDEST
        return dispatch.kernels("torch") if wide and dispatch.automatic() else nullcontext()

    def learn_start(self, weight: float = 1.0) -> None:
        """For rules that are linear in their state; `weight` as `LearnedStart` has it."""
        size = (self.heads, self.feature_dim, self.value_dim)
        sums = self.running_sum and self.sums_weights
        self.learned = LearnedStart(*size, running_sum=sums, weight=weight)

    def decayed(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What a learned start needs of the state: the log decays since the document began."""
        if self.learned is None or self.decay == "none":
            return {}
        each = self.learned.sums.shape[1]
        size = (batch, self.heads, *((each,) if self.decay == "feature" else ()))
        return {"since": torch.zeros(size, dtype=dtype, device=device)}

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Empty tensors of the state, each [B, ...]; `dtype` is float32 or wider."""
        raise NotImplementedError(type(self))  # pragma: no cover - every registered rule defines it

    def masked(self, q: Tensor, k: Tensor, v: Tensor | None, visible: Tensor) -> Partial:
        """`dense` rules only: q [B, R, H, F] against all keys under `visible` [B, R, S]; v None gives the weights."""
        raise NotImplementedError(type(self))  # pragma: no cover

    def parallel(self, stream: Stream) -> Partial:
        """The definition: a loop over tokens, or dense."""
        raise NotImplementedError(type(self))  # pragma: no cover

    def chunked(self, stream: Stream, state: State) -> Partial:
        """O(T)-memory form; writes the new state."""
        raise NotImplementedError(type(self))  # pragma: no cover

    def has_factors(self) -> bool:
        """Whether its weights are q_t.`keys`_s exp(log decays between s and t), divided by their sum or not."""
        return False

    def keys(self, stream: Stream) -> Tensor:
        """What is written under, where `has_factors`."""
        raise NotImplementedError(type(self))  # pragma: no cover

    def transits(self) -> bool:
        """Whether `transition` says what a text does to a state, whatever that is: the rule is affine in its state."""
        return False

    def transition(self, stream: Stream) -> Transition:
        """What all of a stream does to the state, with a gradient; its queries are not read."""
        raise NotImplementedError(type(self))  # pragma: no cover - asked for where `transits`

    def step(self, stream: Stream, state: State) -> Partial:
        """One query: the keys are added, then it reads; in place."""
        raise NotImplementedError(type(self))  # pragma: no cover

    def weights(self, stream: Stream) -> Partial:
        """The weights [B, T, H, S] in the numerator's place: every rule is linear in the values, so identity values
        show them."""
        batch, tokens = stream.k.shape[:2]
        eye = torch.eye(tokens, dtype=stream.q.dtype, device=stream.q.device)
        values = eye[None, :, None].expand(batch, -1, self.heads, -1)
        return self.parallel(replace(stream, v=values, weights=True))


UPDATES: Registry[Update] = Registry("update rule")
discover(sys.modules[__name__])
