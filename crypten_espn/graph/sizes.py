"""How large a network may become, beside what its file and its input hold.

A few bytes can say "a tensor of 2**62 zeros", or double one forty times. Sizes are
known from shape inference, so they are compared before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import ConversionError
from .network import NetworkGraph, Node, layer_name

# Elements that any network may have, and that a large input gives no more of.
_LEAST, _MOST = 1 << 22, 1 << 30
# Elements of all values of one input, for each element of that input.
_PER_INPUT = 1 << 16
# The same for each element of the file's constants.
_PER_CONSTANT = 8
# Products for each element.
_WORK = 1 << 12
# Their results have sizes that their inputs' sizes do not bound.
_ENLARGING = frozenset(
    {
        "AffineGrid", "AveragePool", "BlackmanWindow", "CenterCropPad", "Col2Im",
        "ConstantOfShape", "Conv", "ConvTranspose", "DFT", "Expand", "GridSample",
        "HammingWindow", "HannWindow", "LpPool", "MaxPool", "MaxUnpool",
        "MelWeightMatrix", "OneHot", "Pad", "Range", "Resize", "STFT", "Tile",
        "Upsample",
    }
)  # fmt: skip
_SMALL = 1 << 16


def room(input_shape: Sequence[int], constants: int) -> int:
    """Elements that a network's values may have for one input, all together.

    Args:
        input_shape: batch dimension first.
        constants: elements of all of the file's constants.
    """
    one = math.prod(input_shape[1:])
    return max(min(max(_LEAST, one * _PER_INPUT), _MOST), constants * _PER_CONSTANT)


def is_foldable(graph: NetworkGraph, node: Node) -> bool:
    """Whether a node of known inputs can be evaluated, by the sizes it gives.

    Where its result's shape is not inferred yet it may be later.

    Raises:
        ConversionError: its result is too large; the node is named.
    """
    shapes = [graph.shapes.get(name) for name in (node.output, *node.others)]
    known = [shape for shape in shapes if shape is not None]
    if len(known) == len(shapes):
        _compare(graph, node, sum(map(math.prod, known)))
        return True
    if node.op in _ENLARGING:
        return False
    sizes = [max(graph.constants[name].size, 1) for name in node.inputs if name]
    return math.prod(sizes) <= _SMALL


def check_sizes(graph: NetworkGraph) -> None:
    """Refuse a network whose values, or the work for them, are out of proportion.

    Raises:
        ConversionError: the node at which it becomes so is named.
    """
    elements = work = 0
    batch = max(graph.shapes[graph.input][0], 1)
    for node in graph.nodes:
        shape = graph.shapes.get(node.output)
        if shape is None or node.problem:
            continue
        if min(shape, default=0) < 0:
            raise ConversionError(
                f"{layer_name(node)[:80]} ({node.op}) has the shape {shape}: its input "
                "is smaller than its window; give a larger input"
            )
        count = math.prod(shape)
        elements += count + _padded(graph, node)
        work += count * _products(graph, node)
        _compare(graph, node, elements // batch)
        _compare(graph, node, work // batch // _WORK)


def _compare(graph: NetworkGraph, node: Node, elements: int) -> None:
    if elements > graph.room:
        raise ConversionError(
            f"{layer_name(node)[:80]} ({node.op}) makes the network too large for its "
            f"input of shape {graph.shapes[graph.input]}: {elements:,} elements, or "
            f"{_WORK:,} times as many products; {graph.room:,} are allowed"
        )


def _padded(graph: NetworkGraph, node: Node) -> int:
    """Elements of an input with the node's own pads."""
    pads = node.attributes.get("pads")
    shape = graph.shapes.get(node.inputs[0]) if node.inputs else None
    if not shape or not isinstance(pads, list) or len(pads) != 2 * (len(shape) - 2):
        return 0
    half = len(pads) // 2
    sizes = [
        size + abs(before) + abs(after)
        for size, before, after in zip(shape[2:], pads[:half], pads[half:], strict=True)
    ]
    return math.prod((*shape[:2], *sizes))


def _products(graph: NetworkGraph, node: Node) -> int:
    """Products for one element of a node's result, roughly."""
    kernel = node.attributes.get("kernel_shape")
    if node.op in ("AveragePool", "MaxPool") and isinstance(kernel, list):
        return math.prod(abs(k) for k in kernel)
    if node.op in ("Conv", "Gemm", "MatMul") and len(node.inputs) > 1:
        weight = graph.constants.get(node.inputs[1])
        if weight is not None and node.op == "Conv" and weight.ndim:
            return int(weight.size // max(weight.shape[0], 1))
        if weight is not None and weight.ndim:
            return int(max(weight.shape[-2:]))  # of (out, in) and (in, out) alike
    return 1
