"""Surgery on networks: polynomial activations and average pools in, and back.

`replace_activations`, `replace_pooling` and `restore_activations` work in place and
return the network; `changes` lists what was done to it. Modules are swapped where they
are. A function called inside a `forward` (torch.relu, torch.nn.functional.relu) is
found by tracing that one `forward` with torch.fx, its children kept whole.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ..errors import ConversionError
from ..polynomial import Polynomial
from . import elementwise

Key = type[nn.Module] | Callable[..., Tensor] | str

# The functions and tensor methods that stand for a module type.
_SPELLINGS: dict[type[nn.Module], tuple[Callable[..., Any] | str, ...]] = {
    nn.ReLU: (
        torch.relu,
        torch.relu_,
        functional.relu,
        functional.relu_,
        "relu",
        "relu_",
    ),
    nn.ReLU6: (functional.relu6,),
    nn.SiLU: (functional.silu,),
    nn.GELU: (functional.gelu,),
    nn.Hardswish: (functional.hardswish,),
    nn.Hardsigmoid: (functional.hardsigmoid,),
    nn.LeakyReLU: (functional.leaky_relu,),
    nn.ELU: (functional.elu,),
    nn.Softplus: (functional.softplus,),
    nn.Mish: (functional.mish,),
    nn.Sigmoid: (torch.sigmoid, functional.sigmoid, "sigmoid"),
    nn.Tanh: (torch.tanh, functional.tanh, "tanh"),
    nn.MaxPool2d: (torch.max_pool2d, functional.max_pool2d),
    nn.AdaptiveMaxPool2d: (functional.adaptive_max_pool2d,),
}


@dataclass(frozen=True)
class Change:
    """One replacement: where, what was there, what is there now."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after}"


class Changes(tuple[Change, ...]):
    """The changes made to a network, in order; `str` is a readable summary."""

    def __str__(self) -> str:
        if not self:
            return "nothing was replaced"
        width = max(len(change.name) for change in self)
        lines = [f"{len(self)} replaced"]
        lines += [
            f"  {change.name:<{width}}  {change.before} -> {change.after}"
            for change in self
        ]
        return "\n".join(lines)


class PolynomialActivation(nn.Module):
    """A polynomial, element by element.

    In training the input is clipped to the polynomial's interval, and recorded before
    the clip for `range_penalty` to read. In evaluation the polynomial is applied as it
    is, as the parties will. An ONNX export keeps the module whole, as one operator
    crypten_espn::PolynomialActivation.

    Args:
        polynomial: what to apply.
    """

    def __init__(self, polynomial: Polynomial) -> None:
        super().__init__()
        self.polynomial = polynomial
        self._recorded: dict[int, Tensor] = {}
        self._replaced: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return the polynomial of x, same shape and type."""
        if self.training and x.requires_grad and torch.is_grad_enabled():
            self._record(x)
        return _Evaluate.apply(x, self.polynomial, self.training)

    def take_recorded(self) -> list[Tensor]:
        """Return the inputs since the last call or backward pass, and forget them."""
        recorded = list(self._recorded.values())
        self._recorded.clear()
        return recorded

    def _record(self, x: Tensor) -> None:
        # A backward pass without penalty must not leave its graph behind.
        recorded = self._recorded
        ticket = max(recorded, default=-1) + 1
        recorded[ticket] = x

        def forget(_: Tensor) -> None:
            recorded.pop(ticket, None)

        x.register_hook(forget)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorded": {}}

    def extra_repr(self) -> str:
        """Return the polynomial, for print(model)."""
        return str(self.polynomial)


class _Evaluate(torch.autograd.Function):
    """p(x), or p(clip(x)) in training; float32 inside, whatever the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, polynomial: Polynomial, clip: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.polynomial = polynomial
        ctx.interval = polynomial.interval if clip else None
        return elementwise.polynomial(x, polynomial.coeffs, ctx.interval)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        if gradient.stride() != x.stride():
            gradient = torch.empty_like(x).copy_(gradient)
        slope = ctx.polynomial.derivative().coeffs
        return elementwise.slope(x, gradient, slope, ctx.interval), None, None

    @staticmethod
    def symbolic(g: Any, x: Any, polynomial: Polynomial, clip: bool) -> Any:
        return g.op(
            "crypten_espn::PolynomialActivation",
            x,
            numerators_i=list(polynomial.numerators),
            frac_bits_i=polynomial.frac_bits,
            interval_f=list(polynomial.interval),
            requested_degree_i=polynomial.requested_degree,
        ).setType(x.type())


