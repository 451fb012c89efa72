"""Networks without shortcuts: MiniONN's, VGG-16, two convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .network import Network, checked, conv


class _Sequential(Network):
    """Features, flattened, then a classifier."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


def mini_onn(*, classes: int = 10, in_channels: int = 3, size: int = 32) -> Network:
    """Return MiniONN's CIFAR network with batch-norm.

    7 convolutions, 1 fully connected layer, 7 activations.

    Args:
        classes: outputs.
        in_channels: channels of the input.
        size: height and width of the input, at least 4.

    Raises:
        ShapeError: an argument is too small.
    """
    architecture = checked(
        "mini_onn", classes=classes, in_channels=in_channels, size=size, smallest=4
    )
    layers: list[nn.Module] = []
    channels = in_channels
    for index, (width, kernel) in enumerate(
        [(64, 3), (64, 3), (64, 3), (64, 3), (64, 3), (64, 1), (16, 1)], start=1
    ):
        layers += [
            conv(channels, width, kernel=kernel),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        if index in (2, 4):
            layers.append(nn.AvgPool2d(2))
        channels = width
    side = size // 2 // 2
    network = _Sequential(
        nn.Sequential(*layers), nn.Linear(channels * side * side, classes)
    )
    network.built_as(architecture)
    return network


def vgg16(*, classes: int = 10, in_channels: int = 3, size: int = 32) -> Network:
    """Return VGG-16 with batch-norm, pooling before the activation.

    13 convolutions, 3 fully connected layers, 15 activations. A block whose maps
    are already 1x1 is not pooled, so inputs below 32x32 work too.

    Args:
        classes: outputs.
        in_channels: channels of the input.
        size: height and width of the input, at least 1.

    Raises:
        ShapeError: an argument is too small.
    """
    architecture = checked(
        "vgg16", classes=classes, in_channels=in_channels, size=size, smallest=1
    )
    layers: list[nn.Module] = []
    channels, side = in_channels, size
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for index in range(1, convolutions + 1):
            layers += [conv(channels, width), nn.BatchNorm2d(width)]
            if index == convolutions and side > 1:
                layers.append(nn.AvgPool2d(2))
                side //= 2
            layers.append(nn.ReLU())
            channels = width
    network = _Sequential(
        nn.Sequential(*layers),
        nn.Sequential(
            nn.Linear(channels * side * side, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, classes),
        ),
    )
    network.built_as(architecture)
    return network


def convnet(*, classes: int = 10, in_channels: int = 3, size: int = 32) -> Network:
    """Return a network of two convolutions, without batch-norm.

    2 convolutions, 1 fully connected layer, 2 activations: the smallest network in
    which escaping activations show.

    Args:
        classes: outputs.
        in_channels: channels of the input.
        size: height and width of the input, at least 4.

    Raises:
        ShapeError: an argument is too small.
    """
    architecture = checked(
        "convnet", classes=classes, in_channels=in_channels, size=size, smallest=4
    )
    side = size // 2 // 2
    network = _Sequential(
        nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ),
        nn.Linear(64 * side * side, classes),
    )
    network.built_as(architecture)
    return network
