"""Residual networks: ResNet-18, -32 and -110 for CIFAR, ResNet-50, a small one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .network import Network, checked, conv


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out = out + (x if self.downsample is None else self.downsample(x))
        activated: Tensor = self.relu2(out)
        return activated


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride is the 3x3's."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1 = conv(inputs, width, kernel=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(width, outputs, kernel=1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        activated: Tensor = self.relu3(out)
        return activated


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(
        conv(inputs, outputs, kernel=1, stride=stride), nn.BatchNorm2d(outputs)
    )


def _stages(
    block: type[nn.Module], inputs: int, widths: Sequence[int], blocks: Sequence[int]
) -> list[nn.Sequential]:
    """Return the stages; each but the first halves height and width."""
    stages = []
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        members = []
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            members.append(block(inputs, width, stride))
            inputs = width
        stages.append(nn.Sequential(*members))
    return stages


class _ResNet(Network):
    """Stem, stages of blocks, average over the whole map, classifier."""

    def __init__(
        self,
        stem: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.stages = nn.Sequential(*_stages(_BasicBlock, stem, widths, blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stages(self.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(out), 1))
        return logits


def _cifar_resnet(
    name: str,
    widths: Sequence[int],
    blocks: Sequence[int],
    classes: int,
    in_channels: int,
    size: int,
) -> Network:
    architecture = checked(
        name, classes=classes, in_channels=in_channels, size=size, smallest=4
    )
    network = _ResNet(widths[0], widths, blocks, classes, in_channels)
    network.built_as(architecture)
    return network


def resnet18(*, classes: int = 10, in_channels: int = 3, size: int = 32) -> Network:
    """Return ResNet-18 in its CIFAR form: 3x3 stem, no pooling after it.

    20 convolutions, 1 fully connected layer, 17 activations.

    Args:
        classes: outputs.
        in_channels: channels of the input.
        size: height and width of the input, at least 4.

    Raises:
        ShapeError: an argument is too small.
    """
    return _cifar_resnet(
        "resnet18", (64, 128, 256, 512), (2, 2, 2, 2), classes, in_channels, size
    )


def resnet32(*, classes: int = 10, in_channels: int = 3, size: int = 32) -> Network:
    """Return ResNet-32 for CIFAR, with 1x1 projection shortcuts.

    33 convolutions, 1 fully connected layer, 31 activations.

    Args:
        classes: outputs.
        in_channels: channels of the input.
        size: height and width of the input, at least 4.

    Raises:
        ShapeError: an argument is too small.
    """
    return _cifar_resnet(
        "resnet32", (16, 32, 64), (5, 5, 5), classes, in_channels, size
    )


def resnet110(*, classes: int = 10, in_channels: int = 3, size: int = 32) -> Network:
    """Return ResNet-110 for CIFAR, with 1x1 projection shortcuts.

    111 convolutions, 1 fully connected layer, 109 activations.

    Args:
        classes: outputs.
        in_channels: channels of the input.
        size: height and width of the input, at least 4.

    Raises:
        ShapeError: an argument is too small.
    """
    return _cifar_resnet(
        "resnet110", (16, 32, 64), (18, 18, 18), classes, in_channels, size
    )


def fashion_resnet(
    *, classes: int = 10, in_channels: int = 1, size: int = 28
) -> Network:
    """Return an eight-layer residual network, small enough to bundle and to demo.

    9 convolutions, 1 fully connected layer, 7 activations.

    Args:
        classes: outputs.
        in_channels: channels of the input.
        size: height and width of the input, at least 4.

    Raises:
        ShapeError: an argument is too small.
    """
    return _cifar_resnet(
        "fashion_resnet", (16, 32, 64), (1, 1, 1), classes, in_channels, size
    )


class _ResNet50(Network):
    """torchvision's ResNet-50 with an average pool in the stem."""

    def __init__(self, classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, 64, kernel=7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(
            _Bottleneck, 64, (256, 512, 1024, 2048), (3, 4, 6, 3)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(self.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(out), 1))
        return logits


def resnet50(*, classes: int = 1000, in_channels: int = 3, size: int = 224) -> Network:
    """Return torchvision's ResNet-50 with its stem's max-pool made an average pool.

    53 convolutions, 1 fully connected layer, 49 activations. Parameters and buffers
    bear torchvision's names: its weights load.

    Args:
        classes: outputs.
        in_channels: channels of the input.
        size: height and width of the input, at least 32.

    Raises:
        ShapeError: an argument is too small.
    """
    architecture = checked(
        "resnet50", classes=classes, in_channels=in_channels, size=size, smallest=32
    )
    network = _ResNet50(classes, in_channels)
    network.built_as(architecture)
    return network
