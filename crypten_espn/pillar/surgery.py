"""Surgery on networks: polynomial activations and average pools in, and back.

`replace_activations`, `replace_pooling` and `restore_activations` work in place and
return the network; `changes` lists what was done to it. Modules are swapped where they
are. A function called inside a `forward` (torch.relu, torch.nn.functional.relu) is
found by tracing that one `forward`, its children kept whole, and replaced in the
module's own place; what tracing would lose is refused. Nothing is changed unless
everything can be.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from ..errors import ConversionError, NothingReplacedError
from ..polynomial import AnyPolynomial, ChannelPolynomials, Polynomial
from .activation import PolynomialActivation
from .operation import Change, Operation, arguments, is_inplace, spelling
from .pools import PoolSurgeon
from .spellings import ACTIVATION_CALLS, ACTIVATIONS, SPELLINGS

__all__ = [
    "Change",
    "Changes",
    "Key",
    "PolynomialActivation",
    "activations",
    "changes",
    "replace_activations",
    "replace_pooling",
    "restore_activations",
]

Key = type[nn.Module] | Callable[..., Tensor] | str


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


def replace_activations(
    model: nn.Module,
    mapping: Mapping[Key, AnyPolynomial],
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

    An activation in place stays so: what it overwrote, the polynomial overwrites. Hooks
    of what is replaced move on to the polynomial.

    Returns:
        The model itself, with its class, hooks, buffers, methods and modes; or a
        PolynomialActivation if the model is an activation.

    Raises:
        ConversionError: a key is none of these, nothing or a pattern matches nothing,
            or a `forward` that calls an activation cannot be traced or would lose what
            the message lists. The model is as it was.
    """
    return _operated(model, _Surgeon(mapping, select))


def replace_pooling(model: nn.Module) -> nn.Module:
    """Return the model with every max pool made an average pool, in place.

    Kernel, stride, padding and rounding are kept; padding counts as zeros.

    Raises:
        ConversionError: a pool has a dilation or returns indices, or a `forward` that
            calls a pool cannot be traced or would lose what the message lists. The
            model is as it was.
    """
    return _operated(model, PoolSurgeon())


def restore_activations(model: nn.Module) -> nn.Module:
    """Return the model with what its polynomials replaced, in place.

    A polynomial loaded from a file has no memory of it and becomes torch.nn.ReLU.
    """
    return _operated(model, _Restorer())


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


def _operated(model: nn.Module, operation: Operation) -> nn.Module:
    earlier = changes(model)
    swapped = operation.operate(model)
    # Not a buffer or parameter: state_dict stays as it is.
    object.__setattr__(swapped, "_changes", Changes((*earlier, *operation.done)))
    return swapped


