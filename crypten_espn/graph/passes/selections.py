"""Slices, splits, gathers, crops and constants in a concatenation.

Each picks values at public places, and sometimes puts constants between them: a
convolution (or a linear layer) whose weights are zeros and ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..network import NetworkGraph, Node
from .pads import torch_order
from .weights import set_weights

Picks = Sequence[int | None]


def select(graph: NetworkGraph) -> None:
    """Let convolutions, linear layers and pools of one element do the picking."""
    for node in graph.each("Split"):
        _split(graph, node)
    chosen: dict[str, Sequence[Sequence[int]]] = {}
    for node in graph.each("Slice", "Gather"):
        picks = _slice(graph, node) if node.op == "Slice" else _gather(graph, node)
        if picks is None:
            continue
        before = graph.producer(node.inputs[0])
        if before is not None and graph.sole_user(before.output, node.op) is node:
            earlier = chosen.pop(before.output, None)
            if earlier is not None:
                picks = [
                    [old[i] for i in new]
                    for old, new in zip(earlier, picks, strict=True)
                ]
                node.inputs = before.inputs[:1]
                graph.remove(before)
        chosen[node.output] = picks
    for node in graph.each("Slice", "Gather"):
        _pick(graph, node, chosen[node.output])
    for node in graph.each("Pad"):
        _pad(graph, node)
    for node in graph.each("Concat"):
        _concat(graph, node)


def _split(graph: NetworkGraph, node: Node) -> None:
    """One slice for each part."""
    outputs = [node.output, *node.others]
    if any(name not in graph.shapes for name in outputs):
        node.problem = "the sizes of its parts are not known; give them as numbers"
        return
    axis = node.attributes.get("axis", 0) % len(graph.shapes[node.inputs[0]])
    start = 0
    for output in outputs:
        stop = start + graph.shapes[output][axis]
        attributes = {"starts": [start], "ends": [stop], "axes": [axis]}
        part = Node("Slice", node.inputs[:1], output, attributes, node.name)
        graph.insert_before(node, part)
        start = stop
    graph.remove(node)


def _constant_list(
    graph: NetworkGraph, node: Node, place: int, attribute: str, default: list[int]
) -> list[int]:
    """A list that older operations have as an attribute and newer as an input."""
    if attribute in node.attributes:
        return [int(v) for v in node.attributes[attribute]]
    if len(node.inputs) > place and node.inputs[place]:
        return [int(v) for v in graph.constants[node.inputs[place]]]
    return default


def _slice(graph: NetworkGraph, node: Node) -> list[Sequence[int]] | None:
    if any(name and name not in graph.constants for name in node.inputs[1:]):
        node.problem = "where it cuts is computed at run time; give numbers"
        return None
    shape = graph.shapes[node.inputs[0]]
    starts = _constant_list(graph, node, 1, "starts", [])
    ends = _constant_list(graph, node, 2, "ends", [])
    axes = _constant_list(graph, node, 3, "axes", list(range(len(starts))))
    steps = _constant_list(graph, node, 4, "steps", [1] * len(starts))
    picks: list[Sequence[int]] = [range(size) for size in shape]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis % len(shape)]
        if step < 0 and end < -size:
            picks[axis % len(shape)] = range(size)[start::step]
        else:
            picks[axis % len(shape)] = range(size)[start:end:step]
    return picks


def _gather(graph: NetworkGraph, node: Node) -> list[Sequence[int]] | None:
    index = graph.constants.get(node.inputs[1])
    if index is None or index.ndim != 1:
        node.problem = "it takes one element of an axis away; slice, as in x[:, 2:3]"
        return None
    shape = graph.shapes[node.inputs[0]]
    picks: list[Sequence[int]] = [range(size) for size in shape]
    axis = node.attributes.get("axis", 0) % len(shape)
    picks[axis] = [int(i) % shape[axis] for i in index]
    return picks


def _pick(graph: NetworkGraph, node: Node, picks: Sequence[Sequence[int]]) -> None:
    """Replace a node by one that reads its first input at these places of each axis."""
    source = node.inputs[0]
    shape = graph.shapes[source]
    moved = [i for i, size in enumerate(shape) if list(picks[i]) != list(range(size))]
    if 0 in moved:
        node.problem = "it cuts the batch; every input of a batch is computed alike"
    elif any(not len(p) for p in picks):
        node.problem = "nothing is left of its input"
    elif not moved:
        graph.remove(node)
        graph.replace_value(node.output, source)
    elif len(shape) == 4:
        _pick_image(graph, node, picks)
    elif moved == [len(shape) - 1]:
        choose(graph, node, source, list(picks[-1]))
    else:
        node.problem = "only channels, rows and columns of images and features are cut"


def _pick_image(
    graph: NetworkGraph, node: Node, picks: Sequence[Sequence[int]]
) -> None:
    channels, height, width = graph.shapes[node.inputs[0]][1:]
    windows = []
    for size, places in zip((height, width), picks[2:], strict=True):
        step = places[1] - places[0] if len(places) > 1 else size
        if step < 1 or list(places) != list(range(places[0], places[-1] + 1, step)):
            node.problem = "rows or columns are reversed or picked unevenly"
            return
        # The smallest kernel that fits exactly as many times as there are places.
        reach = max(places[0] + 1, size - len(places) * step + 1)
        windows.append((places[0], reach, step))
    kernel = [window[1] for window in windows]
    strides = [window[2] for window in windows]
    if list(picks[1]) != list(range(channels)):
        if kernel == strides == [1, 1]:
            choose(graph, node, node.inputs[0], list(picks[1]))
            return
        matrix, groups = _matrix(list(picks[1]), channels), 1
    elif kernel == [1, 1]:
        node.op, node.inputs = "AveragePool", node.inputs[:1]
        node.attributes = {"kernel_shape": kernel, "strides": strides}
        return
    else:
        matrix, groups = np.ones((channels, 1)), channels
    weight = np.zeros((*matrix.shape, *kernel))
    weight[:, :, windows[0][0], windows[1][0]] = matrix
    as_convolution(graph, node, weight, np.zeros(len(weight)), strides, groups)


def choose(
    graph: NetworkGraph,
    node: Node,
    source: str,
    picks: Picks,
    constants: np.ndarray | None = None,
) -> None:
    """Make a node put channels of a value, or constants where picks has None.

    A layer that the value comes from and that nothing else reads does it itself.
    """
    shape = graph.shapes[source]
    last = 1 if len(shape) == 4 else len(shape) - 1
    bias = np.zeros(len(picks)) if constants is None else constants
    before = graph.producer(source)
    if (
        before is not None
        and not before.problem
        and graph.sole_user(source, node.op) is node
        and (before.op == "Gemm" or (before.op == "Conv" and len(shape) == 4))
        and before.attributes.get("group", 1) == 1
        and all(name in graph.constants for name in before.inputs[1:])
    ):
        weight, old = (graph.constants[name] for name in before.inputs[1:3])
        if before.op == "Conv" or last == len(shape) - 1:
            rows = [0 if i is None else i for i in picks]
            new = weight[rows].astype(np.float64)
            mask = np.array([i is None for i in picks])
            new[mask] = 0
            node.op, node.attributes = before.op, dict(before.attributes)
            node.inputs = before.inputs[:1]
            set_weights(graph, node, new, np.where(mask, bias, old[rows]))
            graph.remove(before)
            return
    matrix = _matrix(picks, shape[last])
    node.inputs = [source]
    if len(shape) == 4:
        as_convolution(graph, node, matrix[:, :, None, None], bias, [1, 1], 1)
    else:
        node.op, node.attributes = "Gemm", {"transB": 1}
        set_weights(graph, node, matrix, bias)


def _matrix(picks: Picks, size: int) -> np.ndarray:
    matrix = np.zeros((len(picks), size))
    for row, place in enumerate(picks):
        if place is not None:
            matrix[row, place] = 1
    return matrix


def as_convolution(
    graph: NetworkGraph,
    node: Node,
    weight: np.ndarray,
    bias: np.ndarray,
    strides: Sequence[int],
    groups: int,
) -> None:
    """Make a node a convolution of its first input, without pads."""
    node.op, node.inputs = "Conv", node.inputs[:1]
    node.attributes = {
        "strides": list(strides),
        "dilations": [1, 1],
        "pads": [0, 0, 0, 0],
        "group": groups,
    }
    set_weights(graph, node, weight, bias)


def _pad(graph: NetworkGraph, node: Node) -> None:
    """Crop where pads are negative, pad channels by choosing, the image by a Pad."""
    if any(name and name not in graph.constants for name in node.inputs[1:]):
        node.problem = "its pads are computed at run time; give numbers"
        return
    source = node.inputs[0]
    shape = graph.shapes[source]
    given = _constant_list(graph, node, 1, "pads", [])
    axes = _constant_list(graph, node, 3, "axes", list(range(len(given) // 2)))
    value = node.attributes.get("value", 0.0)
    if len(node.inputs) > 2 and node.inputs[2]:
        value = float(graph.constants[node.inputs[2]].reshape(()))
    before, after = [0] * len(shape), [0] * len(shape)
    for i, axis in enumerate(axes):
        before[axis % len(shape)] = given[i]
        after[axis % len(shape)] = given[len(axes) + i]
    if min(before + after) < 0:
        cropped = graph.fresh(node.output + "_cropped")
        picks = [
            range(max(-b, 0), size - max(-a, 0))
            for size, b, a in zip(shape, before, after, strict=True)
        ]
        crop = Node("Slice", [source], cropped, {}, node.name)
        graph.shapes[cropped] = tuple(map(len, picks))
        graph.insert_before(node, crop)
        _pick(graph, crop, picks)
        if crop.problem:
            node.problem = crop.problem
            return
        source, shape = cropped, graph.shapes[cropped]
        before, after = ([max(v, 0) for v in side] for side in (before, after))
    channel = 1 if len(shape) == 4 else len(shape) - 1
    # What is left to pad: channels by choosing, rows and columns by a Pad of zeros
    # between two shifts by the value.
    image = [i for i in range(1, len(shape)) if i != channel and before[i] + after[i]]
    if before[0] or after[0]:
        node.problem = "it pads the batch; pad channels, rows or columns"
    elif (image and len(shape) != 4) or not np.isfinite(value):
        node.problem = "only images and features are padded, with finite values"
    elif not image:
        size = shape[channel]
        places: list[int | None] = [None] * before[channel]
        places += [*range(size), *[None] * after[channel]]
        constants = np.where([p is None for p in places], value, 0.0)
        choose(graph, node, source, places, constants)
    elif before[1] or after[1]:
        node.problem = "it pads channels and the image at once; pad one after the other"
    else:
        node.inputs = [_shifted(graph, node, source, -value)]
        node.attributes = {"pads": torch_order(before[2:] + after[2:])}
        if value:
            output, node.output = node.output, graph.fresh(node.output + "_padded")
            graph.shapes[node.output] = graph.shapes[output]
            shifted = _affine(node, node.output, output, value)
            index = next(i for i, n in enumerate(graph.nodes) if n is node)
            graph.nodes.insert(index + 1, shifted)


def _shifted(graph: NetworkGraph, node: Node, source: str, value: float) -> str:
    """The value plus a constant: zero pads then stand for the constant's negative."""
    if not value:
        return source
    shifted = graph.fresh(node.output + "_shifted")
    graph.shapes[shifted] = graph.shapes[source]
    graph.insert_before(node, _affine(node, source, shifted, value))
    return shifted


