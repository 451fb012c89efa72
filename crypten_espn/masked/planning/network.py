"""A converted network as the planner sees it: layers, float arithmetic, cuts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...errors import PlanError
from ...polynomial import Polynomial
from .precision import NO_EFFECT, Effect

RESCALED = ":rescaled"


@dataclass
class Layer:
    """A node of the converted network, and what calibration says of its result.

    Attributes:
        largest, mean_square: of the result.
        effect: of errors of the result, as a function of an activation's input.
        weight_effect: the outputs' mean square error when every weight is off by 1,
            its sign random.
    """

    name: str
    kind: str
    inputs: list[str]
    shape: tuple[int, ...] = ()
    weight: str = ""
    bias: str = ""
    module: Any = None
    polynomial: Polynomial | None = None
    largest: float = 0.0
    mean_square: float = 0.0
    effect: Effect = NO_EFFECT
    weight_effect: float = 0.0


_KINDS = {
    "Conv": "conv",
    "Conv2d": "conv",
    "Gemm": "gemm",
    "Linear": "gemm",
    "PolynomialActivation": "activation",
    "Add": "add",
    "AvgPool2d": "pool",
    "GlobalAveragePool": "global_pool",
    "AdaptiveAvgPool2d": "adaptive_pool",
    "Flatten": "flatten",
    "Reshape": "flatten",
    "Concat": "concat",
    "ConstantPad2d": "pad",
    "_ConstantPad": "pad",
    "Dropout": "same",
    "Identity": "same",
}


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


def pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        items = tuple(int(v) for v in value)
        return (items[0], items[0]) if len(items) == 1 else (items[0], items[1])
    return int(value), int(value)


def pads_of(value: Any) -> tuple[int, int, int, int]:
    if isinstance(value, (tuple, list)) and len(value) == 4:
        return tuple(int(v) for v in value)  # type: ignore[return-value]
    top, left = pair(value)
    return top, left, top, left


def last_pads(value: Any) -> tuple[int, int, int, int]:
    """torch's (left, right, top, bottom) as (top, left, bottom, right)."""
    items = [int(v) for v in value] + [0] * (4 - len(value))
    left, right, top, bottom = items[:4]
    return top, left, bottom, right


def layer_title(name: str) -> str:
    """A readable layer name from an exporter's value name.

    /stages/stages.0/stages.0.0/relu1/Op_output_0 is stages.0.0.relu1.
    """
    if name.endswith(RESCALED):
        return f"{layer_title(name.removesuffix(RESCALED))} (rescaled)"
    parts = [part for part in name.replace("_output_0", "").split("/") if part]
    parts = parts[:-1] if len(parts) > 1 else parts
    kept = [
        part
        for part, after in zip(parts, [*parts[1:], ""], strict=True)
        if not after.startswith(part + ".")
    ]
    return ".".join(kept) or name


