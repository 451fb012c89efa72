"""What one private inference of a network has to compute.

Weights do not matter to it, so they are set to zero and every network has a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..convert import PrivateNetwork
from ..errors import ConversionError, EspnError, PlanError, ShapeError
from ..graph import POLYNOMIAL_OP, NetworkGraph, layer_name, read, simplify
from ..masked.plan import Plan
from ..masked.planning import make_plan
from ..nn import PolynomialActivation
from ..pillar.networks import NETWORKS
from ..pillar.storage import BUNDLED, load_network, network_file
from ..polynomial import Polynomial

ALIASES = {"minionn": "mini_onn"}
_LINEAR = ("Conv", "Gemm")
_LOCAL = (
    "Add", "AveragePool", "GlobalAveragePool", "Flatten", "Concat", "Pad", "Scale",
)  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """A layer with secret weights; elements of one input image.

    Args:
        name: the layer.
        inputs, weights, outputs: ring elements.
        macs: multiply-accumulates.
    """

    name: str
    inputs: int
    weights: int
    outputs: int
    macs: int


@dataclass(frozen=True)
class Nonlinear:
    """An activation of `elements` values of one image."""

    name: str
    elements: int
    polynomial: Polynomial


@dataclass(frozen=True)
class Workload:
    """What one private inference of a network has to compute.

    Args:
        name: of the network.
        input_shape: of one image, without the batch.
        logits: elements of the result.
        linear, nonlinear: the layers that cost something.
        plan: the masked engine's; its scales are those of zero weights.
        unplanned: why there is no plan; None if there is one.
    """

    name: str
    input_shape: tuple[int, ...]
    logits: int
    linear: tuple[Linear, ...]
    nonlinear: tuple[Nonlinear, ...]
    plan: Plan | None
    unplanned: str | None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(layer.macs for layer in self.linear)

    @property
    def activations(self) -> int:
        """Activations of one image."""
        return sum(layer.elements for layer in self.nonlinear)


def workload(
    network: str,
    *,
    input_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    degree: int = 4,
    precision: str = "fast",
) -> Workload:
    """Read a network by name or file and count what it computes.

    1. Build or load it; in inference form, batch-norm folded.
    2. Put a polynomial of this degree where it has a ReLU.
    3. Set its weights to zero and plan it: the plan's bytes hang on shapes,
       polynomials and ring alone.

    Args:
        network: one of pillar.networks, or a .safetensors or .onnx file.
        input_shape: (channels, height, width); the network's own when None. An .onnx
            file needs it, a .safetensors file brings it.
        classes: of a network given by name.
        degree: of the polynomials in place of ReLU.
        precision: as `masked.planning.make_plan`.

    Raises:
        EspnError: unknown network, or options that it does not take.
        ShapeError: the network does not take this shape.
        ConversionError: a layer whose cost is not known here.
    """
    model, shape = _model(network, input_shape, classes)
    example = torch.zeros(1, *shape)
    graph = read(model, example)
    simplify(graph)
    relu = Polynomial.fit(torch.relu, degree=degree, frac_bits=10)
    _without_relu(graph, relu)
    linear = tuple(_linear_layers(graph))
    nonlinear = tuple(
        Nonlinear(
            layer_name(node),
            _elements(graph, node.output),
            PolynomialActivation.from_onnx(node.attributes).polynomial,
        )
        for node in graph.nodes
        if node.op == POLYNOMIAL_OP
    )
    plan, unplanned = None, None
    for node in graph.nodes:
        if node.op in _LINEAR:
            for name in node.inputs[1:]:
                graph.constants[name] = np.zeros_like(graph.constants[name])
    try:
        private = PrivateNetwork(graph, example=example, engine=None)
        plan, _ = make_plan(private, example, precision=precision)
    except PlanError as error:
        unplanned = str(error)
    logits = _elements(graph, graph.output)
    return Workload(network, shape, logits, linear, nonlinear, plan, unplanned)


def _model(
    network: str, shape: tuple[int, ...] | None, classes: int | None
) -> tuple[torch.nn.Module | Path, tuple[int, ...]]:
    path = network_file(network)
    if path.suffix in (".onnx", ".safetensors"):
        if classes is not None:
            raise EspnError(
                f"--classes {classes}: {path.name} fixes its classes; leave it out"
            )
        if path.suffix == ".onnx":
            if shape is None:
                raise EspnError(
                    f"{path.name} needs --shape, one input without the batch, such as "
                    "--shape 3,224,224"
                )
            return path, shape
        loaded = load_network(path)
        if shape not in (None, loaded.input_shape):
            raise ShapeError(
                f"--shape {shape}: {path.name} takes {loaded.input_shape}; leave it out"
            )
        return loaded.eval(), loaded.input_shape
    build = NETWORKS.get(ALIASES.get(network, network))
    if build is None:
        raise EspnError(
            f"network {network!r}: give one of {', '.join([*ALIASES, *NETWORKS])}; "
            f"bundled are {', '.join(BUNDLED)}; or "
            "give a file that ends in .safetensors or .onnx"
        )
    options = {} if classes is None else {"classes": classes}
    if shape is not None:
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ShapeError(
                f"--shape {shape}: {network} takes channels and a square image, such "
                "as 3,32,32; export other shapes to .onnx"
            )
        options |= {"in_channels": shape[0], "size": shape[1]}
    built = build(**options)
    return built.eval(), built.input_shape


def _without_relu(graph: NetworkGraph, polynomial: Polynomial) -> None:
    """Replace ReLU by the polynomial; refuse what has no known cost, all at once."""
    known = (*_LINEAR, *_LOCAL, POLYNOMIAL_OP, "Relu")
    unknown = sorted({node.op for node in graph.nodes if node.op not in known})
    if unknown:
        raise ConversionError(
            f"the cost of {', '.join(unknown)} is not known; `crypten-espn check` "
            "names each layer with its cure, such as replace_pooling for max-pools"
        )
    for node in graph.nodes:
        if node.op == "Relu":
            node.op = POLYNOMIAL_OP
            node.attributes = {
                "numerators": list(polynomial.numerators),
                "frac_bits": polynomial.frac_bits,
                "interval": list(polynomial.interval),
            }


def _linear_layers(graph: NetworkGraph) -> Iterator[Linear]:
    for node in graph.nodes:
        if node.op in _LINEAR:
            weight = graph.constants[node.inputs[1]]
            outputs = _elements(graph, node.output)
            yield Linear(
                layer_name(node),
                _elements(graph, node.inputs[0]),
                weight.size,
                outputs,
                outputs * weight.size // weight.shape[0],
            )


def _elements(graph: NetworkGraph, value: str) -> int:
    return math.prod(graph.shapes[value][1:])
