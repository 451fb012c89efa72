"""Linear layers of every kind between three processes: the reference's bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import crypten_espn as espn
from crypten_espn.masked.linear import Conv, Mix, Move
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.reference import evaluate
from crypten_espn.serving.local import run_session

from ..masked.networks import Written, ready


def all_kinds() -> nn.Module:
    """One linear part, so that no coin decides a bit of its result."""

    def forward(x: Tensor, *layers: nn.Module) -> Tensor:
        sequence, upward, linear, uneven = layers
        found = [
            functional.pixel_shuffle(x.flip(2), 2)[:, :, 1:],
            torch.cat([x.transpose(2, 3), x.chunk(2, 1)[1].transpose(2, 3)], 1),
            sequence(x.flatten(2)),
            upward(x),
            linear(x),
            uneven(x),
            functional.interpolate(x, (5, 9), mode="bilinear"),
            functional.adaptive_avg_pool2d(x, (4, 3)),
        ]
        return torch.cat([value.flatten(1) for value in found], 1)

    torch.manual_seed(6)
    return ready(
        Written(
            forward, nn.Conv1d(4, 3, 3, stride=2), nn.ConvTranspose2d(4, 2, 3, 2, 1),
            nn.Linear(5, 2), nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        )
    )  # fmt: skip


def test_every_kind_of_linear_layer_gives_the_references_bits() -> None:
    network, x = all_kinds(), torch.randn(2, 4, 6, 5)
    model = masked_model(espn.convert(network, x))
    kinds = [type(node) for node in model.plan.output.root.walk()]
    assert not model.plan.steps and model.plan.output.noise_bits == 0
    assert kinds.count(Conv) == 3 and {Mix, Move} <= {*kinds}
    expected, _ = evaluate(model.plan, model.weights, x)
    ((logits, _),) = run_session(model, [x])
    assert torch.equal(logits, expected)
    assert (logits - network(x)).abs().max() < 1e-3
