"""Batch-norm in evaluation: one product, and what it must still notice."""

from __future__ import annotations

import crypten
import crypten.communicator as comm
import torch
from torch import nn

from crypten_espn import patches
from crypten_espn.launch import run_parties

from .cases import convert


def _batch_norm_runs(patched: bool) -> list[tuple[int, float]]:
    """Rounds and largest error of two inferences, as one party sees them."""
    torch.manual_seed(3)
    layer = nn.BatchNorm2d(4).eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(layer, name).data.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        expected = layer(x)
    graph = convert(layer, x)

    def run() -> list[tuple[int, float]]:
        if not patched:
            patches.get("batch_norm").revert()
        graph.encrypt(src=0)
        crypten.cfg.communicator.verbose = True
        results = []
        for _ in range(2):
            crypten.reset_communication_stats()
            output = graph(crypten.cryptensor(x, src=1))
            rounds = comm.get().comm_rounds
            error = (output.get_plain_text() - expected).abs().max().item()
            results.append((rounds, error))
        return results

    return run_parties(run, world_size=2)[0]


def test_batch_norm_costs_one_product() -> None:
    (_, stock_error), (stock, _) = _batch_norm_runs(patched=False)
    (_, error), (rounds, again) = _batch_norm_runs(patched=True)
    # TFP scatters nothing for its tuples: a product is one opening.
    assert rounds == 1
    assert stock >= rounds + 18
    # Most of it is CrypTen's inverse square root, in both.
    assert max(error, again) < stock_error + 2e-3 < 1e-2


def test_batch_norm_notices_new_parameters() -> None:
    layer, x = nn.BatchNorm2d(2).eval(), torch.randn(1, 2, 3, 3)
    graph = convert(layer, x)

    def run() -> torch.Tensor:
        graph.encrypt(src=0)
        graph(crypten.cryptensor(x, src=1))
        three = crypten.cryptensor(torch.full((2,), 3.0), src=0)
        graph._modules["bias"].data.copy_(three)
        return graph(crypten.cryptensor(x, src=1)).get_plain_text()

    with torch.no_grad():
        expected = layer(x) + 3
    assert (run_parties(run, world_size=2)[1] - expected).abs().max() < 2e-2


def test_batch_norm_still_trains() -> None:
    layer, x = nn.BatchNorm2d(2).train(), torch.randn(4, 2, 3, 3)
    model = nn.Sequential(layer, nn.Flatten())
    graph = convert(model, x)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        graph.encrypt(src=0).train()
        output = graph(crypten.cryptensor(x, src=1))
        output.sum().backward()
        bias = graph._modules["0.bias"].data
        return output.get_plain_text(), bias.grad.get_plain_text()

    output, gradient = run_parties(run, world_size=2)[0]
    with torch.no_grad():
        expected = model(x)
    assert (output - expected).abs().max() < 2e-2
    assert (gradient - 36).abs().max() < 1e-2
