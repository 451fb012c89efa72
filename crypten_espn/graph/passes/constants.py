"""Infer shapes; evaluate what depends on constants and static shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from ...errors import ConversionError
from ..network import ADAPTIVE_OP, NORM_OPS, POLYNOMIAL_OP, NetworkGraph, Node
from ..sizes import check_sizes, is_foldable

# Another value at every call; a constant would be one of them for ever.
_RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
# Ours has the shapes of ONNX's, with these attributes.
_RULES: dict[str, tuple[str, tuple[str, ...]]] = {
    POLYNOMIAL_OP: ("Relu", ()),
    ADAPTIVE_OP: ("AveragePool", ("kernel_shape", "pads", "strides")),
    **dict.fromkeys(NORM_OPS, ("Relu", ())),
}


def fold_constants(graph: NetworkGraph) -> None:
    """Infer shapes and types; evaluate nodes whose inputs are all known.

    A shape can hang on a constant and a constant on a shape, so the two alternate.

    Raises:
        ConversionError: a value, or all constants together, are out of proportion.
    """
    folded = 0
    for node in graph.each(*_RANDOM):
        node.problem = (
            "its values are drawn anew at every call; draw them once, and keep them as "
            "a buffer"
        )
    while True:
        # Values of shapes are followed only once all are known to be small.
        for values_too in (False, True):
            infer(graph, values_too=values_too)
            check_sizes(graph)
        count = len(graph.nodes)
        for node in graph.each():
            if node.op == "Shape" and node.inputs[0] in graph.shapes:
                a = node.attributes
                sizes = np.array(graph.shapes[node.inputs[0]], np.int64)
                values = [sizes[a.get("start", 0) : a.get("end", len(sizes))]]
            elif all(name in graph.constants or not name for name in node.inputs):
                if not is_foldable(graph, node):
                    continue
                values = evaluate(node, graph.constants, graph.opset)
            else:
                continue
            folded += sum(array.size for array in values)
            if folded > graph.room:
                raise ConversionError(
                    f"its constants are computed to more than {graph.room:,} elements; "
                    "store them, or compute fewer"
                )
            graph.constants.update(
                zip([node.output, *node.others], values, strict=True)
            )
            graph.remove(node)
        if len(graph.nodes) == count:
            return


def infer(graph: NetworkGraph, *, values_too: bool = True) -> None:
    """Fill in shapes and types that ONNX can tell.

    Args:
        values_too: follow the values of small integers as well, on which shapes hang;
            a vector that is doubled forty times is then written out.
    """
    protos, values, tensors = [], [], []
    for node in graph.nodes:
        if node.problem:
            continue
        op, attributes = node.op, dict(node.attributes)
        if op in _RULES:
            op, known = _RULES[op]
            attributes = {k: v for k, v in attributes.items() if k in known}
        protos.append(
            onnx.helper.make_node(
                op, node.inputs, [node.output, *node.others], **attributes
            )
        )
    for name, array in graph.constants.items():
        # Shapes hang on small integers only; weights need not be copied.
        if array.dtype == np.int64 and array.ndim <= 1:
            tensors.append(numpy_helper.from_array(array, name))
        else:
            values.append(_declared(name, array))
    values.append(
        onnx.helper.make_tensor_value_info(
            graph.input, graph.types[graph.input], graph.shapes[graph.input]
        )
    )
    output = onnx.helper.make_value_info(graph.output, onnx.TypeProto())
    proto = onnx.helper.make_graph(protos, "shapes", values, [output], tensors)
    model = onnx.helper.make_model(
        proto, opset_imports=[onnx.helper.make_opsetid("", graph.opset)]
    )
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=values_too).graph
    for value in [*inferred.value_info, *inferred.output]:
        tensor = value.type.tensor_type
        if tensor.elem_type:
            graph.types[value.name] = tensor.elem_type
        dims = tensor.shape.dim
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            graph.shapes[value.name] = tuple(d.dim_value for d in dims)


def evaluate(
    node: Node, values: Mapping[str, np.ndarray], opset: int
) -> list[np.ndarray]:
    """What one node gives for known inputs, by ONNX's own evaluator."""
    given = {name: np.asarray(values[name]) for name in node.inputs if name}
    names = [node.output, *node.others]
    proto = onnx.helper.make_node(node.op, node.inputs, names, **node.attributes)
    outputs = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in names]
    graph = onnx.helper.make_graph(
        [proto], "node", [_declared(*item) for item in given.items()], outputs
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)]
    )
    return [np.asarray(v) for v in ReferenceEvaluator(model).run(None, given)]


def _declared(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, array.shape)
