"""A mixer's call that shows what passes between its parts, and a layer's call cut to some of its sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from linearize.mixers.base import Partial
from linearize.mixers.combine import Combine
from linearize.mixers.mixer import Mixer


def some(call: Any, rows: slice) -> Any:
    """The call of some of its sequences; what it holds of none stays.

    Args:
        call: a dataclass, as `calibration.Call` has it, with a dictionary `context`.
        rows: of the sequences.
    """
    batch = len(call.q)

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(part) for part in value)
        return value[rows] if isinstance(value, Tensor) and len(value) == batch else value

    given = {"q", "k", "v", "hidden_states", "valid", "starts", "teacher"}
    fields = {
        field.name: cut(getattr(call, field.name))
        for field in dataclasses.fields(call)
        if field.name in given
    }
    # a sink is one number a head, of which there may be as many as sequences
    context = {name: value if name == "sink" else cut(value) for name, value in call.context.items()}
    again = getattr(call, "shifted", None)
    if again is not None:
        fields["shifted"] = lambda: cut(again())
    return dataclasses.replace(call, **fields, context=context)


@dataclass
class Seen:
    """What passed through a mixer's own seams in one call."""

    window: Partial | None = None
    recurrent: Partial | None = None
    joined: Tensor | None = None


@contextmanager
def shown(mixer: Mixer) -> Iterator[Seen]:
    """Inside, a call runs part by part, and shows what the branches gave and what reached the output part."""
    seen, fused, combine, output = Seen(), mixer.fused, mixer.combine, mixer.output
    parts: Any = mixer
    parts.fused = parts.output = None
    parts.combine = None if combine is None else Joint(seen, combine)
    hooks = []
    if combine is None and mixer.recurrent is not None:

        def keep(module: nn.Module, arguments: Any, made: Partial) -> None:
            seen.recurrent = made

        hooks.append(mixer.recurrent.normalizer.register_forward_hook(keep))
    given = mixer._joined_in

    def joined(*arguments: Any, **options: Any) -> Tensor:
        seen.joined = given(*arguments, **options)
        return seen.joined

    parts._joined_in = joined
    try:
        yield seen
    finally:
        del parts._joined_in
        for hook in hooks:
            hook.remove()
        parts.fused, parts.combine, parts.output = fused, combine, output


class Joint(nn.Module):
    """A mixer's rule of combination that shows what it is given."""

    def __init__(self, seen: Seen, rule: Combine) -> None:
        super().__init__()
        self.seen, self.rule, self.uses_hidden = seen, rule, rule.uses_hidden

    def forward(self, window: Partial, recurrent: Partial, hidden: Tensor | None = None) -> Tensor:
        self.seen.window, self.seen.recurrent = window, recurrent
        return self.rule(window, recurrent, hidden)
