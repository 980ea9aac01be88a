"""Which layer gets which mixer: a recipe's `layers:`, read here and nowhere else.

The forms, of which the first four are short for one of the last two:

| `layers:` | |
|---|---|
| `all` | every layer gets `mixer` |
| `[0, 2, 5]` | these get `mixer`, the others stay softmax |
| `{every: 4}` | every fourth stays softmax |
| `{keep: WHERE}` | those that WHERE names stay softmax |
| `{keep: WHERE, use: {NAME: WHERE}}` | and those under `use` get the mixer of that name from `mixers:` |
| `LLLS` | one letter a layer, over and over: L is `mixer`, S stays softmax, another is the first of a mixer's name |

WHERE is a list of layer numbers, or `{every: 4}` (the 4th, 8th, ...), `{first: 2}`, `{last: 1}`, or several of these
together. `{first: 0.5}` and `{last: 0.25}` are shares of the layers, rounded down, one layer at least. `every`,
`first`, `last` and patterns count attention layers; numbers are the model's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from linearize.config import rules
from linearize.config.names import DEFAULT, SOFTMAX
from linearize.config.values import shown
from linearize.config.words import ranges
from linearize.errors import RecipeError
from linearize.registry import closest

LETTERS = {"L": DEFAULT, "S": SOFTMAX}
"""Letters of a pattern that no mixer's name gives a meaning to."""
FORMS = "all, {every: 4}, [0, 2, 5], {keep: [7, 15], use: {NAME: {first: 2}}} or a pattern such as LLLS"
PLACES = {"every": rules.EVERY, "first": rules.PLACES, "last": rules.PLACES}
SHARES = ("first", "last")
"""Keys of `PLACES` that may also be a share of the layers, above 0 and below 1."""


@dataclass(frozen=True)
class Where:
    """Some of a model's attention layers.

    Attributes:
        numbers: of layers, the model's own.
        every: every n-th; 0: none.
        first, last: so many at either end, or below 1 such a share.
    """

    numbers: tuple[int, ...] = ()
    every: int = 0
    first: float = 0
    last: float = 0

    def among(self, indices: Sequence[int]) -> set[int]:
        """The layers that are meant, of those of a model."""
        first, last = (_count(places, len(indices)) for places in (self.first, self.last))
        found = set(self.numbers) | set(indices[:first])
        found |= set(indices[self.every - 1 :: self.every]) if self.every else set()
        return found | (set(indices[-last:]) if last else set())

    def missing(self, path: str, indices: Sequence[int]) -> Iterator[str]:
        """What the model does not have."""
        absent = [number for number in self.numbers if number not in indices]
        if absent:
            found = f"its layers are {indices[0]} to {indices[-1]}"
            yield f"{path}: the model has no attention layer {', '.join(map(str, absent[:5]))}; {found}"
        for name, count in (("first", self.first), ("last", self.last)):
            if count > len(indices):
                yield f"{path}.{name}: {count:g}, but the model has {len(indices)} attention layers"

    def meets(self, other: Where) -> str | None:
        """A layer that both name in whatever model has the layers that they name, in words, or None."""
        shared = sorted(set(self.numbers) & set(other.numbers))
        for one, two in ((self, other), (other, self)):
            # a layer's number is never below its place among the attention layers, and a share has one layer at least
            first = 1 if 0 < two.first < 1 else two.first
            shared += [number for number in one.numbers if number < first]
            if 0 < one.every <= first:
                return f"the attention layer at place {one.every}"
        if shared:
            return f"layer {shared[0]}"
        if self.first and other.first:
            return "the first attention layer"
        return "the last attention layer" if self.last and other.last else None


def _count(places: float, layers: int) -> int:
    """How many layers a number or a share means; half of two is one, half of three is one too."""
    # a product that lacks a rounding error of a whole number is that number
    return int(places) if places >= 1 or not places else max(1, int(places * layers + 1e-9))


@dataclass
class Layers:
    """What `layers:` says.

    Attributes:
        rules: dotted key, name of a mixer (`SOFTMAX`: none), and where.
        rest: what the layers get that no rule names.
        pattern: the names that follow each other instead, over and over.
    """

    rules: list[tuple[str, str, Where]] = field(default_factory=list)
    rest: str = DEFAULT
    pattern: list[str] = field(default_factory=list)


