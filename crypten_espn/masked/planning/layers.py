"""A node of a converted network as the masked engine's planner sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from ...errors import EspnError, PlanError
from ...layers.arithmetic import Arithmetic, V
from ...polynomial import Polynomial
from .forms import Form
from .precision import NO_EFFECT, Effect, by_channel

RESCALED = ":rescaled"
FACTORS = ":factors"


class Computed(Protocol):
    """What a layer computes in any arithmetic, as `layers.Kind` says it."""

    def apply(self, a: Arithmetic[V], inputs: Sequence[V]) -> V: ...


@dataclass
class Layer:
    """A node of the converted network, and what calibration says of its result.

    Attributes:
        kind: None for the network's input.
        inputs: names of the values it reads.
        form: how the plan writes it.
        weight, bias: names of parameters; empty where there are none.
        largest, mean_square: of the result.
        reach: (channels,) of an activation's |input|, the largest by `rows`.
        effect: of errors of the result, as a function of an activation's input.
        factor_effects: of a product, of errors of either factor.
        weight_effect: the outputs' mean square error when every weight is off by 1,
            its sign random.
    """

    name: str
    kind: Computed | None
    inputs: list[str]
    form: Form
    weight: str = ""
    bias: str = ""
    largest: float = 0.0
    mean_square: float = 0.0
    reach: np.ndarray = field(default_factory=lambda: np.zeros(1))
    effect: Effect = NO_EFFECT
    factor_effects: tuple[float, float] = (0.0, 0.0)
    weight_effect: float = 0.0

    @property
    def title(self) -> str:
        return layer_title(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result, without the batch."""
        return tuple(self.form.shape[1:])

    @property
    def activates(self) -> bool:
        """Whether what it reads is opened: for a polynomial, or for a product."""
        return self.form.polynomial is not None or self.multiplies

    @property
    def multiplies(self) -> bool:
        """Whether it is a product of what it reads, a row of two factors."""
        return self.form.factors is not None

    @cached_property
    def rows(self) -> tuple[Polynomial, ...]:
        """An activation's polynomials: one for all channels, or one for each."""
        assert self.form.polynomial is not None
        return by_channel(self.form.polynomial)

    @property
    def weighted(self) -> bool:
        return self.form.weighted


def layer_title(name: str) -> str:
    """A readable layer name from an exporter's value name.

    /stages/stages.0/stages.0.0/relu1/Op_output_0 is stages.0.0.relu1.
    """
    if name.endswith(RESCALED):
        return f"{layer_title(name.removesuffix(RESCALED))} (rescaled)"
    name = name.removesuffix(FACTORS)
    parts = [part for part in name.replace("_output_0", "").split("/") if part]
    parts = parts[:-1] if len(parts) > 1 else parts
    kept = [
        part
        for part, after in zip(parts, [*parts[1:], ""], strict=True)
        if not after.startswith(part + ".")
    ]
    return ".".join(kept) or name


@contextmanager
def naming(title: str) -> Iterator[None]:
    """What was not foreseen while a layer is planned is a PlanError with its name."""
    try:
        yield
    except EspnError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise PlanError(
            f"{title}: cannot be planned ({type(error).__name__}: {lines[0][:200]}). "
            "Replace the layer by convolutions, pools, additions and polynomial "
            'activations of images or vectors, or convert with protocol="espn".'
        ) from error
