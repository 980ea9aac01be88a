"""One token of a LoLCATs layer in one launch: ring, window softmax, feature maps, sums, all in place on the device.

A program owns one head of the state (and the query heads that share it), so whatever it writes nobody else reads: its
sums and norms, its copies of the counters, and, the first query head of a key-value head, the ring's slot of the new
token, which the others take from their registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.launch import launch

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rotated(x, cosine, sine, dims, K: tl.constexpr, R: tl.constexpr):
    """One vector of width K, its first R numbers rotated by halves, rounded to its own dtype as the model's own is."""
    value = tl.load(x + dims, mask=dims < K, other=0.0)
    if R > 0:
        inside = dims < R
        partner = tl.where(dims < R // 2, dims + R // 2, dims - R // 2)
        other = tl.load(x + tl.where(inside, partner, 0), mask=inside, other=0.0).to(tl.float32)
        other = tl.where(dims < R // 2, -other, other)
        c = tl.load(cosine + dims, mask=inside, other=1.0).to(tl.float32)
        s = tl.load(sine + dims, mask=inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) * c + other * s).to(value.dtype)
    return value.to(tl.float32)


@triton.jit
def vector_maps(x, weight, dims, columns, K: tl.constexpr, F: tl.constexpr):
    """softmax(x W), softmax(-x W) of one vector [K], W [K, F]."""
    inside = columns < F
    square = (dims < K)[:, None] & inside[None, :]
    w = tl.load(weight + dims[:, None] * F + columns[None, :], mask=square, other=0.0).to(tl.float32)
    y = tl.sum(x[:, None] * w, 0)
    top = tl.max(tl.where(inside, y, float("-inf")), 0)
    bottom = tl.min(tl.where(inside, y, float("inf")), 0)
    up = tl.where(inside, tl.exp2((y - top) * LOG2E), 0.0)
    down = tl.where(inside, tl.exp2((bottom - y) * LOG2E), 0.0)
    return up / tl.sum(up, 0), down / tl.sum(down, 0)


@triton.jit
def window_linear_step_kernel(
    q, k, v, valid, cosine, sine, rotation_stride, query_map, key_map, window_weight, linear_weight, sink,
    ring_k, ring_v, ring_valid, counter, position, sums, norms, out, scaling, cap,
    heads: tl.constexpr, kv_heads: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, R: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
    KP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, BW: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_MAPS: tl.constexpr, AT_ONCE: tl.constexpr,
    HAS_WINDOW_WEIGHT: tl.constexpr, HAS_LINEAR_WEIGHT: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """`GROUP` query heads of one row; names as in `recurrent.window_linear_step`, F = f."""
    lane = tl.program_id(0) % (heads // GROUP)
    batch = (tl.program_id(0) // (heads // GROUP)).to(tl.int64)
    first_head = lane * GROUP
    per_kv: tl.constexpr = heads // kv_heads
    kv_head = first_head // per_kv
    leads = first_head % per_kv == 0
    dims, columns = tl.arange(0, KP), tl.arange(0, FP)
    cosine += batch * rotation_stride
    sine += batch * rotation_stride
    here = 1
    if HAS_VALID:
        here = tl.load(valid + batch).to(tl.int32)
    key = load_rotated(k + (batch * kv_heads + kv_head) * K, cosine, sine, dims, K, R)
    slot, reach, place, count = 0, 0, 0, 0
    following, counted = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    if HAS_WINDOW:
        ring_k += (batch * SLOTS * kv_heads + kv_head) * K
        ring_v += (batch * SLOTS * kv_heads + kv_head) * V
        ring_valid += batch * SLOTS
        token = tl.load(counter + batch * heads + first_head)
        following = token + 1
        slot = (token % SLOTS).to(tl.int32)
        reach, count = SLOTS - 1, 1
        if BLOCK > 0:
            before = tl.load(position + batch * heads + first_head)
            counted = tl.where((before > 0) | (here != 0), before + 1, 0)
            place = (tl.maximum(counted - 1, 0) % BLOCK).to(tl.int32)
            reach = tl.minimum(BLOCK + place + 1, LIMIT)
            count = tl.where(place == 0, BLOCK, 0)
        if leads:
            tl.store(ring_k + slot * (kv_heads * K) + dims, key.to(ring_k.dtype.element_ty), mask=dims < K)
        if lane == 0:
            tl.store(ring_valid + slot, here != 0)
    up_z = tl.zeros([FP], tl.float32)
    down_z = tl.zeros([FP], tl.float32)
    if HAS_MAPS:
        # the state's head is the program's
        sums += (batch * (heads // GROUP) + lane) * 2 * F * V
        norms += (batch * (heads // GROUP) + lane) * 2 * F
        up_z = tl.load(norms + columns, mask=columns < F, other=0.0)
        down_z = tl.load(norms + F + columns, mask=columns < F, other=0.0)
        key_map += lane * K * F
    for tile in range(0, (V + BV - 1) // BV):
        values = tile * BV + tl.arange(0, BV)
        wide = values < V
        fresh = tl.load(v + (batch * kv_heads + kv_head) * V + values, mask=wide, other=0.0).to(tl.float32)
        if HAS_WINDOW:
            if leads:
                tl.store(ring_v + slot * (kv_heads * V) + values, fresh.to(ring_v.dtype.element_ty), mask=wide)
        up_s = tl.zeros([FP, BV], tl.float32)
        down_s = tl.zeros([FP, BV], tl.float32)
        if HAS_MAPS:
            square = columns[:, None] * V + values[None, :]
            held = (columns < F)[:, None] & wide[None, :]
            up_s = tl.load(sums + square, mask=held, other=0.0)
            down_s = tl.load(sums + F * V + square, mask=held, other=0.0)
            once = tl.where(tile == 0, 1.0, 0.0)  # norms have no tiles
            if AT_ONCE:
                up_k, down_k = vector_maps(key, key_map, dims, columns, K, F)
                up_k, down_k = up_k * here, down_k * here
                up_s += up_k[:, None] * fresh[None, :]
                down_s += down_k[:, None] * fresh[None, :]
                up_z += up_k * once
                down_z += down_k * once
            else:
                for i in range(0, count):
                    old = (slot + 1 + i) % SLOTS
                    alive = tl.load(ring_valid + old).to(tl.float32)
                    x = tl.load(ring_k + old * (kv_heads * K) + dims, mask=dims < K, other=0.0).to(tl.float32)
                    y = tl.load(ring_v + old * (kv_heads * V) + values, mask=wide, other=0.0).to(tl.float32)
                    up_k, down_k = vector_maps(x, key_map, dims, columns, K, F)
                    up_k, down_k = up_k * alive, down_k * alive
                    up_s += up_k[:, None] * y[None, :]
                    down_s += down_k[:, None] * y[None, :]
                    up_z += up_k * once
                    down_z += down_k * once
            tl.debug_barrier()  # warps that share an element have read it
            tl.store(sums + square, up_s, mask=held)
            tl.store(sums + F * V + square, down_s, mask=held)
        for member in tl.static_range(GROUP):
            head = first_head + member
            line = batch * heads + head
            query = load_rotated(q + line * K, cosine, sine, dims, K, R)
            numerator = tl.zeros([BV], tl.float32)
            total = 0.0
            if HAS_WINDOW:
                top = float("-inf")
                if HAS_SINK:
                    top = tl.load(sink + head).to(tl.float32)
                    total = 1.0
                for first in range(0, SLOTS - 1, BW):
                    age = first + tl.arange(0, BW)
                    at = slot - age
                    at = tl.where(at < 0, at + SLOTS, at)
                    inside = (age > 0) & (age < reach)
                    seen = tl.load(ring_valid + at, mask=inside, other=0) != 0
                    inside = inside & seen
                    rows = tl.load(
                        ring_k + at[:, None] * (kv_heads * K) + dims[None, :],
                        mask=inside[:, None] & (dims < K)[None, :], other=0.0,
                    ).to(tl.float32)  # fmt: skip
                    kept = tl.load(
                        ring_v + at[:, None] * (kv_heads * V) + values[None, :],
                        mask=inside[:, None] & wide[None, :], other=0.0,
                    ).to(tl.float32)  # fmt: skip
                    own = age == 0
                    rows = tl.where(own[:, None], key[None, :], rows)
                    kept = tl.where(own[:, None], fresh[None, :], kept)
                    inside = inside | (own & (here != 0))
                    score = tl.sum(rows * query[None, :], 1) * scaling
                    if HAS_CAP:
                        score = cap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2E / cap)) + 1.0))
                    score = tl.where(inside, score, float("-inf"))
                    higher = tl.maximum(top, tl.max(score, 0))
                    safe = tl.where(higher == float("-inf"), 0.0, higher)
                    weight = tl.where(inside, tl.exp2((score - safe) * LOG2E), 0.0)
                    shrink = tl.exp2((top - safe) * LOG2E)
                    total = total * shrink + tl.sum(weight, 0)
                    numerator = numerator * shrink + tl.sum(weight[:, None] * kept, 0)
                    top = higher
            if HAS_MAPS:
                if HAS_WINDOW_WEIGHT:
                    share = tl.load(window_weight + head).to(tl.float32)
                    numerator, total = numerator * share, total * share
                up_q, down_q = vector_maps(query, query_map + head * K * F, dims, columns, K, F)
                if HAS_LINEAR_WEIGHT:
                    share = tl.load(linear_weight + head).to(tl.float32)
                    up_q, down_q = up_q * share, down_q * share
                numerator += tl.sum(up_q[:, None] * up_s, 0) + tl.sum(down_q[:, None] * down_s, 0)
                total += tl.sum(up_q * up_z + down_q * down_z, 0)
            over = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
            tl.store(out + line * V + values, (numerator * over).to(out.dtype.element_ty), mask=wide)
    tl.debug_barrier()  # every warp has read the norms and the counters
    if HAS_MAPS:
        tl.store(norms + columns, up_z, mask=columns < F)
        tl.store(norms + F + columns, down_z, mask=columns < F)
    if HAS_WINDOW:
        for member in tl.static_range(GROUP):
            tl.store(counter + batch * heads + first_head + member, following)
            if BLOCK > 0:
                tl.store(position + batch * heads + first_head + member, counted)


Numbers = list[float]
"""block, limit, at_once, scaling, softcap (0: none): what is no tensor."""


def configuration(key_dim: int, value_dim: int, features: int, span: int) -> dict[str, int]:
    """Sizes of tiles, and warps: registers are what bounds them (two tiles of sums, one of keys and one of values)."""
    widest = max(key_dim, value_dim)
    wide_state = features * value_dim > 64 * 64
    value_tile = min(value_dim, 64 if features > 64 else 128)
    return {
        "BV": value_tile,
        "BW": min(triton.next_power_of_2(max(span, 1)), 64 if widest <= 128 else 32),
        "num_warps": 8 if wide_state or widest > 64 else 4,
        "num_stages": 1,
    }


@torch.library.custom_op(
    "linearize::window_linear_step",
    mutates_args=("ring_k", "ring_v", "ring_valid", "counter", "position", "sums", "norms"),
)
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    cosine: Tensor | None,
    sine: Tensor | None,
    query_map: Tensor | None,
    key_map: Tensor | None,
    window_weight: Tensor | None,
    linear_weight: Tensor | None,
    sink: Tensor | None,
    ring_k: Tensor | None,
    ring_v: Tensor | None,
    ring_valid: Tensor | None,
    counter: Tensor | None,
    position: Tensor | None,
    sums: Tensor | None,
    norms: Tensor | None,
    numbers: Numbers,
) -> Tensor:
    """The launch; see `recurrent.window_linear_step`. Tensors are contiguous."""
    block, limit, at_once, scaling, cap = numbers
    batch, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    features = 1 if query_map is None else query_map.shape[2]
    group = 1 if sums is None else heads // sums.shape[1]
    slots = 1 if ring_k is None else ring_k.shape[1]
    rotation = 0 if cosine is None else cosine.shape[-1]
    padded = [triton.next_power_of_2(x) for x in (key_dim, value_dim, features)]
    out = torch.empty(batch, heads, value_dim, dtype=v.dtype, device=v.device)
    launch(
        window_linear_step_kernel, (batch * (heads // group),),
        q=q, k=k, v=v, valid=valid, cosine=q if cosine is None else cosine, sine=q if sine is None else sine,
        rotation_stride=0 if cosine is None or cosine.shape[0] == 1 else rotation,
        query_map=query_map, key_map=key_map, window_weight=window_weight, linear_weight=linear_weight, sink=sink,
        ring_k=ring_k, ring_v=ring_v, ring_valid=ring_valid, counter=counter, position=position, sums=sums, norms=norms,
        out=out, scaling=scaling, cap=cap or 1.0, heads=heads, kv_heads=kv_heads, GROUP=group,
        K=key_dim, V=value_dim, F=features, R=rotation, SLOTS=slots, BLOCK=int(block), LIMIT=int(limit) or slots - 1,
        KP=padded[0], FP=padded[2],
        HAS_VALID=valid is not None, HAS_WINDOW=ring_k is not None, HAS_MAPS=query_map is not None,
        AT_ONCE=bool(at_once), HAS_WINDOW_WEIGHT=window_weight is not None,
        HAS_LINEAR_WEIGHT=linear_weight is not None, HAS_SINK=sink is not None, HAS_CAP=cap > 0,
        **configuration(*padded, slots - 1),
    )  # fmt: skip
    return out


@step.register_fake
def _(
    q, k, v, valid, cosine, sine, query_map, key_map, window_weight, linear_weight, sink,
    ring_k, ring_v, ring_valid, counter, position, sums, norms, numbers,
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=v.dtype, device=v.device)


def covered(q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None, tensors: list[Tensor | None]) -> None:
    """Refuse shapes that the kernel does not cover."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    groups = [q.shape[1] % k.shape[1] == 0]
    if sums is not None:
        groups.append(sums.shape[1] in (q.shape[1], k.shape[1]))
    dispatch.require(
        "window_linear_step",
        dtype=(q.dtype in dtypes and k.dtype == v.dtype == q.dtype, f"{q.dtype} must be bfloat16, float16 or float32"),
        head_dim=(max(q.shape[-1], v.shape[-1]) <= 256, f"{max(q.shape[-1], v.shape[-1])} is above 256"),
        heads=(all(groups), "the state has one head for each query head or for each key-value head"),
        state=(
            all(x is None or x.is_contiguous() for x in tensors),
            "a tensor of the state is not contiguous, so it cannot be written in place",
        ),
    )
