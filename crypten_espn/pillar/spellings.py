"""The functions and tensor methods that compute what a module type computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

# The functions and tensor methods that stand for a module type.
SPELLINGS: dict[type[nn.Module], tuple[Callable[..., object] | str, ...]] = {
    nn.ReLU: (
        torch.relu,
        torch.relu_,
        functional.relu,
        functional.relu_,
        "relu",
        "relu_",
    ),
    nn.ReLU6: (functional.relu6,),
    nn.SiLU: (functional.silu,),
    nn.GELU: (functional.gelu,),
    nn.Hardswish: (functional.hardswish,),
    nn.Hardsigmoid: (functional.hardsigmoid,),
    nn.LeakyReLU: (functional.leaky_relu, functional.leaky_relu_),
    nn.ELU: (functional.elu, functional.elu_),
    nn.Softplus: (functional.softplus,),
    nn.Mish: (functional.mish,),
    nn.Sigmoid: (
        torch.sigmoid,
        torch.sigmoid_,
        functional.sigmoid,
        "sigmoid",
        "sigmoid_",
    ),
    nn.Tanh: (torch.tanh, torch.tanh_, functional.tanh, "tanh", "tanh_"),
    nn.MaxPool2d: (torch.max_pool2d, functional.max_pool2d),
    nn.AdaptiveMaxPool2d: (functional.adaptive_max_pool2d,),
}

_POOLS = (nn.MaxPool2d, nn.AdaptiveMaxPool2d)
ACTIVATIONS = tuple(kind for kind in SPELLINGS if kind not in _POOLS)
ACTIVATION_CALLS = {call: kind for kind in ACTIVATIONS for call in SPELLINGS[kind]}
