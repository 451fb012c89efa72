"""From a torch module or an ONNX file to a CrypTen graph: `check` and `convert`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import crypten
import crypten.communicator as comm
import numpy as np
import torch
from crypten.nn import module as crypten_nn

from .errors import (
    ConversionError,
    PlanError,
    ProtocolError,
    ShapeError,
    WorldSizeError,
)
from .graph import POLYNOMIAL_OP, NetworkGraph, Node, layer_name, read, simplify
from .masked.composed import ComposedEngine
from .masked.plan import quantise
from .masked.planner import make_plan, parameters_of
from .nn import PolynomialActivation, Scale
from .protocols import PROTOCOLS, current_settings, settings

Source = torch.nn.Module | str | Path | bytes

MASKED = "masked"

FIXABLE = "fixable"
NOT_YET = "not yet supported"
NEVER = "never"

# What stops a conversion, or makes it slow, and what to do about it.
_CURES: dict[str, tuple[str, str]] = {
    "Relu": (FIXABLE, "replace_activations(model, {torch.nn.ReLU: polynomial})"),
    "Clip": (FIXABLE, "replace_activations(model, {torch.nn.ReLU6: polynomial})"),
    "Sigmoid": (FIXABLE, "replace_activations(model, {torch.nn.Sigmoid: polynomial})"),
    "Tanh": (FIXABLE, "replace_activations(model, {torch.nn.Tanh: polynomial})"),
    "HardSwish": (
        FIXABLE,
        "replace_activations(model, {torch.nn.Hardswish: polynomial})",
    ),
    "HardSigmoid": (
        FIXABLE,
        "replace_activations(model, {torch.nn.Hardsigmoid: polynomial})",
    ),
    "LeakyRelu": (
        FIXABLE,
        "replace_activations(model, {torch.nn.LeakyReLU: polynomial})",
    ),
    "Erf": (FIXABLE, "replace_activations(model, {torch.nn.GELU: polynomial})"),
    "Elu": (FIXABLE, "replace_activations(model, {torch.nn.ELU: polynomial})"),
    "MaxPool": (FIXABLE, "replace_pooling(model)"),
    "Softmax": (FIXABLE, "drop the last softmax: the client applies it to the logits"),
    "LogSoftmax": (
        FIXABLE,
        "drop the last log-softmax: the client applies it to the logits",
    ),
    "ArgMax": (FIXABLE, "return the logits: the client takes the argmax"),
    "NonZero": (NEVER, "its output shape would reveal the data"),
    "NonMaxSuppression": (NEVER, "its output shape would reveal the data"),
    "If": (NEVER, "a branch taken on private data would reveal it"),
    "Loop": (NEVER, "a loop that ends on private data would reveal it"),
}
# Operations that CrypTen evaluates with comparisons: correct, several rounds each.
_BY_COMPARISON = {
    "Relu": lambda node, graph: crypten_nn.ReLU(),
    "MaxPool": lambda node, graph: _max_pool(node),
}


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


class PrivateNetwork(crypten_nn.Graph):
    """A converted network: a crypten.nn.Graph that checks before it computes.

    Attributes:
        changes: what the conversion did, in words.
        input_shape: shape of one input, without the batch.
        example: the inputs it was converted with; they calibrate the masked engine.
        protocol, truncation: what its activations use; None follows crypten.cfg.espn.
    """

    encrypted: bool

    def __init__(
        self,
        graph: NetworkGraph,
        *,
        example: torch.Tensor,
        protocol: str | None,
        truncation: str | None,
    ) -> None:
        super().__init__([graph.input], [graph.output])
        self.changes = tuple(graph.changes)
        self.input_shape = graph.shapes[graph.input][1:]
        self.example = example.detach().clone()
        self.protocol = protocol
        self.truncation = truncation
        self._engine: ComposedEngine | None = None
        for name, array in graph.constants.items():
            tensor = torch.from_numpy(np.array(array, dtype=np.float32))
            self.add_module(name, crypten_nn.Parameter(tensor), [])
        for node in graph.nodes:
            module = _BUILDERS[node.op](node, graph)
            if isinstance(module, PolynomialActivation):
                module.protocol = None if protocol == MASKED else protocol
                module.truncation = truncation
            self.add_module(node.output, module, list(node.inputs))
        self.eval()

    def encrypt(self, mode: bool = True, src: int = 0) -> PrivateNetwork:
        """Share the weights, or with protocol "masked" hide them behind masks.

        The masked engine keeps rank 0's weights where they are and opens them under a
        mask; rank 1's copy of them is not used. For CrypTen's protocols weights are
        rounded first, see `nearest`.

        Args:
            mode: False undoes it.
            src: the owner of the weights; 0 for the masked engine.

        Raises:
            ProtocolError: another owner with protocol "masked".
            PlanError: the network has no plan; the layer is named.
            WorldSizeError: the masked engine needs two parties.
        """
        if self.protocol != MASKED:
            if mode and not self.encrypted:
                frac_bits = crypten.cfg.encoder.precision_bits
                for module in self._modules.values():
                    if isinstance(module, crypten_nn.Parameter):
                        rounded = nearest(module.data, frac_bits=frac_bits)
                        module.set_parameter("data", rounded)
            return super().encrypt(mode=mode, src=src)
        if src != 0:
            raise ProtocolError(
                f"src={src}: with protocol 'masked' rank 0 owns the weights; start the "
                "owner as rank 0"
            )
        self._engine = None
        if mode:
            if not comm.is_initialized():
                raise WorldSizeError(
                    "encrypt() needs two running parties: call crypten.init() in each, "
                    "or start them with run_multiprocess"
                )
            plan = weights = None
            if comm.get().get_rank() == 0:
                plan = make_plan(self, self.example)
                weights = quantise(plan, parameters_of(self))
            self._engine = ComposedEngine(plan, weights)
        self.encrypted = mode
        return self

    def prepare(self, count: int, *, batch: int) -> None:
        """The masked engine's offline phase for `count` calls with `batch` inputs.

        Raises:
            ProtocolError: not converted with protocol "masked", or not encrypted.
        """
        if self._engine is None:
            raise ProtocolError(
                "prepare() belongs to a network converted with protocol='masked' and "
                "encrypted; for others trace CrypTen's provider and fill its cache"
            )
        self._engine.prepare(count, batch=batch)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse an input that is not (batch, *input_shape).

        Raises:
            ShapeError: with both shapes and the cure.
        """
        if shape[1:] != self.input_shape or len(shape) != len(self.input_shape) + 1:
            raise ShapeError(
                f"the input has shape {shape}, the network takes "
                f"(batch, {', '.join(map(str, self.input_shape))}); reshape or resize "
                "the input, or convert again with an example of the right size"
            )

    def forward(self, x: Any) -> Any:
        """Logits for a batch, encrypted once `.encrypt(src=0)` was called.

        Raises:
            ShapeError: the input is not (batch, *input_shape).
            WorldSizeError: the protocol does not run with this many parties.
            ProtocolError: plain tensors with protocol "masked".
            All before anything is sent.
        """
        self.check_shape(tuple(x.size()))
        if self.protocol == MASKED:
            if self._engine is None:
                raise ProtocolError(
                    "a network converted with protocol='masked' takes CrypTen tensors "
                    "after .encrypt(src=0); for plain tensors use simulate()"
                )
            return self._engine(x)
        with settings(protocol=self.protocol, truncation=self.truncation) as chosen:
            world_size = comm.get().get_world_size() if comm.is_initialized() else 0
            if world_size and not chosen.protocol.accepts(world_size):
                raise WorldSizeError(
                    f"{world_size} parties run a network converted for protocol "
                    f"{chosen.protocol.name!r}, which takes "
                    f"{chosen.protocol.world_sizes}; start two parties or convert with "
                    "protocol='opened_mask'"
                )
            return super().forward(x)


