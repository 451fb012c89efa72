"""One activation module at several places, made one module for each place.

Each place sees other values, and with them wants a polynomial of its own: torchvision's
residual blocks call one ReLU two or three times, at different numbers of channels.
"""

from __future__ import annotations

import copy
import functools

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
            if _separate(parent, parent.graph, kinds):
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
    _separate(parent, trace.graph, kinds)
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
        child = functools.reduce(getattr, str(node.target).split("."), parent)
        if isinstance(child, kinds):
            if node.target in met:
                found.append(node)
            met.add(str(node.target))
    return found


def _separate(
    parent: nn.Module, graph: fx.Graph, kinds: tuple[type[nn.Module], ...]
) -> bool:
    repeated = _repeated(parent, graph, kinds)
    for node in repeated:
        target, number = str(node.target), 2
        child = functools.reduce(getattr, target.split("."), parent)
        plain = target.replace(".", "_")
        while hasattr(parent, f"{plain}_{number}"):
            number += 1
        node.target = f"{plain}_{number}"
        parent.add_module(node.target, copy.deepcopy(child))
    graph.lint()
    return bool(repeated)
