"""Training compiles a mixer: whatever stands between the kernels is fused once a composition, not by hand for each.

Feature maps, gates, norms and shares are a few operations on each number. One by one they would read and write the
whole text in float32 each time, and keep it for backward. Inductor fuses them between the kernels and the products,
which stay what they are, and makes again in backward what is cheaper made than kept, the kernels' own inputs among it
(`keeping_little`). All layers of one composition share what is compiled. Where nothing trains, the parts run one by
one.

``LINEARIZE_COMPILE=auto|always|never``: where Triton kernels run, `auto` compiles on CUDA devices, `always` around
Triton's interpreter too (for tests), `never` nowhere.
"""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from linearize.kernels import dispatch
from linearize.kernels.dispatch import KernelError
from linearize.mixers.given import Given
from linearize.registry import closest

VARIABLE = "LINEARIZE_COMPILE"
CHOICES = ("auto", "always", "never")
BACKEND = "inductor"
SHAPES = 6
"""Kinds of calls for which one composition is compiled (`_kind`); at others the parts run one by one.

torch gives a function eight forms (`torch._dynamo.config.recompile_limit`) and raises at the ninth.
"""


Form = Callable[[Any, Given], Tensor]
"""Of a mixer, and the tensors of a call."""


def training(mixer: Any, given: Given) -> Tensor:
    """`Mixer.run` of a text that nothing carries over."""
    made: Tensor = mixer.run(given)
    return made


def weights_in_training(mixer: Any, given: Given) -> Tensor:
    """The same of columns of the weights, see `Mixer.chunked`."""
    made: Tensor = mixer.run(given, weights=True)
    return made


class _Compiled:
    """One composition's compiled form, and the kinds of calls that it has met.

    Args:
        name: shown by profilers.
        form: what is compiled.
    """

    def __init__(self, name: str, form: Form) -> None:
        def body(mixer: Any, given: Given) -> Tensor:
            return form(mixer, given)

        # torch counts compilations by code object: each composition gets one of its own
        code = body.__code__.replace(co_name=name)
        own = types.FunctionType(code, globals(), name, None, body.__closure__)
        self.call: Callable[..., Tensor] = torch.compile(
            own, backend=keeping_little, dynamic=False, fullgraph=True
        )
        self.kinds: set[tuple[Any, ...]] = set()
        self.full = False
        self.failed = False


def keeping_little(graph: Any, inputs: Any) -> Any:
    """`BACKEND` as a backend of `torch.compile` that keeps less for backward.

    By itself it keeps whatever a kernel reads in both passes, and something on the way of every long chain: of RWKV-7's
    mixer, features, rates and decays that are a few operations from the projections (docs/training.md has bytes).
    """
    from torch._functorch import config

    with config.patch(ban_recompute_materialized_backward=False, ban_recompute_long_fusible_chains=False):
        return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)


_made: dict[Any, _Compiled] = {}


_off = False


@contextmanager
def part_by_part() -> Iterator[None]:
    """Inside, no mixer is compiled by itself."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def compiled(mixer: nn.Module, q: Tensor, form: Form) -> Callable[[Given], Tensor] | None:
    """A `form` of the mixer, compiled, or None where it is to run as it is.

    Args:
        q: [B, T, H, K] of the call.
        form: a function that stays, by which what is compiled is found again.
    """
    if not wanted(q):
        return None
    key = (form, _structure(mixer))
    found = _made.get(key)
    if found is None:
        found = _made[key] = _Compiled(f"mixer_{len(_made)}", form)
    if found.failed:
        return None

    def call(given: Given) -> Tensor:
        kind = _kind(given)
        if kind not in found.kinds:
            if found.full or len(found.kinds) >= SHAPES:
                return form(mixer, given)
            found.kinds.add(kind)
        try:
            return found.call(mixer, given)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            # torch tells apart what `_kind` does not; what it has compiled stays in use
            found.full = True
            found.kinds.discard(kind)
            return form(mixer, given)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            if isinstance(error.__cause__, torch.cuda.OutOfMemoryError | KernelError):
                raise error.__cause__ from error
            found.failed = True
            why = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"this mixer could not be compiled ({why}); its parts run one by one, slower. {VARIABLE}=never "
                "leaves compiling out",
                stacklevel=2,
            )
            return form(mixer, given)

    return call


def _kind(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What torch compiles a call of one composition for: each tensor's size, type and place, and which there are."""
    found: list[Any] = []
    for x in given:
        if isinstance(x, Tensor):
            found.append((x.shape, x.dtype, x.device, x.requires_grad))
        else:
            found.append(_kind(x) if isinstance(x, tuple) else x is None)
    return tuple(found)


def wanted(q: Tensor) -> bool:
    """Whether a call on this tensor is to be compiled.

    Raises:
        KernelError: ``LINEARIZE_COMPILE`` has no such value.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise KernelError(f"{VARIABLE}='{choice}' is not a choice; {closest(choice, CHOICES)}")
    if choice == "never" or _off or torch.compiler.is_compiling():
        return False
    return choice == "always" or (q.is_cuda and dispatch.use_triton(q) and not dispatch.recording())


_walked: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], list[tuple[dict[str, Any], str]]]] = (
    WeakKeyDictionary()
)
"""Mixer -> what never changes in it, and where its parameters stand, found at its first call."""


def _structure(mixer: nn.Module) -> tuple[Any, ...]:
    """What tells one composition from another: parts, options, sizes, and how the branches are switched."""
    if mixer not in _walked:
        parts = tuple((name, type(part)) for name, part in mixer.named_modules())
        held = [(part._parameters, name) for part in mixer.modules() for name in part._parameters]
        sizes = tuple((name, x.shape) for name, x in mixer.named_parameters())
        places = [(own, name) for own, name in held if own[name] is not None]
        _walked[mixer] = (getattr(mixer, "composition", ""), parts, sizes), places
    fixed, places = _walked[mixer]
    dtypes = tuple(getattr(own[name], "dtype", None) for own, name in places)
    chosen = getattr(mixer, "without_window", None) is not None
    return (*fixed, dtypes, getattr(mixer, "branch_off", None), chosen)
