"""The masked engine between CrypTen tensors: values, costs, and what is refused."""

from __future__ import annotations

import crypten
import pytest
import torch
from torch import nn

import crypten_espn as espn
from crypten_espn.cost import measure
from crypten_espn.errors import PeerError, ProtocolError, WorldSizeError
from crypten_espn.launch import run_parties
from crypten_espn.polynomial import Polynomial

POLYNOMIAL = Polynomial.fit(torch.relu, degree=4)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        espn.PolynomialActivation(POLYNOMIAL),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3),
        espn.PolynomialActivation(POLYNOMIAL),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()


def images(count=6):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def strangers_copy(model, example):
    """The same architecture with other weights: what rank 1 holds."""
    other = espn.convert(network(seed=99), example, protocol="masked")
    mine = espn.convert(model, example, protocol="masked")
    return mine, other


def compose(mine, other, x, batches, precision):
    """Shares in, the network, shares out, more CrypTen after it."""
    rank = crypten.communicator.get().get_rank()
    with crypten.cfg.temp_override({"encoder.precision_bits": precision}):
        private = (mine if rank == 0 else other).encrypt(src=0)
        private.prepare(1, batch=batches[0])
        results, costs = [], []
        for size in batches:
            halves = [crypten.cryptensor(x[:size] / 2, src=src) for src in (0, 1)]
            shared = halves[0] + halves[1]
            with measure() as measured:
                logits = private(shared)
            costs.append(measured.cost)
            doubled = logits * 2 + 1
            results.append(((doubled - 1) / 2).get_plain_text())
    return results, costs


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
@pytest.mark.parametrize("precision", [16, 12])
def test_shares_in_and_shares_out(provider, precision):
    model, x = network(), images()
    mine, other = strangers_copy(model, x)
    batches = [2, 2, 6, 1]
    with crypten.cfg.temp_override({"mpc.provider": provider}):
        parties = run_parties(
            compose, world_size=2, args=(mine, other, x, batches, precision)
        )
    for results, _ in parties:
        for size, logits in zip(batches, results, strict=True):
            error = (logits - model(x[:size]).detach()).abs().max()
            assert error < (0.01 if precision == 16 else 0.03)


def test_prepared_calls_take_the_plans_messages():
    model, x = network(), images()
    mine, other = strangers_copy(model, x)
    parties = run_parties(compose, world_size=2, args=(mine, other, x, [2], 16))
    for _, (cost,) in parties:
        # Input rescaled, D, two messages for each activation, output lifted.
        assert cost.rounds == 1 + 1 + 2 * 2 + 1


def test_it_works_over_the_direct_channel_too():
    model, x = network(), images()
    mine, other = strangers_copy(model, x)

    def direct(mine, other):
        with espn.use_direct_channel():
            return compose(mine, other, x, [3], 16)

    for (logits,), _ in run_parties(direct, world_size=2, args=(mine, other)):
        assert (logits - model(x[:3]).detach()).abs().max() < 0.01


def rank_one_view(mine, other, x):
    """Everything rank 1 receives while weights are hidden and one input is run."""
    party = crypten.communicator.get()
    rank, seen = party.get_rank(), []
    receive = party.recv

    def record(tensor, src=None):
        result = receive(tensor, src=src)
        seen.append(result.clone())
        return result

    party.recv = record
    private = (mine if rank == 0 else other).encrypt(src=0)
    private(crypten.cryptensor(x, src=1))
    return seen


def test_what_rank_one_sees_changes_with_every_run():
    """Nothing it receives is the same twice, weights included: masks are fresh."""
    model, x = network(), images(2)
    mine, other = strangers_copy(model, x)
    runs = [
        run_parties(rank_one_view, world_size=2, args=(mine, other, x))[1]
        for _ in range(2)
    ]
    assert len(runs[0]) == len(runs[1]) > 4
    for first, second in zip(*runs, strict=True):
        assert (first != second).double().mean() > 0.99


def refused(private):
    private.encrypt(src=0)


def test_refusals_before_anything_is_sent():
    private = espn.convert(network(), images(), protocol="masked")
    with pytest.raises(ProtocolError, match="rank 0 owns the weights"):
        private.encrypt(src=1)
    with pytest.raises(PeerError) as failed:
        run_parties(refused, world_size=3, args=(private,))
    assert isinstance(failed.value.__cause__, WorldSizeError)
    assert "3 parties" in str(failed.value.__cause__)
