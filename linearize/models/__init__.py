"""The MODEL argument (hub id, checkpoint folder, GGUF file, alias) to a local folder, a config, a teacher."""

from __future__ import annotations

from linearize.models.cache import cache_dir
from linearize.models.load import load_config, load_teacher, stored_dtype
from linearize.models.resolve import resolve, resolve_config
from linearize.models.tokenizer import load_tokenizer, render_chat

__all__ = [
    "cache_dir",
    "load_config",
    "load_teacher",
    "load_tokenizer",
    "render_chat",
    "resolve",
    "resolve_config",
    "stored_dtype",
]
