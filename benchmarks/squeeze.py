"""ResNet-18 with squeeze-and-excite blocks: gates of channels, as many networks have.

Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018; the gate's sigmoid is a
polynomial here, and the block ends the residual branch, behind its batch-norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crypten_espn import Polynomial, PolynomialActivation
from crypten_espn.pillar import networks

REDUCTION = 16


class GatedNorm(nn.BatchNorm2d):
    """Batch-norm whose channels are weighed by what all of them are on average."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        gate = Polynomial.fit(torch.sigmoid, degree=3, frac_bits=10)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // REDUCTION, 1),
            nn.ReLU(),
            nn.Conv2d(channels // REDUCTION, channels, 1),
            PolynomialActivation(gate),
        )

    def forward(self, input: Tensor) -> Tensor:
        """The image, normalised and weighed, (batch, channels, h, w)."""
        x = super().forward(input)
        weighed: Tensor = x * self.gate(x)
        return weighed


def seresnet18(*, classes: int = 10, size: int = 32) -> Any:
    """The package's ResNet-18, a gate at the end of each block.

    20 convolutions and 16 small ones, 1 fully connected layer, 33 activations, 8
    products.
    """
    network = networks.resnet18(classes=classes, size=size)
    for module in list(network.modules()):
        norm = getattr(module, "bn2", None)
        if isinstance(norm, nn.BatchNorm2d):
            module.bn2 = GatedNorm(norm.num_features)
    return network
