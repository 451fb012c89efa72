"""A network as a short list of nodes with constants."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

POLYNOMIAL_OP = "PolynomialActivation"
# An adaptive average pool of any size.
ADAPTIVE_OP = "AdaptiveAveragePool"
# Norms that are refused, which the exporter writes out or has no words for.
NORM_OPS = ("GroupNormalization", "RMSNormalization")
# Ours, which ONNX lacks.
OWN_OPS = (POLYNOMIAL_OP, ADAPTIVE_OP, *NORM_OPS)
OPSET = 17
FLOATS = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
    }
)


@dataclass
class Node:
    """One operation: `inputs` name values or constants, `output` names its value.

    Attributes:
        others: further outputs that somebody reads.
        problem: why it cannot be converted as it stands; passes leave it alone then.
        domain: of its operation set; empty for ONNX's own.
    """

    op: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    others: list[str] = field(default_factory=list)
    problem: str = ""
    domain: str = ""


@dataclass
class NetworkGraph:
    """Nodes in topological order, their constants, and every value's shape.

    Args:
        nodes: the operations.
        constants: name to array, weights included.
        shapes: name to shape, batch dimension first, for the example's batch.
        input, output: names of the network's one input and one output.
        changes: what the passes did, in words.
        opset: the version of ONNX's operations that the nodes are written in.
        types: name to ONNX element type, where it is known.
        current: the node a pass is at; whatever goes wrong there is its problem.
        room: elements that its values may have for one input, see sizes.py.
        exponents: name to (channels,) int32; 2 to these is what a pass divided the
            value by. Values without a name here are as they were.
    """

    nodes: list[Node]
    constants: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    input: str
    output: str
    changes: list[str] = field(default_factory=list)
    opset: int = OPSET
    types: dict[str, int] = field(default_factory=dict)
    current: Node | None = None
    room: int = field(kw_only=True)
    exponents: dict[str, np.ndarray] = field(default_factory=dict)

    def copy(self) -> NetworkGraph:
        """The same network, to be rewritten apart; arrays are shared."""
        nodes = [
            replace(
                node,
                inputs=list(node.inputs),
                attributes=dict(node.attributes),
                others=list(node.others),
            )
            for node in self.nodes
        ]
        return replace(
            self,
            nodes=nodes,
            constants=dict(self.constants),
            shapes=dict(self.shapes),
            changes=list(self.changes),
            types=dict(self.types),
            exponents=dict(self.exponents),
        )

    def each(self, *ops: str) -> Iterator[Node]:
        """Every node of these operations (of all, if none) that has no problem.

        The nodes are those there at the start; a pass may insert and remove.
        """
        for node in list(self.nodes):
            if not node.problem and (not ops or node.op in ops):
                self.current = node
                yield node
        self.current = None

    def users(self, value: str) -> list[Node]:
        """The nodes that read a value."""
        return [node for node in self.nodes if value in node.inputs]

    def sole_user(self, value: str, *ops: str) -> Node | None:
        """The one node that reads a value, if it is of these operations and sound."""
        users = self.users(value)
        if len(users) != 1 or value == self.output or users[0].problem:
            return None
        if users[0].inputs.count(value) != 1:
            return None
        return users[0] if users[0].op in ops else None

    def producer(self, value: str) -> Node | None:
        """The node that makes a value; None for the input and constants."""
        return next(
            (n for n in self.nodes if n.output == value or value in n.others), None
        )

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a constant under a fresh name and return that name."""
        fresh = self.fresh(name)
        self.constants[fresh] = np.ascontiguousarray(value)
        return fresh

    def fresh(self, name: str) -> str:
        """A name that no value has yet."""
        while name in self.constants or name in self.shapes:
            name += "_"
        return name

    def insert_before(self, node: Node, *new: Node) -> None:
        """Put nodes just before another."""
        index = next(i for i, other in enumerate(self.nodes) if other is node)
        self.nodes[index:index] = new

    def remove(self, node: Node) -> None:
        """Take out this node and no other that looks the same."""
        self.nodes = [other for other in self.nodes if other is not node]

    def replace_value(self, old: str, new: str) -> None:
        """Let every reader of one value read another."""
        for node in self.nodes:
            node.inputs = [new if name == old else name for name in node.inputs]
        if self.output == old:
            self.output = new

    def drop_unused(self) -> None:
        """Remove nodes and constants that the output does not need."""
        needed, kept = {self.output}, []
        for node in reversed(self.nodes):
            if needed & {node.output, *node.others}:
                needed.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {k: v for k, v in self.constants.items() if k in needed}


def layer_name(node: Node) -> str:
    """The module path of a traced node: /layer1/0/conv1/Conv is layer1.0.conv1."""
    parts = [part for part in node.name.strip("/").split("/") if part]
    if parts and re.sub(r"_\d+$", "", parts[-1]) == node.op and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts) or node.output
