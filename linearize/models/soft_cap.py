"""The soft cap on attention scores of Gemma 2 and its like, which torch's own attention (sdpa) does not compute."""

from __future__ import annotations

from typing import Any


def capped(config: Any) -> bool:
    """Whether a config says that scores have a soft cap, under the name that all families of transformers use."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def honor_soft_cap(model: Any) -> None:
    """Set a model whose scores have a soft cap to the attention function that computes it.

    transformers before 5.18 takes sdpa for such families unasked, which drops the cap without a word and so is
    another model: other logits, and other texts. From 5.18 on it refuses.
    """
    for config in {id(x): x for x in (model.config, model.config.get_text_config())}.values():
        if config._attn_implementation == "sdpa":
            config._attn_implementation = "eager"
