"""Triton's interpreter without what it does again and again: a third of its time, and the same numbers.

Every call of a device function (`tl.sum` is one) looks through all that `triton.language` has for what to replace,
though its launch has replaced it; every operation makes its types anew; every sum of integers is computed a second
time, and not looked at.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

replaced: list[tuple[Any, str, Any, Any]] = []
"""What holds it, its name, Triton's own, and what stands there now."""


def install() -> None:
    """Have this process's launches do so. What a Triton has otherwise stays as it is."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if not replaced:
        for change in CHANGES:
            with contextlib.suppress(
                AttributeError
            ):  # each looks for all that it needs before it replaces any
                change(tl, interpreter)


@contextlib.contextmanager
def without() -> Iterator[None]:
    """Triton's own for a while."""
    for owner, name, own, _ in replaced:
        setattr(owner, name, own)
    try:
        yield
    finally:
        for owner, name, _, quick in replaced:
            setattr(owner, name, quick)


def _replace(owner: Any, name: str, quick: Any) -> None:
    replaced.append((owner, name, getattr(owner, name), quick))
    setattr(owner, name, quick)


def _patched_once(tl: Any, interpreter: Any) -> None:
    """A launch replaces the language once for every module whose functions it calls."""
    executor, scope, patch = interpreter.GridExecutor, interpreter._LangPatchScope, interpreter._patch_lang
    call, mine = executor.__call__, threading.local()

    @functools.wraps(call)
    def launch(self: Any, *given: Any, **named: Any) -> None:
        before, mine.modules = getattr(mine, "modules", None), set()
        try:
            call(self, *given, **named)
        finally:
            mine.modules = before

    @functools.wraps(patch)
    def once(function: Any) -> Any:
        # a function's first call adds names to those of its module, of which some are the language
        module = id(function.__globals__), len(function.__globals__)
        modules = getattr(mine, "modules", None)
        if modules is None:
            return patch(function)
        if module in modules:
            return scope()
        modules.add(module)
        return patch(function)

    _replace(executor, "__call__", launch)
    _replace(interpreter, "_patch_lang", once)


def _builtins_by_name(tl: Any, interpreter: Any) -> None:
    """Which members of a module or a class are builtins is known before the first launch."""
    patch, change, builtin = interpreter._patch_builtin, interpreter._patch_attr, tl.core.is_builtin
    owners = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    names = {
        id(owner): [name for name in dir(owner) if builtin(getattr(owner, name, None))] for owner in owners
    }

    @functools.wraps(patch)
    def by_name(owner: Any, builder: Any, *scope: Any) -> None:
        if id(owner) not in names:
            return patch(owner, builder, *scope)
        for name in names[id(owner)]:
            member = getattr(owner, name)
            if builtin(member):
                change(owner, name, member, builder, *scope)

    _replace(interpreter, "_patch_builtin", by_name)


def _unread_overflow(tl: Any, interpreter: Any) -> None:
    """Integers are computed in 64 bits too, for an assertion that is made while debugging alone."""
    builder = interpreter.interpreter_builder
    options = builder.options
    _replace(builder, "options", dataclasses.replace(options, sanitize_overflow=options.debug))


def _numpy_types(tl: Any, interpreter: Any) -> None:
    """A type of Triton has one of numpy."""
    find, pointer, block = interpreter._get_np_dtype, tl.pointer_type, tl.block_type
    known: dict[str, Any] = {}

    @functools.wraps(find)
    def found(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, block) else kind
        if isinstance(scalar, pointer):
            return find(scalar)
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    _replace(interpreter, "_get_np_dtype", found)


def _block_types(tl: Any, interpreter: Any) -> None:
    """Blocks of one shape share it, and two that do need no broadcasting."""
    block, semantic, values = tl.block_type, type(interpreter.interpreter_semantic), tl.core.tuple
    make, broadcast = block.__init__, semantic.broadcast_impl_value
    known: dict[tuple[int, ...], tuple[Any, int, str]] = {}

    @functools.wraps(make)
    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = builtins.tuple(shape.values if isinstance(shape, values) else shape)
        if not all(type(x) is int for x in key):
            return make(self, element_ty, shape)
        if key not in known:
            make(self, element_ty, shape)
            known[key] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, name = known[key]
        self.name = f"<{name}, {element_ty}>"

    @functools.wraps(broadcast)
    def alike(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape is right.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    _replace(block, "__init__", init)
    _replace(semantic, "broadcast_impl_value", alike)


def _shapes(tl: Any, interpreter: Any) -> None:
    """Tensors of one shape share what holds it."""
    tensor, constexpr, values = tl.tensor, tl.core.constexpr, tl.core.tuple

    @functools.cache
    def held(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return constexpr(math.prod(shape)), values([constexpr(x) for x in shape])

    @functools.wraps(tensor.__init__)
    def init(self: Any, handle: Any, type: Any) -> None:  # noqa: A002, Triton's name
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = held(builtins.tuple(type.shape) if type.is_block() else ())

    _replace(tensor, "__init__", init)


CHANGES = (_patched_once, _builtins_by_name, _unread_overflow, _numpy_types, _block_types, _shapes)
