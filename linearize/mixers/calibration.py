"""A mixer set to its teacher in closed form: statistics first, then least squares, one layer at a time.

Parts know their own closed forms (`Part.calibrate`, `resize`, `FeatureMap.starts`, `Combine.fit`, `Output.fit`); here
is only the order: what the statistics say, then the feature map's best start, then shares or sizes, then the output.
Whoever calls decides what a layer is seen on: the teacher's own inputs, or those that calibrated layers before it give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from linearize.errors import NotFiniteError, UnsupportedModelError
from linearize.mixers import fits
from linearize.mixers.base import Part, Partial, put
from linearize.mixers.mixer import Mixer
from linearize.mixers.seams import shown, some
from linearize.mixers.spec import build
from linearize.mixers.statistics import Moments, Statistics, finite

TOKENS = 16_384
"""Tokens that enter the equations at most, spread evenly over those that were seen."""
TRIED = 4096
"""Tokens that values compete on."""
ROWS = 128
"""Queries whose attention weights are held at once."""


class Call(Protocol):
    """What is read of `surgery.LayerCall`."""

    layer_idx: int
    q: Tensor
    k: Tensor
    hidden_states: Tensor
    valid: Tensor | None
    starts: Tensor | None
    teacher: Tensor
    context: dict[str, Any]

    @property
    def mixer(self) -> Mixer: ...

    def student(self) -> Tensor:
        """[B, T, H, V] the mixer's output."""

    def project(self, y: Tensor) -> Tensor:
        """[B, T, H, V] -> [B, T, D] through the layer's own output projection."""


@dataclass
class Fitted:
    """Squared error of a layer's output, projected, over the squared size of the teacher's, before and after."""

    before: float
    after: float


def can(mixer: Mixer) -> bool:
    """Whether there is anything to set: parameters of any part."""
    return any(True for _ in mixer.parameters())


@torch.no_grad()
def calibrate(
    call: Call, origin: Call | None = None, *, plain: bool = False, sizes_only: bool = False
) -> Fitted:
    """Set a mixer's parameters to its teacher's layer, in place; a mixer that comes out worse is put back.

    Args:
        call: the layer on a few sequences, in float32 or as the model computes; its `teacher` is the target.
        origin: the same layer on the same sequences as the untouched model has it, whose attention is looked at;
            by default `call`.
        plain: leave the output part as it is but for the size of each head: what follows the hidden state, or differs
            from dim to dim, has many numbers to fit one text by.
        sizes_only: keep decays, strengths and features as they stand; shares, sizes and the output alone are set.

    Raises:
        NotFiniteError: q, k, the teacher's output, a statistic or a found parameter is NaN or infinite.
    """
    layer = _Layer(call, origin)
    before = layer.error()
    kept = {name: value.clone() for name, value in call.mixer.state_dict().items()}
    layer.fit(plain=plain, sizes_only=sizes_only)
    for name, parameter in call.mixer.named_parameters():
        if not parameter.isfinite().all():
            raise NotFiniteError(
                f"layer {call.layer_idx}: the calibrated {name} is not finite; another calibration text, or "
                "calibrate.tokens=0 to start from the published values"
            )
    after = layer.error()
    if not after <= before:
        call.mixer.load_state_dict(kept)
        after = before
    return Fitted(before, after)


