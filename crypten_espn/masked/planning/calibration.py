"""Calibration: how large values get, and how far errors in them move the outputs."""

from __future__ import annotations

import math

import numpy as np
import torch

from ...errors import PlanError
from .layers import Layer
from .network import Network
from .precision import columns_of, measured_effect, radii_of
from .products import effects_of

_EFFECT_IMAGES, _EFFECT_SIGNS = 8, 2


class Calibration:
    """What a network does to calibration inputs, noted at its layers.

    Args:
        network: its layers get shapes, sizes and effects.
        x: (batch, *input_shape), finite; more inputs give better bounds.

    Attributes:
        inputs: how many were given.
        samples: the first of them, in float64.

    Raises: PlanError where a value is not finite.
    """

    def __init__(self, network: Network, x: torch.Tensor) -> None:
        self.network = network
        self.inputs = len(x)
        with torch.no_grad():
            values = self._run(x.to(torch.float64))
        for name, result in values.items():
            layer = self.network.layers[name]
            layer.largest = float(result.abs().max())
            layer.mean_square = float(result.square().mean())
            if layer.activates and not layer.multiplies:
                z = values[layer.inputs[0]].abs()
                by_row = z.reshape(len(z), len(layer.rows), -1)
                layer.reach = by_row.amax((0, 2)).numpy()
        del values
        self.samples = x[:_EFFECT_IMAGES].to(torch.float64)
        self._differentiate(self.samples)

    @property
    def outputs(self) -> int:
        """Logits of one input."""
        return math.prod(self.network.layers[self.network.output].shape)

    @property
    def largest_logit(self) -> float:
        """The largest |logit| seen."""
        return self.network.layers[self.network.output].largest

    def beside_logits(self, error: float) -> float:
        """An error of the logits beside the largest seen; 0 if all are zero."""
        return error / self.largest_logit if self.largest_logit else 0.0

    def _run(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every layer's result.

        Raises: PlanError where one is not finite.
        """

        def checked(layer: Layer, inputs: list[torch.Tensor]) -> torch.Tensor:
            result = self.network.compute(layer, inputs)
            if not bool(torch.isfinite(result).all()):
                raise _overflow(layer)
            return result

        return self.network.walk(x, self.network.layers, checked)

    def _differentiate(self, x: torch.Tensor) -> None:
        """Set every layer's effects, from the outputs' derivatives.

        The outputs enter with random signs: the square of a derivative of such a sum
        is on average the sum of the squares.
        """
        weights = sorted(
            {layer.weight for layer in self.network.layers.values()} - {""}
        )
        with torch.enable_grad():
            for name in weights:
                self.network.tensor(name).requires_grad_()
            values = self._run(x.detach().clone().requires_grad_())
        output = values[self.network.output]
        of = [*values.values(), *(self.network.tensor(name) for name in weights)]
        toss = torch.Generator().manual_seed(0)
        draws = []
        for _ in range(_EFFECT_SIGNS):
            signs = 2.0 * torch.randint(2, output.shape, generator=toss) - 1
            draws.append(
                torch.autograd.grad(
                    output,
                    of,
                    signs,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        for name in weights:
            self.network.tensor(name).requires_grad_(False)
        columns = list(zip(*draws, strict=True))
        by_weight = {}
        for name, gradients in zip(weights, columns[len(values) :], strict=True):
            squares = sum(float(gradient.square().sum()) for gradient in gradients)
            by_weight[name] = squares / (len(x) * _EFFECT_SIGNS)
        self._input_gradients = x, columns[0]
        by_value = dict(zip(values, columns, strict=False))
        for name, gradients in zip(values, columns, strict=False):
            layer = self.network.layers[name]
            # A rescaling may follow, whose coefficient errs as the power 1.
            z, degree, radii = values[name], 1, np.ones(1)
            if layer.multiplies:
                assert layer.form.factors is not None
                (row,) = layer.inputs
                layer.factor_effects = effects_of(
                    values[row].detach(), by_value[row], layer.form.factors
                )
            elif layer.activates:
                z, degree = values[layer.inputs[0]], len(columns_of(layer.rows)) - 1
                radii = radii_of(layer.rows)
            layer.effect = measured_effect(
                z.detach(), gradients, degree=degree, radii=radii
            )
            if not np.isfinite(layer.effect.independent).all():
                raise _overflow(layer)
            if layer.weight:
                weight = self.network.tensor(layer.weight)
                depth = weight.numel() / len(weight)
                # Without a derivative, as if it read values of size one.
                layer.weight_effect = (
                    by_weight[layer.weight] or layer.effect.rounding * depth
                )

    def factor_error(self, layer: Layer, off: float) -> float:
        """The outputs' mean square error when a source is off by that factor less 1."""
        if off == 0.0:
            return 0.0
        if layer.multiplies:
            return layer.effect.of_factor({1: np.array([off])})
        if layer.activates:
            columns = columns_of(layer.rows)
            return layer.effect.of_factor({k: off * c for k, c in enumerate(columns)})
        x, gradients = self._input_gradients
        sums = [(x * gradient).flatten(1).sum(1) for gradient in gradients]
        return off**2 * float(torch.stack(sums).square().mean())

    def input_error(self, bits: int) -> float:
        """The outputs' mean square error when the input is rounded to nearest.

        The same values round in the same way, and images hold many equal ones; so what
        these inputs' rounding does is added to what that of any values would.
        """
        x, gradients = self._input_gradients
        off = (torch.round(x * 2.0**bits) / 2.0**bits - x).flatten(1)
        sums = [(off * gradient.flatten(1)).sum(1) for gradient in gradients]
        any_values = (
            self.network.layers[self.network.input].effect.rounding
            * 2.0 ** (-2 * bits)
            / 12
        )
        return float(torch.stack(sums).square().mean()) + any_values


def _overflow(layer: Layer) -> PlanError:
    return PlanError(
        f"{layer.title}: the calibration data overflow here. The activations leave the "
        "interval their polynomial was fitted on."
    )
