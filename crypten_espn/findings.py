"""What stops a network from being converted, or slows it down, and the cure."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import EspnError
from .graph import NetworkGraph, Node, layer_name
from .graph.passes.activations import NAMED, UNNAMED
from .graph.passes.moves import MOVERS
from .layers import KINDS, Kind
from .masked.planning.tails import IMAGES, Tails

FIXABLE = "fixable"
NOT_YET = "not yet supported"
NEVER = "never"

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
} | {name: name.split("(")[0] for name in NAMED}
_AS_POLYNOMIAL = (
    "compute it by espn.PolynomialActivation(espn.Polynomial.fit(f, degree=4)), where "
    "f is this function of one value"
)

_NORM = (
    FIXABLE,
    "it divides by the deviation of private values; put torch.nn.BatchNorm1d or "
    "BatchNorm2d in its place, which is folded, and train (docs/conversion.md)",
)
_CURES: dict[str, tuple[str, str]] = {
    UNNAMED: (FIXABLE, _AS_POLYNOMIAL),
    "MaxPool": (FIXABLE, "replace_pooling(model)"),
    "Softmax": (
        FIXABLE,
        "drop the last softmax: the client applies it to the logits. Inside a network "
        "it divides by a private sum: take a polynomial of each score, and train",
    ),
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
    "Div": (NOT_YET, "division by a private value; divide by a constant"),
    "LSTM": (NOT_YET, "recurrent layers are not supported; use convolutions over time"),
    "GRU": (NOT_YET, "recurrent layers are not supported; use convolutions over time"),
    "RNN": (NOT_YET, "recurrent layers are not supported; use convolutions over time"),
    "GroupNormalization": _NORM,
    "InstanceNormalization": _NORM,
    "LayerNormalization": _NORM,
    "RMSNormalization": _NORM,
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
_NO_STRESS = (
    "stress: not run; check it on two real inputs or more, of which the first "
    f"{IMAGES} are corrupted"
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
        tails: what the plan makes of corrupted images; None if there is no plan, or
            fewer than two images.
        widened: the masked engine's ring, where the network needs a wider one than
            "fast" has, and why.
    """

    findings: tuple[Finding, ...]
    changes: tuple[str, ...]
    layers: dict[str, int]
    masked: str | None
    tails: Tails | None = None
    widened: str = ""

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
            words = f"runs it, in {self.widened}" if self.widened else "runs it"
            lines.append(f"masked engine: {self.masked or words}")
            if self.masked is None:
                lines.append(str(self.tails or _NO_STRESS))
        return "\n".join(lines)


def report(graph: NetworkGraph) -> Report:
    """Every layer of a simplified graph that is refused, or slow."""
    findings: list[Finding] = []
    layers: dict[str, int] = {}
    for node in graph.nodes:
        layers[node.op] = layers.get(node.op, 0) + 1
        kind = KINDS.get(node.op)
        problem = node.problem or (_problem(kind, node, graph) if kind else "")
        if kind and not kind.compares and not problem:
            continue
        verdict, cure = _CURES.get(node.op, _OTHERWISE)
        if node.op in _FUNCTIONS:
            verdict, cure = FIXABLE, _AS_POLYNOMIAL
        if problem:
            verdict = verdict if verdict == NEVER else NOT_YET
            cure = problem
        blocking = bool(problem) or kind is None
        findings.append(Finding(layer_name(node), node.op, verdict, blocking, cure))
    # Batches are moved to where a layer wants them that is refused itself.
    others = [finding for finding in findings if finding.operation not in MOVERS]
    if any(finding.blocking for finding in others):
        findings = others
    return Report(tuple(findings), tuple(graph.changes), layers, "not planned")


def _problem(kind: type[Kind], node: Node, graph: NetworkGraph) -> str:
    """Why a node of a known kind cannot be built all the same."""
    try:
        problem = kind.problem(node, graph)
        if not problem and kind.read(node) is None:
            return "it says more than its layer computes; write it in another way"
    except EspnError as error:
        return str(error)
    return problem