class Network:
    """A crypten.nn.Graph as layers in the order they are computed."""

    def __init__(self, graph: Any) -> None:
        self.parameters = parameters_of(graph)
        self._tensors: dict[str, torch.Tensor] = {}
        self.layers: dict[str, Layer] = {}
        if len(graph.input_names) != 1 or len(graph.output_names) != 1:
            raise PlanError("The masked engine takes networks of one input and output.")
        self.input = graph.input_names[0]
        self.output = graph.output_names[0]
        self.order = self._sorted(graph)
        for name in self.order:
            self._read(name, graph._modules[name], list(graph._graph[name]))
        self.output = self._same(self.output)

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

    def _read(self, name: str, module: Any, inputs: list[str]) -> None:
        title = type(module).__name__
        kind = _KINDS.get(title)
        if kind is None:
            raise PlanError(
                f"{layer_title(name)}: {title} is not supported by the masked engine. "
                'Convert with protocol="espn", or replace the layer by convolutions, '
                "pools, additions and polynomial activations."
            )
        constants = [i for i in inputs if i in self.parameters]
        values = [self._same(i) for i in inputs if i not in self.parameters]
        layer = Layer(name, kind, values, module=module)
        if kind in ("conv", "gemm"):
            if len(values) != 1 or not 1 <= len(constants) <= 2:
                raise PlanError(f"{layer_title(name)}: weights must be constants.")
            layer.weight = constants[0]
            layer.bias = constants[1] if len(constants) == 2 else ""
        elif kind == "activation":
            layer.polynomial = module.polynomial
        elif kind == "add" and constants:
            raise PlanError(f"{layer_title(name)}: adding a constant is not supported.")
        self.layers[name] = layer

    # -- in float64

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter in float64, the same tensor each time."""
        if name not in self._tensors:
            array = np.array(self.parameters[name], dtype=np.float64)
            self._tensors[name] = torch.from_numpy(array)
        return self._tensors[name]

    def compute(self, layer: Layer, inputs: list[torch.Tensor]) -> torch.Tensor:
        function = torch.nn.functional
        x = inputs[0]
        bias = self.tensor(layer.bias).reshape(-1) if layer.bias else None
        if layer.kind == "conv":
            top, left, bottom, right = pads_of(layer.module.padding)
            return function.conv2d(
                function.pad(x, (left, right, top, bottom)),
                self.tensor(layer.weight),
                bias,
                pair(layer.module.stride),
                0,
                pair(layer.module.dilation),
                int(layer.module.groups),
            )
        if layer.kind == "gemm":
            return function.linear(x, self.matrix(layer), bias)
        if layer.kind == "activation":
            assert layer.polynomial is not None
            coeffs = layer.polynomial.coeffs
            y = torch.full_like(x, coeffs[-1])
            for coefficient in coeffs[-2::-1]:
                y = y * x + coefficient
            return y
        if layer.kind == "add":
            return inputs[0] + inputs[1]
        if layer.kind == "concat":
            if layer.module.dimension not in (1, 1 - x.dim()):
                raise PlanError(
                    f"{layer_title(layer.name)}: only channels can be concatenated."
                )
            return torch.cat(inputs, 1)
        if layer.kind == "flatten":
            return x.reshape(len(x), -1)
        if layer.kind == "pad":
            top, left, bottom, right = last_pads(layer.module.padding)
            return function.pad(x, (left, right, top, bottom))
        kernel, stride, pads = self.pool(layer, tuple(x.shape[1:]))
        top, left, bottom, right = pads
        padded = function.pad(x, (left, right, top, bottom))
        return function.avg_pool2d(padded, kernel, stride)

    def matrix(self, layer: Layer) -> torch.Tensor:
        matrix = self.tensor(layer.weight)
        module = layer.module
        if type(module).__name__ == "Gemm":
            if (
                float(module.alpha) != 1.0
                or float(module.beta) != 1.0
                or module.trans_a
            ):
                raise PlanError(f"{layer_title(layer.name)}: Gemm with factors.")
            return matrix if module.trans_b else matrix.T
        return matrix

    def pool(
        self, layer: Layer, shape: tuple[int, ...]
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]:
        height, width = shape[1:]
        if layer.kind == "global_pool":
            return (height, width), (1, 1), (0, 0, 0, 0)
        if layer.kind == "adaptive_pool":
            rows, columns = pair(layer.module.output_size)
            if height % rows or width % columns:
                raise PlanError(
                    f"{layer_title(layer.name)}: adaptive pooling from "
                    f"{height}x{width} to {rows}x{columns} has uneven windows."
                )
            kernel = (height // rows, width // columns)
            return kernel, kernel, (0, 0, 0, 0)
        module = layer.module
        kernel = pair(module.kernel_size)
        stride = pair(module.kernel_size if module.stride is None else module.stride)
        if getattr(module, "ceil_mode", False) and any(
            (size - k) % s
            for size, k, s in zip((height, width), kernel, stride, strict=True)
        ):
            raise PlanError(f"{layer_title(layer.name)}: ceil_mode pads unevenly.")
        return kernel, stride, pads_of(module.padding)

    # -- cutting into linear parts

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
            if layer.kind == "same":
                continue
            if layer.kind != "activation":
                for index, value in enumerate(layer.inputs):
                    needs = layer.kind in ("conv", "gemm") or len(readers[value]) > 1
                    if weighted[value] and needs:
                        layer.inputs[index] = self._rescale(value, rescaled, order)
            order.append(name)
            weighted[name] = layer.kind in ("conv", "gemm") or (
                layer.kind != "activation"
                and any(weighted.get(value, False) for value in layer.inputs)
            )
        self.order = order

    def _rescale(self, value: str, rescaled: dict[str, str], order: list[str]) -> str:
        if value not in rescaled:
            before = self.layers[value]
            name = value + RESCALED
            self.layers[name] = replace(
                before,
                name=name,
                kind="activation",
                inputs=[value],
                weight="",
                bias="",
                polynomial=Polynomial((0, 1), 0, (-1.0, 1.0)),
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
        raise PlanError(
            f"{layer_title(name)}: values of {len(shape) + 1} dimensions; the masked "
            "engine takes (batch, channels, height, width) and (batch, features)."
        )