def nearest(values: torch.Tensor, *, frac_bits: int) -> torch.Tensor:
    """The nearest multiples of 2**-frac_bits; halves go to the even one.

    CrypTen's encoder rounds toward zero, which makes every weight a little too small.
    It keeps what this returns as it is, so that weights err to both sides and half as
    far: at 12 bits most of a network's error is that.

    Args:
        values: float tensor, any shape.
        frac_bits: fractional bits of the encoder.

    Returns:
        Tensor of the same shape and type, detached from any graph.
    """
    rounded = torch.round(values.detach() * 2.0**frac_bits) * 2.0**-frac_bits
    return rounded.requires_grad_(values.requires_grad)


def check(model: Source, example: torch.Tensor) -> Report:
    """Name every problem of a network at once, with its cure. Nothing is changed.

    Args:
        model: torch module, path of an .onnx file, or its bytes.
        example: one input batch.

    Raises:
        ConversionError: it cannot be traced or read at all.
        ShapeError: the example does not fit the network.
    """
    graph = read(model, example)
    simplify(graph)
    return _report(graph, example)


def convert(
    model: Source,
    example: torch.Tensor,
    *,
    protocol: str | None = None,
    truncation: str | None = None,
) -> PrivateNetwork:
    """Make a network private: fold, rewrite, and build its CrypTen graph.

    1. Trace the module in evaluation mode, or read the ONNX file.
    2. Fold constants and batch-norm; make pads and pool borders explicit.
    3. Refuse, naming every unsupported layer at once, or build the graph.

    Args:
        model: torch module (its own weights are not touched), .onnx path, or bytes.
        example: one input batch; fixes the input shape, not the batch size. With
            protocol "masked" it also bounds every layer: give real inputs.
        protocol: "espn", "opened_mask", "beaver" or "masked". When None,
            crypten.cfg.espn decides for CrypTen tensors, and sessions use the masked
            engine.
        truncation: "local" or "exact"; likewise. The masked engine is always exact.

    Returns:
        A PrivateNetwork in evaluation mode, ready for `.encrypt(src=0)`; `.changes`
        says what was done.

    Raises:
        ConversionError: unsupported layers, all of them listed.
        ShapeError: the example does not fit the network.
        ProtocolError: an unknown protocol or truncation.
        PlanError: protocol "masked", and no plan exists; the layer is named.
    """
    if protocol not in (None, MASKED, *PROTOCOLS):
        raise ProtocolError(
            f"protocol {protocol!r}: choose one of {', '.join([*PROTOCOLS, MASKED])}"
        )
    with settings(truncation=truncation):
        current_settings()
    graph = read(model, example)
    simplify(graph)
    report = _findings(graph)
    if not report.ok:
        problems = [str(finding) for finding in report.findings if finding.blocking]
        raise ConversionError(
            f"{len(problems)} layers cannot be converted:\n  " + "\n  ".join(problems)
        )
    private = PrivateNetwork(
        graph, example=example, protocol=protocol, truncation=truncation
    )
    if protocol == MASKED:
        make_plan(private, example)
    return private


