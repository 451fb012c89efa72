"""The networks of the PILLAR paper, and a small one for Fashion-MNIST.

Every network is built with `torch.nn.ReLU`, each activation a module of its own;
`replace_activations` makes it polynomial. Pooling is average pooling throughout, so
nothing but the activations is non-linear.

Source: Diaa et al., USENIX Security 2024 (architectures); He et al., CVPR 2016
(residual networks); Liu et al., MiniONN, CCS 2017; torchvision (names of ResNet-50's
parameters, so that its weights load).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ShapeError
from .data import Normalization


@dataclass(frozen=True)
class Architecture:
    """Which function of this file builds a network, and with what arguments."""

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
    notes: dict[str, Any] | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one input."""
        size = self.architecture.size
        return (self.architecture.in_channels, size, size)

    def _built_as(self, architecture: Architecture) -> None:
        self.architecture = architecture
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu"
                )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _checked(
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


def _conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=kernel // 2,
        bias=False,
    )


class _Sequential(Network):
    """Features, flattened, then a classifier."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


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
    built_as = _checked(
        "mini_onn", classes=classes, in_channels=in_channels, size=size, smallest=4
    )
    layers: list[nn.Module] = []
    channels = in_channels
    for index, (width, kernel) in enumerate(
        [(64, 3), (64, 3), (64, 3), (64, 3), (64, 3), (64, 1), (16, 1)], start=1
    ):
        layers += [
            _conv(channels, width, kernel=kernel),
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
    network._built_as(built_as)
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
    built_as = _checked(
        "vgg16", classes=classes, in_channels=in_channels, size=size, smallest=1
    )
    layers: list[nn.Module] = []
    channels, side = in_channels, size
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for index in range(1, convolutions + 1):
            layers += [_conv(channels, width), nn.BatchNorm2d(width)]
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
    network._built_as(built_as)
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
    built_as = _checked(
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
    network._built_as(built_as)
    return network


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride is the 3x3's."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1 = _conv(inputs, width, kernel=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(width, width, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = _conv(width, outputs, kernel=1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + (x if self.downsample is None else self.downsample(x)))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(
        _conv(inputs, outputs, kernel=1, stride=stride), nn.BatchNorm2d(outputs)
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
        self.conv1 = _conv(in_channels, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.stages = nn.Sequential(*_stages(_BasicBlock, stem, widths, blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stages(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(out), 1))


def _cifar_resnet(
    name: str,
    widths: Sequence[int],
    blocks: Sequence[int],
    classes: int,
    in_channels: int,
    size: int,
) -> Network:
    built_as = _checked(
        name, classes=classes, in_channels=in_channels, size=size, smallest=4
    )
    network = _ResNet(widths[0], widths, blocks, classes, in_channels)
    network._built_as(built_as)
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
        self.conv1 = _conv(in_channels, 64, kernel=7, stride=2)
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
        return self.fc(torch.flatten(self.avgpool(out), 1))


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
    built_as = _checked(
        "resnet50", classes=classes, in_channels=in_channels, size=size, smallest=32
    )
    network = _ResNet50(classes, in_channels)
    network._built_as(built_as)
    return network


NETWORKS: dict[str, Callable[..., Network]] = {
    build.__name__: build
    for build in (
        mini_onn,
        vgg16,
        resnet18,
        resnet32,
        resnet110,
        resnet50,
        convnet,
        fashion_resnet,
    )
}