def replace_activations(
    model: nn.Module,
    mapping: Mapping[Key, Polynomial],
    *,
    select: Callable[[str], bool] | None = None,
) -> nn.Module:
    """Return the model with activations made polynomial, in place.

    Args:
        model: any network.
        mapping: what to replace, and by which polynomial. A key is a module type
            (torch.nn.ReLU, which stands for torch.relu and its other spellings as
            well), a function, or a pattern of names such as "layer1.*"; a pattern is
            preferred over a type, an earlier pattern over a later one.
        select: replaces only the activations for whose dotted name it is true.

    Returns:
        The model itself, or its torch.fx twin if the model's own `forward` calls an
        activation as a function.

    Raises:
        ConversionError: a key is none of these, a pattern matches nothing, or a
            `forward` that calls an activation cannot be traced.
    """
    surgeon = _Surgeon(mapping, select)
    return surgeon.operate(model)


def replace_pooling(model: nn.Module) -> nn.Module:
    """Return the model with every max pool made an average pool, in place.

    Kernel, stride, padding and rounding are kept; padding counts as zeros.

    Raises:
        ConversionError: a pool has a dilation or returns indices, or a `forward` that
            calls a pool cannot be traced.
    """
    return _PoolSurgeon().operate(model)


def restore_activations(model: nn.Module) -> nn.Module:
    """Return the model with what its polynomials replaced, in place.

    A polynomial loaded from a file has no memory of it and becomes torch.nn.ReLU.
    """
    return _Restorer().operate(model)


def changes(model: nn.Module) -> Changes:
    """Return what this file's functions have done to the model, in order."""
    return Changes(getattr(model, "_changes", ()))


def activations(model: nn.Module) -> dict[str, PolynomialActivation]:
    """Return the polynomial activations by dotted name, shared ones once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PolynomialActivation)
    }


class _Operation:
    """Walk over modules and the functions they call; subclasses say what to swap."""

    def __init__(self) -> None:
        self.done: list[Change] = []

    def swap_module(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return what takes this module's place, or None."""
        raise NotImplementedError

    def swap_call(self, name: str, node: fx.Node) -> nn.Module | None:
        """Return the module that takes this call's place, or None."""
        return None

    def sought(self) -> set[str]:
        """Return the names under which sought functions appear in source text."""
        return set()

    def operate(self, model: nn.Module) -> nn.Module:
        earlier = changes(model)
        swapped = self._visit("", model, {})
        # Not a buffer or parameter: state_dict stays as it is.
        object.__setattr__(swapped, "_changes", Changes((*earlier, *self.done)))
        return swapped

    def _visit(
        self, name: str, module: nn.Module, seen: dict[int, nn.Module]
    ) -> nn.Module:
        if id(module) in seen:
            return seen[id(module)]
        new = self.swap_module(name, module)
        if new is not None:
            new.train(module.training)
            self.done.append(
                Change(name or "(model)", type(module).__name__, type(new).__name__)
            )
        else:
            for child_name, child in list(module._modules.items()):
                if child is not None:
                    module._modules[child_name] = self._visit(
                        _join(name, child_name), child, seen
                    )
            new = self._swap_calls(name, module)
        seen[id(module)] = new
        return new

    def _swap_calls(self, name: str, module: nn.Module) -> nn.Module:
        """Return the module, or its traced twin if its forward calls what we seek."""
        if not self.sought() or type(module).__module__.startswith("torch.nn."):
            return module
        where = f"{name or 'the model'} ({type(module).__name__})"
        named = _called_names(module) & self.sought()
        try:
            graph = _traced(module)
        except Exception as error:  # a forward may raise anything when traced
            if not named:
                return module
            raise ConversionError(
                f"the forward of {where} calls {', '.join(sorted(named))} and cannot "
                f"be traced by torch.fx ({type(error).__name__}: {error}); call a "
                "module instead, such as torch.nn.ReLU, one for each place"
            ) from error
        found = {
            node: new
            for node in graph.nodes
            if node.op in ("call_function", "call_method")
            and (new := self.swap_call(_join(name, node.name), node)) is not None
        }
        if not found:
            return module
        twin = module
        if not isinstance(module, fx.GraphModule):
            _check_same_in_both_modes(module, where)
            twin = fx.GraphModule(module, graph, type(module).__name__)
        for node, new in found.items():
            new.train(module.training)
            target = f"{node.name}_module"
            twin.add_module(target, new)
            x = node.args[0] if node.args else node.kwargs["input"]
            with graph.inserting_after(node):
                call = graph.call_module(target, (x,))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            called = getattr(node.target, "__name__", node.target)
            self.done.append(
                Change(_join(name, node.name), f"{called}()", type(new).__name__)
            )
        graph.lint()
        cast("fx.GraphModule", twin).recompile()
        if twin is not module:
            for key, value in vars(module).items():
                if not key.startswith("_") and key not in vars(twin):
                    setattr(twin, key, value)
            twin.train(module.training)
        return twin