def problems(layers: Any, names: Collection[str] = ()) -> list[str]:
    """Everything that is wrong with a `layers:` section whatever the model.

    Args:
        layers: the recipe's value.
        names: of the recipe's `mixers:`.
    """
    return _read(layers, names)[1]


def assign(layers: Any, indices: Sequence[int], names: Collection[str] = ()) -> dict[int, str]:
    """The name of each layer's mixer: of one of `names`, `DEFAULT`, or `SOFTMAX` where it stays as it is.

    Args:
        layers: the recipe's value.
        indices: numbers of the model's attention layers, increasing.
        names: of the recipe's `mixers:`.

    Raises:
        RecipeError: with all problems, those of `problems` and what only the model shows: a layer that it does not
            have, two rules that name one layer, nothing left to convert.
    """
    said, found = _read(layers, names)
    if found:
        raise RecipeError(found)
    if said.pattern:
        if len(said.pattern) > len(indices):
            found.append(
                f"layers: the pattern has {len(said.pattern)} letters, and the model {len(indices)} attention layers"
            )
        given = {index: said.pattern[place % len(said.pattern)] for place, index in enumerate(indices)}
    else:
        given, by = dict.fromkeys(indices, said.rest), dict[int, str]()
        for path, name, where in said.rules:
            found += where.missing(path, indices)
            meant = sorted(where.among(indices) & set(indices))
            for other in dict.fromkeys(by[index] for index in meant if index in by):
                shared = [index for index in meant if by.get(index) == other]
                found.append(
                    f"{path}: names layer{'s' if len(shared) > 1 else ''} {ranges(shared)}, as {other} does; a layer "
                    "has one mixer"
                )
            given |= dict.fromkeys(meant, name)
            by |= dict.fromkeys(meant, path)
    if not found and set(given.values()) == {SOFTMAX}:
        found.append(f"layers: {shown(layers)} leaves no layer to convert")
    if found:
        raise RecipeError(found)
    return given


def idle(layers: Any, count: int, names: Collection[str] = ()) -> list[str]:
    """A sentence for each rule that reaches no layer of a model of `count` attention layers; they do no harm."""
    said, found = _read(layers, names)
    return [
        f"{path}.every: {where.every}, but the model has {count} attention layers, so none "
        f"{'stays softmax' if name == SOFTMAX else f'gets {name}'}"
        for path, name, where in ([] if found else said.rules)
        if where.every > count
    ]


def used(layers: Any, names: Collection[str] = ()) -> list[str]:
    """Names of the mixers that layers get, `DEFAULT` first where it is one; of a section without `problems`."""
    said, _ = _read(layers, names)
    given = [*said.pattern] if said.pattern else [said.rest, *(name for _, name, _ in said.rules)]
    return sorted(set(given) - {SOFTMAX}, key=lambda name: (name != DEFAULT, name))


def keeps_softmax(layers: Any, names: Collection[str] = ()) -> bool:
    """Whether some layers stay as they are, in one model or another; of a section without `problems`."""
    said, _ = _read(layers, names)
    return SOFTMAX in (said.rest, *said.pattern, *(name for _, name, _ in said.rules))


def _read(layers: Any, names: Collection[str]) -> tuple[Layers, list[str]]:
    """What a section says, as far as it is right, and what is wrong."""
    said, found = Layers(), list[str]()
    if isinstance(layers, str):
        if layers != "all":
            said.pattern, found = _pattern(layers, names)
    elif isinstance(layers, (list, tuple)):
        said.rest = SOFTMAX
        found += [] if layers else ["layers: an empty list converts nothing"]
        said.rules = [("layers", DEFAULT, _where("layers", layers, found))]
    elif isinstance(layers, dict) and layers:
        _rules(layers, names, said, found)
    else:
        found.append(f"layers: must be {FORMS}, got {shown(layers)}")
    if not found:
        bound = {*said.pattern, *(name for _, name, _ in said.rules)}
        found += [
            f"mixers.{name}: no layer gets it; name its layers (layers.use.{name}=[0]), or take it out (~mixers.{name})"
            for name in names
            if name not in bound
        ]
    return said, found


