"""The networks of the PILLAR paper, and a small one for Fashion-MNIST.

Every network is built with `torch.nn.ReLU`, each activation a module of its own;
`replace_activations` makes it polynomial. Pooling is average pooling throughout, so
nothing but the activations is non-linear.

Source: Diaa et al., USENIX Security 2024 (architectures); He et al., CVPR 2016
(residual networks); Liu et al., MiniONN, CCS 2017; torchvision (names of ResNet-50's
parameters, so that its weights load).
"""

from __future__ import annotations

from .network import NETWORKS, Architecture, Network
from .plain import convnet, mini_onn, vgg16
from .residual import fashion_resnet, resnet18, resnet32, resnet50, resnet110

NETWORKS.update(
    (build.__name__, build)
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
)

__all__ = [
    "NETWORKS",
    "Architecture",
    "Network",
    "convnet",
    "fashion_resnet",
    "mini_onn",
    "resnet18",
    "resnet32",
    "resnet50",
    "resnet110",
    "vgg16",
]
