"""generation_config.json: what `generate` takes from it unasked has to be of the right type."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from linearize.errors import CheckpointError
from linearize.models.files import check_file, read_json

NAME = "generation_config.json"
AGAIN = "mend it, or fetch the checkpoint again"
COUNTS = """
num_beams num_beam_groups num_return_sequences max_length max_new_tokens min_length min_new_tokens top_k
no_repeat_ngram_size encoder_no_repeat_ngram_size prompt_lookup_num_tokens num_assistant_tokens prefill_chunk_size
"""
NUMBERS = """
temperature top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty
diversity_penalty guidance_scale max_time
"""
FLAGS = "do_sample use_cache renormalize_logits remove_invalid_values output_scores output_attentions token_healing"
TOKENS = (
    "bos_token_id eos_token_id pad_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id"
)
LISTS = "suppress_tokens begin_suppress_tokens bad_words_ids sequence_bias forced_decoder_ids"
NAMES = "cache_implementation"


def check_generation(folder: Path) -> None:
    """Refuse a folder whose generation config, if it has one, holds values that `generate` cannot compute with.

    Raises:
        CheckpointError: names the key, the value and what it must be.
    """
    path = folder / NAME
    check_file(path, AGAIN)
    if not path.exists():
        return
    for key, value in read_json(path).items():
        rule = RULES.get(key)
        if rule is not None and value is not None and not rule[0](value):
            raise CheckpointError(f"{path}: {key} must be {rule[1]}, got {str(value)[:60]!r}; {AGAIN}")


def with_cache(model: Any) -> None:
    """Let `generate` keep what it has read, also where a config says not to: training saves that by chance."""
    if getattr(model.generation_config, "use_cache", None) is False:
        model.generation_config.use_cache = True


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _tokens(value: Any) -> bool:
    return all(type(token) is int for token in (value if isinstance(value, list) else [value]))


RULES = {
    **dict.fromkeys(COUNTS.split(), (_count, "a whole number of at least 0")),
    **dict.fromkeys(NUMBERS.split(), (_number, "a number")),
    **dict.fromkeys(FLAGS.split(), (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(TOKENS.split(), (_tokens, "a token's id or a list of them")),
    **dict.fromkeys(LISTS.split(), (lambda value: isinstance(value, (list, dict)), "a list")),
    **dict.fromkeys(NAMES.split(), (lambda value: isinstance(value, str), "a name")),
}
"""Key -> whether a value may stand there, and how to say so."""
