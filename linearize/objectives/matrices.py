"""Both matrices of a layer, compared without either: what keeps objectives on whole matrices at O(T) memory."""

from __future__ import annotations

from typing import Any

from linearize.kernels.mixing_matrix import Kind
from linearize.mixers import shown


def terms(call: Any, kind: Kind) -> list[shown.Term]:
    """What each query's row of the student's weights differs by from the teacher's, in terms whose sum that is.

    Args:
        call: `surgery.LayerCall`.
        kind: how rows are compared.
    """
    call = getattr(call, "whole", call)  # which queries count says nothing about what is padding
    given = {"valid": call.valid, "starts": call.starts, "gaps": call.gaps, "shifted": call.shifted}
    return shown.terms(call.mixer, kind, call.q, call.k, call.v, **given, **call.context)
