"""Products of one input with several matrices as one product, where a step is compiled.

One token a row makes products so small that starting them is what they cost: a layer has projections to q, k and v, two
into its MLP, and a mixer's own to decays, rates and shares of each head, whose matrices are brought to the model's
dtype before. What `torch.compile` has traced says which of them have the same input. Their matrices are copied below
each other once, in that dtype, and the products become parts of one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

MULTIPLE = 16
"""Rows of a joined matrix, zeros at its end: libraries have slow kernels for matrices of odd sizes."""
SHARE = 4
"""Copies take one such part of the memory that is free at most."""
INDUCTOR = "inductor"
PLAIN = ("torch", "torch.nn.functional", "torch._C._nn", "builtins")
"""Modules whose functions write into what they are given only where their names say so."""
ARITHMETIC = (operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.neg)
"""What traced expressions are made of; the module has others that write."""


@dataclass(frozen=True)
class Constant:
    """What hangs on a parameter alone: the parameter, in a dtype, a matrix perhaps turned."""

    parameter: nn.Parameter
    dtype: torch.dtype
    turned: bool = False

    @property
    def size(self) -> torch.Size:
        """Of `value`."""
        size = self.parameter.shape
        return size[::-1] if self.turned else size

    @property
    def bytes(self) -> int:
        """Of `value`."""
        return self.parameter.numel() * self.dtype.itemsize

    def value(self) -> Tensor:
        """As it is now."""
        made = self.parameter.detach().to(self.dtype)
        return made.T if self.turned else made


@dataclass(frozen=True)
class Product:
    """A node of a graph that multiplies with a constant.

    Attributes:
        node: the product.
        shared: what is multiplied.
        matrix: [out, in].
        bias: [out], or None.
    """

    node: Node
    shared: Node
    matrix: Constant
    bias: Constant | None


class Joining:
    """A backend of `torch.compile` that joins products and hands the rest to another one.

    Args:
        backend: its name, or itself.

    Attributes:
        copies: memory that repeats constants, in what has been compiled.
        joined: how many products became one, of each.
    """

    def __init__(self, backend: str | Callable[..., Any] = INDUCTOR) -> None:
        self.backend = backend
        self.copies: list[tuple[Tensor, Constant]] = []
        self.joined: list[int] = []
        self._known: list[tuple[int, int]] = []

    def __call__(
        self, graph: GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None
    ) -> Any:
        """Compile a graph of Dynamo's; `inputs` in the order of its placeholders."""
        with torch.no_grad():
            graph = self._rewritten(graph, inputs)
        self._known = self._versions()
        compiler: Callable[..., Any] = torch._dynamo.lookup_backend(self.backend)
        if self.backend == INDUCTOR:
            return compiler(graph, inputs, config_patches=options)
        return compiler(graph, inputs, **({} if options is None else {"options": options}))

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to parameters that have changed since they were made."""
        versions = self._versions()
        if versions != self._known:
            for held, source in self.copies:
                held.copy_(source.value())
            self._known = versions

    def _versions(self) -> list[tuple[int, int]]:
        sources = (source.parameter for _, source in self.copies)
        return [(x.data_ptr(), -1 if x.is_inference() else x._version) for x in sources]

    def _rewritten(self, graph: GraphModule, inputs: Sequence[Any]) -> GraphModule:
        constants: dict[Node, Constant] = {
            node: Constant(x, x.dtype)
            for node, x in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True)
            # what is no plain tensor, such as quantized weights, has rules of its own
            if type(x) is nn.Parameter and type(x.data) is Tensor
        }
        for node in graph.graph.nodes:
            found = _derived(node, constants)
            if found is not None:
                constants[node] = found
        alike: dict[Node, list[Product]] = {}
        read = _read(graph)
        for node in graph.graph.nodes:
            product = _product(node, constants) if node in read else None
            if product is not None:
                alike.setdefault(product.shared, []).append(product)
        groups = [products for products in alike.values() if len(products) > 1]
        casts = {node for node, x in constants.items() if not x.turned and x.dtype != x.parameter.dtype}
        taken = sum(product.matrix.bytes for products in groups for product in products)
        if not _fits(taken + sum(constants[node].bytes for node in casts), constants):
            return graph
        for products in groups:
            self._join(graph, products)
        for node in reversed(constants):
            # no other node: one that nobody reads may write
            if node.op != "placeholder" and not node.users:
                graph.graph.erase_node(node)
            elif node in casts:
                self._keep(graph, node, constants[node])
        graph.graph.lint()
        # a module of its own: of Dynamo's, torch wants to know where each buffer came from
        return GraphModule(graph, graph.graph, "Joined")

    def _join(self, graph: GraphModule, products: list[Product]) -> None:
        """Put parts of one product in the place of several."""
        shared, like = products[0].shared, products[0].matrix
        starts = [0]
        for product in products:
            starts.append(starts[-1] + product.matrix.size[0])
        rows = -(-starts[-1] // MULTIPLE) * MULTIPLE
        options: Any = {"dtype": like.dtype, "device": like.parameter.device}
        matrix = torch.zeros(rows, like.size[1], **options)
        bias = torch.zeros(rows, **options) if any(product.bias for product in products) else None
        for product, start, end in zip(products, starts, starts[1:], strict=False):
            self._copy(matrix[start:end], product.matrix)
            if bias is not None and product.bias is not None:
                self._copy(bias[start:end], product.bias)
        nodes = graph.graph
        with nodes.inserting_before(products[0].node):
            weight = self._attribute(graph, matrix)
            added = None if bias is None else self._attribute(graph, bias)
            whole = nodes.call_function(F.linear, (shared, weight, added))
        for product, start, end in zip(products, starts, starts[1:], strict=False):
            with nodes.inserting_before(product.node):
                place: Any = (..., slice(start, end))
                part = nodes.call_function(operator.getitem, (whole, place))
                # as what follows has been given it: where it reads number by number nothing is copied
                part = nodes.call_method("contiguous", (part,))
            part.meta.update(product.node.meta)
            product.node.replace_all_uses_with(part)
            nodes.erase_node(product.node)
        self.joined.append(len(products))

    def _keep(self, graph: GraphModule, node: Node, source: Constant) -> None:
        """Put a copy in the place of a parameter that every step would bring to another dtype."""
        held = torch.empty(source.size, dtype=source.dtype, device=source.parameter.device)
        self._copy(held, source)
        with graph.graph.inserting_before(node):
            kept = self._attribute(graph, held)
        kept.meta.update(node.meta)
        node.replace_all_uses_with(kept)
        graph.graph.erase_node(node)

    def _copy(self, held: Tensor, source: Constant) -> None:
        held.copy_(source.value())
        self.copies.append((held, source))

    def _attribute(self, graph: GraphModule, tensor: Tensor) -> Node:
        name = f"linearize_copy_{len(list(graph.buffers()))}"
        graph.register_buffer(name, tensor, persistent=False)
        return graph.graph.get_attr(name)


def _read(graph: GraphModule) -> set[Node]:
    """What the outputs, or nodes that may write, are made of; the compiler leaves out the rest, unless it is joined."""
    found: set[Node] = set()
    for node in reversed(graph.graph.nodes):
        if node in found or _may_write(node):
            found |= {node, *node.all_input_nodes}
    return found


def _may_write(node: Node) -> bool:
    """Whether there is more to a node than what it returns, as far as names say; in doubt there is."""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return node.op not in ("placeholder", "get_attr")
    module, name = getattr(node.target, "__module__", ""), getattr(node.target, "__name__", "_")
    return node.target not in ARITHMETIC and (module not in PLAIN or name.endswith("_"))


def _derived(node: Node, constants: dict[Node, Constant]) -> Constant | None:
    """What a node makes of a constant, where it changes the dtype or turns it and does nothing else."""
    source = constants.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    if source is None or node.kwargs:
        return None
    if node.op == "call_method" and node.target == "to" and len(node.args) == 2:
        dtype = node.args[1]
        return replace(source, dtype=dtype) if isinstance(dtype, torch.dtype) else None
    is_turned = node.op == "call_function" and node.target is getattr and node.args[1:] == ("T",)
    return replace(source, turned=not source.turned) if is_turned and len(source.size) == 2 else None


def _product(node: Node, constants: dict[Node, Constant]) -> Product | None:
    """A node as a product with a constant, if it is one."""
    targets = (F.linear, operator.matmul, torch.matmul)
    if node.op != "call_function" or node.target not in targets or node.kwargs:
        return None
    shared, weight, *rest = node.args
    matrix = constants.get(weight) if isinstance(weight, Node) else None
    if matrix is None or len(matrix.size) != 2 or not isinstance(shared, Node):
        return None
    if node.target is not F.linear:
        matrix = replace(matrix, turned=not matrix.turned)
    bias = None
    if rest and rest[0] is not None:
        bias = constants.get(rest[0]) if isinstance(rest[0], Node) else None
        if bias is None or bias.dtype != matrix.dtype:
            return None
    shared = _unchanged(shared)
    example = shared.meta.get("example_value")
    if not isinstance(example, Tensor) or example.dtype != matrix.dtype or example.dim() < 2:
        return None
    return Product(node, shared, matrix, bias)


def _unchanged(node: Node) -> Node:
    """What a node is made of, as long as that is only brought to the dtype that it has."""
    while node.op == "call_method" and node.target == "to" and len(node.args) == 2 and not node.kwargs:
        source, dtype = node.args
        example = source.meta.get("example_value") if isinstance(source, Node) else None
        if not isinstance(source, Node) or not isinstance(example, Tensor) or example.dtype != dtype:
            break
        node = source
    return node


def _fits(taken: int, constants: dict[Node, Constant]) -> bool:
    """Whether there is memory enough for copies of so many bytes."""
    device = next((x.parameter.device for x in constants.values()), torch.device("cpu"))
    return device.type != "cuda" or taken <= torch.cuda.mem_get_info(device)[0] // SHARE
