"""A converted network's modules as layers: every attribute is read, or refused by name.

A module computes what its attributes say. Each function below names those it has; one
that is unknown, or has a value that the masked engine does not compute, is a PlanError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..linear import Pads, Pair
from .layers import Factors, Layer, Windows, naming

# Public factors by position are whole numbers over one denominator, none above this.
_MAX_FACTOR = 1 << 16


def read_layer(
    name: str, module: Any, inputs: Sequence[str], parameters: Mapping[str, np.ndarray]
) -> Layer:
    """One module as a layer.

    Args:
        inputs: names of values and parameters, as the module takes them.
        parameters: by name.

    Raises: PlanError with the layer's name: a module, an attribute or a constant that
        the masked engine does not compute.
    """
    title = type(module).__name__
    values = [i for i in inputs if i not in parameters]
    layer = Layer(name, "same", values)
    if title not in _READERS:
        raise layer.refused(
            f"{title} is not supported by the masked engine. Convert with "
            'protocol="espn", or replace the layer by convolutions, pools, additions '
            "and polynomial activations."
        )
    given = _Given(layer, title, vars(module))
    constants = [i for i in inputs if i in parameters]
    arrays = [parameters[i] for i in constants]
    with naming(layer.title):
        read = _READERS[title]
        if read in (_conv, _gemm):
            if (
                len(values) != 1
                or inputs[0] != values[0]
                or len(constants) not in (1, 2)
            ):
                raise layer.refused(
                    "one value, constant weights and at most one constant bias are "
                    f"supported; {len(values)} values and {len(constants)} constants "
                    "were given."
                )
            layer = replace(layer, weight=constants[0], bias="".join(constants[1:]))
        elif constants and read is not _reshape:
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise layer.refused(
                f"{title} with a constant of shape {shapes} is not supported by the "
                "masked engine. Fold it into the layer before or after, or compute it "
                "in the clear."
            )
        elif len(values) != 1 and title not in ("Add", "Concat"):
            raise layer.refused(f"{title} of {len(values)} values; one is supported.")
        layer = read(given, layer, arrays)
        given.check()
    return layer


class _Given:
    """A module's own attributes, each to be taken once."""

    def __init__(self, layer: Layer, title: str, attributes: Mapping[str, Any]) -> None:
        self._layer, self._title = layer, title
        self._left = {
            key: value
            for key, value in attributes.items()
            if key[:1] != "_" and key not in ("training", "encrypted")
        }

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def require(self, key: str, *allowed: Any) -> None:
        """Take an attribute that has to be one of these; the first where missing."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise self._layer.refused(
                f"{self._title} with {key}={value!r}; the masked engine computes "
                f"{key}={allowed[0]!r}."
            )

    def pair(self, key: str, default: Any = None) -> Pair:
        value = self.take(key)
        value = default if value is None else value
        items = list(value) if isinstance(value, (tuple, list)) else [value]
        if len(items) not in (1, 2) or any(int(i) != i for i in items):
            raise self._layer.refused(
                f"{self._title} with {key}={value!r}; one or two whole numbers are "
                "supported."
            )
        return int(items[0]), int(items[-1])

    def positive(self, key: str, default: Any = None) -> Pair:
        found = self.pair(key, default)
        if min(found) < 1:
            raise self._layer.refused(
                f"{self._title} with {key}={found}; at least 1 is needed."
            )
        return found

    def pads(self, key: str = "padding") -> Pads:
        """One number, (rows, columns), or (top, left, bottom, right)."""
        value = self._left.get(key)
        if isinstance(value, (tuple, list)) and len(value) == 4:
            return self.not_cropped([int(v) for v in self.take(key)])
        top, left = self.pair(key, 0)
        return self.not_cropped((top, left, top, left))

    def not_cropped(self, pads: Sequence[int]) -> Pads:
        if min(pads) < 0:
            raise self._layer.refused(
                f"{self._title} with negative pads {tuple(pads)}, which crop; the "
                "masked engine pads with at least 0. Crop the input in the clear."
            )
        top, left, bottom, right = pads
        return top, left, bottom, right

    def check(self) -> None:
        """Refuse what nobody took."""
        for key, value in self._left.items():
            raise self._layer.refused(
                f"{self._title} with {key}={value!r}, an attribute that the masked "
                "engine does not read."
            )


def _conv(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    weight, filters = arrays[0], arrays[0].shape[0]
    if weight.ndim != 4:
        raise layer.refused(
            f"a convolution with weights of shape {weight.shape}; (filters, channels, "
            "height, width) is supported."
        )
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    groups = int(given.take("groups", 1))
    windows = Windows(
        kernel,
        given.positive("stride", 1),
        given.pads(),
        given.positive("dilation", 1),
        groups,
    )
    _check_bias(layer, filters, arrays)
    return replace(layer, kind="conv", windows=windows)


def _gemm(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    given.require("alpha", 1.0)
    given.require("beta", 1.0)
    given.require("trans_a", False)
    # The weights' integers are laid out (out, in).
    given.require("trans_b", True)
    if arrays[0].ndim != 2:
        raise layer.refused(f"a linear layer with weights of shape {arrays[0].shape}.")
    _check_bias(layer, arrays[0].shape[0], arrays)
    return replace(layer, kind="gemm")


def _check_bias(layer: Layer, filters: int, arrays: Sequence[np.ndarray]) -> None:
    if len(arrays) == 2 and (
        arrays[1].size != filters or max(arrays[1].shape) != filters
    ):
        raise layer.refused(
            f"a bias of shape {arrays[1].shape} for {filters} filters; ({filters},) is "
            "supported."
        )


def _activation(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    del arrays
    # Which protocol CrypTen would take is not the masked engine's matter.
    given.take("protocol")
    given.take("truncation")
    return replace(layer, kind="activation", polynomial=given.take("polynomial"))


def _add(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    del given, arrays
    if len(layer.inputs) != 2:
        raise layer.refused(
            f"an addition of {len(layer.inputs)} values; 2 are supported."
        )
    return replace(layer, kind="add")


def _concat(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    del arrays
    return replace(layer, kind="concat", axis=int(given.take("dimension")))


def _pool(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    del arrays
    given.require("pool_type", "average")
    kernel = given.positive("kernel_size")
    windows = Windows(kernel, given.positive("stride", kernel), given.pads())
    if any(windows.pads):
        given.require("count_include_pad", True)
    given.take("count_include_pad")
    ceil_mode = bool(given.take("ceil_mode", False))
    return replace(layer, kind="pool", windows=windows, ceil_mode=ceil_mode)


def _adaptive(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    del arrays
    return replace(layer, kind="pool", size=given.positive("output_size"))


def _global(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    del given, arrays
    return replace(layer, kind="pool", size=(1, 1))


def _scale(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    del arrays
    factor = given.take("factor")
    real = factor.detach().cpu().double().numpy()
    if real.ndim != 2 or not np.isfinite(real).all() or real.min() < 0:
        raise layer.refused(
            f"factors of shape {real.shape}; finite factors of at least 0 by row and "
            "column are supported."
        )
    exact = {v: Fraction(v).limit_denominator(4096) for v in np.unique(real).tolist()}
    divisor = math.lcm(*(fraction.denominator for fraction in exact.values()))
    off = max(abs(float(f) - v) for v, f in exact.items())
    integers = np.rint(real * divisor)
    if off > 2.0**-20 * real.max() or max(divisor, integers.max()) > _MAX_FACTOR:
        raise layer.refused(
            "its factors are no fractions of a small common denominator; use pools "
            "that count every element of their windows (count_include_pad=True)."
        )
    return replace(layer, kind="scale", factors=Factors(integers.astype(int), divisor))


def _flatten(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    del arrays
    given.require("axis", 1)
    return replace(layer, kind="flatten")


def _reshape(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    shape = given.take("shape")
    if arrays:
        shape = arrays[0].reshape(-1).tolist()
    if shape is None or len(layer.inputs) != 1:
        raise layer.refused("a reshape to a shape that is not known in advance.")
    if torch.is_tensor(shape):
        shape = shape.reshape(-1).tolist()
    return replace(layer, kind="flatten", target=tuple(int(v) for v in shape))


def _pad(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    del arrays
    given.require("mode", "constant")
    given.require("value", 0)
    sides = given.take("padding")
    if sides is None:
        raise layer.refused("pads that are not known in advance.")
    items = [int(v) for v in sides]
    if len(items) % 2 or any(items[4:]):
        raise layer.refused(
            f"pads {tuple(items)} beyond height and width; the masked engine pads rows "
            "and columns. Pad other axes with a convolution of as many filters."
        )
    left, right, top, bottom = (items + [0] * 4)[:4]
    pads = given.not_cropped((top, left, bottom, right))
    return replace(layer, kind="pad", windows=Windows((1, 1), (1, 1), pads))


def _same(given: _Given, layer: Layer, arrays: Sequence[np.ndarray]) -> Layer:
    del arrays
    given.take("p")
    return layer


_READERS: dict[str, Callable[[_Given, Layer, Sequence[np.ndarray]], Layer]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "PolynomialActivation": _activation,
    "Add": _add,
    "Concat": _concat,
    "AvgPool2d": _pool,
    "AdaptiveAvgPool2d": _adaptive,
    "GlobalAveragePool": _global,
    "Scale": _scale,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "ConstantPad2d": _pad,
    "_ConstantPad": _pad,
    "Dropout": _same,
    "Identity": _same,
}
