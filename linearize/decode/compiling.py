"""A forward that is compiled at its first call, with joined products if these can be had, and else stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.decode.joined import INDUCTOR, Joining
from linearize.decode.ordered import in_order
from linearize.kernels.dispatch import KernelError

log = logging.getLogger(__name__)


class Compiled:
    """See above.

    Args:
        call: the forward; what it writes is written in place.
        options: of `torch.compile`.

    Attributes:
        obstacle: why it is not compiled, or None.
        joining: what joins products, or None.
    """

    def __init__(self, call: Callable[..., Tensor], options: dict[str, Any]) -> None:
        self.obstacle: str | None = None
        self.joining: Joining | None = None
        self._eager, self._options = call, options
        self._compile(join="mode" not in options)

    def _compile(self, *, join: bool) -> None:
        options = dict(self._options)
        self.joining = Joining(options.get("backend", INDUCTOR)) if join else None
        if self.joining is not None:
            options["backend"] = self.joining
        self._call = torch.compile(self._eager, dynamic=False, **options)

    def __call__(self, *given: Any, **named: Any) -> Tensor:
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
                log.warning("a round's forward is compiled without joining products: %s", why)
                self._compile(join=False)
            else:
                self.obstacle = why
                log.warning("a round's forward is not compiled, which is slower: %s", why)
        return self._eager(*given, **named)

    def refresh(self) -> None:
        """Bring joined products up to parameters that have changed."""
        if self.joining is not None:
            self.joining.refresh()
