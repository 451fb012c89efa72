"""One module's own forward as a torch.fx graph, and a graph as a module's method.

`objections` names what a graph would lose: state set while running, contexts such as
torch.no_grad, branches on the mode or on an argument left out, random constants. Where
there is none, `PatchedMethod` computes the graph in the module's own place: the module
keeps its class, hooks, buffers, children and other methods.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..errors import ConversionError
from .keeping import kept

# Attributes of these types are read once, when the graph is made.
_PLAIN = (bool, int, float, str, bytes, type(None), tuple, list)


@dataclass
class Trace:
    """A graph of one method.

    Attributes:
        name: of the method.
        graph: every child a call to that child.
        methods: for each node, the names of the module's methods that led to it.
        constants: tensors made on the way, to be set on the module.
        fixed: the module's plain attributes that the graph holds the values of.
        lost: what tracing saw and the graph does not do, in words; `objections` adds
            what takes more than one trace to see.
    """

    name: str
    graph: fx.Graph
    methods: dict[fx.Node, tuple[str, ...]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, object] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


def own_method(module: nn.Module, name: str) -> types.FunctionType:
    """The function that a module's method runs, patched before or not.

    Raises:
        ConversionError: the instance carries a method that is no plain function.
    """
    here = vars(module).get(name)
    if here is None:
        method: types.FunctionType = getattr(type(module), name)
        return method
    if isinstance(here, PatchedMethod):
        return here.function
    if isinstance(here, types.MethodType) and here.__self__ is module:
        return here.__func__  # type: ignore[return-value]
    raise ConversionError(
        f"its {name} was replaced on the instance by a {type(here).__name__}"
    )


def traced(module: nn.Module, name: str = "forward") -> Trace:
    """Trace one method as the module is set; the module is left as it was.

    Raises:
        Exception: whatever the method raises when it is given torch.fx proxies.
    """
    return _once(module, name, own_method(module, name))


def objections(module: nn.Module, trace: Trace) -> list[str]:
    """What a module's method does and its trace does not, in words.

    The method is traced again in the other mode, and without the arguments that may be
    left out.
    """
    lost = list(trace.lost)
    function = own_method(module, trace.name)
    mode = module.training
    try:
        # Not module.train(): the children do not take part.
        module.training = not mode
        other = _once(module, trace.name, function, again=True)
    except Exception as error:  # a method may raise anything when traced
        return [*lost, f"in the other mode it raises {type(error).__name__}: {error}"]
    finally:
        module.training = mode
    if _code(other) != _code(trace):
        lost.append("it does different things in training and in evaluation")
    elif not _same(trace.constants, other.constants):
        lost.append("it draws random numbers that do not depend on its input")
    optional = _left_out(function)
    if optional:
        short, names = optional
        try:
            steps = _steps(_once(module, trace.name, short))
        except Exception:  # as above
            steps = []
        if steps != _steps(trace):
            lost.append(f"it does different things without {', '.join(names)}")
    return lost


def _once(
    module: nn.Module, name: str, function: types.FunctionType, *, again: bool = False
) -> Trace:
    tracer = _Shallow(name)
    kind = type(module)
    with kept(module) as changed:
        if again:
            # Other random numbers than the first time show that there are any.
            torch.rand(1)
        # The tracer looks on the class, and a module may carry its method itself.
        object.__setattr__(
            module, "__class__", type(kind.__name__, (kind,), {name: function})
        )
        try:
            graph = tracer.trace(module)
        finally:
            object.__setattr__(module, "__class__", kind)
    constants = {
        key: value
        for key, value in changed.items()
        if key.startswith("_tensor_constant") and isinstance(value, Tensor)
    }
    result = Trace(name, graph, tracer.methods, constants)
    result.lost = [f"it sets self.{key}" for key in changed if key not in constants]
    result.lost += sorted(tracer.contexts)
    names = tracer.names | set(inspect.unwrap(function).__code__.co_names)
    result.fixed = {
        key: value
        for key, value in vars(module).items()
        if key in names and key != "training" and isinstance(value, _PLAIN)
    }
    return result


class _Shallow(fx.Tracer):
    """Traces one method; every child stays a call to that child."""

    # A buffer is read when the graph runs, as a parameter is.
    proxy_buffer_attributes = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self.traced_func_name = name
        self.methods: dict[fx.Node, tuple[str, ...]] = {}
        self.names: set[str] = set()
        self.contexts: set[str] = set()
        self.outside = _contexts()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        if kind in ("call_function", "call_method", "call_module"):
            self._look(node)
        return node

    def _look(self, node: fx.Node) -> None:
        """Note which methods of the module led here, and in what contexts."""
        led = []
        frame = sys._getframe(2)
        while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
            code = frame.f_code
            method = inspect.getattr_static(self.root, code.co_name, None)
            if code.co_argcount and getattr(method, "__code__", None) is code:
                led.append(code.co_name)
                self.names |= set(code.co_names)
            frame = frame.f_back  # type: ignore[assignment]
        self.methods[node] = tuple(led)
        for name, value in _contexts().items():
            if value != self.outside[name]:
                self.contexts.add(f"it runs {node.name} under torch.{name}")


def _contexts() -> dict[str, object]:
    return {
        "no_grad or enable_grad": torch.is_grad_enabled(),
        "inference_mode": torch.is_inference_mode_enabled(),
        "autocast": tuple(
            torch.is_autocast_enabled(device) for device in ("cpu", "cuda")
        ),
    }


def _code(trace: Trace) -> str:
    return trace.graph.python_code("self").src


def _same(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(
        torch.equal(value, those[key]) for key, value in these.items()
    )


def _steps(trace: Trace) -> list[tuple[str, object]]:
    skipped = ("placeholder", "output", "get_attr")
    return [(n.op, n.target) for n in trace.graph.nodes if n.op not in skipped]


def _left_out(
    function: types.FunctionType,
) -> tuple[types.FunctionType, list[str]] | None:
    """The function without the arguments whose default is None, and their names."""
    parameters = list(inspect.signature(function).parameters.values())
    fixed = [p.name for p in parameters if p.default is None]
    if not fixed:
        return None
    taken, passed = [], []
    for p in parameters:
        star = "*" * ((p.kind is p.VAR_POSITIONAL) + 2 * (p.kind is p.VAR_KEYWORD))
        if p.name not in fixed:
            taken.append(star + p.name)
        named = p.kind == p.KEYWORD_ONLY
        value = "None" if p.name in fixed else star + p.name
        passed.append(f"{p.name}={value}" if named else value)
    space: dict[str, types.FunctionType] = {"function": function}
    exec(
        f"def short({', '.join(taken)}):\n    return function({', '.join(passed)})",
        space,
    )
    return space["short"], fixed


class PatchedMethod:
    """A method computed by a graph, set on one module in place of the class's own.

    It survives copy.deepcopy and pickle with its module. A plain attribute whose value
    went into the graph must not change afterwards; a call checks that.

    Args:
        module: whose method it is.
        trace: what it computes.
        name: of the method.
    """

    def __init__(self, module: nn.Module, trace: Trace, name: str) -> None:
        code = trace.graph.python_code("self")
        self.module = module
        self.name = name
        self.source = code.src
        self.names = {key: _named(value) for key, value in code.globals.items()}
        self.fixed = {
            key: list(value) if isinstance(value, list) else value
            for key, value in trace.fixed.items()
        }
        self._build()

    def _build(self) -> None:
        space = {key: _found(value) for key, value in self.names.items()}
        exec(self.source, space)
        self.function = cast(types.FunctionType, space["forward"])
        signature = inspect.signature(self.function)
        without_self = list(signature.parameters.values())[1:]
        self.__signature__ = signature.replace(parameters=without_self)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Compute the method.

        Raises:
            ConversionError: an attribute that went into the graph has changed since.
        """
        for key, value in self.fixed.items():
            now = getattr(self.module, key, None)
            if type(now) is not type(value) or now != value:
                raise ConversionError(
                    f"{type(self.module).__name__}.{key} was {value!r} when the calls "
                    f"in its {self.name} were replaced and is {now!r} now; set it "
                    "first, then replace"
                )
        return self.function(self.module, *args, **kwargs)

    def __getstate__(self) -> dict[str, object]:
        made = ("function", "__signature__")
        return {key: value for key, value in vars(self).items() if key not in made}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._build()


