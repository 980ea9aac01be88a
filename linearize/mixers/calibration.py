"""A mixer set to its teacher in closed form: statistics first, then least squares, one layer at a time.

Parts know their own closed forms (`Part.calibrate`, `resize`, `FeatureMap.starts`, `Combine.fit`, `Output.fit`); here
is only the order: what the statistics say, then the feature map's best start, then shares or sizes, then the output.
Whoever calls decides what a layer is seen on: the teacher's own inputs, or those that calibrated layers before it give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from linearize.errors import NotFiniteError, UnsupportedModelError
from linearize.mixers import fits
from linearize.mixers.attended import attended
from linearize.mixers.base import Part, Partial, put
from linearize.mixers.mixer import Mixer
from linearize.mixers.seams import shown, some
from linearize.mixers.statistics import Statistics, finite

TOKENS = 16_384
"""Tokens that enter the equations at most, spread evenly over those that were seen."""
TRIED = 4096
"""Tokens that values compete on."""


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
    call: Call,
    origin: Call | None = None,
    *,
    plain: bool = False,
    sizes_only: bool = False,
    heard: float | None = None,
) -> Fitted:
    """Set a mixer's parameters to its teacher's layer, in place; a mixer that comes out worse is put back.

    Args:
        call: the layer on a few sequences, in float32 or as the model computes; its `teacher` is the target.
        origin: the same layer on the same sequences as the untouched model has it, whose attention is looked at;
            by default `call`.
        plain: leave the output part as it is but for the size of each head: what follows the hidden state, or differs
            from dim to dim, has many numbers to fit one text by.
        sizes_only: keep decays, strengths and features as they stand; shares, sizes and the output alone are set.
        heard: where a window has a recurrent branch beside it, what remains of the branch's share; all else stays.

    Raises:
        NotFiniteError: q, k, the teacher's output, a statistic or a found parameter is NaN or infinite.
    """
    layer = _Layer(call, origin)
    before = layer.error()
    if heard is not None and layer.lower(heard):
        return Fitted(before, layer.error())
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
            attention=partial(attended, self.origin, self.mixer.shape, opens, chosen),
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
        output = self.mixer.output
        if output is not None and output.constant is not None:
            put(output.constant, torch.zeros_like(output.constant))
        if not sizes_only:
            for part in _parts(self.mixer):
                part.calibrate(self.statistics)
            self._start()
        self._join()
        if output is not None and not plain:
            y = self._before_output()
            output.fit(y, self.hidden, self._less_constant(y))
        self._together(plain)
        self._set_constant()

    def lower(self, heard: float) -> bool:
        """See `Combine.lower`; false where there is no such rule."""
        combine = self.mixer.combine
        return combine is not None and combine.lower(heard)

    def _less_constant(self, y: Tensor) -> Tensor:
        """The target less the constant that is best beside a factor on each dim of y [N, H, V]."""
        if self._constant is None:
            return self.target
        apart = self._apart(y)
        mean = y.mean(0)
        factor = (apart * self._apart(self.target)).sum(0) / apart.square().sum(0).clamp_min(1e-30)
        return self.target - (self.target.mean(0) - factor * mean)

    def _set_constant(self) -> None:
        if self._constant is not None:
            put(self._constant, (self.target - self.rows(self.call.student())).mean(0))

    @property
    def _constant(self) -> Tensor | None:
        return None if self.mixer.output is None else self.mixer.output.constant

    def _apart(self, y: Tensor) -> Tensor:
        """y [N, H, V] less its mean over the tokens, where a constant takes that on itself."""
        return y if self._constant is None else y - y.mean(0)

    def _together(self, plain: bool) -> None:
        """The last sizes by what all heads make of each other in the model's own output projection."""
        mixer, output = self.mixer, self.mixer.output
        y, target = self._apart(self.rows(self.call.student())), self._apart(self.target)
        stretches = output is not None and output.stretch(torch.ones_like(self.target[0]))
        if plain and output is not None and stretches:
            factor = fits.scale(y, target)
            if self.projection is not None:
                y = y * factor.to(y.dtype)[:, None]
                factor = factor * fits.together(y, target, self.projection, dims=False)
            if not (output.scales and self._whole(factor)):
                output.stretch(factor.to(y.dtype)[:, None].expand_as(self.target[0]))
            return
        if self.projection is None:
            return
        if output is not None and stretches:
            factor = fits.together(y, target, self.projection, dims=True)
            if output.scales:
                # a gate says one plus something: near one it keeps its precision in sixteen bits
                mean = factor.mean(1)
                if bool((mean > 0).all()) and self._whole(mean):
                    factor = factor / mean[:, None]
            output.stretch(factor.to(y.dtype))
            return
        factor = fits.together(y, target, self.projection, dims=False)
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
            y, target = self._apart(y), self._apart(self.target)
            factor = fits.scale(y, target)
            # a size in front of a norm is not seen: each call would multiply it anew, until the norm's epsilon rules
            sized = not normed and self._resize(factor)
            if sized or output is not None:  # an output part has sizes of its own
                y = y * factor.to(y.dtype)[:, None]
            return fits.squared_error(y, target)
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
