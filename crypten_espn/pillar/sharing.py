"""One activation module at several places, made one module for each place.

Each place sees other values, and with them wants a polynomial of its own: torchvision's
residual blocks call one ReLU two or three times, at different numbers of channels.
"""

from __future__ import annotations

import copy

from torch import fx, nn

from .tracing import PatchedMethod, objections, traced


def unshare(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Give every place its own copy of an activation that stands at several, in place.

    What is registered twice becomes two modules. A `forward` that calls a child twice
    is traced as in surgery and calls copies; where tracing would lose something, or
    goes through other methods, the child stays shared.

    Args:
        model: any network.
        kinds: the types of the modules to copy; elementwise ones.
    """
    seen: set[int] = set()
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if not isinstance(child, kinds):
                continue
            if id(child) in seen:
                parent._modules[name] = copy.deepcopy(child)
            seen.add(id(child))
    for parent in list(model.modules()):
        if isinstance(parent, fx.GraphModule):
            repeated = _repeated(parent, parent.graph, kinds)
            if repeated:
                _separate(parent, parent.graph, repeated)
                parent.recompile()
        elif not type(parent).__module__.startswith("torch.nn."):
            _unshare_calls(parent, kinds)


def _unshare_calls(parent: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    if not any(isinstance(part, kinds) for part in parent.modules()):
        return
    try:
        trace = traced(parent)
    except Exception:  # a forward may raise anything when traced
        return
    repeated = _repeated(parent, trace.graph, kinds)
    through = {method for node in repeated for method in trace.methods[node]}
    if not repeated or through != {"forward"} or objections(parent, trace):
        return
    _separate(parent, trace.graph, repeated)
    for key, value in trace.constants.items():
        object.__setattr__(parent, key, value)
    object.__setattr__(parent, "forward", PatchedMethod(parent, trace, "forward"))


def _repeated(
    parent: nn.Module, graph: fx.Graph, kinds: tuple[type[nn.Module], ...]
) -> list[fx.Node]:
    """The second and later calls of one activation."""
    met: set[str] = set()
    found = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        if isinstance(parent.get_submodule(str(node.target)), kinds):
            if node.target in met:
                found.append(node)
            met.add(str(node.target))
    return found


def _separate(parent: nn.Module, graph: fx.Graph, repeated: list[fx.Node]) -> None:
    """Let each of the calls go to a copy of its own."""
    for node in repeated:
        target, number = str(node.target), 2
        plain = target.replace(".", "_")
        while hasattr(parent, f"{plain}_{number}"):
            number += 1
        node.target = f"{plain}_{number}"
        parent.add_module(node.target, copy.deepcopy(parent.get_submodule(target)))
    graph.lint()
