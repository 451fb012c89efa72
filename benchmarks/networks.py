"""The networks that are measured: fresh weights, calibrated batch-norm, noise."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crypten_espn.masked.model import MaskedModel

MODELS = (
    "minionn", "vgg16", "resnet18", "seresnet18", "resnet32", "resnet110", "resnet50"
)  # fmt: skip
PRECISIONS = ("compact", "fast", "high")
CLASSES = {"resnet32": 100, "resnet50": 1000}  # 10 elsewhere, as in the paper
DEGREE, FRAC_BITS = 4, 10  # as in the recipes
_CALIBRATION = 32  # images of 32 x 32 for a plan; of larger ones as many pixels
_FEWEST = 4


def image_size(model: str) -> int:
    """Height and width of the images that a network is for."""
    return 224 if model == "resnet50" else 32


def images(model: str, batch: int, size: int | None = None) -> Any:
    """A batch of noise in the network's input shape."""
    import torch

    size = image_size(model) if size is None else size
    return torch.randn(batch, 3, size, size)


def calibration(model: str, size: int | None = None) -> Any:
    """Noise from which batch-norm takes its statistics, and a plan its bounds."""
    size = image_size(model) if size is None else size
    return images(model, max(_FEWEST, _CALIBRATION * 32**2 // size**2), size)


def build(model: str, size: int | None = None) -> tuple[Any, Any]:
    """A network with fresh weights, as ReLU and as polynomial twin, in eval mode.

    1. Seeded weights; small gains, smaller still where a block joins its shortcut.
    2. The twins share them; each takes its batch-norm statistics from two batches of
       noise.

    Args:
        model: one of MODELS.
        size: height and width of its images; None for its own.
    """
    import torch
    from torch import nn

    from crypten_espn import Polynomial, replace_activations
    from crypten_espn.pillar import networks

    from .squeeze import seresnet18

    others = {"minionn": networks.mini_onn, "seresnet18": seresnet18}
    make = others.get(model) or getattr(networks, model)
    shape = {} if size is None else {"size": size}
    torch.manual_seed(7)
    polynomial = Polynomial.fit(torch.relu, degree=DEGREE, frac_bits=FRAC_BITS)
    network = make(classes=CLASSES.get(model, 10), **shape)
    norms = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    joins = [name for name in norms if _joins_shortcut(network, name)]
    for name, module in norms.items():
        module.momentum = None  # average over the batches to come
        # what joins a shortcut adds up over the blocks; its sum stays the same
        gain = 0.3 / len(joins) ** 0.5 if name in joins else 0.3
        nn.init.constant_(module.weight, gain)
    relu = copy.deepcopy(network)
    twin = replace_activations(network, {nn.ReLU: polynomial})
    with torch.no_grad():
        for _ in range(2):
            noise = calibration(model, size)
            twin.train()(noise)
            relu.train()(noise)
    return relu.eval(), twin.eval()


def planned(
    model: str, size: int | None = None, *, precision: str = "fast"
) -> MaskedModel:
    """The masked engine's plan and integers of one of them."""
    import crypten_espn
    from crypten_espn.masked.planning import masked_model

    _, network = build(model, size)
    example = calibration(model, size)
    return masked_model(
        crypten_espn.convert(network, example), example, precision=precision
    )


def _joins_shortcut(network: Any, name: str) -> bool:
    """Whether this batch-norm is the last of a residual block."""
    parent, _, own = name.rpartition(".")
    block = network.get_submodule(parent)
    last = "bn3" if hasattr(block, "bn3") else "bn2"
    return own == last and hasattr(block, "downsample")
