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
from linearize.kernels.window_linear.triton_ring import (
    LOG2E,
    attend,
    attend_pinned_slots,
    load_rotated,
    load_turned_back,
    ring_tile,
)


@triton.jit
def load_map(weight, dims, columns, K: tl.constexpr, F: tl.constexpr):
    """W [K, F] of one head."""
    square = (dims < K)[:, None] & (columns < F)[None, :]
    return tl.load(weight + dims[:, None] * F + columns[None, :], mask=square, other=0.0).to(tl.float32)


@triton.jit
def softmax(y, inside):
    """Softmax over the first axis, of y [FP, ...]; zero where not `inside`, which fits the shape."""
    top = tl.max(tl.where(inside, y, float("-inf")), 0)
    powers = tl.where(inside, tl.exp2((y - tl.expand_dims(top, 0)) * LOG2E), 0.0)
    return powers / tl.expand_dims(tl.sum(powers, 0), 0)


@triton.jit
def features(x, w, inside, WIDTH: tl.constexpr):
    """Features of one vector [K], both signs of a column side by side: [WIDTH = 2 FP]."""
    y = tl.sum(x[:, None] * w, 0)
    return tl.reshape(softmax(tl.join(y, -y), inside[:, None]), [WIDTH])


@triton.jit
def features_of_two(x, w, other, v, inside, WIDTH: tl.constexpr):
    """`features` of two vectors with a map each, in the reductions of one."""
    y = tl.sum(tl.join(x[:, None] * w, other[:, None] * v), 0)
    signs = tl.permute(tl.join(y, -y), (0, 2, 1))
    first, second = tl.split(softmax(signs, inside[:, None, None]))
    return tl.reshape(first, [WIDTH]), tl.reshape(second, [WIDTH])


