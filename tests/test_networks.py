"""The networks have the layers, activations and parameters of the paper's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crypten_espn.errors import CheckpointError, ShapeError
from crypten_espn.pillar.networks import NETWORKS, Architecture, Network


def count_activations(network: Network) -> tuple[int, int]:
    """Return how many ReLU modules there are and how many values they see."""
    values = []
    handles = [
        module.register_forward_hook(lambda _m, _i, out: values.append(out[0].numel()))
        for module in network.modules()
        if isinstance(module, nn.ReLU)
    ]
    with torch.no_grad():
        network.eval()(torch.zeros(1, *network.input_shape))
    for handle in handles:
        handle.remove()
    return len(values), sum(values)


# name, convolutions, fully connected, activations, values at 32x32, parameters
TABLE = [
    ("mini_onn", 7, 1, 7, 173_056, 165_354),
    ("vgg16", 13, 3, 15, 183_808, 15_249_354),
    ("resnet18", 20, 1, 17, 557_056, 11_173_962),
    ("resnet32", 33, 1, 31, 303_104, 466_906),
    ("resnet110", 111, 1, 109, 1_048_576, 1_730_714),
    ("convnet", 2, 1, 2, 49_152, 60_362),
    ("fashion_resnet", 9, 1, 7, 73_728, 78_042),
]


@pytest.mark.parametrize(("name", "conv", "full", "acts", "values", "params"), TABLE)
def test_counts_at_32x32(
    name: str, conv: int, full: int, acts: int, values: int, params: int
) -> None:
    network = Architecture(name, classes=10, in_channels=3, size=32).build()
    modules = list(network.modules())
    assert sum(isinstance(m, nn.Conv2d) for m in modules) == conv
    assert sum(isinstance(m, nn.Linear) for m in modules) == full
    assert count_activations(network) == (acts, values)
    assert sum(p.numel() for p in network.parameters()) == params


ROUNDS = {
    "mini_onn": 15,
    "vgg16": 31,
    "resnet18": 38,
    "resnet32": 65,
    "resnet110": 221,
}


@pytest.mark.parametrize("name", ROUNDS)
def test_one_round_for_each_linear_layer_and_activation(name: str) -> None:
    network = Architecture(name, classes=10, in_channels=3, size=32).build()
    rounds = sum(
        isinstance(m, (nn.Conv2d, nn.Linear, nn.ReLU)) for m in network.modules()
    )
    assert rounds == ROUNDS[name]


@pytest.mark.slow
def test_resnet50_is_torchvisions() -> None:
    from torchvision.models import resnet50

    ours = Architecture("resnet50", classes=1000, in_channels=3, size=64).build()
    theirs = resnet50()
    ours.load_state_dict(theirs.state_dict())
    # With the same pool the two compute the same.
    theirs.maxpool = nn.AvgPool2d(3, stride=2, padding=1)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert count_activations(ours)[0] == 49


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "resnet110"])
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 28, 10), (4, 47, 3)])
def test_any_channels_size_and_classes(
    name: str, channels: int, size: int, classes: int
) -> None:
    size = max(size, 32) if name == "resnet50" else size
    network = Architecture(name, classes, channels, size).build()
    assert network.input_shape == (channels, size, size)
    with torch.no_grad():
        logits = network.eval()(torch.zeros(2, *network.input_shape))
    assert logits.shape == (2, classes)


@pytest.mark.parametrize("name", NETWORKS)
def test_builders_remember_their_arguments(name: str) -> None:
    network = NETWORKS[name](classes=7, in_channels=2, size=40)
    assert network.architecture == Architecture(name, 7, 2, 40)
    assert Architecture(**network.architecture.arguments()) == network.architecture


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"classes": 0}, "classes=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"size": 3}, "size=3"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(ShapeError, match=named):
        NETWORKS["mini_onn"](**arguments)


def test_an_unknown_network_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"lenet.*mini_onn"):
        Architecture("lenet", 10, 3, 32).build()
