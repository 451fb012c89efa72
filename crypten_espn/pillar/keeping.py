"""A module's state or modes held while something is done with it, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

_Container = list[object] | dict[object, object] | set[object]
# Attributes by name; and those of them that are containers, with what stood in them.
_Attributes = dict[str, object]
_Contents = dict[str, tuple[_Container, "list[_Same]"]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode is put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def as_taken(model: nn.Module, x: Tensor) -> Tensor:
    """x on the device and of the type of its parameters; float32 where it has none."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    return x.float() if like is None else x.to(like.device, like.dtype)


@contextmanager
def kept(module: nn.Module) -> Iterator[dict[str, object]]:
    """Put back what the body changes in a module and below; yields what that was."""
    changed: dict[str, object] = {}
    before = [(part, _state(part)) for part in module.modules()]
    generator = torch.random.get_rng_state()
    try:
        yield changed
    finally:
        torch.random.set_rng_state(generator)
        for _part, states in before:
            for container, items, contents in states:
                for key in {*container, *items}:
                    value = container.get(key)
                    if key not in items or value is not items[key]:
                        changed[key] = value
                    elif key in contents:
                        held, elements = contents[key]
                        if _elements(held) != elements:
                            changed[key] = value
                            _refill(held, elements)
                # In place, because hooks and the like share these dictionaries.
                container.clear()
                container.update(items)


def _state(part: nn.Module) -> list[tuple[_Attributes, _Attributes, _Contents]]:
    own = [vars(part), part._parameters, part._buffers, part._modules]
    containers = cast("list[_Attributes]", own)
    result = []
    for container in containers:
        items = dict(container)
        contents = {
            key: (value, _elements(value))
            for key, value in items.items()
            if not key.startswith("_") or key not in _MODULE_STATE
            if isinstance(value, list | dict | set)
        }
        result.append((container, items, contents))
    return result


_MODULE_STATE = frozenset(vars(nn.Module()))


def _elements(value: _Container) -> list[_Same]:
    """The contents of a container, compared by identity."""
    if isinstance(value, dict):
        return [_Same(part) for pair in value.items() for part in pair]
    return [_Same(part) for part in value]


@dataclass(frozen=True)
class _Same:
    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _refill(container: _Container, elements: list[_Same]) -> None:
    values = [element.value for element in elements]
    container.clear()
    if isinstance(container, dict):
        container.update(zip(values[::2], values[1::2], strict=True))
    elif isinstance(container, set):
        container.update(values)
    else:
        container.extend(values)
