"""Whether what is timed is right: one sequence of the batch against the torch form in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.bench.case import PER_SEQUENCE, Case, Contender, Draw, Tensors
from linearize.kernels import dispatch


def disagreement(case: Case, contender: Contender, draw: Draw) -> float:
    """Largest relative error, ||found - expected|| / ||expected||, of outputs and of gradients that belong to one row.

    The contender runs on the whole batch, as it is timed; the torch form of the same function on its first sequence.
    Tests compare everything else; this only keeps a wrong kernel from being called fast. NaN counts as infinite.

    Args:
        case: gives the inputs.
        contender: one of ours.
        draw: where, and in which precision.
    """
    inputs = case.inputs(draw)
    single = [name for name in PER_SEQUENCE if name in inputs]
    rows = slice(0, 1) if single else slice(None)
    wide = {name: _wide(x[rows] if name in single else x) for name, x in inputs.items()}
    found = _outputs_and_gradients(case, contender, inputs, draw.dtype)
    with dispatch.kernels("torch"):
        expected = _outputs_and_gradients(case, contender, wide, draw.dtype)
    errors = [
        ((a[rows] if a.dim() else a).float() - b).norm() / b.norm()
        for a, b in zip(found, expected, strict=True)
    ]
    worst = max(error.item() for error in errors)
    return worst if all(torch.isfinite(error) for error in errors) else float("inf")


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _outputs_and_gradients(
    case: Case, contender: Contender, inputs: Tensors, dtype: torch.dtype
) -> list[Tensor]:
    """Outputs, and the gradients of inputs with a row for each sequence (of all that train where none has).

    Args:
        dtype: that the outputs' gradients are rounded to, so that both sides get the same ones.
    """
    used = {name: x.detach().requires_grad_(name in case.trained) for name, x in inputs.items()}
    made = contender.build(used)()
    outputs = [made] if isinstance(made, Tensor) else list(made)
    asked = [name for name in case.trained if name in PER_SEQUENCE] or list(case.trained)
    generator = torch.Generator(outputs[0].device).manual_seed(2)
    against = []
    for x in outputs:
        size = (1, *x.shape[1:]) if x.dim() else ()
        drawn = torch.randn(size, generator=generator, device=x.device, dtype=torch.float32)
        against.append(drawn.to(dtype).to(x.dtype).expand(x.shape))
    gradients = torch.autograd.grad(outputs, [used[name] for name in asked], against)
    return [x.detach() for x in (*outputs, *gradients)]