class _Surgeon(Operation):
    def __init__(
        self, mapping: Mapping[Key, AnyPolynomial], select: Callable[[str], bool] | None
    ) -> None:
        super().__init__()
        self.select = select
        self.patterns: dict[str, AnyPolynomial] = {}
        self.types: dict[type[nn.Module], AnyPolynomial] = {}
        self.calls: dict[Callable[..., object] | str, AnyPolynomial] = {}
        self.asked = list(mapping)
        self.matched: set[str] = set()
        # The kinds and places of every activation, asked for or not.
        self.met: list[tuple[type[nn.Module], str]] = []
        for key, polynomial in mapping.items():
            if not isinstance(polynomial, Polynomial | ChannelPolynomials):
                raise ConversionError(
                    f"replace_activations was given a {type(polynomial).__name__} for "
                    f"{key!r}; it takes a Polynomial, as from Polynomial.fit, "
                    "or ChannelPolynomials"
                )
            if isinstance(key, str):
                self.patterns[key] = polynomial
            elif isinstance(key, type) and issubclass(key, nn.Module):
                self.types[key] = polynomial
                for call in SPELLINGS.get(key, ()):
                    self.calls.setdefault(call, polynomial)
            elif callable(key):
                self.calls[key] = polynomial
            else:
                raise ConversionError(
                    f"replace_activations was given the key {key!r}; a key is a module "
                    "type such as torch.nn.ReLU, a function such as torch.relu, or a "
                    "pattern of names such as 'layer1.*'"
                )

    def check(self) -> None:
        missing = [p for p in self.patterns if p not in self.matched]
        if missing:
            raise ConversionError(
                f"no activation is called {', '.join(map(repr, missing))}; "
                f"names are those of model.named_modules(). {self._found_instead()}"
            )
        kinds = {kind for kind, _ in self.met}
        if self.done or not (self.types or self.calls) or kinds == _POLYNOMIAL:
            return
        asked = sorted({getattr(key, "__name__", str(key)) for key in self.asked})
        raise NothingReplacedError(
            f"nothing was replaced by {', '.join(asked)}: {self._found_instead()}"
        )

    def _found_instead(self) -> str:
        if not self.met:
            return "the network has no activation that is known here"
        found = []
        for name in sorted({kind.__name__ for kind, _ in self.met}):
            places = [place for known, place in self.met if known.__name__ == name]
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            found.append(f"{name} at {', '.join(places[:3])}{more}")
        kinds = {kind for kind, _ in self.met}
        if kinds == _POLYNOMIAL:
            advice = ""
        elif self.select is not None and kinds & set(self.types):
            advice = "; select is false for these"
        else:
            kind = min(kinds - _POLYNOMIAL, key=str)
            advice = f", as in {{torch.nn.{kind.__name__}: polynomial}}"
        return f"the network has {'; '.join(found)}{advice}"

    def sought(self) -> set[str]:
        calls = set(self.calls)
        if self.patterns:
            calls |= ACTIVATION_CALLS.keys()
        return {call if isinstance(call, str) else call.__name__ for call in calls}

    def swap_module(self, name: str, module: nn.Module) -> nn.Module | None:
        kind = type(module)
        polynomial = self.types.get(kind)
        if kind in ACTIVATIONS or kind is PolynomialActivation:
            self.met.append((kind, name or "(model)"))
            polynomial = self._by_name(name) or polynomial
        inplace = bool(getattr(module, "inplace", False))
        new = self._activation(name, polynomial, inplace)
        if new is not None:
            new._replaced = (module,)
            if isinstance(module, PolynomialActivation):
                new._replaced = module._replaced
        return new

    def swap_call(self, name: str, node: fx.Node) -> nn.Module | None:
        target: Any = node.target
        polynomial = self.calls.get(target)
        kind = ACTIVATION_CALLS.get(target)
        if kind is not None:
            self.met.append((kind, name))
            polynomial = self._by_name(name) or polynomial
        new = self._activation(name, polynomial, False)
        if new is not None:
            new.inplace = is_inplace(node)
            new._replaced = (_as_module(kind, node),)
        return new

    def _by_name(self, name: str) -> AnyPolynomial | None:
        for pattern, polynomial in self.patterns.items():
            if fnmatch.fnmatchcase(name, pattern):
                self.matched.add(pattern)
                return polynomial
        return None

    def _activation(
        self, name: str, polynomial: AnyPolynomial | None, inplace: bool
    ) -> PolynomialActivation | None:
        if polynomial is None or (self.select is not None and not self.select(name)):
            return None
        return PolynomialActivation(polynomial, inplace=inplace)


class _Restorer(Operation):
    def swap_module(self, name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, PolynomialActivation):
            return None
        return module._replaced[0] if module._replaced else nn.ReLU()


class Call(nn.Module):
    """A function or tensor method of one tensor, as a module.

    Args:
        target: the function, or the method's name.
        args, kwargs: what it takes beside the tensor.
    """

    def __init__(
        self,
        target: Callable[..., Tensor] | str,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> None:
        super().__init__()
        self.target, self.args, self.kwargs = target, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        """Return what the function returns."""
        y: Tensor
        if isinstance(self.target, str):
            y = getattr(x, self.target)(*self.args, **self.kwargs)
        else:
            y = self.target(x, *self.args, **self.kwargs)
        return y

    def extra_repr(self) -> str:
        """Return the function's name, for print(model)."""
        return str(getattr(self.target, "__name__", self.target))


def _as_module(kind: type[nn.Module] | None, node: fx.Node) -> nn.Module:
    """What a replaced call becomes when activations are restored."""
    given = arguments(node)
    if given.pop("out", None) is not None:
        raise ConversionError(
            f"{node.name}: {spelling(node)}() writes to out=, which a module cannot; "
            "use what it returns"
        )
    computed = [key for key, value in given.items() if isinstance(value, fx.Node)]
    if computed:
        raise ConversionError(
            f"{node.name}: {', '.join(computed)} of {spelling(node)}() is computed at "
            "run time; a polynomial replaces one fixed function, so make it a constant"
        )
    rest = node.args[1:]
    unused = ("input", "out")
    kwargs = {key: value for key, value in node.kwargs.items() if key not in unused}
    if kind is not None and not spelling(node).endswith("_"):
        return kind(*rest, **kwargs)
    if kind is nn.ReLU:
        return nn.ReLU(inplace=True)
    return Call(node.target, rest, kwargs)


_POLYNOMIAL = {PolynomialActivation}
