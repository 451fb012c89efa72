"""A converted network as the planner sees it: layers and their forms, and cuts."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from crypten.nn import module as crypten_nn

from ...errors import PlanError
from ...layers import Kind, Reals
from ...layers.polynomial import Activation
from ...pillar.guard import InputGuard
from ...polynomial import Polynomial
from .forms import Forms, parameter_form, read_form
from .layers import RESCALED, Layer, layer_title, naming
from .precision import Effect
from .products import as_layers


def parameters_of(graph: crypten_nn.Graph) -> dict[str, np.ndarray]:
    """The real parameters of a converted, unencrypted crypten.nn.Graph, by name.

    Raises: PlanError if the network is encrypted.
    """
    found = {}
    for name, module in graph._modules.items():
        if isinstance(module, crypten_nn.Parameter):
            if not torch.is_tensor(module.data):
                raise PlanError(
                    f"{name} is encrypted; plan the network before .encrypt(), on the "
                    "party that owns the weights."
                )
            found[name] = module.data.detach().cpu().numpy()
    return found


class Network:
    """A converted network's layers in the order they are computed.

    Args:
        private: what `convert` returned, not encrypted.

    Raises: PlanError naming the layer that the masked engine does not compute.
    """

    def __init__(self, private: crypten_nn.Graph) -> None:
        kinds = getattr(private, "layers", None)
        if kinds is None:
            raise PlanError(
                f"a {type(private).__name__} was given; the masked engine plans what "
                "convert() returned"
            )
        self.parameters = parameters_of(private)
        self._tensors: dict[str, torch.Tensor] = {}
        self.guard: InputGuard | None = getattr(private, "guard", None)
        self.input = private.input_names[0]
        self.output = private.output_names[0]
        taken = read_form(private.input_shape, 0)
        self.layers = {self.input: Layer(self.input, None, [], taken)}
        self.order: list[str] = []
        for name, kind in kinds.items():
            inputs = private._graph[name]
            if not all(i in self.layers or i in self.parameters for i in inputs):
                raise PlanError(f"{layer_title(name)}: its input is missing.")
            module = type(private._modules[name]).__name__
            with naming(layer_title(name)):
                self._add(name, module, kind, inputs)
        if self.output not in self.layers:
            raise PlanError(
                f"The output {self.output} is a constant; a network of its input is "
                "needed."
            )

    def _add(self, name: str, module: str, kind: Kind, inputs: list[str]) -> None:
        def refused(found: str) -> PlanError:
            return PlanError(f"{layer_title(name)}: {found}")

        values: list[str] = []
        weights: list[str] = []
        given = []
        for i in inputs:
            if i in self.parameters:
                weights.append(i)
                given.append(parameter_form(self.parameters[i].shape))
            else:
                given.append(read_form(self.layers[i].shape, len(values)))
                values.append(i)
        forms = Forms(refused, module)
        form = kind.apply(forms, given)
        if form.write is None or form.weighted != bool(weights):
            raise forms.unsupported()
        if form.factors is not None:
            for layer in as_layers(name, form, values):
                self.layers[layer.name] = layer
                self.order.append(layer.name)
            return
        weight, bias = [*weights, "", ""][:2]
        self.layers[name] = Layer(name, kind, values, form, weight, bias)
        self.order.append(name)

    # -- in float64

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter in float64, the same tensor each time."""
        if name not in self._tensors:
            array = np.array(self.parameters[name], dtype=np.float64)
            self._tensors[name] = torch.from_numpy(array)
        return self._tensors[name]

    def compute(self, layer: Layer, inputs: list[torch.Tensor]) -> torch.Tensor:
        """A layer's value in the type of its inputs, float64 but for estimates.

        Raises: PlanError with the layer's name if its inputs' shapes do not fit it.
        """
        assert layer.kind is not None
        weights = [n for n in (layer.weight, layer.bias) if n]
        parameters = [self.tensor(name).to(inputs[0]) for name in weights]
        with naming(layer.title):
            return layer.kind.apply(Reals(), [*inputs, *parameters])

    def run(self, x: torch.Tensor, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        """Values by name in float64, of inputs (batch, *input_shape)."""
        with torch.no_grad():
            return self.walk(x.detach().cpu().double(), wanted, self.compute)

    def walk(
        self,
        x: torch.Tensor,
        wanted: Collection[str],
        compute: Callable[[Layer, list[torch.Tensor]], torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The values wanted, by name, as `compute` gives them layer by layer."""
        values = {self.input: x}
        last = {n: name for name in self.order for n in self.layers[name].inputs}
        for name in self.order:
            layer = self.layers[name]
            values[name] = compute(layer, [values[i] for i in layer.inputs])
            for used in set(layer.inputs).difference(wanted):
                if last[used] == name:
                    del values[used]
        return values

    # -- cutting into linear parts

    @property
    def ends(self) -> list[str]:
        """Names of the values that end the linear parts, the output last."""
        layers = [self.layers[name] for name in self.order]
        ends = [layer.inputs[0] for layer in layers if layer.activates]
        return [*ends, self.output]

    def cut(self) -> None:
        """Insert a rescaling where a weight would meet another with no opening between.

        A value that depends on weights may end a segment, or be read once by another
        operation that needs none. Any other reader gets it through an identity
        polynomial, which is an activation like any other.
        """
        readers: dict[str, list[str]] = {}
        for name in self.order:
            for value in self.layers[name].inputs:
                readers.setdefault(value, []).append(name)
        weighted: dict[str, bool] = {self.input: False}
        rescaled: dict[str, str] = {}
        order: list[str] = []
        for name in self.order:
            layer = self.layers[name]
            if not layer.activates:
                for index, value in enumerate(layer.inputs):
                    needs = layer.weighted or len(readers[value]) > 1
                    if weighted[value] and needs:
                        layer.inputs[index] = self._rescale(value, rescaled, order)
            order.append(name)
            weighted[name] = layer.weighted or (
                not layer.activates
                and any(weighted.get(value, False) for value in layer.inputs)
            )
        self.order = order

    def _rescale(self, value: str, rescaled: dict[str, str], order: list[str]) -> str:
        if value not in rescaled:
            before = self.layers[value]
            name = value + RESCALED
            rounding = np.array([[before.effect.rounding, 0.0, 0.0]])
            kind = Activation(Polynomial((0, 1), 0, (-1.0, 1.0)))
            self.layers[name] = Layer(
                name,
                kind,
                [value],
                kind.apply(Forms(PlanError, name), [read_form(before.shape, 0)]),
                largest=before.largest,
                mean_square=before.mean_square,
                reach=np.array([before.largest]),
                effect=Effect(rounding, np.zeros((1, 1, 2)), np.zeros((1, 3))),
            )
            rescaled[value] = name
            order.append(name)
        return rescaled[value]

    def hwc(self, name: str) -> tuple[int, ...]:
        """A value's shape as the plan has it, channels last."""
        first, *rest = self.layers[name].shape
        return (*rest, first)