class _Layer:
    """One layer, its tokens in a row."""

    def __init__(self, call: Call, origin: Call | None = None) -> None:
        self.call, self.mixer, self.origin = call, call.mixer, call if origin is None else origin
        where = f"layer {call.layer_idx}"
        batch, tokens = call.q.shape[:2]
        seen = torch.ones(batch, tokens, dtype=torch.bool, device=call.q.device)
        if call.valid is not None:
            seen = call.valid
        places = seen.flatten().nonzero()[:, 0]
        self.all = places
        self.places = places[:: -(-len(places) // TOKENS)]
        for name, value in (("queries", call.q), ("keys", call.k), ("attention output", call.teacher)):
            finite(self.rows(value).transpose(0, 1), f"{where}: the teacher's {name}")
        self.target = self.rows(call.teacher)
        self.hidden = self.rows(call.hidden_states)
        self.projection = _projection(call, self.target)
        self.size = float(self._projected(self.target))
        opens = torch.zeros_like(seen) if call.starts is None else call.starts.clone()
        first = seen.to(torch.int64).argmax(1)
        opens[torch.arange(batch, device=seen.device), first] = True
        q, k = call.q, call.k
        if self.mixer.needs_plain and not self.mixer.position.recurrent_rotated:
            q, k = call.context["plain"]
        # the first tokens of documents are few: all of them, whatever the stride
        chosen = torch.cat([self.places, (opens & seen).flatten().nonzero()[:, 0]]).unique()
        self.chosen = chosen
        self.statistics = Statistics(
            shape=self.mixer.shape,
            q=q.flatten(0, 1)[chosen].float(),
            k=k.flatten(0, 1)[chosen].float(),
            opens=opens.flatten()[chosen],
            attention=self._attention,
            scores=self._scores,
            where=where,
        )
        self.opens = opens

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...] in float32, the chosen tokens."""
        return x.flatten(0, 1)[self.places].float()

    def error(self) -> float:
        """Relative squared error of the mixer as it stands; infinite where it overflows."""
        found = float(self._projected(self.rows(self.call.student()) - self.target))
        return found / max(self.size, 1e-30) if found == found else float("inf")

    def _projected(self, y: Tensor) -> Tensor:
        """Squared size of y [N, H, V] behind the output projection, where there is one."""
        flat = y.flatten(1)
        return (flat if self.projection is None else flat @ self.projection).square().sum(1).double().sum()

    def fit(self, *, plain: bool, sizes_only: bool) -> None:
        """All parts, in the order of their dependence; see `calibrate`."""
        if not sizes_only:
            for part in _parts(self.mixer):
                part.calibrate(self.statistics)
            self._start()
        self._join()
        output = self.mixer.output
        if output is not None and not plain:
            output.fit(self._before_output(), self.hidden, self.target)
        self._together(plain)

    def _together(self, plain: bool) -> None:
        """The last sizes by what all heads make of each other in the model's own output projection."""
        mixer, output = self.mixer, self.mixer.output
        y = self.rows(self.call.student())
        stretches = output is not None and output.stretch(torch.ones_like(self.target[0]))
        if plain and output is not None and stretches:
            factor = fits.scale(y, self.target)
            if self.projection is not None:
                y = y * factor.to(y.dtype)[:, None]
                factor = factor * fits.together(y, self.target, self.projection, dims=False)
            if not (output.scales and self._whole(factor)):
                output.stretch(factor.to(y.dtype)[:, None].expand_as(self.target[0]))
            return
        if self.projection is None:
            return
        if output is not None and stretches:
            factor = fits.together(y, self.target, self.projection, dims=True)
            if output.scales:
                # a gate says one plus something: near one it keeps its precision in sixteen bits
                mean = factor.mean(1)
                if bool((mean > 0).all()) and self._whole(mean):
                    factor = factor / mean[:, None]
            output.stretch(factor.to(y.dtype))
            return
        factor = fits.together(y, self.target, self.projection, dims=False)
        if mixer.combine is not None:
            mixer.combine.resize(factor)
        elif mixer.recurrent is not None:
            self._resize(factor)

    def _start(self) -> None:
        """Give each head the start of window, features, decays and strengths with which its output is nearest."""
        recurrent = self.mixer.recurrent
        parts: list[Part | None] = [self.mixer.window]
        if recurrent is not None:
            parts += [recurrent.feature_map, recurrent.gate, recurrent.update]
        for part in parts:
            starts = [] if part is None else part.starts(self.statistics)
            if part is not None and starts:
                with self._fewer():
                    self._choose(dict(part.named_parameters()), starts)

    @contextmanager
    def _fewer(self) -> Iterator[None]:
        """Inside, the first sequences alone, TRIED tokens of them: a choice among a few values asks for no more."""
        kept = self.call, self.places, self.target, self.hidden
        batch, tokens = self.call.q.shape[:2]
        few = max(1, TRIED // tokens)
        if few < batch:
            inside = self.places < few * tokens
            self.call = some(self.call, slice(few))
            self.places, self.target, self.hidden = (
                self.places[inside],
                self.target[inside],
                self.hidden[inside],
            )
        try:
            yield
        finally:
            self.call, self.places, self.target, self.hidden = kept

    def _choose(self, parameters: dict[str, Tensor], starts: list[dict[str, Tensor]]) -> None:
        """Each head's best of some values of a part's parameters, by the squared error behind the joint output."""
        names = dict.fromkeys(name for values in starts for name in values)
        best = {name: parameters[name].detach().clone() for name in names}
        least: Tensor | None = None
        for values in [dict(best), *starts]:
            for name, value in values.items():
                put(parameters[name], value)
            error = self._join()
            if least is None:
                least = error
                continue
            # heads that share a parameter choose together
            groups = min(len(value) for value in values.values())
            better = (error.view(groups, -1).sum(1) < least.view(groups, -1).sum(1)).repeat_interleave(
                len(error) // groups
            )
            least = torch.where(better, error, least)
            for name, value in values.items():
                own = better[:: len(better) // len(value)].view(-1, *[1] * (value.dim() - 1))
                best[name] = torch.where(own, value.to(best[name]), best[name])
        for name, value in best.items():
            put(parameters[name], value)

    def _join(self) -> Tensor:
        """Set shares, or sizes, to the teacher's output by least squares; the squared error [H] that is left."""
        with shown(self.mixer) as seen:
            self.call.student()
        combine = self.mixer.combine
        if combine is None and self.mixer.recurrent is None:  # a window alone has no size
            return fits.squared_error(self.rows(self.call.student()), self.target)
        if combine is None:
            assert seen.recurrent is not None
            y = self._partial(seen.recurrent).normalized()[0]
            output = self.mixer.output
            normed = output is not None and output.normalizes
            if normed:
                y = y * y.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
            factor = fits.scale(y, self.target)
            # a size in front of a norm is not seen: each call would multiply it anew, until the norm's epsilon rules
            sized = not normed and self._resize(factor)
            if sized or output is not None:  # an output part has sizes of its own
                y = y * factor.to(y.dtype)[:, None]
            return fits.squared_error(y, self.target)
        assert seen.window is not None and seen.recurrent is not None
        near, far = self._partial(seen.window), self._partial(seen.recurrent)
        hidden = self.hidden[None] if combine.uses_hidden else None
        resized = torch.ones(self.mixer.shape.heads, dtype=torch.float64, device=self.target.device)

        def resize(factor: Tensor) -> bool:
            nonlocal resized
            done = self._resize(factor)
            resized = resized * factor if done else resized
            return done

        combine.fit(near, far, self.target, hidden, resize)
        far = far.scaled(resized.to(far.numerator.dtype).expand(far.numerator.shape[:-1]))
        return fits.squared_error(combine(near, far, hidden)[0], self.target)

    def _resize(self, factor: Tensor) -> bool:
        """In the outermost part of the recurrent branch that has a size: behind a norm nothing else counts."""
        recurrent = self.mixer.recurrent
        assert recurrent is not None
        return recurrent.normalizer.resize(factor) or recurrent.update.resize(factor)

    def _whole(self, factor: Tensor) -> bool:
        """All that reaches the output part times [H], where some part in front of it can say that."""
        combine = self.mixer.combine
        if combine is not None:
            return combine.resize(factor)
        return self.mixer.recurrent is not None and self._resize(factor)

    def _before_output(self) -> Tensor:
        with shown(self.mixer) as seen:
            self.call.student()
        assert seen.joined is not None
        return self.rows(seen.joined)

    def _partial(self, partial: Partial) -> Partial:
        """[B, T, ...] -> [1, N, ...], the chosen tokens."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.flatten(0, 1)[self.places][None].float()

        whole = partial.sums()
        numerator = rows(whole.numerator)
        assert numerator is not None
        return Partial(numerator, rows(whole.denominator), rows(whole.stabilizer))

    def _scores(self) -> Tensor:
        """See `Statistics.first`; a soft cap is left out."""
        call, shape = self.call, self.mixer.shape
        valid = self.opens if call.valid is None else self.opens & call.valid
        first = call.k.flatten(0, 1)[valid.flatten()].float().mean(0)
        return (
            torch.einsum("nhk,hk->nh", self.rows(call.q), first.repeat_interleave(shape.group, 0))
            * shape.scaling
        )

    def _attention(self) -> Moments:
        """Moments of the teacher's weights, a block of queries at a time; the first token of a document apart."""
        call = self.origin
        softmax = build({"window": {"name": "full"}}, self.mixer.shape)
        batch, tokens = call.q.shape[:2]
        valid = call.valid
        order = torch.arange(tokens, device=call.q.device)
        place = order.expand(batch, tokens) if valid is None else valid.cumsum(1)
        rest = ~self.opens[:, None, None, :]
        sums = torch.zeros(3, self.mixer.shape.heads, dtype=torch.float64, device=call.q.device)
        sinks, count = [], 0
        for start in range(0, tokens, ROWS):
            rows = slice(start, min(start + ROWS, tokens))
            weights = softmax.parallel(
                call.q,
                call.k,
                None,
                valid=valid,
                starts=call.starts,
                rows=rows,
                sink=call.context.get("sink"),
            )
            asked = 1.0 if valid is None else valid[:, rows, None, None].to(weights.dtype)
            first = (weights * ~rest).sum(-1)
            weights = weights * rest * asked  # [B, R, H, T]
            sinks.append((first.clamp_min(1e-9) / weights.amax(-1).clamp_min(1e-9)).log())
            mass = weights.sum(-1)
            age = (place[:, rows, None] - place[:, None]).clamp_min(0)[:, :, None].to(weights.dtype)
            shares = weights / mass[..., None].clamp_min(1e-9)
            entropy = -(shares * shares.clamp_min(1e-12).log()).sum(-1)
            sums[0] += (weights * age).sum((0, 1, 3)).double()
            sums[1] += (entropy * mass).sum((0, 1)).double()
            sums[2] += mass.sum((0, 1)).double()
            count += batch * (rows.stop - rows.start) if valid is None else int(valid[:, rows].sum())
        mass = sums[2].clamp_min(1e-9)
        sink = torch.cat(sinks, 1).flatten(0, 1)[self.chosen].float()
        return Moments(sums[0] / mass, sums[1] / mass, sums[2] / max(count, 1), sink)


def _projection(call: Call, like: Tensor) -> Tensor | None:
    """The output projection's matrix [H V, D] without its bias, or None for a layer that has no such module."""
    units = torch.eye(like[0].numel(), device=like.device).view(1, -1, *like.shape[1:])
    try:
        made = call.project(units) - call.project(torch.zeros_like(units))
    except UnsupportedModelError:
        return None
    return made[0].float()


def _parts(mixer: Mixer) -> list[Any]:
    recurrent = mixer.recurrent
    found: list[Any] = [mixer.window, mixer.combine, mixer.output]
    if recurrent is not None:
        found += [recurrent.short_conv, recurrent.feature_map, recurrent.gate, recurrent.update]
        found.append(recurrent.normalizer)
    return [part for part in found if part is not None]
