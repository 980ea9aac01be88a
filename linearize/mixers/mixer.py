"""The mixer: wires the parts in the order of the grammar, in three equal forms, and owns nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.kernels import dispatch
from linearize.mixers import fused, shift
from linearize.mixers.base import LayerShape, Part, Partial, accumulator, documents, narrows
from linearize.mixers.beside import Beside, Plain
from linearize.mixers.combine import Combine
from linearize.mixers.feature_map import FeatureMap
from linearize.mixers.given import Given
from linearize.mixers.inputs import entering
from linearize.mixers.offloaded import with_weights
from linearize.mixers.output import Output
from linearize.mixers.padding import has_gaps, leading
from linearize.mixers.position import Position
from linearize.mixers.recurrent import Recurrent
from linearize.mixers.state import State
from linearize.mixers.update import Update
from linearize.mixers.window import Window

BRANCHES = ("window", "linear")


class Mixer(nn.Module):
    """A token mixer: a window branch, a recurrent branch over what the window hands on, and the rule that joins them.

    The three forms compute one function. `parallel` is the definition (quadratic, or a loop), `chunked` trains and
    prefills in O(T) memory, `step` takes one token in constant memory. All accept q [B, T, H, K], k [B, T, N, K],
    v [B, T, N, V] in any float dtype and return [B, T, H, V] in float32 (float64 for float64 inputs; in the dtype of v
    where kernels run on sixteen bits, see `narrows`, or one computes the whole composition, see `fused`). `hidden`
    [B, T, D], the layer's input, `plain`, q and k before RoPE, and `first` [B, T, N, V], the values of the model's
    first converted layer, are needed where `uses_hidden`, `needs_plain` and `uses_first` say so. A row with padding,
    wherever it stands, is the row without. `sink` [H] is the logit of the teacher's own attention sink, in families
    that have one: its exponential joins the window's sum of weights, and through a shared normalizer that of the
    recurrent branch; a mixer without a window leaves it out.

    Args:
        shape: the layer's numbers.
        position: which branch sees rotated q and k.
        window: always there, possibly `none`.
        recurrent: the recurrent branch, or None.
        combine: the joining rule when both branches exist.
        output: what happens to the joined output, or None.

    Attributes:
        branch_off: the branch that contributes nothing, or None.
        without_window: [] bool, by which the device says whether the window contributes nothing, or None.
        composition: says all parts, options and numbers, where `build` put them together; equal mixers are equal here.
    """

    def __init__(
        self,
        shape: LayerShape,
        position: Position,
        window: Window,
        recurrent: Recurrent | None = None,
        combine: Combine | None = None,
        output: Output | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.position = position
        self.window = window
        self.recurrent = recurrent
        self.combine = combine
        self.output = output
        self.branch_off: str | None = None
        self.without_window: Tensor | None = None
        self.composition = ""
        self.fused = fused.find(shape, position, window, recurrent, combine)
        if recurrent is not None:
            recurrent.by_products = fused.by_products(recurrent)
        window.alone = combine is None or not combine.needs_normalizer
        window.far = window.far if position.window_rotated and not position.turns else None

    @property
    def feature_map(self) -> FeatureMap | None:
        """The recurrent branch's feature map."""
        return None if self.recurrent is None else self.recurrent.feature_map

    @property
    def update(self) -> Update | None:
        """The recurrent branch's update rule."""
        return None if self.recurrent is None else self.recurrent.update

    @property
    def added_parameters(self) -> int:
        """Parameters that the mixer adds to the model."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def has_both_branches(self) -> bool:
        """Whether `branch_off` leaves something to look at."""
        return self.combine is not None

    @property
    def uses_hidden(self) -> bool:
        """Whether the forms need `hidden`."""
        asking = (self.recurrent, self.combine, self.output)
        return self.position.turns or any(part is not None and part.uses_hidden for part in asking)

    @property
    def uses_first(self) -> bool:
        """Whether the forms need `first`."""
        return self.recurrent is not None and self.recurrent.uses_first

    @property
    def needs_plain(self) -> bool:
        """Whether the forms need `plain`: a branch that is there wants q and k before RoPE."""
        near = self.window.size != 0 and not self.position.window_rotated
        return near or (self.recurrent is not None and not self.position.recurrent_rotated)

    @property
    def has_fixed_state(self) -> bool:
        """Whether the state keeps its shapes, as all do but those of the teacher's own softmax (window `full`)."""
        empty = self.initial_state(1, torch.float32, torch.device("meta"))
        return all(x.numel() for x in empty.tensors.values())

    def state_bytes(self, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the state for a model in `dtype`; zero tokens into a `full` window."""
        return self.initial_state(batch, dtype, torch.device("meta")).bytes

    def initial_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        """An empty state for `batch` rows; sums are float32 or wider, copies of keys and values in `dtype`."""
        tensors = self.window.initial(batch, dtype, device)
        if self.recurrent is not None:
            tensors |= self.recurrent.initial(batch, dtype, device)
            tensors |= self.position.initial(batch, accumulator(dtype), device)
        if self.output is not None and self.output.mix is not None:
            tensors[shift.OUTPUT] = shift.initial(self.output.mix, batch, dtype, device)
        return State(tensors)

    def reset_parameters(self) -> None:
        """Every part back to its initial values."""
        for part in self.modules():
            if isinstance(part, Part):
                part.reset_parameters()

    @with_weights
    def parallel(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        *,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        rows: slice | None = None,
        hidden: Tensor | None = None,
        plain: Plain | None = None,
        sink: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """The definition.

        Args:
            q, k, v: see the class; v None asks for the normalized weights [B, R, H, T] instead of the output.
            valid: [B, T] bool, false on padding.
            starts: [B, T] bool, true where a packed document begins.
            rows: query rows to compute (all by default); q still holds every row.
            hidden, plain, sink, first: see the class.

        Returns:
            [B, R, H, V], float32 or wider.
        """
        batch, tokens = k.shape[:2]
        rows = slice(0, tokens) if rows is None else rows
        order = torch.arange(tokens, device=k.device)
        age = causal = order[rows, None] - order
        if valid is not None:
            counted = valid.cumsum(1)
            age = counted[:, rows, None] - counted[:, None]
        with torch.autocast(q.device.type, enabled=False):
            values = q.new_zeros(batch, tokens, self.shape.kv_heads, 0) if v is None else v
            docs = documents(starts, batch, tokens, k.device)
            beside = Beside(hidden, plain, sink, first)
            near_inputs, inputs = entering(self, Given(q, k, values, valid, docs, beside))
            visible = (
                (causal >= 0)
                & (inputs.docs[:, rows, None] == inputs.docs[:, None, :])
                & inputs.valid[:, None, :]
            )
            near_q, near_v = near_inputs.q[:, rows], None if v is None else near_inputs.v
            near, left = self.window.parallel(near_q, near_inputs.k, near_v, visible, age, sink)
            far = None
            if self.recurrent is not None and left is not None:
                far = self.recurrent.parallel(inputs, left, rows, weights=v is None)
            behind = self._behind(inputs.hidden, inputs.valid, inputs.docs)
            seen, behind = (None if x is None else x[:, rows] for x in (inputs.hidden, behind))
            return self._join(near, far, seen, behind, weights=v is None)

    @with_weights
    def chunked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        state: State | None = None,
        gaps: bool | None = None,
        hidden: Tensor | None = None,
        plain: Plain | None = None,
        sink: Tensor | None = None,
        first: Tensor | None = None,
        weights: bool = False,
    ) -> Tensor:
        """The same in O(T) memory; with a state, the tokens before are part of the sequence and the state is written.

        A carried state belongs to the document that is open when the call begins; a start at position 0 closes it.

        Args:
            gaps: whether padding stands between tokens, or, with a state, behind any of them or of those before. None:
                with a state it is taken for granted, without one the device is asked.
            weights: v holds columns of the identity, and what comes are those columns of the weights: what acts on
                values channel by channel is left out, the output part among it.
        """
        batch, tokens = k.shape[:2]
        docs = None if starts is None else documents(starts, batch, tokens, k.device)
        given = Given(q, k, v, valid, docs, Beside(hidden, plain, sink, first))
        if valid is None or gaps is False or (gaps is None and state is None and not has_gaps(valid)):
            return self._chunked(given, state, weights=weights)
        given, packing = given.packed(valid)
        front = None if state is None or given.valid is None else leading(given.valid)
        return packing.unpack(self._chunked(given, state, front, weights=weights))

    def _chunked(
        self, given: Given, state: State | None, front: Tensor | None = None, *, weights: bool
    ) -> Tensor:
        """`run`, compiled where it trains."""
        if dispatch.use_triton(given.q, given.k, given.v) and state is None and torch.is_grad_enabled():
            from linearize.mixers import compiled

            form = compiled.weights_in_training if weights else compiled.training
            body = compiled.compiled(self, given.q, form)
            if body is not None:
                return body(given)
        return self.run(given, state, front, weights=weights)

    def run(
        self, given: Given, state: State | None = None, front: Tensor | None = None, *, weights: bool = False
    ) -> Tensor:
        """`chunked` of rows without padding between tokens, part by part or in one kernel.

        Args:
            given: the call.
            state: what is carried and is to be written, or None.
            front: [B] padding in front of each row, behind which the state belongs, or None.
            weights: see `chunked`.

        Returns:
            [B, T, H, V], see the class.
        """
        q, k, v, valid, docs, beside = given
        with torch.autocast(q.device.type, enabled=False):
            if self._is_fused(q, k, v) and not (state is not None and state.in_parts):
                assert self.fused is not None
                made = self.fused.chunked(self._fused_pair(given), given, state, front, self.without_window)
                behind = self._behind(beside.hidden, valid, docs, front, state, chunked=True)
                return self._finish(made, behind, weights=weights)
            fresh = state is None
            if state is None:
                state = self.initial_state(k.shape[0], k.dtype, k.device)
            near_inputs, inputs = entering(self, given, front, state)
            near, handed = self.window.chunked(
                near_inputs.q,
                near_inputs.k,
                near_inputs.v,
                inputs.valid,
                inputs.docs,
                state,
                front=front,
                sink=beside.sink,
                fresh=fresh,
                whole=valid is None and docs is None,
            )
            far = None
            if self.recurrent is not None and handed is not None:
                far = self.recurrent.chunked(inputs, handed, state, fresh=fresh, weights=weights)
            behind = self._behind(inputs.hidden, valid, docs, front, state, chunked=True)
            return self._joined_in(v, near, far, inputs.hidden, behind, weights=weights)

    @with_weights
    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: State,
        valid: Tensor | None = None,
        hidden: Tensor | None = None,
        plain: Plain | None = None,
        sink: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """One token (T = 1) against the state, which is updated in place; padding leaves it as it is."""
        given = Given(q, k, v, valid, None, Beside(hidden, plain, sink, first))
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            if self._is_fused(q, k, v):
                assert self.fused is not None
                made = self.fused.step(self._fused_pair(given), given, state)
                return self._finish(made, self._behind(hidden, valid, None, state=state))
            near_inputs, inputs = entering(self, given, state=state)
            near, handed = self.window.step(
                near_inputs.q, near_inputs.k, near_inputs.v, inputs.valid, state, sink
            )
            far = None
            if self.recurrent is not None and handed is not None:
                far = self.recurrent.step(inputs, handed, state)
            behind = self._behind(inputs.hidden, valid, None, state=state)
            return self._joined_in(v, near, far, inputs.hidden, behind)

    def _fused_pair(self, given: Given) -> Plain:
        """q and k as the kernel's branches see them, in the dtype that comes in."""
        plain = given.beside.plain
        assert plain is not None or not self.needs_plain, "this mixer wants q and k before RoPE"
        assert self.fused is not None
        return (given.q, given.k) if self.fused.rotated or plain is None else plain

    def _is_fused(self, *tensors: Tensor) -> bool:
        return self.fused is not None and self.branch_off is None and self.fused.runs(*tensors)

    def _finish(self, joined: Tensor, hidden: Tensor | None, *, weights: bool = False) -> Tensor:
        """The output part behind the one kernel."""
        if self.output is None or weights:
            return joined
        if narrows(joined):
            return self.output(joined, None if hidden is None else hidden.to(joined.dtype)).to(joined.dtype)
        wide = accumulator(joined.dtype)
        return self.output(joined.to(wide), None if hidden is None else hidden.to(wide))

    def _behind(
        self,
        hidden: Tensor | None,
        valid: Tensor | None,
        docs: Tensor | None,
        front: Tensor | None = None,
        state: State | None = None,
        *,
        chunked: bool = False,
    ) -> Tensor | None:
        """What the output part reads of the layer's input [B, T, D]; `chunked` begins a state where none is given."""
        mix = None if self.output is None else self.output.mix
        if mix is None or hidden is None:
            return hidden
        hidden = hidden if narrows(hidden) else hidden.to(accumulator(hidden.dtype))
        if valid is None:
            valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if state is None and chunked:
            state = State({shift.OUTPUT: shift.initial(mix, len(hidden), hidden.dtype, hidden.device)})
        masks = {"valid": valid, "docs": docs, "front": front}
        return shift.mixed({shift.OUTPUT: mix}, hidden, masks, state)[shift.OUTPUT]

    def _joined_in(
        self,
        v: Tensor,
        near: Partial | None,
        far: Partial | None,
        hidden: Tensor | None,
        behind: Tensor | None,
        *,
        weights: bool = False,
    ) -> Tensor:
        """`_join` in the dtype of v where that is what the kernels took."""
        joined = self._join(near, far, hidden, behind, weights=weights)
        return joined.to(v.dtype if narrows(v) else accumulator(v.dtype))

    def _join(
        self,
        near: Partial | None,
        far: Partial | None,
        hidden: Tensor | None,
        behind: Tensor | None,
        *,
        weights: bool = False,
    ) -> Tensor:
        joined = self._joined(near, far, hidden)
        return joined if self.output is None or weights else self.output(joined, behind)

    def _joined(self, near: Partial | None, far: Partial | None, hidden: Tensor | None) -> Tensor:
        if near is not None and far is not None and self.combine is not None:
            if self.branch_off is not None:
                return (far if self.branch_off == "window" else near).normalized()
            joined, off = self.combine(near, far, hidden), self.without_window
            return joined if off is None else torch.where(off, far.normalized().to(joined.dtype), joined)
        only = near if near is not None else far
        assert only is not None, "a mixer without any branch passed the check"
        return only.normalized()
