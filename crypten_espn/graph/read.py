"""From a torch module or an ONNX file to a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from ..errors import ConversionError, EspnError, ShapeError
from .external import load_external
from .network import OWN_OPS, NetworkGraph, Node
from .sizes import room
from .trace import export

# Below, broadcasts and batch-norm meant something else; above, we have not looked.
OPSETS = range(7, min(onnx.defs.onnx_opset_version(), 25) + 1)
_DOMAINS = ("", "ai.onnx")


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
            input and one output, of an operation set that is known; its names are not
            each made once, before they are read; or its weights lie outside its folder.
        ShapeError: the example does not have the file's input shape.
    """
    if isinstance(source, torch.nn.Module):
        model = onnx.load_model_from_string(export(source, example))
    else:
        model = _load(source)
    try:
        return _to_graph(model, tuple(example.shape))
    except EspnError:
        raise
    except Exception as error:
        raise ConversionError(
            f"the ONNX model is damaged or holds what is not known "
            f"({type(error).__name__}: {error}); check it with onnx.checker"
        ) from error


def _load(source: str | Path | bytes) -> onnx.ModelProto:
    try:
        if isinstance(source, bytes):
            model = onnx.load_model_from_string(source)
            folder = None
        else:
            model = onnx.load(str(source), load_external_data=False)
            folder = Path(source).parent
        load_external(model, folder)
        return model
    except EspnError:
        raise
    except FileNotFoundError as error:
        raise ConversionError(f"no file {str(source)!r}: give an .onnx file") from error
    except Exception as error:
        raise ConversionError(
            f"{str(source)[:80]!r} is not an ONNX model ({error}); export one with "
            "torch.onnx.export or pass the torch module itself"
        ) from error


def _to_graph(model: onnx.ModelProto, input_shape: tuple[int, ...]) -> NetworkGraph:
    proto = model.graph
    overriding = [f.name for f in model.functions if f.domain in _DOMAINS]
    if overriding:
        raise ConversionError(
            f"the file defines {', '.join(overriding)[:80]} anew, which is ONNX's own; "
            "export it without functions"
        )
    constants = {t.name: _array(t) for t in proto.initializer}
    if proto.sparse_initializer:
        raise ConversionError("the file has sparse weights; store them densely")
    inputs = [value for value in proto.input if value.name not in constants]
    if len(inputs) != 1 or len(proto.output) != 1:
        raise ConversionError(
            f"the network has {len(inputs)} inputs and {len(proto.output)} outputs; "
            "one of each is supported. Wrap it in a module of one tensor in, one out"
        )
    _check_input(inputs[0], input_shape)
    name = inputs[0].name
    _check_names(proto, name)
    graph = NetworkGraph(
        [_node(node) for node in proto.node],
        constants,
        {name: input_shape},
        name,
        proto.output[0].name,
        opset=_opset(model),
        types={name: inputs[0].type.tensor_type.elem_type},
        room=room(input_shape, sum(array.size for array in constants.values())),
    )
    graph.drop_unused()
    return graph


def _check_names(proto: onnx.GraphProto, network_input: str) -> None:
    """Every value is made once, before it is read; the output is one of them."""
    made: set[str] = set()

    def make(name: str, what: str) -> None:
        if not name or name in made:
            raise ConversionError(
                f"{what} makes {name[:80]!r}, which "
                f"{'is no name' if not name else 'is made before'}; check the file "
                "with onnx.checker"
            )
        made.add(name)

    make(network_input, "the input")
    for tensor in proto.initializer:
        make(tensor.name, "a weight")
    for node in proto.node:
        texts = (node.op_type, node.domain, node.name, *node.input, *node.output)
        texts += tuple(attribute.name for attribute in node.attribute)
        if not all(isinstance(text, str) for text in texts):
            raise ConversionError(
                f"a node {node.name[:80]!r} has a name that is no text; check the file "
                "with onnx.checker"
            )
        what = f"{node.name[:80]} ({node.op_type[:80]})"
        for name in node.input:
            if name and name not in made:
                raise ConversionError(
                    f"{what} reads {name[:80]!r}, which nothing before it makes; check "
                    "the file with onnx.checker"
                )
        for number, name in enumerate(node.output):
            if name or not number:
                make(name, what)
        if not node.output:
            raise ConversionError(f"{what} has no output; export the network again")
    if proto.output[0].name not in made:
        raise ConversionError(
            f"nothing makes the output {proto.output[0].name[:80]!r}; check the file "
            "with onnx.checker"
        )


def _array(tensor: onnx.TensorProto) -> np.ndarray:
    """A constant; bfloat16 and narrower, which numpy lacks, as float32."""
    array: np.ndarray = numpy_helper.to_array(tensor)
    own = array.dtype.isbuiltin == 2  # a type that a package adds to numpy
    return array.astype(np.float32) if own else array


def _opset(model: onnx.ModelProto) -> int:
    versions = {o.version for o in model.opset_import if o.domain in _DOMAINS} or {1}
    version = int(max(versions))
    if len(versions) > 1 or version not in OPSETS:
        raise ConversionError(
            f"the file uses version {' and '.join(map(str, sorted(versions)))} of "
            f"ONNX's operations; one of "
            f"{OPSETS[0]} to {OPSETS[-1]} are known. Export it again with one of these"
        )
    return version


def _node(proto: onnx.NodeProto) -> Node:
    attributes: dict[str, object] = {}
    problem = ""
    for a in proto.attribute:
        if a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            problem = (
                f"{proto.op_type} runs another graph, by values known at run time "
                "only; compute every side, or build the network without it"
            )
        if a.name in attributes:
            problem = f"it has two attributes {a.name[:80]!r}; export it again"
        attributes[a.name] = onnx.helper.get_attribute_value(a)
    if proto.domain not in _DOMAINS and proto.op_type not in OWN_OPS:
        problem = (
            f"{proto.domain}.{proto.op_type} is no operation of ONNX; write the layer "
            "with convolutions, linear layers, pools and additions"
        )
    given = list(proto.input)
    while given and not given[-1]:
        given.pop()  # an optional input left out
    others = [name for name in proto.output[1:] if name]
    return Node(
        proto.op_type,
        given,
        proto.output[0],
        attributes,
        proto.name,
        others,
        problem,
        "" if proto.domain in _DOMAINS else proto.domain,
    )


def declared_shape(path: Path) -> tuple[int | None, ...]:
    """The shape that an ONNX file declares of its input, the batch first.

    None stands for a size that is left open; the shape may be empty.

    Raises:
        ConversionError: the file is not ONNX with one input.
    """
    model = _load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise ConversionError(f"{path} has {len(inputs)} inputs; one is supported")
    return _declared(inputs[0])


def _declared(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    return tuple(
        d.dim_value if d.HasField("dim_value") else None
        for d in value.type.tensor_type.shape.dim
    )


def _check_input(value: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    declared = _declared(value)
    fits = len(declared) == len(shape) and all(
        d is None or d == s for d, s in zip(declared[1:], shape[1:], strict=True)
    )
    if declared and not fits:
        raise ShapeError(
            f"the example has shape {shape}, the network wants "
            f"{tuple('batch' if i == 0 else d for i, d in enumerate(declared))}"
        )
