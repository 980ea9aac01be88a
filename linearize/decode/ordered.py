"""Compiled steps read a state before a kernel writes into it, as the model does, and without a copy of it.

Inductor moves an operation to the one that needs it, and may move one that reads a state behind the kernel that writes
into it; the kernel is then given a copy of the state, which is copied back afterwards: a window's whole ring, keys and
values, for the sake of the one key that leaves it. So operations stay in their order (`reorder_for_locality`).

That alone would give wrong numbers. What is done number by number Inductor computes where it is needed first, and for
what needs it only behind the kernel it finds that out when the kernel is there already: a counter would be read that
has been advanced. So what is made of a state before a kernel writes into it, and used behind, is made there and then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node


class MadeBefore(CustomGraphPass):
    """See above; for graphs in which operators that write are still functions of their bases.

    Args:
        then: a pass that comes behind this one, or None.
    """

    def __init__(self, then: Any = None) -> None:
        self.then = then

    def __call__(self, graph: Graph) -> None:
        """Change a graph in place."""
        self._keep(graph)
        if self.then is not None:
            self.then(graph)

    def _keep(self, graph: Graph) -> None:
        place = {node: number for number, node in enumerate(graph.nodes)}
        late: dict[Node, int] = {}
        for node in graph.nodes:
            bases = node.kwargs.get("_all_bases") if "auto_functionalized" in str(node.target) else None
            for base in bases or ():
                for made in _made_of(base, place, place[node]):
                    late[made] = min(late.get(made, place[node]), place[node])
        for made, limit in late.items():
            users = [user for user in made.users if place[user] > limit]
            value = made.meta.get("val")
            if users and isinstance(value, Tensor):
                with graph.inserting_after(made):
                    kept = graph.call_function(
                        torch.ops.prims.inductor_force_stride_order.default, (made, value.stride())
                    )
                kept.meta.update(made.meta)
                for user in users:
                    user.replace_input_with(made, kept)

    def uuid(self) -> Any:
        """What Inductor's cache of compiled graphs knows it by; None: it is not to keep them."""
        own = get_hash_for_files((__file__,))
        if self.then is None:
            return own
        other = self.then.uuid() if isinstance(self.then, CustomGraphPass) else None
        return None if other is None else (own, other)


def _made_of(base: Node, place: dict[Node, int], limit: int) -> Iterator[Node]:
    """Everything before `limit` that hangs on what a base holds and is not a part of its memory."""
    todo, seen = [base], {base}
    storage = _storage(base)
    while todo:
        for user in todo.pop().users:
            if user in seen or place[user] >= limit or user.op != "call_function":
                continue
            seen.add(user)
            todo.append(user)
            if _storage(user) != storage:
                yield user


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


@contextmanager
def in_order() -> Iterator[None]:
    """What is compiled inside keeps the order of the model's own operations where it reads and writes states."""
    from torch._inductor import config

    passes = MadeBefore(config.post_grad_custom_post_pass)
    with config.patch(reorder_for_locality=False, post_grad_custom_post_pass=passes):
        yield
