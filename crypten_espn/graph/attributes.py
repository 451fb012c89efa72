"""Every attribute of the operations that passes and builders know.

An attribute is read by whoever handles the operation, or makes no difference to
inference, or must have a value that ours agrees with. Whatever is none of these is
refused: a value nobody reads is a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .network import FLOATS, POLYNOMIAL_OP, NetworkGraph, Node

Rule = tuple[Callable[[Any], bool], str]

READ: Rule = (lambda value: True, "anything")
IGNORED: Rule = (lambda value: True, "anything, inference does not use it")


def _only(*values: object) -> Rule:
    allowed = " or ".join(
        str(v.decode() if isinstance(v, bytes) else v) for v in values
    )
    return (lambda value: value in values, allowed)


def _all(expected: int) -> Rule:
    return (lambda value: all(v == expected for v in value), f"{expected} everywhere")


_WINDOW = {"kernel_shape": READ, "pads": READ, "strides": READ}
_AUTO_PAD = _only(b"NOTSET", b"SAME_UPPER", b"SAME_LOWER", b"VALID")

ATTRIBUTES: dict[str, dict[str, Rule]] = {
    "AdaptiveAveragePool": {
        "kernel_shape": IGNORED,
        "output_size": READ,
        "pads": IGNORED,
        "strides": IGNORED,
    },
    "Add": {},
    "AveragePool": _WINDOW
    | {
        "auto_pad": _AUTO_PAD,
        "ceil_mode": READ,
        "count_include_pad": READ,
        "dilations": _all(1),
    },
    "BatchNormalization": {
        "epsilon": READ,
        "momentum": IGNORED,
        "spatial": _only(1),
        "training_mode": _only(0),
    },
    "Cast": {"to": READ, "saturate": IGNORED, "round_mode": IGNORED},
    "Concat": {"axis": READ},
    "Conv": _WINDOW | {"auto_pad": _AUTO_PAD, "dilations": READ, "group": READ},
    "ConvTranspose": _WINDOW
    | {
        "auto_pad": _AUTO_PAD,
        "dilations": READ,
        "group": READ,
        "output_padding": READ,
        "output_shape": READ,
    },
    "DepthToSpace": {"blocksize": READ, "mode": READ},
    "Div": {},
    "Dropout": {"ratio": IGNORED, "seed": IGNORED},
    "DropoutNd": {"ratio": IGNORED},
    "Expand": {},
    "Flatten": {"axis": READ},
    "Gather": {"axis": READ},
    "Gemm": {"alpha": READ, "beta": READ, "transA": _only(0), "transB": READ},
    "GlobalAveragePool": {},
    "Identity": {},
    "MatMul": {},
    "MaxPool": _WINDOW
    | {
        "auto_pad": _only(b"NOTSET", b"VALID"),
        "ceil_mode": READ,
        "dilations": _all(1),
        "storage_order": _only(0),
    },
    "Mul": {},
    "Neg": {},
    "Pad": {
        "mode": _only(b"constant", b"reflect", b"edge", b"wrap"),
        "pads": READ,
        "value": READ,
    },
    "ReduceMean": {"axes": READ, "keepdims": READ, "noop_with_empty_axes": READ},
    "ReduceSum": {"axes": READ, "keepdims": READ, "noop_with_empty_axes": READ},
    "Relu": {},
    "Reshape": {"allowzero": READ},
    "Slice": {"axes": READ, "ends": READ, "starts": READ},
    "Resize": {
        "antialias": READ,
        "axes": READ,
        "coordinate_transformation_mode": READ,
        "cubic_coeff_a": READ,
        "exclude_outside": READ,
        "extrapolation_value": READ,
        "keep_aspect_ratio_policy": READ,
        "mode": READ,
        "nearest_mode": READ,
    },
    "SpaceToDepth": {"blocksize": READ},
    "Split": {"axis": READ, "split": READ, "num_outputs": READ},
    "Squeeze": {"axes": READ},
    "Sub": {},
    "Tile": {},
    "Transpose": {"perm": READ},
    "Unsqueeze": {"axes": READ},
    POLYNOMIAL_OP: {
        "frac_bits": READ,
        "interval": READ,
        "numerators": READ,
        "polynomial": READ,
        "requested_degree": READ,
    },
}
# Operations whose result on integers is not that on reals.
_REAL = ("Add", "Div", "Gemm", "MatMul", "Mul", "Neg", "Sub")


def check_attributes(graph: NetworkGraph) -> None:
    """Give every node that says more than is read a problem that names it."""
    for node in graph.each(*ATTRIBUTES):
        node.problem = _problem(node, graph)


def _problem(node: Node, graph: NetworkGraph) -> str:
    rules = ATTRIBUTES[node.op]
    for name, value in node.attributes.items():
        shown = value.decode() if isinstance(value, bytes) else value
        if name not in rules:
            return (
                f"its attribute {name}={shown!r} is not known; known are "
                f"{', '.join(sorted(rules)) or 'none'}. Export the layer without it"
            )
        fits, allowed = rules[name]
        if not fits(value):
            return (
                f"{name}={shown!r}, and only {allowed} is supported; build the layer "
                "that way"
            )
    if node.op == "Dropout" and len(node.inputs) > 2:
        training = graph.constants.get(node.inputs[2])
        if training is None or np.any(training):
            return (
                "it drops values in evaluation too (training_mode); use a "
                "torch.nn.Dropout, which .eval() turns off"
            )
    types = [graph.types.get(name) for name in [*node.inputs, node.output]]
    if node.op in _REAL and any(t is not None and t not in FLOATS for t in types):
        return "it computes with integers; cast the input to float before the network"
    used = [name for name in node.others if name == graph.output or graph.users(name)]
    if used and node.op != "Split":
        return f"{1 + len(used)} of its outputs are used; use its first one only"
    return ""
