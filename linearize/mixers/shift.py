"""Token shift: x + mix (x_before - x) in the place of a token x, in front of what reads it (RWKV-7, Peng et al. 2025,
arXiv 2503.14456, section 4.1). x_before is the token before it in its document, zero in front of the first one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.mixers.base import accumulator, documents, fill, narrows
from linearize.mixers.short_conv.depthwise import convolved
from linearize.mixers.state import State

if TYPE_CHECKING:
    from linearize.mixers.mixer import Mixer

PROJECTIONS = "shift_projections"
"""Name in the state of what the projections' shift carries."""
OUTPUT = "shift_output"
NAMES = ("shift_gate", "shift_update", PROJECTIONS, OUTPUT)
"""Every such name; each holds the last hidden state, [B, 1, 1, D]."""


def initial(mix: Tensor, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The state of a mix [D]: no token yet, [B, 1, 1, D]."""
    return torch.zeros(batch, 1, 1, len(mix), dtype=dtype, device=device)


def mixed(
    mixes: dict[str, Tensor], hidden: Tensor, masks: dict[str, Any], state: State | None
) -> dict[str, Tensor]:
    """Each mixture [B, T, D] of hidden [B, T, D]: a filter of two taps, mix and 1 - mix.

    Args:
        mixes: name in the state -> mix [D].
        hidden: the layer's input.
        masks: `valid`, `docs` and `front`, see `ShortConv.forward`.
        state: read and written under those names; None in the parallel form.
    """
    filters = {name: torch.stack([mix, 1 - mix], -1)[None] for name, mix in mixes.items()}
    given = {name: (hidden[:, :, None], weight) for name, weight in filters.items()}
    outputs = convolved(given, **masks, state=state)
    return {name: x[:, :, 0] for name, x in zip(filters, outputs, strict=True)}


def before(
    hidden: Tensor, last: Tensor | None, valid: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """The token before each one in its document [B, T, D], zero where there is none; on padding anything.

    Args:
        hidden: [B, T, D].
        last: [B, D], the last token of the document that is open when the call begins, or None for none.
        valid: [B, T] bool, false on padding, wherever it stands, or None for none.
        starts: [B, T] bool, true where a document begins, or None for nowhere.
    """
    batch, tokens = hidden.shape[:2]
    last = hidden.new_zeros(batch, hidden.shape[2]) if last is None else last.to(hidden.dtype)
    line = torch.cat([last[:, None], hidden], 1)
    index = torch.arange(tokens, device=hidden.device).expand(batch, tokens)
    if valid is not None and tokens > 1:
        newest = torch.where(valid, index + 1, 0).cummax(1).values
        index = torch.cat([torch.zeros_like(newest[:, :1]), newest[:, :-1]], 1)
    plain = valid is None or tokens == 1
    found = line[:, :tokens] if plain else line.gather(1, index[..., None].expand_as(hidden))
    if starts is None:
        return found
    docs = documents(starts, batch, tokens, hidden.device)
    theirs = torch.cat([torch.zeros_like(docs[:, :1]), docs], 1).gather(1, index)
    return torch.where((theirs == docs)[..., None], found, torch.zeros_like(found))


class ShiftedProjections(nn.Module):
    """Mixes in front of a layer's own projections to queries, keys and values, one each; zero at the start.

    Whoever runs the projections asks for their inputs (`inputs_of`); the mixer only carries the last token.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(3, width))

    def start(self) -> None:
        """Put the parameters at their initial values."""
        fill(self.mix, 0.0)

    @property
    def values(self) -> Tensor:
        """The mix [D] in front of the projection to values."""
        return self.mix[2]


def shifts_projections(mixer: Mixer) -> bool:
    """Whether the layer's projections are to read `inputs_of` in place of its input."""
    return mixer.recurrent is not None and mixer.recurrent.update.inputs is not None


def inputs_of(
    mixer: Mixer,
    hidden: Tensor,
    *,
    valid: Tensor | None = None,
    starts: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the projections to q, k and v are to read, each [B, T, D]; for mixers that `shifts_projections`.

    Args:
        mixer: of the layer.
        hidden: [B, T, D], the layer's input.
        valid, starts: see `before`.
        state: what the tokens before have left, which is not written here: `Mixer.chunked` and `Mixer.step` do, on the
            same tokens. None: nothing.
    """
    assert mixer.recurrent is not None and mixer.recurrent.update.inputs is not None
    last = None if state is None else state[PROJECTIONS][:, 0, 0]
    dtype = hidden.dtype if narrows(hidden) else accumulator(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        own = hidden.to(dtype)
        step = before(own, last, valid, starts) - own
        q, k, v = ((own + mix.to(dtype) * step).to(hidden.dtype) for mix in mixer.recurrent.update.inputs.mix)
    return q, k, v
