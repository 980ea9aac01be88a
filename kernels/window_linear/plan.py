"""Sizes, tiles, segments and configurations of one call of window_linear's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.launch import processors
from linearize.kernels.window_linear.sizes import CHUNK

WAVES = 2
"""Programs to a multiprocessor that a scan over chunks should have."""
FULL = 0.9
"""Share of them from which a scan needs no more programs."""


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled.

    Attributes:
        values: columns of the values in one program.
        warps, stages: num_warps and num_stages.
        registers: most of them a thread, so that more programs run on a multiprocessor; 0 for as many as it takes.
    """

    values: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """Of the launch."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found | ({"maxnreg": self.registers} if self.registers else {})


@dataclass(frozen=True)
class Plan:
    """Everything that the launches need to know beside the tensors.

    Attributes:
        batch, tokens, key_tokens, heads, kv_heads, state_heads, key_dim, value_dim, map_dim: sizes.
        window, least, prefix, scaling: see `Layer`.
        return_state: whether the final state is wanted.
        chunks: chunks of queries.
        lag: chunks between a query's own tile and the oldest one that it sees key by key.
        linear_tiles: how many of its tiles, the oldest first, can hold keys behind the window.
        segments, per_segment: pieces of the scan over chunks, and chunks in each.
        split: whether the scan's programs have one half of the features each.
        wide: whether states are float32.
        precision: of products of float32 numbers.
        roomy: whether the kernels for windows of whole chunks, which hold more tiles, fit into shared memory.
        pins: pinned keys of a document.
    """

    batch: int
    tokens: int
    key_tokens: int
    heads: int
    kv_heads: int
    state_heads: int
    key_dim: int
    value_dim: int
    map_dim: int
    window: int
    least: int
    prefix: int
    scaling: float
    return_state: bool
    chunks: int
    lag: int
    linear_tiles: int
    segments: int
    per_segment: int
    split: bool
    wide: bool
    precision: str
    roomy: bool
    pins: int

    @property
    def whole_chunks(self) -> bool:
        """Whether window and prefix are whole numbers of chunks, of one length, and the kernels for them have room."""
        return self.roomy and not (self.window % CHUNK or self.prefix % CHUNK or self.window - self.least)

    def kernel(self, name: str, *, aligned: bool) -> str:
        """Its entry in the table: kernels for windows of whole chunks have others, and others again with no window."""
        if aligned and self.pins and f"pinned_{name}" in CONFIGS:
            return f"pinned_{name}"
        return (("aligned_" if self.window else "unwindowed_") if aligned else "") + name

    @property
    def base(self) -> int:
        """First key of tile 0; keys in front of it are pinned ones or nobody's."""
        return self.prefix - self.lag * CHUNK

    @property
    def first_tile(self) -> int:
        """The first tile that holds a key."""
        return max(0, -self.base // CHUNK)

    @property
    def pin_segment(self) -> int:
        """Queries whose part in the gradients of pinned keys one program adds up."""
        return (4 if self.tokens <= 64 * CHUNK else 16) * CHUNK

    @property
    def pin_segments(self) -> int:
        """How many there are."""
        return -(-self.tokens // self.pin_segment)

    @property
    def last_tile(self) -> int:
        """Tiles that hold keys behind the last query's window."""
        return max(self.chunks, -(-(self.key_tokens - self.least - self.base) // CHUNK))

    def scans(self, config: Config) -> int:
        """Programs that scan one segment of one head side by side."""
        return self.value_dim // config.values * (2 if self.split else 1)

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the states between chunks; sums of float16 would overflow."""
        return dtype if dtype == torch.bfloat16 else torch.float32

    def outputs(self, q: Tensor) -> list[Tensor]:
        """Empty tensors for what the forward operator gives."""
        rows = (self.batch, self.heads, self.tokens)
        single = torch.float32
        made = [
            q.new_empty(self.batch, self.tokens, self.heads, self.value_dim),
            q.new_empty(rows, dtype=single),
            q.new_empty(rows, dtype=single),
        ]
        size = (self.batch, self.state_heads)
        final = self.return_state
        width = 2 * self.map_dim
        made.append(q.new_empty((*size, width, self.value_dim) if final else (0,), dtype=single))
        made.append(q.new_empty((*size, width) if final else (0,), dtype=single))
        chunks, pieces = self.chunks, self.segments if self.segments > 1 else 0
        made.append(
            q.new_empty(*size, chunks, 2, self.value_dim, self.map_dim, dtype=self.state_dtype(q.dtype))
        )
        made.append(q.new_empty(*size, chunks, width, dtype=single))
        made.append(
            q.new_empty(*size, pieces, 2, self.value_dim, self.map_dim, dtype=self.state_dtype(q.dtype))
        )
        made.append(q.new_empty(*size, pieces, width, dtype=single))
        made.append(q.new_empty(self.batch, self.heads, 2, self.tokens, dtype=single))
        made.append(q.new_empty(*size, 2, self.key_tokens, dtype=single))
        return made

    def gradients(self, q: Tensor, train_maps: bool) -> list[Tensor]:
        """Empty float32 gradients of maps and factors."""
        size = (self.heads, self.key_dim, self.map_dim)
        key_size = (self.state_heads, self.key_dim, self.map_dim)
        made = [q.new_empty(x if train_maps else (0,), dtype=torch.float32) for x in (size, key_size)]
        return made + [q.new_empty(self.heads, dtype=torch.float32) for _ in range(3)]


def make_plan(
    q: Tensor, k: Tensor, v: Tensor, query_map: Tensor, key_map: Tensor, numbers: list[float]
) -> Plan:
    """Work out the tiles; `numbers` as in `operator.Numbers`."""
    window, least, prefix, return_state, segments = (int(x) for x in numbers[:5])
    roomy, pins = (int(x) for x in numbers[6:])
    batch, tokens, heads, key_dim = q.shape
    key_tokens, kv_heads, value_dim = v.shape[1:]
    state_heads = key_map.shape[0]
    chunks = -(-tokens // CHUNK)
    lag = -(-window // CHUNK)
    split = False
    if not chunks:
        segments = 1
    elif segments == 0:
        # states of one segment are whole: their readers have no carry to add, which costs them a tenth of their time
        room, scans = WAVES * processors(q.device), max(1, batch * state_heads * max(1, value_dim // CHUNK))
        split = value_dim <= CHUNK and FULL * room <= 2 * scans and scans < FULL * room
        segments = 1 if split else max(1, min(room // scans, chunks // 8))
    per_segment = max(1, -(-chunks // segments))
    return Plan(
        batch=batch,
        tokens=tokens,
        key_tokens=key_tokens,
        heads=heads,
        kv_heads=kv_heads,
        state_heads=state_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        map_dim=query_map.shape[-1],
        window=window,
        least=least,
        prefix=prefix,
        scaling=numbers[5],
        return_state=bool(return_state),
        chunks=chunks,
        lag=lag,
        linear_tiles=lag - least // CHUNK + 1,
        segments=-(-chunks // per_segment) if chunks else 1,
        per_segment=per_segment,
        split=split,
        wide=q.dtype != torch.bfloat16,
        # of float32 operands, among them the states of float16: plain float32 products would take minutes to compile,
        # and single tf32 ones of states read wrong from segments on Hopper (Triton 3.6)
        precision="tf32" if q.dtype == torch.bfloat16 else "tf32x3",
        roomy=bool(roomy),
        pins=pins,
    )


def config(kernel: str, plan: Plan) -> Config:
    """The fixed table: block of values, warps and stages by head dim; no stages where float32 takes the shared memory.

    Tiles of fewer than 64 columns take two warps: with four, wgmma of such tiles is wrong in Triton 3.6 and 3.7 (their
    issue 11366), and two warps do not use it.
    """
    width = max(plan.key_dim, plan.value_dim)
    found = CONFIGS[kernel][64 if width <= 64 else 128 if width == 128 else 256]
    narrow = min(plan.key_dim, plan.value_dim, plan.map_dim) < 64
    stages = 1 if plan.wide else found.stages
    registers = 0 if plan.wide or narrow else found.registers
    return Config(min(found.values, plan.value_dim), 2 if narrow else found.warps, stages, registers)


CONFIGS: dict[str, dict[int, Config]] = {
    "key_states": {64: Config(64, 4, 4), 128: Config(64, 4, 3), 256: Config(64, 8, 2)},
    "query_states": {64: Config(64, 4, 3), 128: Config(64, 4, 3), 256: Config(64, 8, 2)},
    "split_query_states": {64: Config(64, 4, 3, 168), 128: Config(64, 4, 3), 256: Config(64, 8, 2)},
    "output": {64: Config(64, 4, 2), 128: Config(128, 8, 2), 256: Config(64, 8, 1)},
    "query_gradient": {64: Config(64, 4, 2), 128: Config(128, 8, 1), 256: Config(256, 8, 1)},
    "key_gradient": {64: Config(64, 4, 2), 128: Config(128, 8, 1), 256: Config(256, 8, 1)},
    "aligned_output": {64: Config(64, 4, 3, 168), 128: Config(64, 4, 2), 256: Config(64, 8, 1)},
    "aligned_query_gradient": {64: Config(64, 4, 1), 128: Config(128, 8, 1), 256: Config(256, 8, 1)},
    "aligned_key_gradient": {64: Config(64, 4, 2), 128: Config(128, 8, 1), 256: Config(256, 8, 1)},
    "frozen_key_gradient": {64: Config(64, 4, 1), 128: Config(128, 8, 1), 256: Config(256, 8, 1)},
    "unwindowed_output": {64: Config(64, 4, 2, 168), 128: Config(64, 4, 2), 256: Config(64, 8, 1)},
    "unwindowed_query_gradient": {64: Config(64, 4, 1, 168), 128: Config(128, 8, 1), 256: Config(256, 8, 1)},
    "unwindowed_key_gradient": {64: Config(64, 4, 1), 128: Config(128, 8, 1), 256: Config(256, 8, 1)},
    "pinned_output": {64: Config(64, 4, 3), 128: Config(64, 4, 2), 256: Config(64, 8, 1)},
    "pinned_parts": {64: Config(64, 4, 1), 128: Config(128, 8, 1), 256: Config(256, 8, 1)},
    "map_gradient": {64: Config(64, 4, 3), 128: Config(128, 8, 2), 256: Config(256, 8, 2)},
}
