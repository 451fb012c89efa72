"""From a torch module or an ONNX file to a graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper

from ..errors import ConversionError, ShapeError
from .network import NetworkGraph, Node
from .trace import export


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
