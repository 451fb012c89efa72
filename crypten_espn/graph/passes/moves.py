"""What only moves values becomes a public index map, for which nothing is sent.

Slices, splits, gathers, transposes, reshapes, broadcasts, shuffles and concatenations
are run on the numbers of their inputs' elements, the whole batch of them: chains of
them join, whatever they do to the batch on the way, and a chain that gives every input
of a batch the same map is one Move.
"""

from __future__ import annotations

import math

import numpy as np

from ..index_map import NOTHING, IndexMap, counted
from ..network import NetworkGraph, Node
from .constants import evaluate

# Operations that move their first inputs' elements by constants.
MOVERS = frozenset(
    {
        "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Move", "Reshape",
        "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
_BROADCASTING = ("Add", "Div", "Mul", "Sub", "Sum")


def moves(graph: NetworkGraph) -> None:
    """Join what moves values; broadcasts are written out."""
    found = _Views(graph)
    for node in graph.each(*MOVERS, *_BROADCASTING):
        if node.op in _BROADCASTING:
            _broadcast(graph, node, found)
        elif not _kept(graph, node, found):
            found.add(node)
    found.write()


def moved(
    graph: NetworkGraph, node: Node, source: str, index: np.ndarray, *, name: str = ""
) -> str:
    """A Move of a value, before a node; its name."""
    output = name or graph.fresh(f"{source}_moved")
    batch = graph.shapes[source][:1]
    graph.shapes[output] = (*batch, *index.shape)
    new = Node("Move", [source], output, {"map": IndexMap(index)}, node.name)
    graph.insert_before(node, new)
    return output


def move_after(
    graph: NetworkGraph, node: Node, shape: tuple[int, ...], index: np.ndarray
) -> None:
    """Let a node give a value of another shape, of which its own is a Move.

    Args:
        shape: of the new value, without the batch.
    """
    output, node.output = node.output, graph.fresh(f"{node.output}_before")
    graph.shapes[node.output] = (*graph.shapes[output][:1], *shape)
    graph.shapes[output] = (*graph.shapes[output][:1], *index.shape)
    back = Node("Move", [node.output], output, {"map": IndexMap(index)}, node.name)
    place = next(i for i, other in enumerate(graph.nodes) if other is node)
    graph.nodes.insert(place + 1, back)


def _kept(graph: NetworkGraph, node: Node, found: _Views) -> bool:
    """Whether a node is a layer of its own kind, and no input of it is a move."""
    shape = graph.shapes.get(node.output, ())
    plain = node.op == "Flatten" and len(shape) == 2 and node.attributes["axis"] == 1
    beside = (
        node.op == "Concat"
        and len(node.inputs) > 1
        and len(shape) > 1
        and node.attributes["axis"] % len(shape) == 1
    )
    return (plain or beside) and not found.views.keys() & {*node.inputs}


def _broadcast(graph: NetworkGraph, node: Node, found: _Views) -> None:
    """Values that an operation enlarges are enlarged before it, but for gates."""
    shape = graph.shapes.get(node.output)
    if shape is None:
        return
    if node.op == "Mul" and graph.shapes.get(node.inputs[-1]) == shape:
        node.inputs.reverse()
    for place, name in enumerate(node.inputs):
        own = graph.shapes.get(name)
        if name in graph.constants or own in (None, shape):
            continue
        assert own is not None
        # A product's second factor may have one element for many of the first.
        gate = node.op == "Mul" and place > 0
        if gate and len(own) == len(shape) and own[0] == shape[0]:
            continue
        enlarged = graph.fresh(f"{name}_enlarged")
        graph.shapes[enlarged] = shape
        found.views[enlarged] = np.broadcast_to(found.of(name), shape)
        found.owners[enlarged] = node
        node.inputs[place] = enlarged


class _Views:
    """Moved values as numbers of elements of those that are not.

    Attributes:
        views: by name, the numbers, the whole batch of them.
        owners: the nodes that gave them.
    """

    def __init__(self, graph: NetworkGraph) -> None:
        self.graph = graph
        self.batch = graph.shapes[graph.input][0]
        self.views: dict[str, np.ndarray] = {}
        self.owners: dict[str, Node] = {}
        self._first: dict[str, int] = {}
        self._next = 0

    def of(self, name: str) -> np.ndarray:
        """The numbers of a value's elements."""
        if name in self.views:
            return self.views[name]
        shape = self.graph.shapes[name]
        if name not in self._first:
            self._first[name] = self._next
            self._next += math.prod(shape)
        return self._first[name] + counted(shape)

    def add(self, node: Node) -> None:
        """Follow what a node moves."""
        graph = self.graph
        moving = node.inputs if node.op in ("Concat", "Move") else node.inputs[:1]
        rest = node.inputs[len(moving) :]
        if any(name and name not in graph.constants for name in rest):
            node.problem = "where it cuts is computed at run time; give numbers"
            return
        if any(name in graph.constants or name not in graph.shapes for name in moving):
            node.problem = "the shapes of its inputs are not known"
            return
        values = {name: graph.constants[name] for name in rest if name}
        values |= {name: self.of(name) for name in moving}
        if node.op == "Move":
            results = [_through(node.attributes["map"], [values[n] for n in moving])]
        else:
            results = evaluate(node, values, graph.opset)
        for name, result in zip([node.output, *node.others], results, strict=True):
            if not result.size:
                node.problem = "nothing is left of its input"
                return
            self.views[name], self.owners[name] = result, node
            graph.shapes[name] = tuple(result.shape)

    def write(self) -> None:
        """Replace the movers by a Move for each value that something else reads."""
        graph = self.graph
        movers = [id(node) for node in self.owners.values() if node.op in MOVERS]
        written: set[str] = set()
        for node in list(graph.nodes):
            if id(node) in movers and not node.problem:
                continue
            for name in {*node.inputs} & self.views.keys() - written:
                written.add(name)
                self._write(name, node)
        if graph.output in self.views.keys() - written:
            self._write(graph.output, None)
        # What leads to a problem stays, or all before it would seem unused.
        kept: list[Node] = []
        read: set[str] = set()
        for node in reversed(graph.nodes):
            if id(node) in movers and not (
                node.problem or read & {node.output, *node.others}
            ):
                continue
            if id(node) in movers:
                read |= {*node.inputs}
            kept.append(node)
        graph.nodes = kept[::-1]

    def _write(self, name: str, before: Node | None) -> None:
        graph, owner = self.graph, self.owners[name]
        if owner.problem:
            return
        found = self._map(self.views[name])
        if found is None:
            owner.problem = (
                "it moves values between the inputs of a batch, or into another "
                "place than the first axis; every input of a batch is computed alike"
            )
            return
        bases, index = found
        shape = graph.shapes[bases[0]] if bases else ()
        if len(bases) == 1 and np.array_equal(index, counted(shape[1:])):
            graph.replace_value(name, bases[0])
            return
        flat = len(bases) == 1 and math.prod(shape[1:]) == index.size
        if flat and index.ndim == 1 and np.array_equal(index, counted(index.shape)):
            new = Node("Flatten", bases, name, {"axis": 1}, owner.name)
        else:
            new = Node("Move", bases, name, {"map": IndexMap(index)}, owner.name)
        if before is None:
            graph.nodes.append(new)
        else:
            graph.insert_before(before, new)

    def _map(self, view: np.ndarray) -> tuple[list[str], np.ndarray] | None:
        """The values that a view reads, and the index map of one input; or None."""
        if not view.ndim or view.shape[0] != self.batch:
            return None
        first = view[0]
        index = np.full(first.shape, NOTHING, np.int64)
        step = np.zeros(first.shape, np.int64)
        bases: list[str] = []
        count = 0
        names = list(self._first)
        owners = np.searchsorted([*self._first.values()], first, side="right") - 1
        for owner in np.unique(owners[first != NOTHING]).tolist():
            name = names[owner]
            start, shape = self._first[name], self.graph.shapes[name]
            here = (owners == owner) & (first != NOTHING)
            size = math.prod(shape[1:])
            if shape[0] != self.batch or (first[here] - start >= size).any():
                return None
            index[here] = first[here] - start + count
            step[here] = size
            count += size
            bases.append(name)
        rows = np.arange(1, self.batch).reshape(-1, *[1] * first.ndim)
        if not np.array_equal(view[1:], first + rows * step):
            return None
        return (bases, index) if bases else None


def _through(given: IndexMap, values: list[np.ndarray]) -> np.ndarray:
    flat = np.concatenate([v.reshape(len(v), -1) for v in values], 1)
    result = flat[:, given.index.reshape(-1)]
    result[:, given.index.reshape(-1) == NOTHING] = NOTHING
    return result.reshape(len(flat), *given.shape)
