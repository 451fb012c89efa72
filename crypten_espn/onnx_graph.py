"""A network as a short list of nodes with constants, read from torch or ONNX.

`read` gives a `NetworkGraph`; its passes rewrite it in inference form: constants
folded, batch-norm folded into the layer before it, shapes resolved, pools and pads
explicit.
Nothing here knows about parties or shares.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from .errors import ConversionError, ShapeError

POLYNOMIAL_OP = "PolynomialActivation"
OPSET = 17


@dataclass
class Node:
    """One operation: `inputs` name values or constants, `output` names its value."""

    op: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass
class NetworkGraph:
    """Nodes in topological order, their constants, and every value's shape.

    Args:
        nodes: the operations.
        constants: name to array, weights included.
        shapes: name to shape, batch dimension first, for the example's batch.
        input, output: names of the network's one input and one output.
        changes: what the passes did, in words.
    """

    nodes: list[Node]
    constants: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    input: str
    output: str
    changes: list[str] = field(default_factory=list)

    def users(self, value: str) -> list[Node]:
        """The nodes that read a value."""
        return [node for node in self.nodes if value in node.inputs]

    def producer(self, value: str) -> Node | None:
        """The node that makes a value; None for the input and constants."""
        return next((node for node in self.nodes if node.output == value), None)

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a constant under a fresh name and return that name."""
        fresh = name
        while fresh in self.constants or fresh in self.shapes:
            fresh += "_"
        self.constants[fresh] = np.ascontiguousarray(value)
        return fresh

    def replace_value(self, old: str, new: str) -> None:
        """Let every reader of one value read another."""
        for node in self.nodes:
            node.inputs = [new if name == old else name for name in node.inputs]
        if self.output == old:
            self.output = new

    def simplify(self) -> None:
        """Run every pass, in the order each needs the one before."""
        for rewrite in _PASSES:
            rewrite(self)
        self._drop_unused()

    def _drop_unused(self) -> None:
        needed, kept = {self.output}, []
        for node in reversed(self.nodes):
            if node.output in needed:
                needed.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {k: v for k, v in self.constants.items() if k in needed}


def read(
    source: torch.nn.Module | str | Path | bytes, example: torch.Tensor
) -> NetworkGraph:
    """Read a torch module (traced in evaluation mode) or an ONNX file.

    Args:
        source: module, path of an .onnx file, or its bytes.
        example: one input batch; its shape fixes every other one.

    Returns:
        The graph before any pass.

    Raises:
        ConversionError: the module cannot be traced, or the file is not ONNX with one
            input and one output.
        ShapeError: the example does not have the file's input shape.
    """
    if isinstance(source, torch.nn.Module):
        model = onnx.load_model_from_string(export(source, example))
    else:
        model = _load(source)
    return _to_graph(model, tuple(example.shape))


def export(model: torch.nn.Module, example: torch.Tensor) -> bytes:
    """The ONNX bytes of a module in evaluation mode, polynomials kept whole.

    Raises:
        ConversionError: tracing failed; the message carries the cause.
    """
    was_training = model.training
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(),
                (example,),
                cast(Any, buffer),
                dynamo=False,
                opset_version=OPSET,
                do_constant_folding=True,
                # The mode is ours to keep: the exporter would fold batch-norm unasked.
                training=torch.onnx.TrainingMode.PRESERVE,
                input_names=["input"],
                output_names=["output"],
            )
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} could not be traced with an input of shape "
            f"{tuple(example.shape)}: {str(error).splitlines()[0][:300]}. Give an "
            "example the network accepts, and keep control flow that depends on the "
            "data out of forward()"
        ) from error
    finally:
        model.train(was_training)
    return buffer.getvalue()


def layer_name(node: Node) -> str:
    """The module path of a traced node: /layer1/0/conv1/Conv is layer1.0.conv1."""
    parts = [part for part in node.name.strip("/").split("/") if part]
    if parts and re.sub(r"_\d+$", "", parts[-1]) == node.op and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts) or node.output