def _affine(node: Node, source: str, output: str, offset: float) -> Node:
    one = np.ones((1, 1, 1))
    attributes = {"factor": one, "offset": one * offset}
    return Node("Affine", [source], output, attributes, node.name)


def _concat(graph: NetworkGraph, node: Node) -> None:
    """Constants are put beside the value next to them."""
    values = [name for name in node.inputs if name not in graph.constants]
    if len(values) == len(node.inputs):
        return
    shape = graph.shapes[node.output]
    axis = node.attributes["axis"] % len(shape)
    channel = 1 if len(shape) == 4 else len(shape) - 1
    if axis != channel:
        node.problem = "constants can be put beside channels or features only (dim=1)"
        return
    # A group for each value, with the constants that follow it; the first has those
    # before it too.
    groups: list[tuple[str, list[int | None], list[float]]] = []
    waiting: list[float] = []
    for name in node.inputs:
        if name in graph.constants:
            array = graph.constants[name].astype(np.float64)
            rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
            if np.any(rows != rows[:, :1]):
                node.problem = (
                    "a constant in it differs between pixels, or inputs of the batch; "
                    "one value a channel is supported"
                )
                return
            if groups:
                groups[-1][1].extend([None] * len(rows))
                groups[-1][2].extend(rows[:, 0])
            else:
                waiting.extend(rows[:, 0])
        else:
            size = graph.shapes[name][axis]
            picks: list[int | None] = [None] * len(waiting)
            groups.append((name, [*picks, *range(size)], [*waiting, *[0.0] * size]))
            waiting = []
    # One value: the node itself chooses.
    if len(groups) == 1:
        name, places, constants = groups[0]
        node.inputs = [name]
        choose(graph, node, name, places, np.array(constants))
        return
    # Several: each with constants gets a node of its own, and this one joins them.
    node.inputs = []
    for name, places, constants in groups:
        if None in places:
            beside = graph.fresh(f"{name}_beside")
            sizes = list(graph.shapes[name])
            sizes[axis] = len(places)
            graph.shapes[beside] = tuple(sizes)
            part = Node("Concat", [name], beside, {}, node.name)
            graph.insert_before(node, part)
            choose(graph, part, name, places, np.array(constants))
            name = beside
        node.inputs.append(name)
