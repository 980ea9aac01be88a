"""A mixer without its values, the matrix that mixes tokens, beside the softmax matrix of the layer that it replaces.

Where the recurrent branch is all that answers and its weights are products of features, perhaps under a decay per head,
both matrices are compared tile by tile (`kernels.mixing_matrix`). Every other composition is linear in its values all
the same, so it is asked for columns: the chunked form itself, of which value i is one at token `at + i` and zero
elsewhere, on the kernels that train it. Either way nothing as large as a matrix exists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TypedDict

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.mixing_matrix import WIDEST, Kind, Products, Softmax, compared, mixing_matrix_rows
from linearize.mixers.base import LayerShape, documents, narrows, wide
from linearize.mixers.beside import Beside, Plain
from linearize.mixers.given import Given
from linearize.mixers.inputs import entering
from linearize.mixers.mixer import Mixer
from linearize.mixers.padding import has_gaps
from linearize.mixers.spec import build

Term = Callable[[], Tensor]
"""[B, T, H] with a graph: a part of what each query's row of weights differs by."""
Own = Callable[[], tuple[Tensor, Tensor, Tensor, Plain | None]]
"""See `surgery.LayerCall.shifted`."""


class _Masks(TypedDict):
    """See `Mixer.chunked`."""

    valid: Tensor | None
    starts: Tensor | None
    gaps: bool | None


def terms(
    mixer: Mixer,
    kind: Kind,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    valid: Tensor | None = None,
    starts: Tensor | None = None,
    gaps: bool | None = None,
    hidden: Tensor | None = None,
    plain: Plain | None = None,
    sink: Tensor | None = None,
    first: Tensor | None = None,
    shifted: Own | None = None,
) -> list[Term]:
    """Terms of `kernels.mixing_matrix.compared` between the layer's softmax and the mixer; see `Mixer.chunked`.

    Each is computed when it is called, so that the gradient of one may be taken before the next begins. At padding
    they are any finite number.

    Args:
        shifted: makes the mixer's own q, k, v and `plain` anew at each call, where they are not the layer's.
    """
    batch, tokens, _, width = v.shape
    beside = Beside(hidden, plain, sink, first)
    if shifted is None and shows_products(mixer) and not _too_wide(mixer, q, k, v):
        docs = None if starts is None else documents(starts, batch, tokens, k.device)
        return [partial(_products, mixer, kind, Given(q, k, v, valid, docs, beside), gaps)]
    masks: _Masks = {"valid": valid, "starts": starts, "gaps": gaps}
    given = Given(q, k, v, beside=beside)
    return [partial(_columns, mixer, kind, given, at, masks, shifted) for at in range(0, tokens, width)]


def shows_products(mixer: Mixer) -> bool:
    """Whether the mixer's weights are products of features alone, of every key that a query may see."""
    recurrent = mixer.recurrent
    if recurrent is None or recurrent.normalizer.signed or not recurrent.update.has_factors():
        return False
    return (
        not mixer.window.size
        if mixer.combine is None
        else mixer.branch_off == "window" and not recurrent.delayed
    )


def _too_wide(mixer: Mixer, *tensors: Tensor) -> bool:
    """Whether tiles of so many features are left to torch, where columns have a kernel."""
    update = mixer.update
    assert update is not None, "no features without a rule"
    widest = max(mixer.shape.key_dim, update.feature_dim)
    return widest > WIDEST and dispatch.automatic() and dispatch.use_triton(*tensors)


@cache
def softmax(shape: LayerShape) -> Mixer:
    """The attention of the layer as the teacher has it."""
    return build({"window": {"name": "full"}}, shape)


def _products(mixer: Mixer, kind: Kind, given: Given, gaps: bool | None) -> Tensor:
    """Tile by tile, or in blocks of rows, with the padding of every row taken to its front."""
    packing = None
    if given.valid is not None and gaps is not False and (gaps or has_gaps(given.valid)):
        given, packing = given.packed(given.valid)
    form, run = _FORMS[kind], None
    if dispatch.use_triton(given.q, given.k, given.v) and torch.is_grad_enabled():
        from linearize.mixers.compiled import compiled

        run = compiled(mixer, given.q, form)
    rows = form(mixer, given) if run is None else run(given)
    return rows if packing is None else packing.unpack(rows)


def _compared(kind: Kind, mixer: Mixer, given: Given) -> Tensor:
    """Features and their comparison, of rows without padding between tokens: what is compiled."""
    q, k, v, valid, docs, beside = given
    batch, tokens = k.shape[:2]
    codes = docs
    if valid is not None:
        own = documents(None, batch, tokens, k.device) if docs is None else docs
        codes = torch.where(valid, own, -1 - own)
    with torch.autocast(q.device.type, enabled=False):
        assert mixer.recurrent is not None
        state, shape = mixer.initial_state(batch, k.dtype, k.device), mixer.shape
        _, inputs = entering(mixer, Given(q, k, v[..., :0], valid, docs, beside), state=state)
        student = Products(*mixer.recurrent.products(inputs, state), mixer.recurrent.update.running_sum)
        if narrows(q, k, v):
            # under autocast a rotary embedding leaves q and k in float32
            q, k = q.to(v.dtype), k.to(v.dtype)
        teacher = Softmax(q, k, shape.scaling, shape.softcap, shape.sliding_window, beside.sink)
        return mixing_matrix_rows(kind, teacher, student, codes)


_FORMS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": partial(_compared, "cross_entropy"),
    "squares": partial(_compared, "squares"),
}


def _columns(mixer: Mixer, kind: Kind, given: Given, at: int, masks: _Masks, shifted: Own | None) -> Tensor:
    """Columns `at` to `at + V` of both matrices, of all rows."""
    q, k, v, _, _, beside = given
    tokens, width = v.shape[1], v.shape[-1]
    chosen = torch.arange(tokens, device=v.device)[:, None] - at == torch.arange(width, device=v.device)
    exact = _exact(v)
    q, k, beside = exact(q), exact(k), beside.each(exact)
    values = chosen.to(exact(v).dtype)[None, :, None].expand(v.shape)
    with torch.no_grad():
        teacher = softmax(mixer.shape).chunked(q, k, values, sink=beside.sink, **masks)
    if shifted is not None:
        q, k, _, own = shifted()
        q, k, beside = exact(q), exact(k), beside._replace(plain=own).each(exact)
    student = mixer.chunked(q, k, values, weights=True, **masks, **beside._asdict())
    return column_rows(kind, teacher, student)


def _exact(v: Tensor) -> Callable[[Tensor], Tensor]:
    """In what a matrix is computed whose columns come in the dtype of v: float16 ends at 6e-8, and weights do not."""
    return torch.Tensor.float if v.dtype == torch.float16 else lambda x: x


def column_rows(kind: Kind, teacher: Tensor, student: Tensor) -> Tensor:
    """`compared` of columns [B, T, H, V] -> [B, T, H]; a function alone, so that it can be compiled."""
    return compared(kind, wide(teacher), wide(student))
