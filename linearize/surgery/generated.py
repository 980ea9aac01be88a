"""Subclasses made at run time: `Linearized<Base>` is the model's own class with one of our mixins in front.

`isinstance`, parameter names, masks and everything else that the base class does stay as they are.
"""

from __future__ import annotations

from typing import Any

PREFIX = "Linearized"

_made: dict[tuple[Any, ...], type[Any]] = {}


def subclass(base: type, mixin: type, **attributes: Any) -> type[Any]:
    """The class `Linearized<Base>(mixin, base)`; the same class for the same arguments.

    The name never holds a mixer's name: transformers decides by class name how `generate` caches. Classes of one name
    may differ in their attributes: two families can share a model class and have a config class each.

    Args:
        base: the class of transformers.
        mixin: one of ours.
        **attributes: of the new class; hashable.
    """
    if issubclass(base, mixin):
        return base
    key = (base, mixin, *sorted(attributes.items()))
    if key not in _made:
        namespace: dict[str, Any] = {
            "__module__": __name__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            **attributes,
        }
        made: Any = type(PREFIX + base.__name__, (mixin, base), namespace)
        made.linearize_made_of = key
        _made[key] = made
    return _made[key]


def empty(base: type, mixin: type, *attributes: tuple[str, Any]) -> Any:
    """An instance of `subclass(base, mixin, **attributes)` without any state, as unpickling needs it."""
    # a class among the attributes was generated itself, and is handed over as what it was made of
    values = {
        name: subclass(*value[:2], **dict(value[2:])) if _is_made(value) else value
        for name, value in attributes
    }
    cls: Any = subclass(base, mixin, **values)
    return cls.__new__(cls)


def _reduce(self: Any, protocol: Any) -> Any:
    """How an instance is pickled: a new process has not made its class, so the class goes as what it is made of."""
    cls: Any = next(cls for cls in type(self).__mro__ if "linearize_made_of" in cls.__dict__)
    base, mixin, *attributes = cls.linearize_made_of
    reduced = super(mixin, self).__reduce_ex__(max(int(protocol), 2))
    if cls is not type(self):  # somebody else's subclass, which is theirs to find
        return reduced
    parts = ((name, getattr(value, "linearize_made_of", value)) for name, value in attributes)
    return empty, (base, mixin, *parts), *reduced[2:]


def _is_made(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) >= 2 and all(isinstance(part, type) for part in value[:2])
