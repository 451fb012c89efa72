"""A network as a short list of nodes with constants."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

POLYNOMIAL_OP = "PolynomialActivation"
OPSET = 17


@dataclass
class Node:
    """One operation: `inputs` name values or constants, `output` names its value."""

    op: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass
class NetworkGraph:
    """Nodes in topological order, their constants, and every value's shape.

    Args:
        nodes: the operations.
        constants: name to array, weights included.
        shapes: name to shape, batch dimension first, for the example's batch.
        input, output: names of the network's one input and one output.
        changes: what the passes did, in words.
    """

    nodes: list[Node]
    constants: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    input: str
    output: str
    changes: list[str] = field(default_factory=list)

    def users(self, value: str) -> list[Node]:
        """The nodes that read a value."""
        return [node for node in self.nodes if value in node.inputs]

    def producer(self, value: str) -> Node | None:
        """The node that makes a value; None for the input and constants."""
        return next((node for node in self.nodes if node.output == value), None)

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a constant under a fresh name and return that name."""
        fresh = name
        while fresh in self.constants or fresh in self.shapes:
            fresh += "_"
        self.constants[fresh] = np.ascontiguousarray(value)
        return fresh

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
            if node.output in needed:
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
