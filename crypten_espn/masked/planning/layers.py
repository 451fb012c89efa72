"""A node of a converted network as the masked engine's planner sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ...errors import EspnError, PlanError
from ...polynomial import Polynomial
from ..linear import NO_PADS, Pads, Pair
from .precision import NO_EFFECT, Effect

RESCALED = ":rescaled"


@dataclass(frozen=True)
class Windows:
    """Where a convolution or a pool looks; pads are (top, left, bottom, right)."""

    kernel: Pair
    stride: Pair
    pads: Pads = NO_PADS
    dilation: Pair = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Factors:
    """Public factors by position: integers / divisor.

    Args:
        integers: (height, width), at least 0.
    """

    integers: np.ndarray
    divisor: int


@dataclass
class Layer:
    """A node of the converted network, and what calibration says of its result.

    Attributes:
        kind: "conv", "gemm", "activation", "add", "concat", "pool", "scale",
            "flatten", "pad", "same" or "input".
        weight, bias: names of parameters; empty where there are none.
        windows: of a convolution, of a pool, and the pads of a pad.
        size: (rows, columns) that a pool leaves, where that decides its windows.
        factors: of a scale.
        ceil_mode: whether a pool adds a window that does not fit; it must not.
        axis: of a concatenation, the batch counted.
        target: the shape a reshape asks for, the batch included.
        largest, mean_square: of the result.
        effect: of errors of the result, as a function of an activation's input.
        weight_effect: the outputs' mean square error when every weight is off by 1,
            its sign random.
    """

    name: str
    kind: str
    inputs: list[str]
    shape: tuple[int, ...] = ()
    weight: str = ""
    bias: str = ""
    windows: Windows | None = None
    size: Pair | None = None
    factors: Factors | None = None
    ceil_mode: bool = False
    axis: int = 1
    target: tuple[int, ...] | None = None
    polynomial: Polynomial | None = None
    largest: float = 0.0
    mean_square: float = 0.0
    effect: Effect = NO_EFFECT
    weight_effect: float = 0.0

    @property
    def title(self) -> str:
        return layer_title(self.name)

    @property
    def weighted(self) -> bool:
        return self.kind in ("conv", "gemm")

    def refused(self, found: str) -> PlanError:
        """The error that names this layer."""
        return PlanError(f"{self.title}: {found}")

    def pool_windows(self, shape: Sequence[int]) -> Windows:
        """A pool's windows over values of this shape, (channels, height, width)."""
        if self.size is None:
            assert self.windows is not None
            return self._without_remainder(self.windows, shape)
        height, width = self.image(shape)[1:]
        rows, columns = self.size
        if height % rows or width % columns:
            raise self.refused(
                f"adaptive pooling from {height}x{width} to {rows}x{columns} has "
                "uneven windows. Resize the input so that they divide, or pool with "
                "fixed windows."
            )
        kernel = (height // rows, width // columns)
        return Windows(kernel, kernel)

    def _without_remainder(self, windows: Windows, shape: Sequence[int]) -> Windows:
        top, left, bottom, right = windows.pads
        padded = (shape[1] + top + bottom, shape[2] + left + right)
        rest = [
            (size - k) % s
            for size, k, s in zip(padded, windows.kernel, windows.stride, strict=True)
        ]
        if self.ceil_mode and any(rest):
            raise self.refused(
                f"ceil_mode=True over {padded[0]}x{padded[1]} adds windows that leave "
                "the image; use ceil_mode=False, or pad the image so that they fit."
            )
        return windows

    def divisor(self, shape: Sequence[int]) -> int:
        """What a pool or a scale divides its sums by, for inputs of this shape."""
        if self.factors is not None:
            return self.factors.divisor
        return math.prod(self.pool_windows(shape).kernel)

    def image(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(channels, height, width) of an input that has to be an image."""
        if len(shape) != 3:
            raise self.refused(
                f"values of {len(shape) + 1} dimensions; this layer takes (batch, "
                "channels, height, width)."
            )
        return shape[0], shape[1], shape[2]


def layer_title(name: str) -> str:
    """A readable layer name from an exporter's value name.

    /stages/stages.0/stages.0.0/relu1/Op_output_0 is stages.0.0.relu1.
    """
    if name.endswith(RESCALED):
        return f"{layer_title(name.removesuffix(RESCALED))} (rescaled)"
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
