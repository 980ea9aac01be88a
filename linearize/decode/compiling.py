"""A forward that is compiled at its first call, with joined products if these can be had, and else stays as it is."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import torch

from linearize.decode.joined import INDUCTOR, Joining
from linearize.decode.ordered import in_order
from linearize.kernels.dispatch import KernelError

log = logging.getLogger(__name__)


class Compiled:
    """See above.

    Args:
        call: the forward, a method; what it writes is written in place.
        options: of `torch.compile`.
        what: it is, in messages.

    Attributes:
        obstacle: why it is not compiled, or None.
        joining: what joins products, or None.
    """

    def __init__(self, call: Callable[..., Any], options: dict[str, Any], what: str) -> None:
        self.obstacle: str | None = None
        self.joining: Joining | None = None
        self._eager, self._options, self._what = call, options, what
        self._compile(join="mode" not in options)

    def _compile(self, *, join: bool) -> None:
        options = dict(self._options)
        self.joining = Joining(options.get("backend", INDUCTOR)) if join else None
        if self.joining is not None:
            options["backend"] = self.joining
        self._call = torch.compile(_with_code_of_its_own(self._eager), dynamic=False, **options)

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Call it; the first call compiles."""
        while self.obstacle is None:
            try:
                with in_order():
                    return self._call(*given, **named)
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                if isinstance(error.__cause__, torch.cuda.OutOfMemoryError | KernelError):
                    raise error.__cause__ from error
                why = " ".join(str(error).split())[:200] or type(error).__name__
                log.debug("where it could not be compiled", exc_info=error)
            if self.joining is not None:
                log.warning("%s is compiled without joining products: %s", self._what, why)
                self._compile(join=False)
            else:
                self.obstacle = why
                log.warning("%s is not compiled, which is slower: %s", self._what, why)
        return self._eager(*given, **named)

    def refresh(self) -> None:
        """Bring joined products up to parameters that have changed."""
        if self.joining is not None:
            self.joining.refresh()


def _with_code_of_its_own(call: Any) -> Callable[..., Any]:
    """The same method, of which torch keeps what it compiles apart.

    torch counts forms by code object, whatever model or buffers they were made for, and runs the ninth of a method
    operation by operation, saying little (`torch._dynamo.config.recompile_limit`).
    """
    function = call.__func__
    made = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(made, call.__self__)
