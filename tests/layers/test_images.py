"""Layers that become layers on images: right in every engine, and exact."""

from __future__ import annotations

import crypten
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import crypten_espn as espn
from crypten_espn.launch import run_parties
from crypten_espn.masked.linear import Mix
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.planning.network import parameters_of
from crypten_espn.masked.reference import evaluate

from ..conversion_cases import SUPPORTED, assert_right, settled
from ..masked import oracle
from ..masked.cases import Pair, without_noise
from ..masked.networks import Written, act, conv, ready

interpolate = functional.interpolate


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    """Constructs whose layers are not on images as they stand."""
    torch.manual_seed(4)
    image, sequence, tokens = (
        torch.randn(shape) for shape in ((3, 4, 6, 5), (3, 4, 9), (3, 6, 4))
    )
    up, norm = nn.ConvTranspose2d, nn.BatchNorm1d
    linear, flat = nn.Linear(4, 3), nn.Conv1d
    written: dict[str, tuple[nn.Module, Tensor]] = {
        "conv1d": (flat(4, 3, 3), sequence),
        "conv1d, uneven": (flat(4, 6, 3, stride=2, padding=2, groups=2), sequence),
        "conv1d, norm": (nn.Sequential(flat(4, 3, 3, dilation=2), norm(3)), sequence),
        "norm of a sequence": (norm(4), sequence),
        "pool of a sequence": (nn.AvgPool1d(3, 2, 1), sequence),
        "pool inside": (nn.AvgPool1d(3, 2, 1, count_include_pad=False), sequence),
        "mean of a sequence": (nn.AdaptiveAvgPool1d(1), sequence),
        "adaptive sequence": (nn.AdaptiveAvgPool1d(4), sequence),
        "upsampled sequence": (nn.Upsample(scale_factor=2, mode="linear"), sequence),
        "transposed": (up(4, 3, 3, stride=2), image),
        "transposed, more": (up(4, 3, 3, 2, 1, output_padding=1), image),
        "transposed, cropped": (up(4, 6, 2, (3, 2), 3, groups=2), image),
        "transposed, dilated": (up(4, 3, (3, 2), dilation=2, bias=False), image),
        "transposed sequence": (nn.ConvTranspose1d(4, 3, 4, 2, 1), sequence),
        "linear of tokens": (linear, tokens),
        "linear of rows": (nn.Linear(5, 2, bias=False), image),
        "linear of the first axis": (
            Written(lambda x, a: a(x.transpose(1, 2)).transpose(1, 2), linear),
            sequence,
        ),
        "matrix on the left": (Written(lambda x: torch.ones(2, 4) @ x), sequence),
        "vector on the right": (Written(lambda x: x @ torch.arange(9.0)), sequence),
        "vector on the left": (Written(lambda x: torch.arange(4.0) @ x), sequence),
        "mixer": (
            Written(
                lambda x, a, b: a(x) + b(x.mT).mT, nn.Linear(4, 4), nn.Linear(6, 6)
            ),
            tokens,
        ),
        "mean of channels": (Written(lambda x: x.mean(1)), image),
        "mean of tokens": (Written(lambda x: x.mean(1)), tokens),
        "mean of all": (Written(lambda x: x.mean((1, 2, 3), keepdim=True)), image),
        "sum of rows": (Written(lambda x: x.sum(2)), image),
        "sum of an image": (Written(lambda x: x.sum((2, 3), keepdim=True)), image),
        "less its mean": (
            Written(lambda x: x - x.mean((2, 3), keepdim=True)),
            image,
        ),
        "adaptive": (nn.AdaptiveAvgPool2d((4, 3)), image),
        "adaptive, larger": (nn.AdaptiveAvgPool2d((7, 7)), image),
        "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), image),
        "bilinear, corners": (
            Written(
                lambda x: interpolate(x, (9, 4), mode="bilinear", align_corners=True)
            ),
            image,
        ),
        "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), image),
        "a plane of constants": (
            Written(lambda x: x * torch.linspace(1, 2, 30).view(6, 5) + 1), image
        ),
        "positions": (
            Written(lambda x, a: a(x) + torch.linspace(0, 1, 18).view(6, 3), linear),
            tokens,
        ),
    }  # fmt: skip
    return {
        n: (settled(m, x).requires_grad_(False), x) for n, (m, x) in written.items()
    }


@pytest.mark.parametrize("name", list(cases()))
def test_each_is_right_in_the_masked_engine(name: str) -> None:
    network, x = cases()[name]
    assert {node.op for node in assert_right(network, x).nodes} <= SUPPORTED
    report = espn.check(network, x)
    assert report.masked is None, report
    model = masked_model(espn.convert(network, x))
    pair = Pair(without_noise(model))
    got, _ = pair.infer(x)
    coins = pair.roundings(0, len(x))
    _, trace = evaluate(pair.plan, model.weights, x, roundings=coins)
    assert np.array_equal(got, trace[-1])
    error = (pair.plan.decode(got) - network(x)).abs().max()
    assert error < 12 * model.report.logits_error + 1e-6


def between_parties() -> dict[str, float]:
    errors = {}
    for name, (network, x) in cases().items():
        private = espn.convert(network, x, protocol="espn").encrypt(src=0)
        got = private(crypten.cryptensor(x, src=1)).get_plain_text()
        errors[name] = float((got - network(x)).abs().max())
    return errors


def test_each_is_right_between_two_crypten_parties() -> None:
    errors, _ = run_parties(between_parties, world_size=2)
    assert {name: e for name, e in errors.items() if e > 5e-3} == {}


def test_weighted_sums_among_layers_are_what_python_integers_give() -> None:
    torch.manual_seed(0)

    def forward(x, a, b, p, q):
        y = interpolate(p(a(x)), scale_factor=2, mode="bilinear")
        y = functional.adaptive_avg_pool2d(b(y), 4)
        z = interpolate(y, size=(3, 5), mode="bilinear")
        return q(functional.adaptive_avg_pool2d(z, 4) - y)

    x = torch.randn(2, 3, 4, 4)
    network = ready(Written(forward, conv(3, 2), conv(2, 2, 3), act(), act()))
    private = espn.convert(network, x)
    model = masked_model(private)
    kinds = [type(node) for part in model.plan.parts for node in part.root.walk()]
    assert kinds.count(Mix) >= 3
    _, trace = evaluate(model.plan, model.weights, x[:1])
    image = model.plan.encode(x[:1]).transpose(0, 3, 1, 2)[0]
    expected = oracle.logits(model, parameters_of(private), image.tolist())
    assert {at: int(trace[-1][0][at]) for at in expected} == expected


def test_crypten_shares_of_weighted_sums_are_explained() -> None:
    x = torch.randn(2, 3, 5, 4)
    network = ready(nn.Upsample(scale_factor=2, mode="bilinear"))
    private = espn.convert(network, x, protocol="espn")
    found = espn.explain(private, x)
    assert found.overflow is None
    assert (found.logits - network(x)).abs().max() < 2e-3


def test_a_linear_layers_constants_join_it_behind_a_move() -> None:
    network, x = cases()["conv1d, norm"]
    kinds = espn.check(network, x).layers
    assert kinds["Conv"] == 1
    network, x = cases()["linear of tokens"]
    assert espn.check(network, x).layers == {"Conv": 1, "Move": 2}
