"""A network that knows how it was built, and what all of them are built of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ...errors import CheckpointError, ShapeError
from ..data import Normalization

# Every builder by its name; networks/__init__.py fills it.
NETWORKS: dict[str, Callable[..., Network]] = {}


@dataclass(frozen=True)
class Architecture:
    """Which function of this room builds a network, and with what arguments."""

    name: str
    classes: int
    in_channels: int
    size: int

    def build(self) -> Network:
        """Return the network with fresh weights.

        Raises:
            CheckpointError: no network has this name.
        """
        if self.name not in NETWORKS:
            raise CheckpointError(
                f"unknown network {self.name!r}; known are {', '.join(NETWORKS)}"
            )
        return NETWORKS[self.name](
            classes=self.classes, in_channels=self.in_channels, size=self.size
        )

    def arguments(self) -> dict[str, Any]:
        """Return the fields as a dictionary of plain values."""
        return asdict(self)


class Network(nn.Module):
    """A network that knows how it was built.

    Attributes:
        architecture: name and arguments, enough to build it again.
        normalization: of the images it was trained on, where a file says so.
        notes: what a file holds besides: recipe, accuracy, selection rule.
    """

    architecture: Architecture
    normalization: Normalization | None = None
    notes: dict[str, object] | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one input."""
        size = self.architecture.size
        return (self.architecture.in_channels, size, size)

    def built_as(self, architecture: Architecture) -> None:
        """Remember the architecture, and draw the convolutions' weights."""
        self.architecture = architecture
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu"
                )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def checked(
    name: str, *, classes: int, in_channels: int, size: int, smallest: int
) -> Architecture:
    """Return the architecture, or raise ShapeError naming the bad argument."""
    for what, given, least in (
        ("classes", classes, 1),
        ("in_channels", in_channels, 1),
        ("size", size, smallest),
    ):
        if given < least:
            raise ShapeError(
                f"{name} was asked for with {what}={given}; it needs {what} >= {least}"
            )
    return Architecture(name, classes, in_channels, size)


def conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=kernel // 2,
        bias=False,
    )
