"""The mixer: wires the parts in the order of the grammar, in three equal forms, and owns nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Partial, accumulator, documents, positions, repeat_heads
from linearize.mixers.combine import Combine
from linearize.mixers.feature_map import FeatureMap
from linearize.mixers.state import State
from linearize.mixers.update import Update
from linearize.mixers.window import Handed, Window

BRANCHES = ("window", "linear")


class Mixer(nn.Module):
    """A token mixer: a window branch, a recurrent branch over what leaves the window, and the rule that joins them.

    The three forms compute one function. `parallel` is the definition (quadratic), `chunked` trains and prefills in
    O(T) memory, `step` takes one token in constant memory. All accept q [B, T, H, K], k [B, T, N, K], v [B, T, N, V]
    in any float dtype and return [B, T, H, V] in float32 (float64 for float64 inputs).

    Args:
        shape: the layer's numbers.
        window: always there, possibly `none`.
        feature_map, update: the recurrent branch, or None.
        combine: the joining rule when both branches exist.
    """

    def __init__(
        self,
        shape: LayerShape,
        window: Window,
        feature_map: FeatureMap | None,
        update: Update | None,
        combine: Combine | None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.window = window
        self.feature_map = feature_map
        self.update = update
        self.combine = combine
        self.branch_off: str | None = None

    @property
    def added_parameters(self) -> int:
        """Parameters that the mixer adds to the model."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def has_both_branches(self) -> bool:
        """Whether `branch_off` leaves something to look at."""
        return self.combine is not None

    def state_bytes(self, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the state for a model in `dtype`; zero tokens into a `full` window."""
        return self.initial_state(batch, dtype, torch.device("meta")).bytes

    def initial_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        """An empty state for `batch` rows; sums are float32 or wider, copies of keys and values in `dtype`."""
        tensors = self.window.initial(batch, dtype, device)
        if self.update is not None:
            tensors |= self.update.initial(batch, accumulator(dtype), device)
        if self.feature_map is not None and self.feature_map.uses_position:
            tensors["position"] = torch.zeros(batch, dtype=torch.int64, device=device)
        return State(tensors)

    def reset_parameters(self) -> None:
        """Every part back to its initial values."""
        for part in (self.window, self.feature_map, self.update, self.combine):
            if part is not None:
                part.reset_parameters()

    def parallel(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        *,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        """The definition.

        Args:
            q, k, v: see the class; v None asks for the normalized weights [B, R, H, T] instead of the output.
            valid: [B, T] bool, false on padding.
            starts: [B, T] bool, true where a packed document begins.
            rows: query rows to compute (all by default); q still holds every row.

        Returns:
            [B, R, H, V], float32 or wider.
        """
        batch, tokens = k.shape[:2]
        rows = slice(0, tokens) if rows is None else rows
        order = torch.arange(tokens, device=k.device)
        age = order[rows, None] - order
        docs = documents(starts, batch, tokens, k.device)
        visible = (age >= 0) & (docs[:, rows, None] == docs[:, None, :])
        if valid is not None:
            visible = visible & valid[:, None, :]
        with torch.autocast(q.device.type, enabled=False):
            q, k = self._widen(q[:, rows]), self._widen(k)
            v = None if v is None else self._widen(v)
            near, left = self.window.parallel(q, k, v, visible, age)
            far = None
            if self.update is not None and self.feature_map is not None and left is not None:
                position, q_position = None, None
                if self.feature_map.uses_position:
                    real = torch.ones_like(docs, dtype=torch.bool) if valid is None else valid
                    position, _ = positions(real, docs, docs.new_zeros(batch))
                    q_position = position[:, rows]
                phi_k = self.feature_map.key(k, position)
                shared_v = None if v is None else repeat_heads(v, phi_k.shape[2] // v.shape[2])
                far = self.update.parallel(self.feature_map.query(q, q_position), phi_k, shared_v, left)
            return self._join(near, far)

    def chunked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """The same in O(T) memory; with a state, the tokens before are part of the sequence and the state is written.

        A carried state belongs to the document that is open when the call begins; a start at position 0 closes it.
        """
        batch, tokens = k.shape[:2]
        if state is None:
            state = self.initial_state(batch, k.dtype, k.device)
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=k.device) if valid is None else valid
        docs = documents(starts, batch, tokens, k.device)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = self._widen(q), self._widen(k), self._widen(v)
            near, handed = self.window.chunked(q, k, v, valid, docs, state)
            far = None
            if self.update is not None and self.feature_map is not None and handed is not None:
                position = self._advance(valid, docs, state)
                phi_k, shared_v = self._recurrent_input(handed, position)
                phi_q = self.feature_map.query(q, position)
                far = self.update.chunked(phi_q, phi_k, shared_v, docs, state)
            return self._join(near, far)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: State, valid: Tensor | None = None) -> Tensor:
        """One token (T = 1) against the state, which is updated in place."""
        valid = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if valid is None else valid
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            q, k, v = self._widen(q), self._widen(k), self._widen(v)
            near, handed = self.window.step(q, k, v, valid, state)
            far = None
            if self.update is not None and self.feature_map is not None and handed is not None:
                position = self._advance(valid, torch.zeros_like(valid, dtype=torch.int64), state)
                phi_k, shared_v = self._recurrent_input(handed, position)
                far = self.update.step(self.feature_map.query(q, position), phi_k, shared_v, state)
            return self._join(near, far)

    def _advance(self, valid: Tensor, docs: Tensor, state: State) -> Tensor | None:
        """Positions [B, T] of the new tokens for a map that uses them; the count goes on in the state."""
        if self.feature_map is None or not self.feature_map.uses_position:
            return None
        position, seen = positions(valid, docs, state["position"])
        state.write({"position": seen})
        return position

    def _recurrent_input(self, handed: Handed, position: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features and values of the keys handed on, each `window.size` tokens older than the query at its place."""
        assert self.feature_map is not None
        k, v = self._widen(handed.k), self._widen(handed.v)
        k_position = None if position is None else position - (self.window.size or 0)
        phi_k = self.feature_map.key(k, k_position) * handed.valid[..., None, None].to(k.dtype)
        return phi_k, repeat_heads(v, phi_k.shape[2] // v.shape[2])

    def _join(self, near: Partial | None, far: Partial | None) -> Tensor:
        if near is not None and far is not None and self.combine is not None:
            if self.branch_off is None:
                return self.combine(near, far)
            return (far if self.branch_off == "window" else near).normalized()
        only = near if near is not None else far
        assert only is not None, "a mixer without any branch passed the check"
        return only.normalized()

    @staticmethod
    def _widen(x: Tensor) -> Tensor:
        return x.to(accumulator(x.dtype))