def _load(source: str | Path | bytes) -> onnx.ModelProto:
    try:
        if isinstance(source, bytes):
            return onnx.load_model_from_string(source)
        return onnx.load(str(source))
    except FileNotFoundError as error:
        raise ConversionError(f"no file {str(source)!r}: give an .onnx file") from error
    except Exception as error:
        raise ConversionError(
            f"{str(source)[:80]!r} is not an ONNX model ({error}); export one with "
            "torch.onnx.export or pass the torch module itself"
        ) from error


def _to_graph(model: onnx.ModelProto, input_shape: tuple[int, ...]) -> NetworkGraph:
    proto = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in proto.initializer}
    inputs = [value for value in proto.input if value.name not in constants]
    if len(inputs) != 1 or len(proto.output) != 1:
        raise ConversionError(
            f"the network has {len(inputs)} inputs and {len(proto.output)} outputs; "
            "one of each is supported. Wrap it in a module of one tensor in, one out"
        )
    _check_input(inputs[0], input_shape)
    nodes = []
    for node in proto.node:
        if len(node.output) > 1 and any(node.output[1:]) and node.op_type != "Dropout":
            raise ConversionError(
                f"{node.name or node.op_type} has {len(node.output)} outputs, which is "
                "not supported; split the network there"
            )
        attributes = {
            a.name: onnx.helper.get_attribute_value(a) for a in node.attribute
        }
        given = list(node.input)
        while given and not given[-1]:
            given.pop()  # an optional input left out
        nodes.append(Node(node.op_type, given, node.output[0], attributes, node.name))
    shapes = {inputs[0].name: input_shape}
    return NetworkGraph(nodes, constants, shapes, inputs[0].name, proto.output[0].name)


def _check_input(value: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    declared = [
        d.dim_value if d.HasField("dim_value") else None
        for d in value.type.tensor_type.shape.dim
    ]
    fits = len(declared) == len(shape) and all(
        d is None or d == s for d, s in zip(declared[1:], shape[1:], strict=True)
    )
    if declared and not fits:
        raise ShapeError(
            f"the example has shape {shape}, the network wants "
            f"{tuple('batch' if i == 0 else d for i, d in enumerate(declared))}"
        )


# Passes. Each has one effect, and leaves the graph valid.


def _fold_constants(graph: NetworkGraph) -> None:
    """Infer shapes; evaluate what depends on constants and static shapes alone.

    A shape can hang on a constant and a constant on a shape, so the two alternate.
    """
    while True:
        graph.shapes.update(_infer_shapes(graph))
        kept = []
        for node in graph.nodes:
            if node.op == "Shape" and node.inputs[0] in graph.shapes:
                graph.constants[node.output] = np.array(graph.shapes[node.inputs[0]])
            elif all(name in graph.constants or not name for name in node.inputs):
                graph.constants[node.output] = _evaluate(node, graph.constants)
            else:
                kept.append(node)
        if len(kept) == len(graph.nodes):
            return
        graph.nodes = kept


def _infer_shapes(graph: NetworkGraph) -> dict[str, tuple[int, ...]]:
    """Shapes of all values that ONNX can tell; ours has the shape rule of Relu."""
    protos, values, tensors = [], [], []
    for node in graph.nodes:
        ours = node.op == POLYNOMIAL_OP
        protos.append(
            onnx.helper.make_node(
                "Relu" if ours else node.op,
                node.inputs,
                [node.output],
                **({} if ours else node.attributes),
            )
        )
    for name, array in graph.constants.items():
        # Shapes hang on small integers only; weights need not be copied.
        if array.dtype == np.int64 and array.ndim <= 1:
            tensors.append(numpy_helper.from_array(array, name))
        else:
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            values.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
    values.append(
        onnx.helper.make_tensor_value_info(
            graph.input, onnx.TensorProto.FLOAT, graph.shapes[graph.input]
        )
    )
    output = onnx.helper.make_value_info(graph.output, onnx.TypeProto())
    proto = onnx.helper.make_graph(protos, "shapes", values, [output], tensors)
    model = onnx.helper.make_model(
        proto, opset_imports=[onnx.helper.make_opsetid("", OPSET)]
    )
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in [*inferred.value_info, *inferred.output]
        if v.type.tensor_type.HasField("shape")
        and all(d.HasField("dim_value") for d in v.type.tensor_type.shape.dim)
    }


