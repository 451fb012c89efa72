"""What a CrypTen user may write: single layers and constructs, one line each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE, WIDE, VECTOR, SEQUENCE = (2, 4, 8, 6), (2, 4, 9, 9), (2, 6), (2, 3, 6)


class Function(nn.Module):
    """A forward written as a function of the input and some layers."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def _f(function: Callable[..., Tensor], *layers: nn.Module) -> nn.Module:
    return Function(function, *layers)


def constructs() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Name to a fresh module in evaluation mode and the shape of its input."""
    torch.manual_seed(5)
    conv, linear = nn.Conv2d, nn.Linear
    channel = torch.linspace(0.5, 2.0, 4).view(1, 4, 1, 1)
    table: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        # Arithmetic with tensors and constants.
        "add scalar": (_f(lambda x: x + 1.5), VECTOR),
        "scalar add": (_f(lambda x: 1.5 + x), VECTOR),
        "sub scalar": (_f(lambda x: x - 1.5), VECTOR),
        "scalar sub": (_f(lambda x: 1.5 - x), VECTOR),
        "mul scalar": (_f(lambda x: x * 1.5), VECTOR),
        "scalar mul": (_f(lambda x: 1.5 * x), VECTOR),
        "div scalar": (_f(lambda x: x / 1.5), VECTOR),
        "scalar div": (_f(lambda x: 2.0 / (x * x + 1)), VECTOR),
        "neg": (_f(lambda x: -x), VECTOR),
        "pow 2": (_f(lambda x: x**2), VECTOR),
        "pow 3": (_f(lambda x: x**3), VECTOR),
        "square": (_f(torch.square), VECTOR),
        "x * x": (_f(lambda x: x * x), VECTOR),
        "x + x": (_f(lambda x: x + x), VECTOR),
        "x - x": (_f(lambda x: x - 0.5 * x), VECTOR),
        "add channel": (_f(lambda x: x + channel), IMAGE),
        "mul channel": (_f(lambda x: x * channel), IMAGE),
        "div channel": (_f(lambda x: x / channel), IMAGE),
        "normalise": (_f(lambda x: (x - 0.4) / 0.2), IMAGE),
        "add row": (_f(lambda x: x + torch.arange(6.0)), VECTOR),
        "add ones like": (_f(lambda x: x + torch.ones_like(x)), VECTOR),
        "add layers": (
            _f(lambda x, a, b: a(x) + b(x), linear(6, 4), linear(6, 4)),
            VECTOR,
        ),
        "sub layers": (
            _f(lambda x, a, b: a(x) - b(x), linear(6, 4), linear(6, 4)),
            VECTOR,
        ),
        "mul layers": (
            _f(lambda x, a, b: a(x) * b(x), linear(6, 4), linear(6, 4)),
            VECTOR,
        ),
        "residual": (_f(lambda x, a: x + a(x), conv(4, 4, 3, padding=1)), IMAGE),
        "matmul constant": (_f(lambda x: x @ torch.ones(6, 2)), VECTOR),
        "abs": (_f(torch.abs), VECTOR),
        "sqrt": (_f(lambda x: torch.sqrt(x * x + 1)), VECTOR),
        "exp": (_f(torch.exp), VECTOR),
        # Reductions and shapes.
        "sum channels": (_f(lambda x: x.sum(1)), IMAGE),
        "sum keepdim": (_f(lambda x: x.sum(1, keepdim=True)), IMAGE),
        "mean channels": (_f(lambda x: x.mean(1)), IMAGE),
        "mean image": (_f(lambda x: x.mean([2, 3])), IMAGE),
        "mean keepdim": (_f(lambda x: x.mean([2, 3], keepdim=True)), IMAGE),
        "flatten": (nn.Flatten(), IMAGE),
        "torch.flatten": (_f(lambda x: torch.flatten(x, 1)), IMAGE),
        "view size": (_f(lambda x: x.view(x.size(0), -1)), IMAGE),
        "view -1": (_f(lambda x: x.view(-1, 192)), IMAGE),
        "reshape": (_f(lambda x: x.reshape(x.shape[0], 4, -1)), IMAGE),
        "unflatten": (_f(lambda x: x.view(x.size(0), 2, 3)), VECTOR),
        "transpose": (_f(lambda x: x.transpose(2, 3)), IMAGE),
        "permute": (_f(lambda x: x.permute(0, 2, 3, 1)), IMAGE),
        "unsqueeze": (_f(lambda x: x.unsqueeze(1)), VECTOR),
        "squeeze": (_f(lambda x: x.mean(1, keepdim=True).squeeze(1)), VECTOR),
        "slice channels": (_f(lambda x: x[:, 1:3]), IMAGE),
        "slice rows": (_f(lambda x: x[:, :, 1:5]), IMAGE),
        "slice steps": (_f(lambda x: x[:, :, ::2, ::2]), IMAGE),
        "select": (_f(lambda x: x[:, 0]), IMAGE),
        "chunk": (_f(lambda x: x.chunk(2, 1)[0]), IMAGE),
        "split": (_f(lambda x: x.split(2, 1)[1]), IMAGE),
        "cat": (_f(lambda x: torch.cat([x, x], 1)), IMAGE),
        "cat layers": (_f(lambda x, a: torch.cat([x, a(x)], 1), conv(4, 2, 1)), IMAGE),
        "cat one": (_f(lambda x: torch.cat([x], 1)), IMAGE),
        "cat ones": (_f(lambda x: torch.cat([x, torch.ones_like(x)], 1)), IMAGE),
        "stack": (_f(lambda x: torch.stack([x, x], 1)), VECTOR),
        "expand": (_f(lambda x: x.mean(1, keepdim=True).expand(-1, 6)), VECTOR),
        "pad": (_f(lambda x: functional.pad(x, (1, 2, 0, 1))), IMAGE),
        "pad value": (_f(lambda x: functional.pad(x, (1, 1, 1, 1), value=0.5)), IMAGE),
        "zero pad": (nn.ZeroPad2d(1), IMAGE),
        # Convolutions and linear layers.
        "conv": (conv(4, 3, 3), IMAGE),
        "conv no bias": (conv(4, 3, 3, bias=False), IMAGE),
        "conv stride": (conv(4, 3, 3, stride=2, padding=1), IMAGE),
        "conv uneven": (conv(4, 3, (3, 1), padding=(1, 0)), IMAGE),
        "conv dilation": (conv(4, 3, 3, dilation=2, padding=2), IMAGE),
        "conv groups": (conv(4, 4, 3, groups=2), IMAGE),
        "conv depthwise": (conv(4, 8, 3, groups=4), IMAGE),
        "conv same": (conv(4, 3, 3, padding="same"), IMAGE),
        "conv same even": (conv(4, 3, 4, padding="same"), IMAGE),
        "conv1d": (nn.Conv1d(3, 4, 3), SEQUENCE),
        "conv transposed": (nn.ConvTranspose2d(4, 3, 2, stride=2), IMAGE),
        "linear": (linear(6, 3), VECTOR),
        "linear no bias": (linear(6, 3, bias=False), VECTOR),
        "linear sequence": (linear(6, 3), SEQUENCE),
        "two linear": (nn.Sequential(linear(6, 5), linear(5, 3)), VECTOR),
        # Pools.
        "avg pool": (nn.AvgPool2d(2), IMAGE),
        "avg pool stride": (nn.AvgPool2d(3, 2), WIDE),
        "avg pool pad": (nn.AvgPool2d(3, 2, 1), WIDE),
        "avg pool inside": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), WIDE),
        "avg pool ceil": (nn.AvgPool2d(2, 2, ceil_mode=True), WIDE),
        "global pool": (nn.AdaptiveAvgPool2d(1), IMAGE),
        "adaptive pool": (nn.AdaptiveAvgPool2d((4, 3)), IMAGE),
        "pool by size": (_f(lambda x: functional.avg_pool2d(x, x.size()[2:])), IMAGE),
        "max pool": (nn.MaxPool2d(2), IMAGE),
        "max pool pad": (nn.MaxPool2d(3, 2, 1), WIDE),
        # Norms, activations, heads.
        "batch norm": (nn.BatchNorm2d(4), IMAGE),
        "batch norm 1d": (nn.BatchNorm1d(6), VECTOR),
        "conv norm": (nn.Sequential(conv(4, 4, 3), nn.BatchNorm2d(4)), IMAGE),
        "dropout": (nn.Sequential(linear(6, 3), nn.Dropout()), VECTOR),
        "dropout 2d": (nn.Sequential(conv(4, 3, 1), nn.Dropout2d()), IMAGE),
        "identity": (nn.Sequential(nn.Identity(), linear(6, 3)), VECTOR),
        "relu": (nn.ReLU(), VECTOR),
        "relu6": (nn.ReLU6(), VECTOR),
        "hardtanh": (nn.Hardtanh(), VECTOR),
        "sigmoid": (nn.Sigmoid(), VECTOR),
        "tanh": (nn.Tanh(), VECTOR),
        "softmax": (nn.Softmax(1), VECTOR),
        "log softmax": (nn.LogSoftmax(1), VECTOR),
        "head": (
            _f(
                lambda x, a, b: b(functional.avg_pool2d(a(x), 2).view(x.size(0), -1)),
                conv(4, 4, 3, padding=1),
                linear(48, 3),
            ),
            IMAGE,
        ),
    }
    return {name: (module.eval(), shape) for name, (module, shape) in table.items()}
