"""Numbers that callers of window_linear go by; here, where nothing needs Triton, exported code finds them."""

CHUNK = 64
"""Tokens in a chunk: one tile of every product."""
MOST_PINS = 16
"""Pinned keys that the kernels take: each costs a row as much as a column of a product, but without tensor cores."""
