"""The exporter writes the example's batch size into reshapes and expansions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from .patch import Patch, replace

# Operations of CrypTen's own, whose output has their input's shape.
_SHAPELESS = ("DropoutNd", "PolynomialActivation")
_ELEMENTWISE = ("Add", "Div", "Mul", "Sub")


def _any_batch(model: ModelProto) -> ModelProto:
    """A copy in which what keeps the batch does so for every size of it.

    1. A reshape that keeps the first dimension takes -1 there.
    2. An expansion takes 1, which keeps what the input has.
    3. A constant of one row for each input of the batch, all alike, keeps one.
    """
    result = ModelProto()
    result.CopyFrom(model)
    shapes = _shapes(model)
    names = {t.name for t in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in names]
    batch = shapes.get(inputs[0], [0])[0] if inputs else 0
    if not batch or any(_moves_batch(node) for node in model.graph.node):
        return result
    constants = _constants(model)
    fixed_names = set(constants)
    for node in model.graph.node:
        if all(name in fixed_names for name in node.input):
            fixed_names.update(node.output)
    for node in list(result.graph.node):
        before = shapes.get(node.input[0], []) if node.input else []
        after = shapes.get(node.output[0], [])
        keeps = before[:1] == after[:1] == [batch]
        fixed = len(node.input) == 2 and node.input[1] in fixed_names
        if node.op_type == "Reshape" and keeps and fixed:
            _set_input(result, node, 1, np.array([-1, *after[1:]], np.int64))
        elif node.op_type == "Expand" and keeps and fixed:
            _set_input(result, node, 1, np.array([1, *after[1:]], np.int64))
        elif node.op_type in _ELEMENTWISE and after[:1] == [batch]:
            for place, name in enumerate(node.input):
                array = constants.get(name)
                if (
                    array is not None
                    and array.ndim == len(after)
                    and len(array) == batch > 1
                    and np.all(array == array[:1])
                ):
                    _set_input(result, node, place, array[:1])
    return result


def _moves_batch(node: onnx.NodeProto) -> bool:
    return node.op_type == "Transpose" and any(
        a.name == "perm" and a.ints[0] != 0 for a in node.attribute
    )


def _shapes(model: ModelProto) -> dict[str, list[int]]:
    """Every shape that ONNX can tell."""
    known = ModelProto()
    known.CopyFrom(model)
    for node in known.graph.node:
        if node.op_type in _SHAPELESS:
            node.op_type, node.domain = "Relu", ""
            del node.attribute[:]
            del node.output[1:]
    graph = onnx.shape_inference.infer_shapes(known, data_prop=True).graph
    return {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.value_info, *graph.output]
        if all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
    }


def _constants(model: ModelProto) -> dict[str, np.ndarray]:
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def _set_input(
    model: ModelProto, node: onnx.NodeProto, place: int, value: np.ndarray
) -> None:
    """Let one input of a node be a constant, by a node before it."""
    name = f"{node.output[0]}_any_batch_{place}"
    constant = onnx.helper.make_node(
        "Constant", [], [name], value=numpy_helper.from_array(value, name)
    )
    node.input[place] = name
    model.graph.node.insert(0, constant)


def _probe() -> bool:
    from crypten.nn import onnx_converter

    return not getattr(onnx_converter._load_onnx_model, "takes_any_batch", False)


def _install() -> Callable[[], None]:
    from crypten.nn import onnx_converter

    stock = onnx_converter._load_onnx_model

    def load(onnx_string_or_file: Any) -> ModelProto:
        return _any_batch(stock(onnx_string_or_file))

    load.takes_any_batch = True  # type: ignore[attr-defined]
    return replace(onnx_converter, "_load_onnx_model", load)


PATCH = Patch(
    name="any_batch",
    broke="crypten.nn.from_pytorch(net, x[:1]) with y.view(y.size(0), -1): the batch "
    "of one is written into the network, and four inputs give one row",
    seen_on="torch 2.13.0 with crypten 0.4.1",
    delete_when="CrypTen exports the batch as a dynamic axis and its modules follow it",
    probe=_probe,
    install=_install,
)
