"""Every layer with windows or weights becomes one on images.

One-dimensional ones get a row, linear layers on the last axis become convolutions of
one pixel, means over any axes become those over an image, and transposed convolutions
ordinary ones of an image with zeros between its pixels. What goes in and comes out is
moved (`moves`), for which nothing is sent.
"""

from __future__ import annotations

import math

import numpy as np

from ..index_map import NOTHING, IndexMap, counted
from ..network import ADAPTIVE_OP, NetworkGraph, Node
from .constants import evaluate
from .mixes import means, mixed
from .moves import move_after, moved
from .pads import around
from .weights import set_weights, window

_WINDOWED = (
    ADAPTIVE_OP,
    "AveragePool",
    "Conv",
    "ConvTranspose",
    "GlobalAveragePool",
    "MaxPool",
)
_ONE_PIXEL = {"strides": [1, 1], "dilations": [1, 1], "pads": [0] * 4, "group": 1}
# A list of two: one for an axis of a single element, then the given.
_LISTS = {
    "kernel_shape": 1,
    "strides": 1,
    "dilations": 1,
    "output_padding": 0,
    "output_size": 1,
}


def on_images(graph: NetworkGraph) -> None:
    """Bring layers to two dimensions, and means, resizes and the like to images."""
    for node in graph.each(*_WINDOWED):
        if len(graph.shapes.get(node.inputs[0], ())) == 3:
            _with_a_row(graph, node)
    for node in graph.each(ADAPTIVE_OP):
        height, width = graph.shapes[node.inputs[0]][2:]
        rows, columns = node.attributes["output_size"]
        mixed(node, means(height, rows), means(width, columns))
    for node in graph.each("ConvTranspose"):
        _transposed(graph, node)
    for node in graph.each("MatMul"):
        _linear(graph, node)
    for node in graph.each("ReduceMean", "ReduceSum"):
        _reduced(graph, node)
    for node in graph.each("Resize"):
        _resized(graph, node)


def _with_a_row(graph: NetworkGraph, node: Node) -> None:
    """(batch, channels, length) as an image of one row."""
    if any(name not in graph.constants for name in node.inputs[1:]):
        return
    _, channels, length = graph.shapes[node.inputs[0]]
    out = graph.shapes[node.output][1:]
    index = counted((channels, length)).reshape(channels, 1, length)
    node.inputs[0] = moved(graph, node, node.inputs[0], index)
    move_after(graph, node, (out[0], 1, *out[1:]), counted(out))
    attributes = node.attributes
    for name, one in _LISTS.items():
        if name in attributes:
            attributes[name] = [one, *attributes[name]]
    if "pads" in attributes:
        before, after = attributes["pads"]
        attributes["pads"] = [0, before, 0, after]
    if len(node.inputs) > 1:
        weight = graph.constants[node.inputs[1]]
        node.inputs[1] = graph.constant(node.output + "_weight", weight[:, :, None])