class OutdatedMethod:
    """A method that forward used and whose calls could not be replaced on their own.

    It would compute what the network no longer does, so calling it is an error.
    """

    def __init__(self, module: nn.Module, name: str, why: str) -> None:
        self.module, self.name, self.why = module, name, why

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Raise ConversionError, or be traced as the class's own method."""
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return getattr(type(self.module), self.name)(self.module, *args, **kwargs)
        raise ConversionError(
            f"{type(self.module).__name__}.{self.name} calls what was replaced in "
            f"forward, and could not be changed likewise ({self.why}); call the module "
            "itself, or call modules such as torch.nn.ReLU in it and replace again"
        )


def _named(value: object) -> object:
    """A module or function by its name where pickle would not find it itself."""
    if isinstance(value, types.ModuleType):
        return _Reference(value.__name__, "")
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    local = callable(value) and "<locals>" in getattr(value, "__qualname__", "")
    if local and getattr(sys.modules.get(module or ""), name or "", None) is value:
        return _Reference(str(module), str(name))
    return value


def _found(value: object) -> object:
    if not isinstance(value, _Reference):
        return value
    module = importlib.import_module(value.module)
    return getattr(module, value.name) if value.name else module


@dataclass(frozen=True)
class _Reference:
    module: str
    name: str