class _Surgeon(_Operation):
    def __init__(
        self, mapping: Mapping[Key, Polynomial], select: Callable[[str], bool] | None
    ) -> None:
        super().__init__()
        self.select = select
        self.patterns: dict[str, Polynomial] = {}
        self.types: dict[type[nn.Module], Polynomial] = {}
        self.calls: dict[Callable[..., Any] | str, Polynomial] = {}
        self.matched: set[str] = set()
        for key, polynomial in mapping.items():
            if not isinstance(polynomial, Polynomial):
                raise ConversionError(
                    f"replace_activations was given a {type(polynomial).__name__} for "
                    f"{key!r}; it takes a Polynomial, as from Polynomial.fit"
                )
            if isinstance(key, str):
                self.patterns[key] = polynomial
            elif isinstance(key, type) and issubclass(key, nn.Module):
                self.types[key] = polynomial
                for spelling in _SPELLINGS.get(key, ()):
                    self.calls.setdefault(spelling, polynomial)
            elif callable(key):
                self.calls[key] = polynomial
            else:
                raise ConversionError(
                    f"replace_activations was given the key {key!r}; a key is a module "
                    "type such as torch.nn.ReLU, a function such as torch.relu, or a "
                    "pattern of names such as 'layer1.*'"
                )

    def operate(self, model: nn.Module) -> nn.Module:
        swapped = super().operate(model)
        missing = [p for p in self.patterns if p not in self.matched]
        if missing:
            raise ConversionError(
                f"no activation is called {', '.join(map(repr, missing))}; "
                "names are those of model.named_modules()"
            )
        return swapped

    def sought(self) -> set[str]:
        calls = set(self.calls)
        if self.patterns:
            calls |= _ACTIVATION_CALLS
        return {call if isinstance(call, str) else call.__name__ for call in calls}

    def swap_module(self, name: str, module: nn.Module) -> nn.Module | None:
        known = (*_SPELLINGS, PolynomialActivation)
        polynomial = self.types.get(type(module))
        if type(module) in known and not isinstance(module, _POOLS):
            polynomial = self._by_name(name) or polynomial
        new = self._activation(name, polynomial)
        if new is not None:
            if isinstance(module, PolynomialActivation):
                new._replaced = module._replaced
            else:
                new._replaced = (module,)
        return new

    def swap_call(self, name: str, node: fx.Node) -> nn.Module | None:
        target: Any = node.target
        polynomial = self.calls.get(target)
        if target in _ACTIVATION_CALLS:
            polynomial = self._by_name(name) or polynomial
        return self._activation(name, polynomial)

    def _by_name(self, name: str) -> Polynomial | None:
        for pattern, polynomial in self.patterns.items():
            if fnmatch.fnmatchcase(name, pattern):
                self.matched.add(pattern)
                return polynomial
        return None

    def _activation(
        self, name: str, polynomial: Polynomial | None
    ) -> PolynomialActivation | None:
        if polynomial is None or (self.select is not None and not self.select(name)):
            return None
        return PolynomialActivation(polynomial)


