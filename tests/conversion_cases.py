"""Networks of one construct each, for the tests of reading and converting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import crypten_espn as espn
from crypten_espn.errors import ConversionError
from crypten_espn.graph import read, simplify
from crypten_espn.polynomial import Polynomial
from tests import oracle

POLYNOMIAL = Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))


class Function(nn.Module):
    """A forward written as a function of the input and some layers."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def image() -> Tensor:
    return torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(1))


def vector() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(2))


def settled(model: nn.Module, example: Tensor) -> nn.Module:
    """With batch-norm statistics that are not those of a fresh layer."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
    model.train()
    with torch.no_grad():
        model(3 * example + 1)
    return model.eval()


def constants() -> dict[str, tuple[nn.Module, Tensor]]:
    """Public constants in every place where they can be folded or become a layer."""
    torch.manual_seed(3)
    x, v = image(), vector()
    mean = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)
    plane = torch.linspace(-1, 1, 192).view(4, 8, 6)

    def conv(i: int = 4, o: int = 4, k: int = 3, p: int = 0, g: int = 1) -> nn.Module:
        return nn.Conv2d(i, o, k, padding=p, groups=g)

    def beside(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        ones, zeros = torch.full_like(x[:, :2], 0.5), torch.zeros_like(x[:, :1])
        return b(torch.cat([zeros, x, ones, a(x)], 1))

    table: dict[str, tuple[Callable[..., Tensor], tuple[nn.Module, ...], Tensor]] = {
        "normalised, then padded": (lambda x, a: a((x - mean) / 0.2), (conv(p=1),), x),
        "normalised": (lambda x, a: a((x - mean) / 0.2), (conv(),), x),
        "normalised, groups": (lambda x, a: a((x - mean) * mean), (conv(g=2),), x),
        "factor, then padded": (lambda x, a: a(x * mean), (conv(p=1, g=2),), x),
        "negated": (lambda x, a: -a(x), (conv(),), x),
        "one minus": (lambda x, a: 1 - a(x), (conv(),), x),
        "difference": (lambda x, a, b: a(x) - b(x), (conv(), conv()), x),
        "half a sum": (lambda x, a: (x + a(x)) / 2, (conv(p=1),), x),
        "mean, then quotient": (lambda x: x.mean([2, 3]) / 4, (), x),
        "before a mean": (
            lambda x, a: a((x + mean).mean([2, 3])),
            (nn.Linear(4, 3),),
            x,
        ),
        "a plane before a linear layer": (
            lambda x, a: a((x * plane + plane).flatten(1)),
            (nn.Linear(192, 3),),
            x,
        ),
        "after a linear layer": (
            lambda v, a: 2 * a(v) + torch.arange(3.0),
            (nn.Linear(6, 3),),
            v,
        ),
        "ones beside channels": (
            lambda x, a: torch.cat([a(x), torch.ones_like(a(x)[:, :1])], 1),
            (conv(),),
            x,
        ),
        "constants between values": (beside, (conv(p=1), conv(11, 3, 1)), x),
        "ones beside features": (
            lambda v, a: a(torch.cat([v, torch.ones_like(v)], 1)),
            (nn.Linear(12, 3),),
            v,
        ),
        "option A": (
            lambda x: functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)),
            (),
            x,
        ),
        "option A by pooling": (
            lambda x: functional.pad(functional.avg_pool2d(x, 1, 2), (0,) * 4 + (2, 2)),
            (),
            x,
        ),
        "pads that crop": (
            lambda x, a: a(functional.pad(x, (-1, -1, -2, 1))),
            (conv(),),
            x,
        ),
        "pads of features": (
            lambda v, a: a(functional.pad(v, (1, 2))),
            (nn.Linear(9, 3),),
            v,
        ),
        "pads of a value": (
            lambda x, a: a(functional.pad(x, (1, 1, 1, 1), value=0.7)),
            (conv(),),
            x,
        ),
        "slices": (lambda x, a: a(x[:, 1:3, 1:, 2:5]), (conv(2, 3),), x),
        "slices with steps": (lambda x: x[:, :, 1::2, :-1:3], (), x),
        "split": (lambda x, a: torch.cat(a(x).split([1, 3], 1)[::-1], 1), (conv(),), x),
        "chunk": (lambda x, a: a(x).chunk(2, 1)[1], (conv(),), x),
        "channels in another order": (lambda x, a: a(x[:, [2, 1, 0]]), (conv(3),), x),
        "pool that counts less at the border": (
            lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            (),
            x,
        ),
        "pool that rounds up": (
            lambda x: functional.avg_pool2d(x, 3, 2, ceil_mode=True),
            (),
            x,
        ),
    }
    return {
        name: (Function(f, *m).eval(), given) for name, (f, m, given) in table.items()
    }


def activation() -> nn.Module:
    return espn.PolynomialActivation(POLYNOMIAL)


SUPPORTED = {
    "Add", "AveragePool", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool",
    "Mix", "Move", "Mul", "Pad", "PolynomialActivation", "Scale",
}  # fmt: skip


def rewritten(model, example):
    graph = read(model, example)
    simplify(graph)
    return graph


def assert_right(model, example, *, batch=5):
    """What conversion makes of a network computes it, for other inputs and batches."""
    report = espn.check(model, example)
    assert report.ok, report
    graph = rewritten(model, example)
    assert {node.op for node in graph.nodes} <= SUPPORTED
    x = torch.cat([example, -example])[:batch]
    expected = model(x).detach()
    torch.testing.assert_close(
        oracle.run_graph(graph, x.float()), expected, atol=1e-5, rtol=1e-4
    )
    return graph


def refusal(model, example):
    """The one finding that stops a network."""
    report = espn.check(model, example)
    blocking = [finding for finding in report.findings if finding.blocking]
    assert blocking, report
    with pytest.raises(ConversionError):
        espn.convert(model, example)
    return str(blocking[0])