def _rules(layers: dict[Any, Any], names: Collection[str], said: Layers, found: list[str]) -> None:
    known = ("every", "keep", "use")
    found += [f"layers.{key}: unknown key; {closest(str(key), known)}" for key in layers if key not in known]
    if "every" in layers:
        if "keep" in layers:
            found.append(
                "layers.every: is short for keep: {every: n}, and keep is there too; write one of them"
            )
        said.rules.append(("layers", SOFTMAX, _where("layers", {"every": layers["every"]}, found)))
    if "keep" in layers:
        said.rules.append(("layers.keep", SOFTMAX, _where("layers.keep", layers["keep"], found)))
    use = layers.get("use", {})
    if not isinstance(use, dict):
        found.append(f"layers.use: must map names of mixers to their layers, got {shown(use)}")
        use = {}
    for name, value in use.items():
        path = f"layers.use.{name}"
        if name not in names:
            reason = {
                DEFAULT: "what no rule names gets `mixer`",
                SOFTMAX: "layers.keep says what stays softmax",
            }
            found.append(f"{path}: no such mixer; {reason.get(name) or _named(str(name), names)}")
        if value == []:
            found.append(f"{path}: an empty list names no layer; take it out (~{path})")
        said.rules.append((path, str(name), _where(path, value, found)))
    for (one, _, first), (two, _, second) in combinations(said.rules, 2):
        if (shared := first.meets(second)) is not None:
            found.append(f"{two}: names {shared}, as {one} does; a layer has one mixer")


def _where(path: str, value: Any, found: list[str]) -> Where:
    """Layers that are meant, as far as they are right; what is wrong is written down."""
    if isinstance(value, (list, tuple)):
        wrong = _number_problems(path, value)
        found += wrong
        return Where() if wrong else Where(numbers=tuple(value))
    if not isinstance(value, dict) or not value:
        found.append(f"{path}: must be a list of layer numbers, or {{every: 4}}, {{first: 2}}, {{last: 1}}, got "
                     f"{shown(value)}")  # fmt: skip
        return Where()
    places: dict[str, Any] = {}
    for key, count in value.items():
        if key not in PLACES:
            found.append(f"{path}.{key}: unknown key; {closest(str(key), PLACES)}")
        elif key in SHARES and type(count) is float and 0 < count < 1:
            places[key] = count
        elif type(count) is not int:
            share = " (or a share of the layers, above 0 and below 1)" if key in SHARES else ""
            found.append(f"{path}.{key}: must be a whole number{share}, got {shown(count)}")
        elif (problem := PLACES[key].problem(count)) is not None:
            found.append(f"{path}.{key}: {problem}")
        else:
            places[key] = count
    return Where(**places)


def _number_problems(path: str, values: Sequence[Any]) -> list[str]:
    wrong = [value for value in values if type(value) is not int or rules.LAYER.problem(value)]
    if wrong:
        named = ", ".join(shown(value) for value in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        return [f"{path}: layer numbers are whole, count from 0 and end before 10000, got {named}"]
    twice = sorted(value for value, times in Counter(values).items() if times > 1)
    return [f"{path}: names layer {', '.join(map(str, twice[:5]))} twice"] if twice else []


def _pattern(text: str, names: Collection[str]) -> tuple[list[str], list[str]]:
    """The names that letters stand for, and what is wrong with them."""
    if not re.fullmatch("[A-Z]+", text) or len(text) > rules.PLACES.high or text == "ALL":
        return [], [f"layers: must be {FORMS}, got {shown(text)}"]
    meant, found = dict[str, str](), list[str]()
    for letter in dict.fromkeys(text):
        bound = [LETTERS[letter]] if letter in LETTERS else [n for n in names if n[:1].upper() == letter]
        if len(bound) == 1:
            meant[letter] = bound[0]
        elif bound:
            found.append(
                f"layers: the letter {letter} could be {' or '.join(bound)}; rename one, or use layers.use"
            )
        else:
            found.append(f"layers: the letter {letter} begins the name of no mixer; {_named(letter, names)}")
    if not found and set(meant.values()) == {SOFTMAX}:
        found.append(f"layers: the pattern {shown(text)} leaves no layer to convert")
    return [meant.get(letter, SOFTMAX) for letter in text], found


def _named(name: str, names: Collection[str]) -> str:
    return closest(name, names) if names else "mixers: names none"
