"""Which foreign layer a checkpoint's mixers are, all of them together; or the nearest one, and what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from linearize.export.layouts.difference import Difference
from linearize.export.layouts.layer import ForeignLayer, Given

Kind = TypeVar("Kind", bound=ForeignLayer)

Softmax = Callable[[Given], Iterable[Difference]]
"""What keeps a mixer without a recurrent branch from being the library's softmax layer."""


def nearest(
    candidates: Sequence[Kind], givens: Sequence[Given], softmax: Softmax
) -> tuple[Kind, list[Difference]]:
    """The layer of the same rule with the fewest differences, and those; none where it is the same function.

    Args:
        candidates: in the order in which they are preferred.
        givens: one of each kind of converted layer.
        softmax: see `Softmax`.
    """
    found = [(candidate, differences(candidate, givens, softmax)) for candidate in candidates]
    return min(found, key=lambda one: (any(each.part == "update" for each in one[1]), len(one[1])))


def differences(candidate: ForeignLayer, givens: Sequence[Given], softmax: Softmax) -> list[Difference]:
    """Everything in which one of the mixers is not this layer, each thing once."""
    recurrent = [given for given in givens if is_recurrent(given)]
    listed = [
        one for given in recurrent for one in (*candidate.differences(given), *_output(candidate, given))
    ]
    listed += [one for given in givens if not is_recurrent(given) for one in softmax(given)]
    if len({str(candidate.settings(given)) for given in recurrent} if not listed else ()) > 1:
        listed.append(Difference("layers", "several mixers or shapes", "the same one in every layer"))
    return list(dict.fromkeys(listed))


def _output(candidate: ForeignLayer, given: Given) -> list[Difference]:
    """Options of every output part: a constant behind the mixer, which no foreign layer has, as its own output
    projection would need a bias; and a token shift in front of its gate."""
    output, found = given.mixer["output"], []
    if output["name"] not in ("none", "constant") and output["constant"]:
        found.append(Difference("output.constant", "a constant on each head", "none"))
    if output.get("shift") and not candidate.shifts_output:
        found.append(Difference("output.shift", "a gate that reads the token before", "shift False"))
    return found


def is_recurrent(given: Given) -> bool:
    """Whether a mixer has a recurrent branch, or is softmax alone."""
    return bool(given.mixer["feature_map"]["name"] != "none")
