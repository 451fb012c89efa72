"""Activations fitted one after the other, on what those before them make of images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConversionError, RangeError
from ..polynomial import ChannelPolynomials, Polynomial
from ..polynomial.channel_fit import cells, fit_channels
from ..table import aligned
from .activation import PolynomialActivation
from .histogram import CellMeans, ChannelHistogram
from .surgery import activations

# |input| that this percentage of a channel's values does not exceed.
PERCENT = 99.95
# Of the weight of an error; the rest follows what the channel saw. More costs accuracy,
# less leaves the polynomials of rare inputs to chance.
_UNIFORM = 0.005
# How far beyond the largest seen a polynomial is fitted; and how much longer than that
# its interval is, for images to come: a fit spread over all of it would be coarser.
_FITTED = 1.2
_ROOM = 1.25
_CELLS = 512
# A channel's interval is at least the layer's widest over this: in the ring, channels
# share a unit. Where all is zero, it is the next number.
_NARROWEST = 16
_NOTHING_SEEN = 0.05
# What stands at a place that is still to be fitted.
IDENTITY = Polynomial((0, 1), 0, (-1.0, 1.0))


@dataclass(frozen=True)
class LayerFit:
    """What one activation became.

    Attributes:
        name: its dotted name.
        replaced: the function that was there.
        channels: of its input.
        radii: the narrowest and the widest channel's.
        error: root mean square of p - f over that of f, on the calibration images.
        constant: channels whose inputs were all the same.
        silent: channels whose outputs were all the same: they never fire.
    """

    name: str
    replaced: str
    channels: int
    radii: tuple[float, float]
    error: float
    constant: tuple[int, ...]
    silent: tuple[int, ...]


@dataclass(frozen=True)
class Fits:
    """What `calibrate` did, layers in the order of computation; `str` is a table."""

    layers: tuple[LayerFit, ...]
    images: int
    degree: int
    margin: float

    def __str__(self) -> str:
        head = ("layer", "was", "channels", "radii", "fit error", "constant", "silent")
        rows = [
            (
                layer.name,
                layer.replaced,
                f"{layer.channels}",
                f"{layer.radii[0]:.3g} to {layer.radii[1]:.3g}",
                f"{layer.error:.2%}",
                f"{len(layer.constant)}",
                f"{len(layer.silent)}",
            )
            for layer in self.layers
        ]
        return "\n".join(
            [
                *aligned([head, *rows], left=2),
                f"degree {self.degree}, margin {self.margin:g}, {self.images} images",
            ]
        )


class _ReachedError(Exception):
    """All that is needed of a forward pass is computed."""


class Fitting:
    """Fits a prepared network's activations one after the other, in place."""

    def __init__(
        self,
        network: nn.Module,
        batches: list[Tensor],
        degree: int,
        margin: float,
        beside: Sequence[Tensor] = (),
    ) -> None:
        self.network, self.batches, self.beside = network, batches, list(beside)
        self.degree, self.margin = degree, margin
        self.open = {
            module: name
            for name, module in activations(network).items()
            if module.polynomial is IDENTITY
        }
        # The network as it was; what its activations get is what was meant.
        self.original = copy.deepcopy(network)
        # The function that was at each place, there and in the network itself; not
        # called, for surgery lets it share its successor's hooks.
        self.functions = {module: module._replaced[0] for module in self.open}
        for name in self.open.values():
            module = self._meant_by(name)
            self.functions[module] = module._replaced[0]
            module.register_forward_hook(self._stand_in)
        self.calls: dict[nn.Module, int] = {}

    def run(self, batch_norm: bool) -> tuple[Fits, list[str]]:
        """Fit all; what was done, and which activations taught nothing, in words."""
        hooks = {m: m.register_forward_hook(self._stand_in) for m in self.open}
        layers = []
        try:
            for module in self._order():
                if isinstance(module, PolynomialActivation):
                    module.polynomial, layer = self._fit(module)
                    hooks.pop(module).remove()
                    layers.append(layer)
                elif batch_norm:
                    self._estimate(module)
        finally:
            unused = [self.open[module] for module in hooks]
            for hook in hooks.values():
                hook.remove()
        notes = [
            f"{layer.name} never fires: all its outputs are the same; give images "
            "normalised as in training"
            for layer in layers
            if len(layer.silent) == layer.channels
        ]
        for module, name in self.open.items():
            if name in unused:
                self.network.set_submodule(name, self.functions[module])
                notes.append(f"{name} was never called, and is left as it was")
        images = sum(map(len, self.batches))
        return Fits(tuple(layers), images, self.degree, self.margin), notes

    def _meant_by(self, name: str) -> PolynomialActivation:
        """The activation of this name in the network as it was."""
        module = self.original.get_submodule(name)
        assert isinstance(module, PolynomialActivation)
        return module

    def _stand_in(
        self,
        module: PolynomialActivation,
        inputs: tuple[Tensor, ...],
        output: Tensor,
    ) -> Tensor:
        """The function itself, until its polynomial is fitted."""
        (x,) = inputs
        y = self.functions[module].forward(x.clone())
        return x.copy_(y) if module.inplace else y

    def _order(self) -> list[PolynomialActivation | _BatchNorm]:
        """Activations and batch-norms in the order of their first calls."""
        order: list[PolynomialActivation | _BatchNorm] = []
        channels: dict[nn.Module, int] = {}

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.calls[module] = self.calls.get(module, 0) + 1
            shape = tuple(inputs[0].shape)
            if isinstance(module, PolynomialActivation):
                _check_place(self.open[module], shape, channels.get(module))
            channels[module] = shape[1]
            if self.calls[module] == 1:
                assert isinstance(module, PolynomialActivation | _BatchNorm)
                order.append(module)

        norms = [m for m in self.network.modules() if isinstance(m, _BatchNorm)]
        self._pass(self.network, [*self.open, *norms], note, self.batches[:1])
        return order

    def _pass(
        self,
        network: nn.Module,
        modules: Sequence[nn.Module],
        hook: Callable[[nn.Module, tuple[Tensor, ...]], None],
        batches: list[Tensor],
    ) -> None:
        handles = [module.register_forward_pre_hook(hook) for module in modules]
        try:
            with torch.no_grad():
                for batch in batches:
                    try:
                        network(batch.clone())
                    except _ReachedError:
                        continue
        finally:
            for handle in handles:
                handle.remove()

    def _inputs(
        self,
        network: nn.Module,
        module: nn.Module,
        name: str,
        take: Callable[[Tensor], None],
        batches: list[Tensor],
    ) -> None:
        """Hand over what a network's module gets, batch by batch.

        Nothing after its last call is computed.

        Raises:
            RangeError: values that are not finite.
        """
        left, calls = 0, self.calls[module]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal left
            (x,) = inputs
            if not bool(torch.isfinite(x).all()):
                raise RangeError(
                    f"{name} gets values that are not finite, from the images or from "
                    "the polynomials before it; give images normalised as in training, "
                    "a larger margin, or degree 4"
                )
            take(x)
            left = (left or calls) - 1
            if not left:
                raise _ReachedError

        self._pass(network, [module], hook, batches)

    def _fit(self, module: PolynomialActivation) -> tuple[ChannelPolynomials, LayerFit]:
        name = self.open[module]
        seen, beside = ChannelHistogram(), ChannelHistogram()
        self._inputs(self.network, module, name, seen.add, self.batches)
        largest = seen.largest
        if self.beside:
            self._inputs(self.network, module, name, beside.add, self.beside)
            largest = np.maximum(largest, beside.largest)
        reach = np.maximum(self.margin * seen.percentile(PERCENT), _FITTED * largest)
        radii = np.maximum(reach, reach.max() / _NARROWEST or _NOTHING_SEEN)
        values = _values(self.functions[module], radii)
        met = self._met(module, name, radii)
        shares = met.shares()
        # By what was meant where inputs fell, by the function itself everywhere.
        often, anywhere = (1 - _UNIFORM) * shares, _UNIFORM / _CELLS
        aim = often * met.means(values) + anywhere * values
        weights = often + anywhere
        fit = fit_channels(aim / weights, weights, radii, self.degree)
        x = torch.from_numpy((radii[:, None] * cells(_CELLS)).T.copy())
        off = fit(x).numpy().T - values
        silent = [
            c for c, row in enumerate(values) if np.ptp(row[shares[c] > 0]) == 0.0
        ]
        signal = float((shares * values**2).sum())
        radii, fit = _ROOM * radii, fit.widened([_ROOM] * len(radii))
        layer = LayerFit(
            name or "(model)",
            type(self.functions[module]).__name__,
            seen.channels,
            (float(radii.min()), float(radii.max())),
            float(np.sqrt((shares * off**2).sum() / max(signal, 2.0**-60))),
            tuple(int(c) for c in seen.constant.nonzero().flatten()),
            tuple(silent),
        )
        return fit, layer

    def _met(
        self, module: PolynomialActivation, name: str, radii: np.ndarray
    ) -> CellMeans:
        """Where a module's inputs fall, and what the original network has there."""
        met = CellMeans(radii, _CELLS)
        original, function = self._meant_by(name), self.functions[module]
        meant: list[Tensor] = []

        def note(x: Tensor) -> None:
            meant.append(function.forward(x.clone()))

        self.calls[original] = self.calls[module]
        for batch in self.batches:
            self._inputs(self.original, original, name, note, [batch])
            self._inputs(
                self.network, module, name, lambda x: met.add(x, meant.pop(0)), [batch]
            )
        return met

    def _estimate(self, module: _BatchNorm) -> None:
        """Set a batch-norm's statistics to those of what it gets now."""
        if module.running_mean is None or module.running_var is None:
            return
        count = 0
        total, square = torch.zeros(2, len(module.running_mean), dtype=torch.float64)

        def take(x: Tensor) -> None:
            nonlocal count, total, square
            flat = x.cpu().double().transpose(0, 1).flatten(1)
            count += flat.shape[1]
            total = total + flat.sum(1)
            square = square + flat.square().sum(1)

        self._inputs(self.network, module, "a batch-norm", take, self.batches)
        mean = total / count
        variance = (square / count - mean**2).clamp_min(0) * count / max(count - 1, 1)
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)


def _values(function: nn.Module, radii: np.ndarray) -> np.ndarray:
    """(channels, cells) float64: a function at every channel's radius times `cells`."""
    x = torch.from_numpy(radii[None, :] * cells(_CELLS)[:, None])
    # Without the hooks that it shares, and all that hangs on them.
    alone = copy.copy(function)
    for key, value in vars(function).items():
        if "hook" in key and isinstance(value, dict):
            vars(alone)[key] = type(value)()
    with torch.no_grad():
        y = copy.deepcopy(alone).cpu().double().eval().forward(x)
    values: np.ndarray = y.numpy().T.copy()
    return values


def _check_place(name: str, shape: tuple[int, ...], channels: int | None) -> None:
    """Refuse an input without channels, or of others than at an earlier place.

    Raises:
        ConversionError: with the cure.
    """
    if len(shape) < 2:
        raise ConversionError(
            f"{name} takes an input of shape {shape}, without channels; the network "
            "must keep the batch as first axis"
        )
    if channels not in (None, shape[1]):
        raise ConversionError(
            f"{name} is one module at places of {channels} and {shape[1]} channels, "
            "and the calls in its forward could not be told apart; give each place an "
            "activation of its own"
        )
