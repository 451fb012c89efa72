"""What one private inference of a network has to compute.

Weights do not matter to it, so they are set to zero and every network has a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..convert import PrivateNetwork
from ..errors import ConversionError, EspnError, PlanError, ShapeError
from ..graph import POLYNOMIAL_OP, NetworkGraph, read, simplify
from ..layers import KINDS
from ..layers.compared import Relu
from ..masked.plan import Plan
from ..masked.planning import make_plan
from ..pillar.networks import NETWORKS
from ..pillar.storage import BUNDLED, load_network, network_file
from ..polynomial import Polynomial
from .counts import Counts, Linear, Multiplied, Nonlinear

ALIASES = {"minionn": "mini_onn"}


@dataclass(frozen=True)
class Workload:
    """What one private inference of a network has to compute.

    Args:
        name: of the network.
        input_shape: of one image, without the batch.
        logits: elements of the result.
        linear, nonlinear, products: the layers that cost something.
        plan: the masked engine's; its scales are those of zero weights.
        unplanned: why there is no plan; None if there is one.
    """

    name: str
    input_shape: tuple[int, ...]
    logits: int
    linear: tuple[Linear, ...]
    nonlinear: tuple[Nonlinear, ...]
    products: tuple[Multiplied, ...]
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
    for name, array in graph.constants.items():
        graph.constants[name] = np.zeros_like(array)
    private = PrivateNetwork(graph, example=example, engine=None)
    counts = Counts()
    logits = counts.run(graph, private.layers)
    plan, unplanned = None, None
    try:
        plan, _ = make_plan(private, example, precision=precision)
    except PlanError as error:
        unplanned = str(error)
    return Workload(
        network,
        shape,
        logits,
        tuple(counts.linear),
        tuple(counts.nonlinear),
        tuple(counts.products),
        plan,
        unplanned,
    )


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
    known = {op for op, kind in KINDS.items() if not kind.compares} | {Relu.op}
    unknown = sorted({node.op for node in graph.nodes} - known)
    if unknown:
        raise ConversionError(
            f"the cost of {', '.join(unknown)} is not known; `crypten-espn check` "
            "names each layer with its cure, such as replace_pooling for max-pools"
        )
    for node in graph.nodes:
        if node.op == Relu.op:
            node.op = POLYNOMIAL_OP
            node.attributes = {
                "numerators": list(polynomial.numerators),
                "frac_bits": polynomial.frac_bits,
                "interval": list(polynomial.interval),
            }