def _evaluate(node: Node, constants: dict[str, np.ndarray]) -> np.ndarray:
    given = {name: constants[name] for name in node.inputs if name}
    proto = onnx.helper.make_node(
        node.op, node.inputs, [node.output], **node.attributes
    )
    untyped = onnx.TypeProto()
    values = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in given.items()
    ]
    output = onnx.helper.make_value_info(node.output, untyped)
    graph = onnx.helper.make_graph([proto], "constant", values, [output])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)]
    )
    return np.asarray(ReferenceEvaluator(model).run(None, given)[0])


def _drop_identities(graph: NetworkGraph) -> None:
    """Remove what does nothing in inference."""
    for node in list(graph.nodes):
        alone = node.op == "Concat" and len(node.inputs) == 1
        if alone or node.op in ("Identity", "Dropout", "Cast"):
            graph.nodes.remove(node)
            graph.replace_value(node.output, node.inputs[0])


def _flatten_reshapes(graph: NetworkGraph) -> None:
    """Reshapes and squeezes that keep the batch become Flatten, for any batch."""
    for node in graph.nodes:
        if node.op in ("Reshape", "Squeeze"):
            before = graph.shapes.get(node.inputs[0], ())
            after = graph.shapes.get(node.output, ())
            if len(after) == 2 and before[:1] == after[:1]:
                node.op, node.inputs = "Flatten", node.inputs[:1]
                node.attributes = {"axis": 1}


def _means_to_pools(graph: NetworkGraph) -> None:
    """A mean over both image axes is a global average pool."""
    for node in list(graph.nodes):
        if node.op != "ReduceMean" or len(graph.shapes.get(node.inputs[0], ())) != 4:
            continue
        axes = node.attributes.get("axes")
        if axes is None and len(node.inputs) > 1:
            axes = graph.constants[node.inputs[1]].tolist()
        if sorted(a % 4 for a in axes or []) != [2, 3]:
            continue
        keep = node.attributes.get("keepdims", 1)
        node.op, node.inputs, node.attributes = (
            "GlobalAveragePool",
            node.inputs[:1],
            {},
        )
        if not keep:
            batch, channels = graph.shapes[node.inputs[0]][:2]
            pooled = node.output + "_pooled"
            flatten = Node("Flatten", [pooled], node.output, {"axis": 1}, node.name)
            graph.shapes[pooled] = (batch, channels, 1, 1)
            node.output = pooled
            graph.nodes.insert(graph.nodes.index(node) + 1, flatten)


def _linear_layers(graph: NetworkGraph) -> None:
    """MatMul and Gemm with constant weights become Gemm(x, W, b), W of (out, in)."""
    for node in list(graph.nodes):
        if node.op == "MatMul" and node.inputs[1] in graph.constants:
            weight = graph.constants[node.inputs[1]].T
            bias = np.zeros(len(weight), weight.dtype)
            adds = graph.users(node.output)
            other = [name for add in adds for name in add.inputs if name != node.output]
            if (
                len(adds) == 1
                and adds[0].op == "Add"
                and other[0] in graph.constants
                and graph.constants[other[0]].shape == bias.shape
                and node.output != graph.output
            ):
                bias = graph.constants[other[0]]
                graph.nodes.remove(adds[0])
                node.output = adds[0].output
        elif node.op == "Gemm" and node.inputs[1] in graph.constants:
            a = node.attributes
            weight = graph.constants[node.inputs[1]] * a.get("alpha", 1.0)
            weight = weight if a.get("transB", 0) else weight.T
            bias = np.zeros(len(weight), weight.dtype)
            if len(node.inputs) == 3:
                bias = bias + graph.constants[node.inputs[2]] * a.get("beta", 1.0)
        else:
            continue
        names = (
            graph.constant(node.output + "_weight", weight),
            graph.constant(node.output + "_bias", bias),
        )
        node.op, node.inputs = "Gemm", [node.inputs[0], *names]
        node.attributes = {"transB": 1}


