"""A node that uses one value twice (x * x, y + y) never becomes computable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from .patch import Patch, replace


def _forward(self: Any, *args: Any) -> Any:
    """Evaluate the graph, each node as soon as its inputs are there.

    Nodes run in the order in which they were added, skipping those that must wait, so
    parties agree on the order. A value is dropped after its last use.
    """
    if len(args) != len(self.input_names):
        raise ValueError(
            f"{len(args)} inputs were given to a graph of {len(self.input_names)}: "
            f"{', '.join(self.input_names)}"
        )
    values = dict(zip(self.input_names, args, strict=True))
    uses = Counter(name for names in self._graph.values() for name in set(names))
    uses.update(self.output_names)
    waiting = dict(self._graph)
    while waiting:
        progress = False
        for node, names in list(waiting.items()):
            if not all(name in values for name in names):
                continue
            progress = True
            del waiting[node]
            _compute(self, node, values)
            for name in set(names):
                uses[name] -= 1
                if not uses[name]:
                    del values[name]
            if all(name in values for name in self.output_names):
                result = [values[name] for name in self.output_names]
                return result[0] if len(result) == 1 else tuple(result)
        if not progress:
            break
    missing = sorted({n for names in waiting.values() for n in names} - set(values))
    raise ValueError(
        f"the graph is not connected: nothing computes {missing or self.output_names}"
    )


def _compute(graph: Any, node: str, values: dict[str, Any]) -> None:
    names = graph._graph[node]
    inputs = [values[name] for name in names]
    module = graph._modules[node]
    output = module(inputs[0] if len(inputs) == 1 else inputs)
    outputs = getattr(module, "_output_names", None) or [node]
    if len(outputs) == 1 or not isinstance(output, tuple):
        # Only the first output of a dropout is a value; the mask is never used.
        values[node] = output
        return
    if len(output) != len(outputs):
        raise ValueError(f"{module} must give {len(outputs)} values: {outputs}")
    values.update(zip(outputs, output, strict=True))


def _probe() -> bool:
    from crypten.nn.module import Add, Graph

    graph = Graph("input", "output")
    graph.add_module("output", Add(), ["input", "input"])
    try:
        graph(torch.ones(1))
    except ValueError:
        return True
    return False


def _install() -> Callable[[], None]:
    from crypten.nn.module import Graph

    return replace(Graph, "forward", _forward)


PATCH = Patch(
    name="graph_inputs",
    broke="a converted network with x * x or y + y: nn.Graph.forward() failed",
    seen_on="crypten 0.4.1, any torch",
    delete_when="crypten.nn.Graph marks every use of a value as available",
    probe=_probe,
    install=_install,
)
