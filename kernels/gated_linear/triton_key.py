"""The kernels of gated_linear with a decay for every key or value dimension: programs of a chunk each."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_linear.triton_common import LOG2E, load_document, load_rows
from linearize.kernels.gated_linear.triton_key_parts import add_products
from linearize.kernels.gated_linear.triton_key_sums import add_sums, factors, sum_keys
from linearize.kernels.gated_linear.triton_levels import halvings, in_base_two


@triton.jit
def key_output_kernel(
    q, k, v, g, bonus, docs, states, norms, carries, carry_norms, spans, out, denominator, halved,
    tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, HALVED: tl.constexpr, READ_BEFORE: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_BONUS: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Numerators [B, T, H, V] and denominators [B, T, H]: one chunk, head and block of values a program.

    A first launch makes the chunks that need no halving and marks the others in `halved` [B, M, chunks]; a second one
    (HALVED), whose programs need more registers, makes those.
    """
    chunk, block = tl.program_id(0) // (V // BV), tl.program_id(0) % (V // BV)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    group: tl.constexpr = heads // state_heads
    line = batch * state_heads + head // group
    if HALVED:
        mine = tl.load(halved + line * tiles + chunk) != 0
    else:
        decays = g + (batch * tokens * state_heads + head // group) * K
        often = halvings(decays, chunk * C, tl.arange(0, C), tokens, state_heads, K, BK, C)
        mine = often == 0
        if (head % group == 0) & (block == 0):
            tl.store(halved + line * tiles + chunk, often)
    if mine:
        add_products(
            q, k, v, g, bonus, docs, (states, norms, carries, carry_norms, spans), out, denominator,
            chunk, batch, head, block, tokens, periods, per_segment, segments,
            heads, state_heads, K, V, BK, BV, C, True, HALVED, READ_BEFORE, NORMALIZE, HAS_BONUS, HAS_DOCS,
            HAS_CARRY, WIDE, PRECISION,
        )  # fmt: skip


@triton.jit
def key_gradient_kernel(
    q, k, v, g, bonus, docs, do, weight, states, norms, carries, carry_norms, spans, halved,
    ahead, ahead_norms, ahead_carries, ahead_carry_norms, ahead_spans, dq, dk, dv, dg, dbonus,
    tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, HALVED: tl.constexpr,
    SUMS: tl.constexpr, PRODUCTS: tl.constexpr, WITH_Q: tl.constexpr, COMPLEMENT: tl.constexpr, ADD: tl.constexpr,
    READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BONUS: tl.constexpr, HAS_DOCS: tl.constexpr,
    HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and the decays' gradient (SUMS), or dv (PRODUCTS): one chunk, head and block of columns a program.

    Whole chunks have one launch for both, whose programs share what they read in the cache; halved ones, for want of
    registers, one for each. WITH_Q, COMPLEMENT and ADD as in `add_sums`.
    """
    key_blocks: tl.constexpr = K // COLUMNS if SUMS else 0
    roles: tl.constexpr = key_blocks + (V // BV if PRODUCTS else 0)
    chunk, role = tl.program_id(0) // roles, tl.program_id(0) % roles
    batch = (tl.program_id(1) // state_heads).to(tl.int64)
    head = tl.program_id(1) % state_heads
    future = (ahead, ahead_norms, ahead_carries, ahead_carry_norms, ahead_spans)
    often = tl.load(halved + (batch * state_heads + head) * tiles + chunk)
    mine = often != 0 if HALVED else often == 0
    if mine:
        if SUMS and (not PRODUCTS or role < key_blocks):
            add_sums(
                q, k, v, g, bonus, docs, do, weight, (states, norms, carries, carry_norms, spans), future,
                dq, dk, dg, dbonus, chunk, batch, head, role, tokens, tiles, periods, per_segment, segments,
                heads, state_heads, K, V, COLUMNS, C, HALVED, READ_BEFORE, NORMALIZE, HAS_BONUS, WITH_Q,
                COMPLEMENT, ADD, HAS_DOCS, HAS_CARRY, WIDE, PRECISION,
            )  # fmt: skip
        if PRODUCTS and (not SUMS or role >= key_blocks):
            add_products(
                k, q, do, g, bonus, docs, future, dv, weight,
                chunk, batch, head, role - key_blocks, tokens, periods, per_segment, segments,
                heads, state_heads, K, V, BK, BV, C, False, HALVED, READ_BEFORE, NORMALIZE, HAS_BONUS, HAS_DOCS,
                HAS_CARRY, WIDE, PRECISION,
            )  # fmt: skip


@triton.jit
def value_output_kernel(
    q, k, v, g, docs, states, norms, carries, carry_norms, spans, out, halved,
    tokens, tiles, periods, per_segment, segments, width,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TILES: tl.constexpr, HALVED: tl.constexpr, SOFTMAX: tl.constexpr, READ_BEFORE: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs [B, T, H, V] where every value dimension has its decay: one chunk, head and block of values a program.

    States are [V, K]. `halved` as in `key_output_kernel`. SOFTMAX over the first `width` of a row, which one program
    makes whole.
    """
    chunk, block = tl.program_id(0) // (V // BV), tl.program_id(0) % (V // BV)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    group: tl.constexpr = heads // state_heads
    state_head = head // group
    line = batch * state_heads + state_head
    rows, values = tl.arange(0, C), block * BV + tl.arange(0, BV)
    first = chunk * C
    g += (batch * tokens * state_heads + state_head) * V
    if HALVED:
        mine = tl.load(halved + line * tiles + chunk) != 0
    else:
        often = halvings(g, first, rows, tokens, state_heads, V, BV, C)
        mine = often == 0
        if (head % group == 0) & (block == 0):
            tl.store(halved + line * tiles + chunk, often)
    if mine:
        place = first + rows
        owner = tl.zeros([C], tl.int32)
        others, before = owner, 0
        if HAS_DOCS:
            owner = load_document(docs, batch, place, tokens)
            others = load_document(docs, batch, first + rows, tokens)
            before = load_document(docs, batch, first - 1, tokens)
        decays = in_base_two(load_rows(g, first, rows, state_heads * V, values, tokens))
        made = factors(decays, rows, C, HALVED, READ_BEFORE)
        result, _passing = sum_keys(
            q + (batch * tokens * heads + head) * K,
            q, v + (batch * tokens * state_heads + state_head) * V,
            k + (batch * tokens * state_heads + state_head) * K,
            0.0, 0.0, (states, norms, carries, carry_norms, spans), made, owner, others, before,
            line, chunk, first, rows, values, tokens, periods, chunk // per_segment, segments,
            heads, state_heads, V, K, BV, C, HALVED, READ_BEFORE, False, HAS_DOCS, HAS_CARRY, False, WIDE,
            PRECISION,
        )  # fmt: skip
        if SOFTMAX:
            result = tl.where((values < width)[None, :], result, float("-inf"))
            result = tl.exp2((result - tl.max(result, 1)[:, None]) * LOG2E)
            result /= tl.sum(result, 1)[:, None]
        lines = (batch * tokens + place) * heads + head
        tl.store(
            out + lines[:, None] * V + values[None, :],
            result.to(out.dtype.element_ty),
            mask=(place < tokens)[:, None],
        )