def _convolutions(graph: NetworkGraph) -> None:
    """Every convolution gets a bias, explicit strides, dilations, groups and pads."""
    for node in graph.nodes:
        if node.op != "Conv" or node.inputs[1] not in graph.constants:
            continue
        weight = graph.constants[node.inputs[1]]
        dims = weight.ndim - 2
        a = node.attributes
        strides = list(a.get("strides", [1] * dims))
        dilations = list(a.get("dilations", [1] * dims))
        pads = list(a.get("pads", [0] * 2 * dims))
        auto = a.get("auto_pad", b"NOTSET")
        if auto in (b"SAME_UPPER", b"SAME_LOWER"):
            pads = _same_pads(graph, node, weight, strides, dilations, auto)
        node.attributes = {
            "strides": strides,
            "dilations": dilations,
            "pads": pads,
            "group": a.get("group", 1),
        }
        if len(node.inputs) == 2:
            bias = np.zeros(len(weight), weight.dtype)
            node.inputs.append(graph.constant(node.output + "_bias", bias))


def _same_pads(
    graph: NetworkGraph,
    node: Node,
    weight: np.ndarray,
    strides: list[int],
    dilations: list[int],
    auto: bytes,
) -> list[int]:
    before, after = [], []
    for i, size in enumerate(graph.shapes[node.inputs[0]][2:]):
        reach = dilations[i] * (weight.shape[2 + i] - 1) + 1
        total = max((math.ceil(size / strides[i]) - 1) * strides[i] + reach - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if auto == b"SAME_UPPER" else large)
        after.append(large if auto == b"SAME_UPPER" else small)
    return before + after


def _fold_batch_norms(graph: NetworkGraph) -> None:
    """Batch-norm goes into the layer before it, else becomes a layer of its own."""
    folded = alone = 0
    for node in list(graph.nodes):
        if node.op != "BatchNormalization":
            continue
        gamma, beta, mean, variance = (
            graph.constants[name].astype(np.float64) for name in node.inputs[1:5]
        )
        factor = gamma / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
        offset = beta - mean * factor
        before = graph.producer(node.inputs[0])
        if (
            before is not None
            and before.op in ("Conv", "Gemm")
            and len(graph.users(before.output)) == 1
            and before.output != graph.output
        ):
            weight, bias = (graph.constants[name] for name in before.inputs[1:3])
            shape = (-1,) + (1,) * (weight.ndim - 1)
            new_weight = (weight * factor.reshape(shape)).astype(weight.dtype)
            new_bias = (bias * factor + offset).astype(bias.dtype)
            before.inputs[1:3] = [
                graph.constant(before.output + "_folded_weight", new_weight),
                graph.constant(before.output + "_folded_bias", new_bias),
            ]
            before.output = node.output
            graph.nodes.remove(node)
            folded += 1
        else:
            _norm_to_layer(graph, node, factor, offset)
            alone += 1
    if folded:
        graph.changes.append(f"{folded} batch-norms folded into the layer before")
    if alone:
        graph.changes.append(f"{alone} batch-norms turned into depthwise layers")


def _norm_to_layer(
    graph: NetworkGraph, node: Node, factor: np.ndarray, offset: np.ndarray
) -> None:
    channels = len(factor)
    dims = len(graph.shapes[node.inputs[0]]) - 2
    if dims == 0:
        node.op, weight, node.attributes = "Gemm", np.diag(factor), {"transB": 1}
    else:
        node.op, weight = "Conv", factor.reshape((channels, 1) + (1,) * dims)
        node.attributes = {
            "strides": [1] * dims,
            "dilations": [1] * dims,
            "pads": [0] * 2 * dims,
            "group": channels,
        }
    node.inputs = [
        node.inputs[0],
        graph.constant(node.output + "_weight", weight.astype(np.float32)),
        graph.constant(node.output + "_bias", offset.astype(np.float32)),
    ]


def _explicit_pads(graph: NetworkGraph) -> None:
    """Pads that differ between the two sides become a Pad node in torch's order."""
    for node in list(graph.nodes):
        if node.op == "Pad":
            _normalise_pad(graph, node)
        elif node.op == "Conv":
            pads = node.attributes["pads"]
            half = len(pads) // 2
            if pads[:half] == pads[half:]:
                continue
            shape = graph.shapes[node.inputs[0]]
            padded = node.output + "_padded"
            graph.shapes[padded] = shape[:2] + tuple(
                s + pads[i] + pads[half + i] for i, s in enumerate(shape[2:])
            )
            sides = [
                p for i in reversed(range(half)) for p in (pads[i], pads[half + i])
            ]
            index = graph.nodes.index(node)
            graph.nodes.insert(
                index, Node("Pad", [node.inputs[0]], padded, {"pads": sides}, node.name)
            )
            node.inputs[0] = padded
            node.attributes["pads"] = [0] * 2 * half


