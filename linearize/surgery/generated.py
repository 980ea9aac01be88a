"""Subclasses made at run time: `Linearized<Base>` is the model's own class with one of our mixins in front.

`isinstance`, parameter names, masks and everything else that the base class does stay as they are.
"""

from __future__ import annotations

from typing import Any

PREFIX = "Linearized"

_made: dict[tuple[type, type], type[Any]] = {}


def subclass(base: type, mixin: type, **attributes: Any) -> type[Any]:
    """The class `Linearized<Base>(mixin, base)`; the same class for the same arguments.

    The name never holds a mixer's name: transformers decides by class name how `generate` caches.
    """
    if issubclass(base, mixin):
        return base
    key = (base, mixin)
    if key not in _made:
        name = PREFIX + base.__name__
        namespace = {"__module__": __name__, "__doc__": base.__doc__, **attributes}
        _made[key] = type(name, (mixin, base), namespace)
        # pickling (torch.save, multiprocessing) finds a class by module and name
        globals().setdefault(name, _made[key])
    return _made[key]