@triton.jit
def window_linear_step_kernel(
    q, k, v, valid, cosine, sine, rotation_stride, query_map, key_map, window_weight, linear_weight, sink,
    ring_k, ring_v, ring_valid, counter, position, sums, norms, since, turns, out, scaling, cap, most,
    heads: tl.constexpr, kv_heads: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, R: tl.constexpr,
    FIRST: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, TURNED: tl.constexpr,
    KP: tl.constexpr, FP: tl.constexpr, PP: tl.constexpr, BV: tl.constexpr, BW: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_WINDOW: tl.constexpr, AT_ONCE: tl.constexpr,
    HAS_WINDOW_WEIGHT: tl.constexpr, HAS_LINEAR_WEIGHT: tl.constexpr, FACTOR: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_CAP: tl.constexpr, BOTH_MAPS: tl.constexpr,
):  # fmt: skip
    """`GROUP` query heads of one row; names as in `recurrent.window_linear_step`, F = f.

    FACTOR: 0 weights as they are, 1 `window_weight` is a logit, 2 and the linear branch has the complement.
    BOTH_MAPS: one key and one query are mapped, and registers hold both maps at once.
    """
    lane = tl.program_id(0) % (heads // GROUP)
    batch = (tl.program_id(0) // (heads // GROUP)).to(tl.int64)
    first_head = lane * GROUP
    per_kv: tl.constexpr = heads // kv_heads
    kv_head = first_head // per_kv
    leads = first_head % per_kv == 0
    dims, columns, features_at = tl.arange(0, KP), tl.arange(0, FP), tl.arange(0, 2 * FP)
    real = columns < F
    k_stride: tl.constexpr = kv_heads * K
    v_stride: tl.constexpr = kv_heads * V
    # both signs of a feature lie side by side in registers and F apart in memory
    feature = (features_at % 2) * F + features_at // 2
    is_feature = features_at // 2 < F
    cosine += batch * rotation_stride
    sine += batch * rotation_stride
    token = tl.cast(0, tl.int64)
    if HAS_WINDOW:
        token = tl.load(counter + batch * heads + first_head)
    here = 1
    if HAS_VALID:
        here = tl.load(valid + batch).to(tl.int32)
    key = load_rotated(k + (batch * kv_heads + kv_head) * K, cosine, sine, dims, K, R)
    query = load_rotated(q + (batch * heads + first_head) * K, cosine, sine, dims, K, R)
    z = tl.zeros([2 * FP], tl.float32)
    # the state's head is the program's
    sums += (batch * (heads // GROUP) + lane) * 2 * F * V
    norms += (batch * (heads // GROUP) + lane) * 2 * F
    key_map += lane * K * F
    slot, reach, count = 0, 0, 1
    counted = tl.cast(0, tl.int64)
    if HAS_WINDOW:
        held_k = ring_k + (batch * (FIRST + SLOTS) * kv_heads + kv_head) * K
        held_v = ring_v + (batch * (FIRST + SLOTS) * kv_heads + kv_head) * V
        flags = ring_valid + batch * (FIRST + SLOTS)
        ring_k, ring_v, ring_valid = held_k + FIRST * k_stride, held_v + FIRST * v_stride, flags + FIRST
        slot = (token % SLOTS).to(tl.int32)
        reach = SLOTS - 1
        if BLOCK > 0:
            before = tl.load(position + batch * heads + first_head)
            counted = before + here
            place = (tl.maximum(counted - 1, 0) % BLOCK).to(tl.int32)
            reach = tl.minimum(BLOCK + place + 1, LIMIT)
            count = tl.where((place == 0) & (here != 0), BLOCK, 0)
        own_slot = slot + FIRST
        if FIRST > 0:
            before = tl.load(since + batch)
            pinned = tl.minimum(before, FIRST).to(tl.int32)
            too_far = tl.maximum(before - most, 0)
            own_slot = tl.where((pinned < FIRST) & (here != 0), pinned, own_slot)
    for tile in tl.static_range((V + BV - 1) // BV):
        # everything is asked for before the first reduction, what hangs on the token's number last
        values = tile * BV + tl.arange(0, BV)
        wide = values < V
        fresh = tl.load(v + (batch * kv_heads + kv_head) * V + values, mask=wide, other=0.0).to(tl.float32)
        square = feature[:, None] * V + values[None, :]
        held = is_feature[:, None] & wide[None, :]
        state = tl.zeros([2 * FP, BV], tl.float32)
        phi_q = tl.zeros([2 * FP], tl.float32)
        state = tl.load(sums + square, mask=held, other=0.0)
        w_k = load_map(key_map, dims, columns, K, F)
        if BOTH_MAPS:
            w_q = load_map(query_map + first_head * K * F, dims, columns, K, F)
        arriving, arriving_value, alive = key, fresh, tl.cast(here, tl.float32)
        if not AT_ONCE and BLOCK == 0:
            old = (slot + 1) % SLOTS
            alive = tl.load(ring_valid + old).to(tl.float32) * here
            arriving = tl.load(ring_k + old * k_stride + dims, mask=dims < K, other=0.0).to(tl.float32)
            arriving_value = tl.load(ring_v + old * v_stride + values, mask=wide, other=0.0).to(tl.float32)
        if HAS_WINDOW:
            rows, kept, inside = ring_tile(
                ring_k, ring_v, ring_valid, 0, slot, reach, dims, values, key, fresh, here, k_stride, v_stride,
                K, V, SLOTS, BW,
            )  # fmt: skip
        if tile == 0:
            z = tl.load(norms + feature, mask=is_feature, other=0.0)
        if AT_ONCE or BLOCK == 0:
            if BOTH_MAPS:
                phi_k, phi_q = features_of_two(arriving, w_k, query, w_q, real, 2 * FP)
            else:
                phi_k = features(arriving, w_k, real, 2 * FP)
            phi_k = phi_k * alive
            state += phi_k[:, None] * arriving_value[None, :]
            if tile == 0:
                z += phi_k
        else:
            for i in range(0, count):
                old = (slot + 1 + i) % SLOTS
                alive = tl.load(ring_valid + old).to(tl.float32)
                x = tl.load(ring_k + old * k_stride + dims, mask=dims < K, other=0.0).to(tl.float32)
                y = tl.load(ring_v + old * v_stride + values, mask=wide, other=0.0).to(tl.float32)
                phi_k = features(x, w_k, real, 2 * FP) * alive
                state += phi_k[:, None] * y[None, :]
                if tile == 0:
                    z += phi_k
        for member in tl.static_range(GROUP):
            head = first_head + member
            line = batch * heads + head
            if member > 0:
                query = load_rotated(q + line * K, cosine, sine, dims, K, R)
            numerator = tl.zeros([BV], tl.float32)
            total = 0.0
            if HAS_WINDOW:
                top = float("-inf")
                if HAS_SINK:
                    top = tl.load(sink + head).to(tl.float32)
                    total = 1.0
                top, total, numerator = attend(
                    query, rows, kept, inside, top, total, numerator, scaling, cap, HAS_CAP
                )
                for first in range(BW, SLOTS - 1, BW):
                    more_rows, more_kept, more = ring_tile(
                        ring_k, ring_v, ring_valid, first, slot, reach, dims, values, key, fresh, here, k_stride,
                        v_stride, K, V, SLOTS, BW,
                    )  # fmt: skip
                    top, total, numerator = attend(
                        query, more_rows, more_kept, more, top, total, numerator, scaling, cap, HAS_CAP
                    )
                if FIRST > 0:
                    asks = query
                    if TURNED > 0:
                        asks = load_turned_back(q + line * K, too_far, turns, dims, K, TURNED)
                    top, total, numerator = attend_pinned_slots(
                        asks, held_k, held_v, pinned, top, total, numerator, scaling, cap, dims, values, k_stride,
                        v_stride, K, V, PP, HAS_CAP,
                    )  # fmt: skip
            far = 1.0
            if HAS_WINDOW_WEIGHT:
                share = tl.load(window_weight + head).to(tl.float32)
                if FACTOR > 0:
                    share = 1.0 / (1.0 + tl.exp2(-share * LOG2E))
                if FACTOR == 2:
                    far = 1.0 - share
                numerator, total = numerator * share, total * share
            if HAS_LINEAR_WEIGHT:
                far = tl.load(linear_weight + head).to(tl.float32)
            if not BOTH_MAPS:
                w_q = load_map(query_map + head * K * F, dims, columns, K, F)
                phi_q = features(query, w_q, real, 2 * FP)
            numerator += tl.sum(phi_q[:, None] * state, 0) * far
            total += tl.sum(phi_q * z, 0) * far
            over = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
            tl.store(out + line * V + values, (numerator * over).to(out.dtype.element_ty), mask=wide)
        tl.debug_barrier()  # warps that share an element, or a counter, have read it
        tl.store(sums + square, state, mask=held)
        if HAS_WINDOW:  # noqa: SIM102 - known when compiling, the other is not
            if leads:
                tl.store(held_v + own_slot * v_stride + values, fresh.to(ring_v.dtype.element_ty), mask=wide)
    tl.store(norms + feature, z, mask=is_feature)
    if HAS_WINDOW:
        if leads:
            tl.store(held_k + own_slot * k_stride + dims, key.to(ring_k.dtype.element_ty), mask=dims < K)
        if lane == 0:
            tl.store(ring_valid + slot, (here != 0) & (own_slot == slot + FIRST))
            if FIRST > 0:
                tl.store(flags + own_slot, here != 0)
        for member in tl.static_range(GROUP):
            tl.store(counter + batch * heads + first_head + member, token + here)
            if BLOCK > 0:
                tl.store(position + batch * heads + first_head + member, counted)


Numbers = list[float]
"""block, limit, at_once, scaling, softcap (0: none), factor (see the kernel), first, most: what is no tensor."""


PROGRAMS = 132
"""More than one program to each multiprocessor of an H100 is many."""


def configuration(key_dim: int, value_dim: int, features: int, span: int, programs: int) -> dict[str, int]:
    """Sizes of tiles, and warps.

    Registers bound them: a tile of sums, one of keys, one of values and two maps are held at once. Few programs are
    bound by latency and take many warps each; many are bound by bandwidth, and two share a multiprocessor.
    """
    widest = max(key_dim, value_dim)
    small = features * widest <= 32 * 32
    return {
        "BV": min(value_dim, 128 if features * widest <= 64 * 128 else 32),
        "BW": min(triton.next_power_of_2(max(span, 1)), 128 if widest <= 64 else 64 if widest <= 128 else 32),
        "num_warps": 4 if small or (max(widest, features, span) <= 64 and programs > PROGRAMS) else 8,
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
    query_map: Tensor,
    key_map: Tensor,
    window_weight: Tensor | None,
    linear_weight: Tensor | None,
    sink: Tensor | None,
    ring_k: Tensor | None,
    ring_v: Tensor | None,
    ring_valid: Tensor | None,
    counter: Tensor | None,
    position: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    since: Tensor | None,
    turns: Tensor | None,
    numbers: Numbers,
) -> Tensor:
    """The launch; see `recurrent.window_linear_step`. Tensors are contiguous."""
    block, limit, at_once, scaling, cap, factor, first, most = numbers
    batch, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    features, group = query_map.shape[2], heads // sums.shape[1]
    slots = 1 if ring_k is None else ring_k.shape[1] - int(first)
    rotation = 0 if cosine is None else cosine.shape[-1]
    key_pad, value_pad, map_pad = (triton.next_power_of_2(x) for x in (key_dim, value_dim, features))
    programs = batch * (heads // group)
    one_key = group == 1 and (at_once or not block)
    out = torch.empty(batch, heads, value_dim, dtype=v.dtype, device=v.device)
    launch(
        window_linear_step_kernel, (programs,),
        q=q, k=k, v=v, valid=valid, cosine=q if cosine is None else cosine, sine=q if sine is None else sine,
        rotation_stride=0 if cosine is None or cosine.shape[0] == 1 else rotation,
        query_map=query_map, key_map=key_map, window_weight=window_weight, linear_weight=linear_weight, sink=sink,
        ring_k=ring_k, ring_v=ring_v, ring_valid=ring_valid, counter=counter, position=position, sums=sums, norms=norms,
        since=since, turns=turns, most=int(most), out=out, scaling=scaling, cap=cap or 1.0, heads=heads,
        kv_heads=kv_heads, GROUP=group,
        K=key_dim, V=value_dim, F=features, R=rotation, SLOTS=slots, BLOCK=int(block), LIMIT=int(limit) or slots - 1,
        FIRST=int(first), PP=triton.next_power_of_2(max(int(first), 1)), TURNED=0 if turns is None else 2 * len(turns),
        KP=key_pad, FP=map_pad,
        HAS_VALID=valid is not None, HAS_WINDOW=ring_k is not None,
        AT_ONCE=bool(at_once), HAS_WINDOW_WEIGHT=window_weight is not None,
        HAS_LINEAR_WEIGHT=linear_weight is not None, FACTOR=int(factor), HAS_SINK=sink is not None, HAS_CAP=cap > 0,
        BOTH_MAPS=bool(one_key) and key_pad * map_pad <= 64 * 128,
        **configuration(key_pad, value_pad, map_pad, slots - 1, programs),
    )  # fmt: skip
    return out


@step.register_fake
def _(
    q, k, v, valid, cosine, sine, query_map, key_map, window_weight, linear_weight, sink,
    ring_k, ring_v, ring_valid, counter, position, sums, norms, since, turns, numbers,
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=v.dtype, device=v.device)


def covered(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, tensors: list[Tensor | None]) -> None:
    """Refuse shapes that the kernel does not cover."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    groups = [q.shape[1] % k.shape[1] == 0, sums.shape[1] in (q.shape[1], k.shape[1])]
    dispatch.require(
        "window_linear_step",
        dtype=(
            q.dtype in dtypes and k.dtype == v.dtype == q.dtype,
            f"{q.dtype} must be bfloat16, float16 or float32",
        ),
        head_dim=(max(q.shape[-1], v.shape[-1]) <= 256, f"{max(q.shape[-1], v.shape[-1])} is above 256"),
        heads=(all(groups), "the state has one head for each query head or for each key-value head"),
        state=(
            all(x is None or x.is_contiguous() for x in tensors),
            "a tensor of the state is not contiguous, so it cannot be written in place",
        ),
    )
