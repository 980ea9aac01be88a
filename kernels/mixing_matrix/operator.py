"""The mixing matrix as torch custom operators over the Triton kernels: shapes checked, launched, gradients wired.

Nothing of the size of a matrix exists. Forward keeps four numbers a row and head, and backward makes every tile anew:
a tile of scores, one of products, and the two products that spread a tile's gradient over the features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.launch import launch
from linearize.kernels.mixing_matrix.plan import WIDEST, Plan, constants, make_plan, sizes
from linearize.kernels.mixing_matrix.reference import Kind, Products, Softmax


def mixing_matrix_triton(kind: Kind, teacher: Softmax, student: Products, codes: Tensor | None) -> Tensor:
    """`mixing_matrix_rows` by kernels, [B, T, H] float32.

    Raises:
        KernelError: the kernels do not cover the call.
    """
    q, k, a, b = teacher.q, teacher.k, student.q, student.k
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    pairs = q.dtype == k.dtype and a.dtype == b.dtype
    dispatch.require(
        "mixing_matrix",
        dtype=(
            pairs and {q.dtype, a.dtype} <= {*kinds},
            f"{q.dtype}, {k.dtype}, {a.dtype}, {b.dtype}: of {kinds}",
        ),
        key_dim=(q.shape[-1] <= WIDEST, f"{q.shape[-1]} must be at most {WIDEST}"),
        features=(a.shape[-1] <= WIDEST, f"{a.shape[-1]} must be at most {WIDEST}"),
        heads=(
            q.shape[2] % k.shape[2] == 0 and a.shape[2] % b.shape[2] == 0,
            f"{q.shape[2]} must be a multiple of {k.shape[2]} key-value heads and {b.shape[2]} heads of features",
        ),
    )
    first = last = None
    if codes is not None:
        docs = torch.where(codes < 0, -1 - codes, codes).contiguous()
        first = torch.searchsorted(docs, docs).to(torch.int32)
        last = torch.searchsorted(docs, docs, right=True).to(torch.int32) - 1
        codes = codes.to(torch.int32)
    window = teacher.window or 0
    numbers = [teacher.scaling, teacher.softcap or 0.0, window, student.normalized, kind == "squares"]
    given = (q, k, a, b, student.total, teacher.sink, codes, first, last, [float(x) for x in numbers])
    return forward(*given)[0]


@torch.library.custom_op("linearize::mixing_matrix", mutates_args=())
def forward(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, total: Tensor | None, sink: Tensor | None, codes: Tensor | None,
    first: Tensor | None, last: Tensor | None, numbers: list[float],
) -> list[Tensor]:  # fmt: skip
    """What rows differ by, log of the teacher's sum, inverse of the student's, and its pull; the last two one number
    where nothing is normalized. Numbers: scaling, cap, window, normalized, squares."""
    from linearize.kernels.mixing_matrix.triton_rows import row_kernel

    plan = make_plan(q, k, a, b, numbers)
    q, k, a, b = (x.contiguous() for x in (q, k, a, b))
    made, tile = _outputs(plan, q), sizes(plan)
    rows, log_sum, rest, pull = made
    launch(
        row_kernel, (plan.batch * plan.heads * -(-plan.tokens // tile["M"]),),
        q=q, k=k, a=a, b=b, sink=None if sink is None else sink.contiguous(), first=first, rows_out=rows,
        log_sum_out=log_sum, rest_out=rest, pull_out=pull, HAS_SINK=sink is not None,
        **_seen(total, codes), **constants(plan), **tile,
    )  # fmt: skip
    return made


def _outputs(plan: Plan, q: Tensor) -> list[Tensor]:
    rows = (plan.batch, plan.tokens, plan.heads)
    kept = rows if plan.normalized else (1,)
    return [q.new_empty(size, dtype=torch.float32) for size in (rows, rows, kept, kept)]


def _seen(total: Tensor | None, codes: Tensor | None) -> dict[str, object]:
    """Masks, and totals as the sum of two float32 numbers: their differences count, and they grow with the text."""
    high = low = None
    if total is not None:
        high = total.to(torch.float32).contiguous()
        low = (total - high).to(torch.float32).contiguous()
    return {
        "high": high, "low": low, "codes": None if codes is None else codes.contiguous(),
        "HAS_CODES": codes is not None, "HAS_DECAY": total is not None,
    }  # fmt: skip


@forward.register_fake
def _(q, k, a, b, total, sink, codes, first, last, numbers):
    return _outputs(make_plan(q, k, a, b, numbers), q)


@torch.library.custom_op("linearize::mixing_matrix_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, total: Tensor | None, codes: Tensor | None, first: Tensor | None,
    last: Tensor | None, saved: list[Tensor], slope: Tensor, numbers: list[float],
) -> list[Tensor]:  # fmt: skip
    """da, db, and the gradient of the totals, one number where there are none."""
    from linearize.kernels.mixing_matrix.triton_keys import key_kernel
    from linearize.kernels.mixing_matrix.triton_rows import query_kernel

    plan = make_plan(q, k, a, b, numbers)
    q, k, a, b, slope = (x.contiguous() for x in (q, k, a, b, slope))
    made, tile = _gradients(plan, a, b, total), sizes(plan)
    da, db, dtotal = made
    of_queries = None if total is None else slope.new_empty(plan.batch, plan.tokens, plan.heads)
    of_keys = None if total is None else slope.new_empty(plan.batch, plan.tokens, plan.map_heads)
    given = {
        "q": q, "k": k, "a": a, "b": b, **dict(zip(("log_sum", "rest", "pull"), saved, strict=True)), "slope": slope,
        **_seen(total, codes), **constants(plan), **tile,
    }  # fmt: skip
    rows = plan.batch * plan.heads * -(-plan.tokens // tile["M"])
    launch(query_kernel, (rows,), da=da, dtotal=of_queries, first=first, **given)
    keys = plan.batch * plan.map_heads * -(-plan.tokens // tile["N"])
    launch(key_kernel, (keys,), db=db, dtotal=of_keys, last=last, **given)
    if of_queries is not None and of_keys is not None:
        dtotal.copy_(of_queries.unflatten(2, (plan.map_heads, -1)).sum(-1) - of_keys)
    return made


def _gradients(plan: Plan, a: Tensor, b: Tensor, total: Tensor | None) -> list[Tensor]:
    sizes_of = (plan.batch, plan.tokens)
    return [
        a.new_empty(*sizes_of, plan.heads, plan.feature_dim),
        b.new_empty(*sizes_of, plan.map_heads, plan.feature_dim),
        a.new_empty(1) if total is None else total.new_empty(*sizes_of, plan.map_heads),
    ]


@backward.register_fake
def _(q, k, a, b, total, codes, first, last, saved, slope, numbers):
    return _gradients(make_plan(q, k, a, b, numbers), a, b, total)


def _setup(ctx, inputs, output) -> None:
    q, k, a, b, total, _, codes, first, last, numbers = inputs
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, a, b, total, codes, first, last, *output[1:])


def _backward(ctx, grads):
    q, k, a, b, total, codes, first, last, *saved = ctx.saved_tensors
    if grads[0] is None:
        return (None,) * 10
    da, db, dtotal = backward(q, k, a, b, total, codes, first, last, saved, grads[0], ctx.numbers)
    return None, None, da, db, None if total is None else dtotal, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup)
