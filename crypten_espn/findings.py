"""What stops a network from being converted, or slows it down, and the cure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import POLYNOMIAL_OP, NetworkGraph, Node, layer_name
from .graph.passes.activations import NAMED, UNNAMED

FIXABLE = "fixable"
NOT_YET = "not yet supported"
NEVER = "never"

LINEAR = (
    "Add",
    "AveragePool",
    "Concat",
    "Conv",
    "Flatten",
    "Gemm",
    "GlobalAveragePool",
    "Pad",
    "Scale",
    POLYNOMIAL_OP,
)
# Operations that CrypTen evaluates with comparisons: correct, several rounds each.
BY_COMPARISON = ("MaxPool", "Relu")

# torch's module for each of ONNX's activations.
_MODULES = {
    "Celu": "CELU",
    "Elu": "ELU",
    "Gelu": "GELU",
    "HardSigmoid": "Hardsigmoid",
    "HardSwish": "Hardswish",
    "LeakyRelu": "LeakyReLU",
    "Mish": "Mish",
    "PRelu": "PReLU",
    "Relu": "ReLU",
    "Selu": "SELU",
    "Softplus": "Softplus",
    "Softsign": "Softsign",
    "ThresholdedRelu": "Threshold",
} | {name: name.split("(")[0] for name in NAMED if name != "Square"}
_AS_POLYNOMIAL = (
    "compute it by espn.PolynomialActivation(espn.Polynomial.fit(f, degree=4)), where "
    "f is this function of one value"
)

_CURES: dict[str, tuple[str, str]] = {
    "Square": (
        FIXABLE,
        "espn.PolynomialActivation(espn.Polynomial((0, 0, 1), 0, (-5.0, 5.0))) is "
        "this square exactly",
    ),
    UNNAMED: (FIXABLE, _AS_POLYNOMIAL),
    "MaxPool": (FIXABLE, "replace_pooling(model)"),
    "Softmax": (FIXABLE, "drop the last softmax: the client applies it to the logits"),
    "LogSoftmax": (
        FIXABLE,
        "drop the last log-softmax: the client applies it to the logits",
    ),
    "ArgMax": (FIXABLE, "return the logits: the client takes the argmax"),
    "BatchNormalization": (
        FIXABLE,
        "it normalises by the batch's own statistics; build it with "
        "track_running_stats=True and train it",
    ),
    "MatMul": (NOT_YET, "a product of two private values; use torch.nn.Linear"),
    "Mul": (NOT_YET, "a product of two private values; add them, or use one of them"),
    "Div": (NOT_YET, "division by a private value; divide by a constant"),
    "LSTM": (NOT_YET, "recurrent layers are not supported; use convolutions over time"),
    "GRU": (NOT_YET, "recurrent layers are not supported; use convolutions over time"),
    "RNN": (NOT_YET, "recurrent layers are not supported; use convolutions over time"),
    "InstanceNormalization": (
        FIXABLE,
        "it divides by a private deviation; use torch.nn.BatchNorm2d, and train it",
    ),
    "LayerNormalization": (
        FIXABLE,
        "it divides by a private deviation; use torch.nn.BatchNorm, and train it",
    ),
    "NonZero": (NEVER, "its output shape would reveal the data"),
    "Unique": (NEVER, "its output shape would reveal the data"),
    "NonMaxSuppression": (NEVER, "its output shape would reveal the data"),
    "If": (NEVER, "a branch taken on private data would reveal it"),
    "Loop": (NEVER, "a loop that ends on private data would reveal it"),
    "Scan": (NEVER, "a loop over private data is not supported; write its steps out"),
} | {
    operation: (
        FIXABLE,
        f"replace_activations(model, {{torch.nn.{module}: polynomial}}); where a "
        f"forward writes it out, call torch.nn.{module}() there first",
    )
    for operation, module in _MODULES.items()
}
_OTHERWISE = (
    NOT_YET,
    "write the layer with convolutions, linear layers, average pools and additions",
)
_FUNCTIONS = ("Abs", "Clip", "Erf", "Exp", "Log", "Pow", "Sqrt", "Reciprocal")


@dataclass(frozen=True)
class Finding:
    """One layer that needs attention.

    Args:
        layer: its module path or ONNX name.
        operation: the ONNX operation.
        verdict: "fixable", "not yet supported" or "never".
        blocking: whether `convert` refuses the network because of it.
        cure: what to do.
    """

    layer: str
    operation: str
    verdict: str
    blocking: bool
    cure: str

    def __str__(self) -> str:
        weight = "stops conversion" if self.blocking else "works, but slowly"
        return f"{self.layer} ({self.operation}): {self.verdict}, {weight}; {self.cure}"


@dataclass(frozen=True)
class Report:
    """All findings about a network at once, and what conversion would do to it.

    Attributes:
        findings: layers that need attention.
        changes: what conversion does, in words.
        layers: how many of each operation.
        masked: why the masked engine cannot run the network; None if it can.
    """

    findings: tuple[Finding, ...]
    changes: tuple[str, ...]
    layers: dict[str, int]
    masked: str | None

    @property
    def ok(self) -> bool:
        """Whether `convert` accepts the network."""
        return not any(finding.blocking for finding in self.findings)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {op}" for op, n in sorted(self.layers.items()))
        lines = [f"layers: {counts}", *self.changes]
        lines += [str(finding) for finding in self.findings]
        lines.append("can be converted" if self.ok else "cannot be converted as it is")
        if self.ok:
            lines.append(f"masked engine: {self.masked or 'runs it'}")
        return "\n".join(lines)


def report(graph: NetworkGraph) -> Report:
    """Every layer of a simplified graph that is refused, or slow."""
    findings: list[Finding] = []
    layers: dict[str, int] = {}
    for node in graph.nodes:
        layers[node.op] = layers.get(node.op, 0) + 1
        problem = node.problem or _problem(node, graph)
        if not problem and node.op in LINEAR:
            continue
        verdict, cure = _CURES.get(node.op, _OTHERWISE)
        if node.op in _FUNCTIONS:
            verdict, cure = FIXABLE, _AS_POLYNOMIAL
        if problem:
            verdict = verdict if verdict == NEVER else NOT_YET
            cure = problem
        blocking = bool(problem) or node.op not in BY_COMPARISON
        findings.append(Finding(layer_name(node), node.op, verdict, blocking, cure))
    return Report(tuple(findings), tuple(graph.changes), layers, "not planned")


def _problem(node: Node, graph: NetworkGraph) -> str:
    """Why a node of a supported kind cannot be built all the same."""
    a = node.attributes
    shape = graph.shapes.get(node.inputs[0], ()) if node.inputs else ()
    rank = len(shape)
    if node.op in ("Conv", "Gemm"):
        if len(node.inputs) != 3 or any(
            name not in graph.constants for name in node.inputs[1:]
        ):
            return "its weights are computed at run time; make them constants"
        if not all(
            np.isfinite(graph.constants[name]).all() for name in node.inputs[1:]
        ):
            return "its weights are not finite numbers; train the network again"
        if node.op == "Conv" and graph.constants[node.inputs[1]].ndim != 4:
            return (
                "only two-dimensional convolutions are supported; unsqueeze the input"
            )
    elif any(name in graph.constants for name in node.inputs) and node.op in LINEAR:
        return "one of its inputs is a constant; only in Add, Sub, Mul, Div and Concat"
    if node.op == "Pad" and (len(node.inputs) != 1 or rank != 4):
        return "only images are padded, with constants; use torch.nn.ZeroPad2d"
    if node.op == "Flatten" and a.get("axis", 1) % max(rank, 2) != 1:
        return "flatten must keep the batch: torch.flatten(x, 1)"
    if node.op == "Concat" and (not rank or a.get("axis", 0) % rank == 0):
        return "the batch cannot be concatenated; concatenate channels (dim=1)"
    if node.op in ("AveragePool", "MaxPool") and len(a["kernel_shape"]) != 2:
        return "only two-dimensional pools are supported; unsqueeze the input"
    if node.op == "GlobalAveragePool" and rank != 4:
        return "only two-dimensional pools are supported; unsqueeze the input"
    if node.op == "MaxPool" and len(set(a.get("pads", [0]))) != 1:
        return (
            f"pads {a['pads']}: CrypTen pads rows and columns alike; use one padding "
            "for all sides, or replace_pooling(model)"
        )
    return ""
