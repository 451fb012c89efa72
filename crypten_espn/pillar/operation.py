"""The walk over a network that swaps modules, and calls inside a `forward`.

Surgery says what to swap by subclassing `Operation`. A call is replaced in its module's
own place, as `tracing` does it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import ConversionError
from .activation import PolynomialActivation
from .tracing import OutdatedMethod, PatchedMethod, objections, traced

_ADVICE = "call a module instead, such as torch.nn.ReLU, one for each place"
_MODULE_STATE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Change:
    """One replacement: where, what was there, what is there now."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after}"


class Operation:
    """Walk over modules and the functions they call; subclasses say what to swap.

    First everything is decided, then everything is done: a network that is refused
    is left as it was.
    """

    def __init__(self) -> None:
        self.done: list[Change] = []
        self._edits: list[Callable[[], object]] = []
        self._seen: dict[int, nn.Module] = {}

    def swap_module(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return what takes this module's place, or None."""
        raise NotImplementedError

    def swap_call(self, name: str, node: fx.Node) -> nn.Module | None:
        """Return the module that takes this call's place, or None."""
        return None

    def sought(self) -> set[str]:
        """Return the names under which sought functions appear in source text."""
        return set()

    def check(self) -> None:
        """Raise ConversionError if what was found is not what was asked for."""

    def operate(self, model: nn.Module) -> nn.Module:
        """Swap in place; return the model, or what takes its own place.

        Raises:
            ConversionError: something cannot be swapped; nothing was.
        """
        swapped = self._visit("", model)
        self.check()
        for edit in self._edits:
            edit()
        return swapped

    def _visit(self, name: str, module: nn.Module) -> nn.Module:
        if id(module) in self._seen:
            return self._seen[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(
                f"{name or 'the model'} is a TorchScript module, whose layers are "
                "fixed; replace in the network it was made from, and script that"
            )
        new = self.swap_module(name, module)
        if new is not None:
            _take_over(new, module)
            kinds = type(module).__name__, type(new).__name__
            self.done.append(Change(name or "(model)", *kinds))
            self._seen[id(module)] = new
            return new
        self._seen[id(module)] = module
        for child_name, child in list(module._modules.items()):
            if child is not None:
                self._swap(module._modules, child_name, child, _join(name, child_name))
        if not _is_torchs(module):
            for container, key, part, place in _unregistered(module):
                self._swap(container, key, part, _join(name, place))
            self._swap_calls(name, module)
        return module

    def _swap(self, container: Any, key: Any, part: nn.Module, name: str) -> None:
        changed = self._visit(name, part)
        if changed is part:
            return
        if isinstance(container, tuple):
            raise ConversionError(
                f"{name} ({type(part).__name__}) stands in a tuple, which cannot be "
                "changed; keep modules in a torch.nn.ModuleList"
            )
        self._edits.append(functools.partial(container.__setitem__, key, changed))

    def _swap_calls(self, name: str, module: nn.Module) -> None:
        """Replace what the module's own forward calls."""
        if not self.sought():
            return
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, fx.GraphModule):
            found = self._found(name, module, module.graph)
            self._edits.append(functools.partial(_edit_graph_module, module, found))
            return
        named = _called_names(module) & self.sought()
        try:
            trace = traced(module)
        except Exception as error:  # a forward may raise anything when traced
            if not named:
                return
            raise ConversionError(
                f"the forward of {where} calls {', '.join(sorted(named))} and cannot "
                f"be traced by torch.fx ({type(error).__name__}: {error}); {_ADVICE}"
            ) from error
        candidates = self._candidates(trace.graph)
        found = self._found(name, module, trace.graph)
        if not found:
            return
        lost = objections(module, trace)
        if lost:
            calls = ", ".join(sorted({spelling(node) for node in found}))
            raise ConversionError(
                f"the forward of {where} calls {calls}, and replacing that would lose "
                f"what torch.fx cannot keep: {'; '.join(lost)}; {_ADVICE}"
            )
        taken = set(dir(module))
        targets = {}
        for node in found:
            targets[node] = _fresh(f"{node.name}_module", taken)
        methods: dict[str, PatchedMethod | OutdatedMethod] = {}
        used = {method for node in targets for method in trace.methods[node]}
        for method in sorted(used - {"forward"}):
            here = [node for node in candidates if method in trace.methods[node]]
            methods[method] = self._method(module, method, here, targets)
        _insert(trace.graph, targets)
        methods["forward"] = PatchedMethod(module, trace, "forward")
        for node, new in found.items():
            self._edits.append(functools.partial(module.add_module, targets[node], new))
        for key, value in {**trace.constants, **methods}.items():
            self._edits.append(
                functools.partial(object.__setattr__, module, key, value)
            )

    def _method(
        self,
        module: nn.Module,
        method: str,
        here: list[fx.Node],
        targets: dict[fx.Node, str],
    ) -> PatchedMethod | OutdatedMethod:
        """What takes the place of a method through which forward makes its calls."""
        try:
            trace = traced(module, method)
        except Exception as error:  # as in _swap_calls
            return OutdatedMethod(module, method, type(error).__name__)
        own = self._candidates(trace.graph)
        why = objections(module, trace)
        if trace.constants:
            why.append("it makes tensors of its own")
        if [(n.op, n.target) for n in own] != [(n.op, n.target) for n in here]:
            why.append("forward does not call it exactly once")
        if why:
            return OutdatedMethod(module, method, "; ".join(why))
        pairs = zip(own, here, strict=True)
        _insert(trace.graph, {n: targets[h] for n, h in pairs if h in targets})
        return PatchedMethod(module, trace, method)

    def _candidates(self, graph: fx.Graph) -> list[fx.Node]:
        return [
            node
            for node in graph.nodes
            if node.op in ("call_function", "call_method")
            and spelling(node) in self.sought()
        ]

    def _found(
        self, name: str, module: nn.Module, graph: fx.Graph
    ) -> dict[fx.Node, nn.Module]:
        """The calls to replace, in order, and by what."""
        found = {}
        for node in graph.nodes:
            if node.op not in ("call_function", "call_method"):
                continue
            place = _join(name, node.name)
            new = self.swap_call(place, node)
            # What is neither used nor done in place changes nothing.
            if new is None or not (node.users or is_inplace(node)):
                continue
            new.train(module.training)
            found[node] = new
            self.done.append(Change(place, f"{spelling(node)}()", type(new).__name__))
        return found


def spelling(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def is_inplace(node: fx.Node) -> bool:
    """Whether a call changes its first argument.

    Raises:
        ConversionError: that is decided at run time.
    """
    if spelling(node).endswith("_"):
        return True
    value = arguments(node).get("inplace", False)
    if isinstance(value, fx.Node):
        raise ConversionError(
            f"{node.name}: inplace of {spelling(node)}() is computed at run time; make "
            "it a constant"
        )
    return bool(value)


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments but the first, by name as far as Python knows the names."""
    names: list[str] = []
    if callable(node.target):
        try:
            names = list(inspect.signature(node.target).parameters)
        except ValueError:  # a function of C has no signature
            names = []
    rest = names[1:] + [str(i) for i in range(len(node.args))]
    return dict(zip(rest, node.args[1:], strict=False)) | {
        key: value for key, value in node.kwargs.items() if key != "input"
    }


def _insert(graph: fx.Graph, targets: dict[fx.Node, str]) -> None:
    """Put calls of modules in the place of calls of functions."""
    for node, target in targets.items():
        x = node.args[0] if node.args else node.kwargs["input"]
        with graph.inserting_after(node):
            call = graph.call_module(target, (x,))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    graph.lint()


def _edit_graph_module(module: fx.GraphModule, found: dict[fx.Node, nn.Module]) -> None:
    if not found:
        return
    taken = set(dir(module))
    targets = {node: _fresh(f"{node.name}_module", taken) for node in found}
    for node, target in targets.items():
        module.add_module(target, found[node])
    _insert(module.graph, targets)
    module.recompile()


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Give a module the mode, the hooks and the user's attributes of another."""
    new.train(old.training)
    state = vars(new)
    for key, value in vars(old).items():
        if "hook" in key and key in _MODULE_STATE:
            # The same dictionaries, so that a hook's handle still removes it.
            state[key] = value
        elif key not in state and not _is_setting(old, key):
            state[key] = value


def _is_setting(module: nn.Module, key: str) -> bool:
    own = ("polynomial", "inplace", *getattr(type(module), "__constants__", ()))
    return key.startswith("_") or key in own


def _is_torchs(module: nn.Module) -> bool:
    return isinstance(module, PolynomialActivation) or type(
        module
    ).__module__.startswith("torch.nn.")


def _unregistered(module: nn.Module) -> Iterator[tuple[Any, Any, nn.Module, str]]:
    """Modules that a module holds beside its children: container, key, module, name."""
    state = vars(module)
    for key, value in list(state.items()):
        if key in _MODULE_STATE:
            continue
        if isinstance(value, nn.Module):
            yield state, key, value, key
        elif isinstance(value, list | tuple | dict):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            for index, part in list(parts):
                if isinstance(part, nn.Module):
                    yield value, index, part, f"{key}.{index}"


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


@functools.cache
def _names_in_source(owner: type) -> frozenset[str]:
    """Return the names of what a class calls; none if its source is not to be had."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {f.id for f in calls if isinstance(f, ast.Name)}
    return frozenset(names | {f.attr for f in calls if isinstance(f, ast.Attribute)})


def _called_names(module: nn.Module) -> set[str]:
    """Return the names of what the module's own methods call, from their source."""
    names: set[str] = set()
    for owner in type(module).__mro__:
        if not owner.__module__.startswith("torch.nn.") and owner is not object:
            names |= _names_in_source(owner)
    for value in vars(module).values():
        if callable(value) and hasattr(value, "__name__"):
            names.add(value.__name__)
    return names
