"""A rewritten graph beside the network it comes from, on a few inputs.

The second input has another sign, another size and another batch, so that whatever a
trace froze, or a pass took from the example's batch, shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import ConversionError
from .graph import NetworkGraph, Node, layer_name
from .graph.passes.constants import evaluate
from .graph.trace import as_it_was
from .layers import KINDS, Reals
from .polynomial import across

_RELATIVE, _ROUNDING = 1e-3, 30.0
# What a network's own arithmetic may be off, in units of its type's last place.
_PLACES = 8


def own_rounding(outputs: Tensor) -> float:
    """How far a network in half precision may be off by itself, of its largest output.

    0 for float32 and float64, which are nowhere the limit.
    """
    if outputs.dtype not in (torch.float16, torch.bfloat16):
        return 0.0
    return _PLACES * torch.finfo(outputs.dtype).eps


@dataclass(frozen=True)
class Probe:
    """An input, what the network itself gives for it, and how to speak of it."""

    x: Tensor
    expected: Tensor
    words: str

    def difference(self, got: Tensor, *, rounding: float = 0.0) -> str:
        """How a result differs from the network's, in words; "" if it does not.

        Args:
            got: a result for `x`.
            rounding: how far float32 alone moves the outputs.
        """
        expected = self.expected.to(torch.float64)
        if got.shape != expected.shape:
            return (
                f"on {self.words} it gives shape {tuple(got.shape)}, the network "
                f"{tuple(expected.shape)}"
            )
        if not expected.numel() or not bool(torch.isfinite(expected).all()):
            return ""
        largest = float(expected.abs().max())
        off = float((got.to(torch.float64) - expected).abs().max())
        relative = max(_RELATIVE, own_rounding(self.expected))
        if off <= relative * largest + _ROUNDING * rounding + 1e-6:
            return ""
        return f"on {self.words} it is off by {off:.3g} of {largest:.3g}"


def run(graph: NetworkGraph, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every value of a graph in floating point, for one batch of any size.

    Layers that conversion knows are torch's; any other node is ONNX's own evaluator's,
    which is slow and covers what a graph holds before its passes.

    Args:
        graph: with or without its passes run.
        x: (batch, ...) as the graph's input.
        dtype: what real numbers are computed in.

    Returns:
        name to value; the graph's output among them.
    """

    def real(array: Tensor) -> Tensor:
        return array.to(dtype) if array.is_floating_point() else array

    values = {
        name: real(torch.from_numpy(np.array(array)))
        for name, array in graph.constants.items()
    }
    values[graph.input] = real(x.detach())
    for node in graph.nodes:
        given = [name for name in node.inputs if name]
        layer = KINDS[node.op].read(node) if node.op in KINDS else None
        if layer is not None:
            values[node.output] = layer.apply(Reals(), [values[name] for name in given])
            continue
        arrays = {name: values[name].numpy() for name in given}
        outputs = evaluate(node, arrays, graph.opset)
        for name, output in zip([node.output, *node.others], outputs, strict=True):
            values[name] = real(torch.from_numpy(np.array(output)))
    return values


def probes(
    model: torch.nn.Module | None, raw: NetworkGraph, example: Tensor
) -> list[Probe]:
    """The example's first inputs and others, with the network's own outputs.

    Args:
        model: the network; None for an ONNX file, whose graph then speaks for it.
        raw: the network as it was read, before any pass.
        example: one input batch.
    """
    count = min(len(example), 2)
    others = example[torch.arange(count + 1) % len(example)].flip(-1)
    if others.is_floating_point():
        others = -0.5 * others
    found: list[Probe] = []
    for x, words in (
        (example[:count], "the example"),
        (others, f"another input, of batch size {count + 1}"),
    ):
        try:
            expected = _itself(model, raw, x)
        except Exception:
            if not found:
                raise
            continue  # the network takes no other batch size
        found.append(Probe(x, expected.detach(), words))
    return found


def in_evaluation(model: torch.nn.Module, x: Tensor) -> Tensor:
    """What a module computes in evaluation mode; nothing of it is changed.

    Raises:
        ConversionError: it does not return one tensor, alone or in a container.
    """
    with as_it_was(model), torch.no_grad():
        returned = result = model.eval()(x.clone())
    while not torch.is_tensor(result):
        held = list(result.values()) if isinstance(result, Mapping) else result
        if not isinstance(held, (list, tuple)) or len(held) != 1:
            raise ConversionError(
                f"the network returns a {type(returned).__name__}, not one tensor; "
                "wrap it in a module of one tensor in, one out"
            )
        (result,) = held
    return result


def _itself(model: torch.nn.Module | None, raw: NetworkGraph, x: Tensor) -> Tensor:
    if model is None:
        return run(raw, x, torch.float32)[raw.output]
    return in_evaluation(model, x)


def first_difference(
    graph: NetworkGraph, raw: NetworkGraph, found: list[Probe]
) -> tuple[str, str, str] | None:
    """Where a rewritten graph first leaves its network.

    Returns:
        The layer, its operation and the difference in words; None if there is none.
    """
    for probe in found:
        # Casts to real numbers are gone from it.
        x = probe.x.to(torch.float64)
        values = run(graph, x, torch.float64)
        got = values[graph.output]
        words = probe.difference(got)
        if words and got.numel():
            # A network far outside its range may amplify float32's own rounding.
            coarse = run(graph, x, torch.float32)[graph.output]
            rounding = float((coarse - got).abs().max())
            words = probe.difference(got, rounding=rounding)
        if words:
            node = _first(values, graph, raw, probe)
            if node is None:
                return "the network", "trace", words
            return layer_name(node), node.op, words
    return None


def _first(
    values: dict[str, Tensor], graph: NetworkGraph, raw: NetworkGraph, probe: Probe
) -> Node | None:
    """The first node whose value is not what it was before the passes."""
    try:
        before = run(raw, probe.x, torch.float32)
    except Exception:
        return None  # what the reader folded by the example's batch has no other
    for node in graph.nodes:
        if node.output in before:
            here = Probe(probe.x, before[node.output], "")
            if here.difference(_undivided(graph, node, values)):
                return node
    return None


def _undivided(graph: NetworkGraph, node: Node, values: dict[str, Tensor]) -> Tensor:
    """A layer's value without what a pass divided its channels by."""
    value = values[node.output]
    exponents = graph.exponents.get(node.output)
    if exponents is None:
        return value
    return value * across(torch.from_numpy(np.exp2(exponents)), value)
