"""The value of an override by hydra's grammar, read without what the grammar's own reader lets slip."""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.overrides_parser import create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import Override
from hydra.grammar.gen.OverrideLexer import (  # type: ignore[attr-defined]
    CommonTokenStream,
    InputStream,
    OverrideLexer,
)
from hydra.grammar.gen.OverrideParser import OverrideParser

from linearize.config.values import as_number, shown


class Reader(HydraOverrideVisitor):
    """Underscores stand in numbers as `values` has them (hydra takes 1_0 for 10); a mapping has each key once."""

    def visitPrimitive(self, ctx: Any) -> Any:
        value = super().visitPrimitive(ctx)
        written = ctx.getText().strip()
        number = isinstance(value, int | float) and "_" in written
        return written if number and as_number(written) is None else value

    def visitDictContainer(self, ctx: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(1, ctx.getChildCount() - 1, 2):
            key, value = self.visitDictKeyValuePair(ctx.getChild(index))
            if str(key) in found:
                raise ValueError(f"{shown(str(key))} stands twice in one mapping; keep one of them")
            found[str(key)] = value
        return found


def read(written: str) -> Override:
    """The override that sets a key to `written`.

    Raises:
        HydraException: outside the grammar.
        ValueError: a mapping with a key twice.
    """
    listener = HydraErrorListener()
    lexer = OverrideLexer(InputStream(f"++key={written}"))
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(listener)
    override = Reader(create_functions()).visit(parser.override())
    assert isinstance(override, Override)
    override.validate()
    return override
