"""A network's weights as integers: the server's secret."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..errors import PlanError
from . import kernels
from .plan import Plan, WeightShape


@dataclass(frozen=True)
class Weights:
    """A model's weights as integers in kernel layout. The server's secret.

    Args:
        shapes: the plan's, by weight.
        integers: per weight, `WeightShape.kernel_layout`, in the type of its ring.
        biases: per weight, (filters,) in the same type, or None.
    """

    shapes: tuple[WeightShape, ...]
    integers: tuple[np.ndarray, ...] = field(repr=False)
    biases: tuple[np.ndarray | None, ...] = field(repr=False)

    @cached_property
    def filters(self) -> tuple[kernels.Filters, ...]:
        """The integers as the convolutions of this processor take them."""
        pairs = zip(self.shapes, self.integers, strict=True)
        return tuple(shape.filters(array) for shape, array in pairs)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all integers: which model offline material was made for."""
        digest = hashlib.sha256()
        for array in (*self.integers, *self.biases):
            digest.update(b"-" if array is None else array.tobytes())
        return digest.digest()


@dataclass(frozen=True)
class Quantisation:
    """How one layer's real weights become integers.

    Args:
        name: the layer.
        parameter, bias: names of the parameters in the converted network; bias may be
            empty.
        factor, bias_factor: integers are round(real * factor).
    """

    name: str
    parameter: str
    bias: str
    factor: float
    bias_factor: float


def quantise(
    plan: Plan, how: Sequence[Quantisation], parameters: Mapping[str, np.ndarray]
) -> Weights:
    """Round a network's real weights to the plan's integers.

    Args:
        plan, how: made for this network.
        parameters: real arrays by name, as `parameters_of` gives them.

    Raises: PlanError if a parameter is missing, not finite, or has another shape.
    """
    integers, biases = [], []
    for shape, known in zip(plan.weights, how, strict=True):
        array = parameters.get(known.parameter)
        if array is None or array.size != shape.elements:
            raise PlanError(
                f"{known.name}: the plan expects weights of shape {shape.shape}; make "
                "the plan from this network."
            )
        dtype = kernels.ring_dtype(shape.ring)
        real = np.asarray(array, dtype=np.float64).reshape(shape.shape)
        if not np.isfinite(real).all():
            raise PlanError(f"{known.name}: a weight is NaN or infinite.")
        whole = shape.arrange(np.rint(real * known.factor).astype(np.int64))
        integers.append(whole.astype(dtype))
        bias = None
        if known.bias:
            shift = np.asarray(parameters[known.bias], dtype=np.float64).reshape(-1)
            bias = np.rint(shift * known.bias_factor).astype(np.int64).astype(dtype)
        biases.append(bias)
    return Weights(plan.weights, tuple(integers), tuple(biases))
