"""Generation in one CUDA graph where it can be had; the caller goes on with transformers' own `generate` where not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from linearize.decode.arguments import evaluating
from linearize.decode.choice import obstacles, request
from linearize.decode.prefix import Prefix
from linearize.decode.reach import crossed
from linearize.decode.reuse import decoder, forget
from linearize.errors import LinearizeError
from linearize.surgery import converted


def generate_ids(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    *,
    graph: bool | None = None,
    compile: bool = False,  # noqa: A002 - torch's name
    on_tokens: Callable[[Tensor], None] | None = None,
    every: int = 16,
    prefix: Prefix | None = None,
) -> Tensor | None:
    """The new tokens of `model.generate(ids, attention_mask=mask, **options)`, from one graph that all tokens replay.

    Args:
        model: a causal language model of transformers.
        ids, mask: [B, T], padded on the left; mask may be None.
        options: further arguments of `generate`.
        graph: True insists, None takes it for converted models where nothing stands in the way, False never does.
        compile: `torch.compile` the step before it is captured: about a minute once, then faster tokens.
        on_tokens, every, prefix: see `Decoder.generate`.

    Returns:
        [B, n], or None: transformers is to do it.

    Raises:
        LinearizeError: a graph was insisted on where it cannot be had; the message says what stands in the way.
    """
    if graph is False or (graph is None and not converted(model)):
        return None
    before = 0 if prefix is None else prefix.tokens
    problems = obstacles(model)
    asked = None
    if not problems:
        asked, problems = request(model, before + ids.shape[1], options)
    if asked is not None and prefix is None:  # behind a prefix it has been refused
        turned = crossed(model, ids.shape[1], ids.shape[1] + asked.tokens)
        asked, problems = (None, [turned]) if turned is not None else (asked, [])
    if asked is None:
        if graph:
            name = "compile" if compile else "graph"
            raise LinearizeError(f"{name}=True: {'; '.join(problems)}; without it transformers decodes")
        return None
    with evaluating(model):
        made = decoder(model, ids.shape[0], before + ids.shape[1], asked, compile={} if compile else None)
        try:
            made.prepare()
        except (RuntimeError, LinearizeError) as error:
            forget(model)
            if graph:
                raise
            what = str(error).strip().splitlines()[0]
            warnings.warn(f"no CUDA graph of this model's step, going on without: {what}", stacklevel=2)
            return None
        return made.generate(ids, mask, asked.tokens, on_tokens=on_tokens, every=every, prefix=prefix)
