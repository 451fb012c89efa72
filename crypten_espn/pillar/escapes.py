"""How far beyond its polynomial's interval each activation's input goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import RangeError
from ..polynomial import Polynomial, across
from .activation import PolynomialActivation
from .surgery import activations


@dataclass
class LayerEscapes:
    """What one activation saw, all its calls together.

    Attributes:
        name: the module's dotted name.
        values: how many inputs.
        outside: how many of them outside the interval, NaN and infinity included.
        largest: the largest distance from the interval's middle, in its radii.
        finite: whether every input was finite.
        rows: (rows,) the largest distance for each row of the polynomial: of each
            channel where each has its own. Infinity where an input was not finite.
    """

    name: str
    values: int = 0
    outside: int = 0
    largest: float = 0.0
    finite: bool = True
    rows: Tensor = field(default_factory=lambda: torch.zeros(1))


@dataclass
class Escapes:
    """Counts while a network runs: `with Escapes.of(network) as seen: network(x)`.

    Attributes:
        layers: by name, in the order of `activations`.
        reach: (images,) for each image since `take`, the largest distance in radii over
            all layers and channels; infinity where any is not finite.
    """

    layers: dict[str, LayerEscapes]
    modules: dict[str, PolynomialActivation]
    reach: Tensor | None = None
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    @staticmethod
    def of(network: nn.Module) -> Escapes:
        """Counts of no inputs yet.

        Raises:
            RangeError: the network has no polynomial activation.
        """
        modules = activations(network)
        if not modules:
            raise RangeError(
                "the network has no polynomial activation; espn.calibrate or "
                "replace_activations makes them"
            )
        return Escapes({name: LayerEscapes(name) for name in modules}, modules)

    def __enter__(self) -> Escapes:
        for name, module in self.modules.items():
            layer = self.layers[name]

            def hook(
                module: nn.Module,
                inputs: tuple[Tensor, ...],
                layer: LayerEscapes = layer,
            ) -> None:
                assert isinstance(module, PolynomialActivation)
                self._see(layer, module, inputs[0].detach())

            self._handles.append(module.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> Tensor:
        """The images' reach since the last call, which is forgotten.

        Raises:
            RangeError: the network computed no activation.
        """
        reach, self.reach = self.reach, None
        if reach is None:
            raise RangeError("the network computed none of its activations")
        return reach

    def _see(
        self, layer: LayerEscapes, module: PolynomialActivation, x: Tensor
    ) -> None:
        distance = in_radii(x, module.polynomial.rows)
        self._see_rows(layer, module, distance)
        distance = distance.flatten(1)
        layer.values += distance.numel()
        # Not >: so NaN counts as outside.
        layer.outside += distance.numel() - int((distance <= 1.0).sum())
        furthest = distance.amax(1)
        finite = torch.isfinite(furthest)
        furthest = torch.where(finite, furthest, torch.inf)
        layer.finite &= bool(finite.all())
        layer.largest = max(layer.largest, float(furthest.max()))
        self.reach = furthest if self.reach is None else self.reach.maximum(furthest)

    def _see_rows(
        self, layer: LayerEscapes, module: PolynomialActivation, distance: Tensor
    ) -> None:
        flat = distance.transpose(0, 1).flatten(1) if distance.dim() > 1 else distance
        if len(module.polynomial.rows) == 1:
            flat = flat.reshape(1, -1)
        rows = flat.amax(1).cpu()
        rows = torch.where(torch.isfinite(rows), rows, torch.inf)
        layer.rows = torch.maximum(layer.rows, rows)


def in_radii(x: Tensor, rows: Sequence[Polynomial]) -> Tensor:
    """|x - middle| over half the interval's length, channel by channel; float32.

    Args:
        x: (batch, channels, ...).
        rows: one polynomial for all channels, or one for each.
    """
    ends = torch.tensor([row.interval for row in rows])
    low, high = (across(end, x) for end in ends.unbind(1))
    return (x.float() - (low + high) / 2).abs_().div_((high - low) / 2)