class _PoolSurgeon(_Operation):
    def sought(self) -> set[str]:
        return {"max_pool2d", "adaptive_max_pool2d"}

    def swap_module(self, name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.AdaptiveMaxPool2d):
            _check_indices(name, module.return_indices)
            return nn.AdaptiveAvgPool2d(module.output_size)
        if isinstance(module, nn.MaxPool2d):
            _check_indices(name, module.return_indices)
            return _average_pool(
                name,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                module.ceil_mode,
            )
        return None

    def swap_call(self, name: str, node: fx.Node) -> nn.Module | None:
        if node.target in _SPELLINGS[nn.AdaptiveMaxPool2d]:
            fields = _arguments(node, ("input", "output_size", "return_indices"))
            _check_indices(name, fields.get("return_indices", False))
            return nn.AdaptiveAvgPool2d(fields["output_size"])
        if node.target in _SPELLINGS[nn.MaxPool2d]:
            fields = _arguments(
                node,
                (
                    "input",
                    "kernel_size",
                    "stride",
                    "padding",
                    "dilation",
                    "ceil_mode",
                    "return_indices",
                ),
            )
            _check_indices(name, fields.get("return_indices", False))
            return _average_pool(
                name,
                fields["kernel_size"],
                fields.get("stride"),
                fields.get("padding", 0),
                fields.get("dilation", 1),
                fields.get("ceil_mode", False),
            )
        return None


class _Restorer(_Operation):
    def swap_module(self, name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, PolynomialActivation):
            return None
        return module._replaced[0] if module._replaced else nn.ReLU()


_POOLS = (nn.MaxPool2d, nn.AdaptiveMaxPool2d)
_ACTIVATION_CALLS = {
    call
    for kind, spellings in _SPELLINGS.items()
    if kind not in _POOLS
    for call in spellings
}


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _check_indices(name: str, return_indices: Any) -> None:
    if return_indices:
        raise ConversionError(
            f"{name}: a max pool that returns indices has no average twin; "
            "rebuild the layer without return_indices"
        )


def _average_pool(
    name: str, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: Any
) -> nn.AvgPool2d:
    if dilation not in (1, (1, 1), [1, 1]):
        raise ConversionError(
            f"{name}: a max pool with dilation={dilation} has no average twin; "
            "rebuild the layer with dilation=1"
        )
    return nn.AvgPool2d(
        kernel, stride=stride or kernel, padding=padding, ceil_mode=ceil
    )


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    computed = [k for k in names[1:] if isinstance(given.get(k), fx.Node)]
    if computed:
        raise ConversionError(
            f"{node.name}: {', '.join(computed)} of the pool is computed at run time; "
            "an average pool needs constants"
        )
    return {key: value for key, value in given.items() if value is not None}


class _Shallow(fx.Tracer):
    """Traces one forward; every child stays a call to that child."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(module: nn.Module) -> fx.Graph:
    if isinstance(module, fx.GraphModule):
        return module.graph
    return _Shallow().trace(module)


def _check_same_in_both_modes(module: nn.Module, where: str) -> None:
    mode = module.training
    try:
        codes = []
        for training in (True, False):
            # Not module.train(): the children do not take part.
            module.training = training
            codes.append(_Shallow().trace(module).python_code("self").src)
    finally:
        module.training = mode
    if codes[0] != codes[1]:
        raise ConversionError(
            f"the forward of {where} calls an activation or pool and does different "
            "things in training and in evaluation, which torch.fx cannot keep; call a "
            "module instead, such as torch.nn.ReLU, one for each place"
        )


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