def _report(graph: NetworkGraph, example: torch.Tensor) -> Report:
    report = _findings(graph)
    if not report.ok:
        return report
    private = PrivateNetwork(graph, example=example, protocol=None, truncation=None)
    try:
        make_plan(private, example)
    except PlanError as error:
        return replace(report, masked=str(error))
    return replace(report, masked=None)


def _findings(graph: NetworkGraph) -> Report:
    findings: list[Finding] = []
    layers: dict[str, int] = {}
    for node in graph.nodes:
        layers[node.op] = layers.get(node.op, 0) + 1
        problem = _problem(node, graph)
        if node.op in _BUILDERS and problem is None and node.op not in _BY_COMPARISON:
            continue
        verdict, cure = _CURES.get(
            node.op, (NOT_YET, "replace the layer by convolutions, pools and additions")
        )
        if problem is not None:
            verdict, cure = NOT_YET, problem
        blocking = node.op not in _BUILDERS or problem is not None
        findings.append(Finding(layer_name(node), node.op, verdict, blocking, cure))
    return Report(tuple(findings), tuple(graph.changes), layers, "not planned")


def _problem(node: Node, graph: NetworkGraph) -> str | None:
    """Why a node of a supported kind cannot be built all the same."""
    if node.op in ("Conv", "Gemm"):
        if any(name not in graph.constants for name in node.inputs[1:]):
            return "its weights are computed at run time; make them constants"
        if node.op == "Conv" and graph.constants[node.inputs[1]].ndim != 4:
            return (
                "only two-dimensional convolutions are supported; unsqueeze the input"
            )
    if node.op == "Pad" and len(node.inputs) != 1:
        return "only constant padding with zeros is supported; use torch.nn.ZeroPad2d"
    if node.op == "Flatten" and node.attributes.get("axis", 1) != 1:
        return "flatten must keep the batch: torch.flatten(x, 1)"
    if node.op == "Concat" and node.attributes.get("axis") == 0:
        return "the batch cannot be concatenated; concatenate channels (dim=1)"
    if node.op == "AveragePool" and len(node.attributes["kernel_shape"]) != 2:
        return "only two-dimensional pools are supported; unsqueeze the input"
    if node.op == "AveragePool" and "uniform" not in node.attributes:
        return "its windows are not known or leave the image; use ceil_mode=False"
    return None


def _max_pool(node: Node) -> crypten_nn.MaxPool2d:
    a = node.attributes
    pads = a.get("pads", [0, 0, 0, 0])
    return crypten_nn.MaxPool2d(
        tuple(a["kernel_shape"]),
        stride=tuple(a.get("strides", [1, 1])),
        padding=tuple(pads[:2]),
        ceil_mode=bool(a.get("ceil_mode", 0)),
    )


def _convolution(node: Node, graph: NetworkGraph) -> crypten_nn.Conv:
    a = node.attributes
    half = len(a["pads"]) // 2
    return crypten_nn.Conv(
        a["strides"], a["pads"][:half], a["dilations"], groups=a["group"]
    )


_BUILDERS: dict[str, Callable[[Node, NetworkGraph], crypten_nn.Module]] = {
    "Conv": _convolution,
    "Gemm": lambda node, graph: crypten_nn.Gemm(trans_b=True),
    POLYNOMIAL_OP: lambda node, graph: PolynomialActivation.from_onnx(node.attributes),
    "Add": lambda node, graph: crypten_nn.Add(),
    "AveragePool": lambda node, graph: crypten_nn.AvgPool2d(
        tuple(node.attributes["kernel_shape"]), stride=tuple(node.attributes["strides"])
    ),
    "GlobalAveragePool": lambda node, graph: crypten_nn.GlobalAveragePool(),
    "Flatten": lambda node, graph: crypten_nn.Flatten(1),
    "Concat": lambda node, graph: crypten_nn.Concat(node.attributes["axis"]),
    "Pad": lambda node, graph: crypten_nn.ConstantPad2d(
        tuple(node.attributes["pads"]), 0
    ),
    "Scale": lambda node, graph: Scale(torch.tensor(node.attributes["factor"])),
    **_BY_COMPARISON,
}