def _normalise_pad(graph: NetworkGraph, node: Node) -> None:
    if "pads" in node.attributes and len(node.inputs) == 1:
        pads = [int(p) for p in node.attributes["pads"]]
    elif all(name in graph.constants for name in node.inputs[1:]):
        pads = [int(p) for p in graph.constants[node.inputs[1]]]
    else:
        return
    value = graph.constants[node.inputs[2]] if len(node.inputs) > 2 else 0
    if node.attributes.get("mode", b"constant") != b"constant" or np.any(value):
        return
    half = len(pads) // 2
    sides = [p for i in reversed(range(half)) for p in (pads[i], pads[half + i])]
    while len(sides) >= 2 and sides[-2:] == [0, 0]:
        sides = sides[:-2]
    node.inputs, node.attributes = node.inputs[:1], {"pads": sides}


def _uniform_pools(graph: NetworkGraph) -> None:
    """Average pools with whole windows; borders that count fewer get a Scale node."""
    for node in list(graph.nodes):
        known = graph.shapes.keys() >= {node.output, *node.inputs}
        if node.op != "AveragePool" or "uniform" in node.attributes or not known:
            continue
        a = node.attributes
        kernel = list(a["kernel_shape"])
        strides = list(a.get("strides", [1] * len(kernel)))
        pads = list(a.get("pads", [0] * 2 * len(kernel)))
        include = bool(a.get("count_include_pad", 0))
        size = graph.shapes[node.inputs[0]][2:]
        out = graph.shapes[node.output][2:]
        half = len(kernel)
        # What ceil_mode adds beyond the declared pads never counts.
        extra = [
            max(
                (out[i] - 1) * strides[i]
                + kernel[i]
                - size[i]
                - pads[i]
                - pads[half + i],
                0,
            )
            for i in range(half)
        ]
        # torch drops a last window that starts beyond the image; ONNX keeps it.
        if any((out[i] - 1) * strides[i] >= size[i] + pads[i] for i in range(half)):
            continue
        counts = _window_counts(size, kernel, strides, pads, out, include)
        sides = [
            p
            for i in reversed(range(half))
            for p in (pads[i], pads[half + i] + extra[i])
        ]
        node.attributes = {"kernel_shape": kernel, "strides": strides, "uniform": 1}
        index = graph.nodes.index(node)
        if any(sides):
            padded = node.output + "_padded"
            graph.shapes[padded] = graph.shapes[node.inputs[0]][:2] + tuple(
                s + pads[i] + pads[half + i] + extra[i] for i, s in enumerate(size)
            )
            graph.nodes.insert(
                index, Node("Pad", [node.inputs[0]], padded, {"pads": sides}, node.name)
            )
            node.inputs[0] = padded
            index += 1
        full = math.prod(kernel)
        if np.any(counts != full):
            pooled = node.output + "_pooled"
            graph.shapes[pooled] = graph.shapes[node.output]
            scale = Node(
                "Scale",
                [pooled],
                node.output,
                {"factor": (full / counts).tolist()},
                node.name,
            )
            node.output = pooled
            graph.nodes.insert(index + 1, scale)


def _window_counts(
    size: tuple[int, ...],
    kernel: list[int],
    strides: list[int],
    pads: list[int],
    out: tuple[int, ...],
    include: bool,
) -> np.ndarray:
    """How many elements each output position of an average pool divides by."""
    counts = np.ones(())
    half = len(kernel)
    for i in range(half):
        low, high = (-pads[i], size[i] + pads[half + i]) if include else (0, size[i])
        starts = np.arange(out[i]) * strides[i] - pads[i]
        inside = np.minimum(starts + kernel[i], high) - np.maximum(starts, low)
        counts = np.multiply.outer(counts, inside)
    return counts


_PASSES: tuple[Callable[[NetworkGraph], None], ...] = (
    _fold_constants,
    _drop_identities,
    _flatten_reshapes,
    _means_to_pools,
    _linear_layers,
    _convolutions,
    _fold_batch_norms,
    _explicit_pads,
    _uniform_pools,
)
