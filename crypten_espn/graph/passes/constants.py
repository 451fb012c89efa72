"""Infer shapes; evaluate what depends on constants and static shapes alone."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from ..network import OPSET, POLYNOMIAL_OP, NetworkGraph, Node


def fold_constants(graph: NetworkGraph) -> None:
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