def _transposed(graph: NetworkGraph, node: Node) -> None:
    """A transposed convolution is one of the image with zeros between its pixels."""
    a = node.attributes
    source = node.inputs[0]
    shape, weight = graph.shapes[source], graph.constants.get(node.inputs[1])
    if weight is None or len(shape) != 4 or weight.ndim != 4:
        node.problem = "only images are convolved, with constant weights"
        return
    auto = a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    if auto or "output_shape" in a:
        node.problem = "its pads follow from its output; give them as numbers"
        return
    kernel, groups = list(weight.shape[2:]), a.get("group", 1)
    geometry = window(graph, node, kernel)
    strides, dilations = geometry["strides"], geometry["dilations"]
    pads, more = geometry["pads"], list(a.get("output_padding", [0, 0]))
    spread = np.full(
        (shape[1], *((n - 1) * s + 1 for n, s in zip(shape[2:], strides, strict=True))),
        NOTHING,
    )
    spread[:, :: strides[0], :: strides[1]] = counted(shape[1:])
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    index = around(
        spread,
        [0, *(reach[i] - pads[i] for i in range(2))],
        [0, *(reach[i] - pads[2 + i] + more[i] for i in range(2))],
    )
    inputs, outputs = weight.shape[:2]
    new = weight.reshape(groups, inputs // groups, outputs, *kernel)
    new = new.transpose(0, 2, 1, 3, 4)[..., ::-1, ::-1]
    new = new.reshape(groups * outputs, inputs // groups, *kernel)
    bias = np.zeros(len(new), weight.dtype)
    if len(node.inputs) > 2:
        bias = graph.constants[node.inputs[2]]
    node.inputs[0] = moved(graph, node, source, index)
    node.op = "Conv"
    node.attributes = {**_ONE_PIXEL, "dilations": dilations, "group": groups}
    set_weights(graph, node, new, bias)


def _linear(graph: NetworkGraph, node: Node) -> None:
    """A product of one axis with a constant matrix, of values of three axes or more.

    A constant row that is added to it is its bias.
    """
    constant = [name in graph.constants for name in node.inputs]
    if sum(constant) != 1:
        return
    source = node.inputs[constant.index(False)]
    shape = graph.shapes.get(source, ())
    weight = graph.constants[node.inputs[constant.index(True)]]
    while weight.ndim > 2 and len(weight) == 1:
        weight = weight[0]
    out = graph.shapes.get(node.output, ())
    if weight.ndim > 2:
        node.problem = (
            f"a product with a constant of {weight.ndim} axes; a matrix is supported, "
            "alike for all inputs and rows"
        )
        return
    if len(shape) < 3 or not out:
        return
    axis = len(shape) - 2 if constant[1] else len(shape) - 3
    if weight.ndim == 1:
        weight = weight[:, None] if constant[1] else weight[None]
    if constant[1]:
        weight = weight.T
    index = np.moveaxis(counted(shape[1:]), axis, 0)
    rest = index.shape[1:]
    node.inputs = [moved(graph, node, source, index.reshape(len(index), -1, 1))]
    bias = np.zeros(len(weight))
    added = graph.sole_user(node.output, "Add") if constant[1] else None
    if added is not None:
        other = next(n for n in added.inputs if n != node.output)
        row = graph.constants.get(other)
        if row is not None and row.shape in ((len(weight),), (1, len(weight))):
            bias = row.reshape(-1)
            graph.remove(added)
            node.output = added.output
    pixels = math.prod(rest)
    back = counted((len(weight), pixels)).reshape(len(weight), *rest)
    node.op, node.attributes = "Conv", dict(_ONE_PIXEL)
    set_weights(graph, node, weight[:, :, None, None], bias)
    back = np.moveaxis(back, 0, axis).reshape(graph.shapes[node.output][1:])
    move_after(graph, node, (len(weight), pixels, 1), back)


def _axes(graph: NetworkGraph, node: Node, rank: int) -> list[int] | None:
    axes = node.attributes.get("axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1]:
        found = graph.constants.get(node.inputs[1])
        axes = None if found is None else found.tolist()
    return None if axes is None else sorted({int(a) % rank for a in axes})


def _reduced(graph: NetworkGraph, node: Node) -> None:
    """A mean or a sum over some axes, by an image whose rows are these."""
    source = node.inputs[0]
    shape = graph.shapes.get(source, ())
    out = graph.shapes.get(node.output, ())
    if not shape:
        return
    axes = _axes(graph, node, len(shape))
    if not axes or axes[0] == 0 or not out:
        node.problem = "it takes all inputs of a batch together"
        return
    image = axes == [2, 3] and len(shape) == 4
    if not image or node.op == "ReduceSum":
        last = np.moveaxis(
            counted(shape[1:]), [a - 1 for a in axes], range(-len(axes), 0)
        )
        size = math.prod(shape[a] for a in axes)
        source = moved(graph, node, source, last.reshape(-1, size, 1))
    channels, rows = graph.shapes[source][1:3]
    node.inputs = [source]
    if node.op == "ReduceMean":
        node.op, node.attributes = "GlobalAveragePool", {}
    else:
        mixed(node, np.ones((1, rows)), np.ones((1, 1)))
    if out[1:] != (channels, 1, 1):
        move_after(graph, node, (channels, 1, 1), counted(out[1:]))


def _resized(graph: NetworkGraph, node: Node) -> None:
    """Rows and columns of the image are weighted sums of its own, or copies."""
    a, source = node.attributes, node.inputs[0]
    shape, out = graph.shapes[source], graph.shapes[node.output]
    if any(name and name not in graph.constants for name in node.inputs[1:]):
        node.problem = "its size is computed at run time; give numbers"
    elif a.get("coordinate_transformation_mode") == b"tf_crop_and_resize" or (
        a.get("keep_aspect_ratio_policy", b"stretch") != b"stretch" or "axes" in a
    ):
        node.problem = "a crop or an aspect ratio is kept; crop before it"
    elif len(shape) not in (3, 4) or shape[:2] != out[:2]:
        node.problem = "only rows and columns of images are resized"
    if node.problem:
        return
    matrices = [_resizing(graph, node, axis) for axis in range(2, len(shape))]
    if len(shape) == 3:
        matrices = [np.ones((1, 1)), *matrices]
        index = counted(shape[1:]).reshape(shape[1], 1, shape[2])
        source = moved(graph, node, source, index)
        move_after(graph, node, (out[1], 1, out[2]), counted(out[1:]))
    node.inputs = [source]
    if all(_copies(matrix) for matrix in matrices):
        index = counted(graph.shapes[source][1:])
        for axis, matrix in enumerate(matrices):
            index = index.take(matrix.argmax(1), 1 + axis)
        node.op = "Move"
        node.attributes = {"map": IndexMap(index)}
    else:
        mixed(node, *matrices)


def _resizing(graph: NetworkGraph, node: Node, axis: int) -> np.ndarray:
    """The weights of one axis's elements, found by resizing a unit matrix."""
    size = graph.shapes[node.inputs[0]][axis]
    given = [n for n in node.inputs[1:] if n and graph.constants[n].size]
    number = graph.constants[given[-1]][axis]
    sizes = graph.constants[given[-1]].dtype == np.int64
    one = np.array([size if sizes else 1, number], graph.constants[given[-1]].dtype)
    inputs = ["x", *("" if n != given[-1] else n for n in node.inputs[1:])]
    alone = Node("Resize", inputs, "y", dict(node.attributes))
    values = {"x": np.eye(size), given[-1]: one}
    (weights,) = evaluate(alone, values, graph.opset)
    matrix = np.asarray(weights, dtype=np.float64).T
    if matrix.shape != (graph.shapes[node.output][axis], size):
        raise ValueError(f"a resize of {size} to {number}")
    # Of exact numbers, float32 remembers 24 bits.
    return np.round(matrix, 7)


def _copies(matrix: np.ndarray) -> bool:
    return bool(((matrix == 1).sum(1) == 1).all() and ((matrix != 0).sum(1) == 1).all())
