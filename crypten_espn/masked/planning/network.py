"""A converted network as the planner sees it: layers, float arithmetic, cuts."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...errors import PlanError
from ...polynomial import Polynomial
from .layers import RESCALED, Layer, layer_title, naming
from .precision import Effect
from .reading import read_layer


def parameters_of(graph: Any) -> dict[str, np.ndarray]:
    """The real parameters of a converted, unencrypted crypten.nn.Graph, by name.

    Raises: PlanError if the network is encrypted.
    """
    found = {}
    for name, module in graph._modules.items():
        if type(module).__name__ in ("Parameter", "Constant"):
            data = getattr(module, "data", None)
            if data is None:
                data = module.value
            if not torch.is_tensor(data):
                raise PlanError(
                    f"{name} is encrypted; plan the network before .encrypt(), on the "
                    "party that owns the weights."
                )
            found[name] = data.detach().cpu().numpy()
    return found


class Network:
    """A crypten.nn.Graph as layers in the order they are computed.

    Raises: PlanError naming the layer that the masked engine does not compute.
    """

    def __init__(self, graph: Any) -> None:
        self.parameters = parameters_of(graph)
        self._tensors: dict[str, torch.Tensor] = {}
        self.layers: dict[str, Layer] = {}
        for what, names in (
            ("inputs", graph.input_names),
            ("outputs", graph.output_names),
        ):
            if len(names) != 1:
                raise PlanError(
                    f"A network of {len(names)} {what}; the masked engine takes "
                    "networks of one input and one output."
                )
        self.input = graph.input_names[0]
        self.output = graph.output_names[0]
        self.order = self._sorted(graph)
        for name in self.order:
            layer = read_layer(
                name, graph._modules[name], list(graph._graph[name]), self.parameters
            )
            layer.inputs = [self._same(value) for value in layer.inputs]
            self.layers[name] = layer
        self.output = self._same(self.output)
        if self.output != self.input and self.output not in self.layers:
            raise PlanError(
                f"The output {self.output} is a constant; a network of its input is "
                "needed."
            )
        self._drop_unused()

    def _sorted(self, graph: Any) -> list[str]:
        done = {self.input, *self.parameters}
        waiting = [name for name in graph._graph if name not in done]
        order: list[str] = []
        while waiting:
            ready = [n for n in waiting if all(i in done for i in graph._graph[n])]
            if not ready:
                raise PlanError(f"{layer_title(waiting[0])}: its input is missing.")
            order += ready
            done.update(ready)
            waiting = [name for name in waiting if name not in done]
        return order

    def _same(self, name: str) -> str:
        while name in self.layers and self.layers[name].kind == "same":
            name = self.layers[name].inputs[0]
        return name

    def _drop_unused(self) -> None:
        """What no output depends on costs nothing and is not planned."""
        needed = {self.output}
        for name in reversed(self.order):
            if name in needed:
                needed.update(self.layers[name].inputs)
        self.order = [
            n for n in self.order if n in needed and self.layers[n].kind != "same"
        ]

    # -- in float64

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter in float64, the same tensor each time."""
        if name not in self._tensors:
            array = np.array(self.parameters[name], dtype=np.float64)
            self._tensors[name] = torch.from_numpy(array)
        return self._tensors[name]

    def compute(self, layer: Layer, inputs: list[torch.Tensor]) -> torch.Tensor:
        """A layer's value in the type of its inputs, float64 but for estimates.

        Raises: PlanError with the layer's name if its inputs' shapes do not fit it.
        """
        with naming(layer.title):
            return self._compute(layer, inputs)

    def run(self, x: torch.Tensor, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        """Values by name in float64, of inputs (batch, *input_shape)."""
        kept = {*wanted}
        values = {self.input: x.detach().cpu().double()}
        last = {n: name for name in self.order for n in self.layers[name].inputs}
        with torch.no_grad():
            for name in self.order:
                layer = self.layers[name]
                values[name] = self.compute(layer, [values[i] for i in layer.inputs])
                for used in set(layer.inputs) - kept:
                    if last[used] == name:
                        del values[used]
        return {name: values[name] for name in kept}

    def _compute(self, layer: Layer, inputs: list[torch.Tensor]) -> torch.Tensor:
        function = torch.nn.functional
        x = inputs[0]
        shape = tuple(x.shape[1:])
        bias = self.tensor(layer.bias).to(x).reshape(-1) if layer.bias else None
        if layer.kind == "gemm":
            if x.dim() != 2:
                raise layer.refused(
                    f"a linear layer on values of {x.dim()} dimensions; flatten them "
                    "first, or use a 1x1 convolution."
                )
            return function.linear(x, self.tensor(layer.weight).to(x), bias)
        if layer.kind == "activation":
            assert layer.polynomial is not None
            coeffs = layer.polynomial.coeffs
            y = torch.full_like(x, coeffs[-1])
            for coefficient in coeffs[-2::-1]:
                y = y * x + coefficient
            return y
        if layer.kind == "add":
            shapes = [tuple(value.shape[1:]) for value in inputs]
            if shapes[0] != shapes[1]:
                raise layer.refused(
                    f"an addition of values of shapes {shapes[0]} and {shapes[1]}; the "
                    "masked engine adds values of one shape. Bring both to one shape "
                    "before."
                )
            return inputs[0] + inputs[1]
        if layer.kind == "concat":
            if layer.axis not in (1, 1 - x.dim()):
                raise layer.refused(
                    f"a concatenation along axis {layer.axis} of {x.dim()}; only "
                    "channels (axis 1) can be concatenated."
                )
            return torch.cat(inputs, 1)
        if layer.kind == "flatten":
            return self._flatten(layer, x)
        channels, height, width = layer.image(shape)
        if layer.kind == "conv":
            assert layer.windows is not None
            here = layer.windows
            return function.conv2d(
                _padded(x, here.pads),
                self.tensor(layer.weight).to(x),
                bias,
                here.stride,
                0,
                here.dilation,
                here.groups,
            )
        if layer.kind == "pad":
            assert layer.windows is not None
            return _padded(x, layer.windows.pads)
        if layer.kind == "scale":
            assert layer.factors is not None
            factors = layer.factors
            if factors.integers.shape != (height, width):
                raise layer.refused(
                    f"factors of shape {factors.integers.shape} on images of "
                    f"{height}x{width}."
                )
            return x * torch.from_numpy(factors.integers / factors.divisor)
        assert layer.kind == "pool" and channels
        here = layer.pool_windows(shape)
        return function.avg_pool2d(_padded(x, here.pads), here.kernel, here.stride)

    def _flatten(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        count = math.prod(x.shape[1:])
        # A batch that was written down stands for any batch.
        as_rows = layer.target is None or (
            len(layer.target) == 2
            and (layer.target[1] == count or layer.target == (len(x), -1))
        )
        if not as_rows:
            raise layer.refused(
                f"a reshape of {tuple(x.shape)} to {layer.target}; the masked engine "
                f"flattens to (batch, {count})."
            )
        return x.reshape(len(x), -1)

    # -- cutting into linear parts

    @property
    def ends(self) -> list[str]:
        """Names of the values that end the linear parts, the output last."""
        layers = [self.layers[name] for name in self.order]
        ends = [layer.inputs[0] for layer in layers if layer.kind == "activation"]
        return [*ends, self.output]

    def cut(self) -> None:
        """Insert a rescaling where a weight would meet another with no opening between.

        A value that depends on weights may end a segment, or be read once by another
        operation that needs none. Any other reader gets it through an identity
        polynomial, which is an activation like any other.
        """
        readers: dict[str, list[str]] = {}
        for name in self.order:
            for value in self.layers[name].inputs:
                readers.setdefault(value, []).append(name)
        weighted: dict[str, bool] = {self.input: False}
        rescaled: dict[str, str] = {}
        order: list[str] = []
        for name in self.order:
            layer = self.layers[name]
            if layer.kind != "activation":
                for index, value in enumerate(layer.inputs):
                    needs = layer.weighted or len(readers[value]) > 1
                    if weighted[value] and needs:
                        layer.inputs[index] = self._rescale(value, rescaled, order)
            order.append(name)
            weighted[name] = layer.weighted or (
                layer.kind != "activation"
                and any(weighted.get(value, False) for value in layer.inputs)
            )
        self.order = order

    def _rescale(self, value: str, rescaled: dict[str, str], order: list[str]) -> str:
        if value not in rescaled:
            before = self.layers[value]
            name = value + RESCALED
            rounding = np.array([before.effect.rounding, 0.0, 0.0])
            self.layers[name] = replace(
                Layer(name, "activation", [value]),
                shape=before.shape,
                largest=before.largest,
                mean_square=before.mean_square,
                polynomial=Polynomial((0, 1), 0, (-1.0, 1.0)),
                effect=Effect(rounding, np.zeros((2, 2))),
            )
            rescaled[value] = name
            order.append(name)
        return rescaled[value]

    def hwc(self, name: str) -> tuple[int, ...]:
        shape = self.layers[name].shape
        if len(shape) == 3:
            return (shape[1], shape[2], shape[0])
        if len(shape) == 1:
            return shape
        raise self.layers[name].refused(
            f"values of {len(shape) + 1} dimensions; the masked engine takes (batch, "
            "channels, height, width) and (batch, features)."
        )


def _padded(x: torch.Tensor, pads: tuple[int, int, int, int]) -> torch.Tensor:
    top, left, bottom, right = pads
    return torch.nn.functional.pad(x, (left, right, top, bottom))
