"""The chunked form of a mixer over sequences that several processes hold (LASP-2, Sun et al. 2025, arXiv 2502.07563).

Two ways, and a mixer takes the first that its parts allow:

- At once. Each process says what its tokens do to any state (`Update.transition`), all of them gather that, and each
  composes what the ones before it say. Windows and convolutions get the few tokens that they reach back over (a halo).
  One gathering of halos and one of transitions a layer, whatever the number of processes; nobody waits for another's
  output. The transition is one product of keys and values more, or for rules that overwrite two more runs of the rule.
  Where a graph spans layers, a layer's mixer is computed once more in backward (`again`): its parts, which are not
  compiled, would keep several times what one compiled function does.
- One after the other. A process takes the whole state that the one before has left, and hands its own on. Right for any
  mixer, since it is what decoding and carried states are. Nothing is computed twice, but within a layer processes wait
  for each other: they overlap across layers alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.across import Across
from linearize.mixers import shift
from linearize.mixers.base import documents
from linearize.mixers.beside import Beside, Plain
from linearize.mixers.given import Given
from linearize.mixers.state import State
from linearize.mixers.update import Transition
from linearize.mixers.window.ring import RingWindow

if TYPE_CHECKING:
    from linearize.mixers.mixer import Mixer


class Entering(State):
    """What a process's tokens meet; never written in place, since it has a gradient.

    Args:
        tensors: see `State`.
        across: the other processes, where an update rule's share is still to be gathered; else None.
    """

    in_parts = True

    def __init__(self, tensors: dict[str, Tensor], across: Across | None = None) -> None:
        super().__init__(tensors)
        self.across = across

    def write(self, values: dict[str, Tensor]) -> None:
        self.tensors.update(values)

    def meet(self, update: Any, stream: Any) -> None:
        if self.across is not None:
            self.tensors |= composed(self.across, update.transition(stream), self.tensors)


def composed(across: Across, own: Transition, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the transitions of the processes before this one, in their order, make of an empty state.

    Args:
        across: the processes.
        own: of this one.
        state: has the tensors, empty.
    """
    kept = across.gathered(own.kept)
    added = {name: across.gathered(value) for name, value in own.added.items()}
    found = {name: state[name] for name in added}
    for number in range(across.size - 1):
        next_ones = Transition(kept[number], {name: x[number] for name, x in added.items()}, own.mixes)(found)
        # a later one's takes part too, or its gradient would not come and the others wait for it
        here = torch.tensor(number < across.rank, device=kept.device)
        found = {name: torch.where(here, next_ones[name], value) for name, value in found.items()}
    return found


def at_once(mixer: Mixer) -> bool:
    """Whether what enters a process can be composed of what all of them say at the same time."""
    window, recurrent = mixer.window, mixer.recurrent
    if not window.spreads:
        return False
    if recurrent is None:
        return True
    return recurrent.update.transits() and recurrent.update.first is None and not mixer.position.turns


def chunked(
    across: Across,
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    valid: Tensor | None = None,
    starts: Tensor | None = None,
    gaps: bool | None = None,
    again: bool = False,
    **beside: Any,
) -> Tensor:
    """`Mixer.chunked` of this process's tokens, [B, T, H, V].

    Args:
        across: the processes; knows where documents begin.
        mixer: whose state has a fixed size, and whose projections read the tokens of their own place alone.
        q, k, v: of this process's tokens, as is what stands `beside` them.
        valid, starts, gaps: what a mask of this process's tokens alone would say; there is no padding.
        again: keep q, k, v and what stands beside them alone for backward, and compute the rest anew there, which all
            processes do in the same order; of mixers that are computed at once.
    """
    assert valid is None, "spread sequences have no padding"
    assert k.shape[1] == across.tokens, "a pass over other tokens than those of the batch"
    starts = across.starts
    docs = None if starts is None else documents(starts, k.shape[0], k.shape[1], k.device)
    given = Given(q, k, v, None, docs, Beside(**beside))
    if not at_once(mixer):
        return _in_turn(mixer, given, across)
    if not (again and torch.is_grad_enabled()):
        return _at_once(mixer, given, across)
    # nothing in a mixer draws random numbers, whose state would be read off the device
    made: Tensor = checkpoint(_at_once, mixer, given, across, use_reentrant=False, preserve_rng_state=False)
    return made


def _at_once(mixer: Mixer, given: Given, across: Across) -> Tensor:
    q, k, v, _, _, beside = given
    state = Entering(mixer.initial_state(k.shape[0], k.dtype, k.device).tensors, across)
    plain = beside.plain
    window = mixer.window
    if isinstance(window, RingWindow):
        near = k if mixer.position.window_rotated or plain is None else plain[1]
        _held(window, state, near, v, across)
    far: Plain = (q, k) if mixer.position.recurrent_rotated or plain is None else plain
    _recent(state, (*far, v), beside.hidden, across)
    return mixer.run(given, state)


def _held(window: RingWindow, state: Entering, k: Tensor, v: Tensor, across: Across) -> None:
    """Pinned and last keys of the document that is open, as `RingWindow` keeps them."""
    there = _same(across, window.span)
    keys, values = across.halo(k, window.span), across.halo(v, window.span)
    if window.first:
        first_k, pinned = across.opening(k, window.first)
        first_v, _ = across.opening(v, window.first)
        keys, values = torch.cat([first_k, keys], 1), torch.cat([first_v, values], 1)
        there = torch.cat([pinned, there & (across.before(window.span)[2] >= window.first)], 1)
    window.refill(state, keys, values, there)
    if "window_since" in state and across.rank:
        state["window_since"] = across.positions[:, across.begin - 1] + 1


def _recent(
    state: Entering,
    streams: tuple[Tensor, Tensor, Tensor],
    hidden: Tensor | None,
    across: Across,
) -> None:
    """What convolutions, token shifts and counts of positions carry."""
    given = dict(zip(("conv_q", "conv_k", "conv_v"), streams, strict=True))
    if hidden is not None:
        given |= dict.fromkeys(shift.NAMES, hidden[:, :, None])
    for name, x in given.items():
        if name in state:
            count = state[name].shape[1]
            seen = _same(across, count)[..., None, None]
            state[name] = (across.halo(x, count) * seen.to(x.dtype)).to(state[name].dtype)
    if "position" in state and across.rank:
        state["position"] = across.positions[:, across.begin - 1] + 1


def _same(across: Across, count: int) -> Tensor:
    """[B, count] bool: which tokens before this process's are of the document that is open then."""
    there, docs, _ = across.before(count)
    return there & (docs == docs[:, -1:])


def _in_turn(mixer: Mixer, given: Given, across: Across) -> Tensor:
    q, k, v, _, _, beside = given
    sources = (q, k, v, beside.hidden, beside.first, *(beside.plain or ()), *mixer.parameters())
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources)
    # the same in all processes, so that all of them wait for a gradient or none does
    anchor = torch.zeros((), device=q.device, requires_grad=trains)
    empty = mixer.initial_state(k.shape[0], k.dtype, k.device).tensors
    taken = across.taken(list(empty.values()), anchor)
    state = Entering(dict(zip(empty, taken, strict=True)))
    made = mixer.run(given, state)
    left = [state[name].to(like.dtype) for name, like in empty.items()]
    return across.given(made, left, anchor, taken if across.rank else [])
