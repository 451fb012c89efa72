"""Exact truncation is off by less than one unit, always; local as often as declared."""

from __future__ import annotations

import pytest
import torch
from crypten.common import rng

from crypten_espn.cost import measure
from crypten_espn.launch import run_parties
from crypten_espn.protocols import truncation
from tests import oracle

TIMEOUT = 120
EDGES = [0, 1, -1, 2**62 - 1, -(2**62) + 1, 2**61, -(2**61), 12345, -12345]


def truncate(kind, shift, values):
    """Shares of the values, uniform but for their sum; what the party gets out."""
    y = torch.tensor(values)
    share = _share(y)
    with measure() as measured:
        out = getattr(truncation, kind)(share, shift)
    return out, measured.cost


def _share(y):
    from crypten.mpc.primitives import ArithmeticSharedTensor

    return ArithmeticSharedTensor(y, precision=0, src=0).share


@pytest.mark.parametrize("shift", [0, 1, 16, 32, 47, 61, 62])
def test_exact_is_floor_or_one_more(shift):
    generator = torch.Generator().manual_seed(shift)
    spread = torch.randint(-(2**62) + 1, 2**62, (20_000,), generator=generator)
    small = torch.randint(-1000, 1000, (5_000,), generator=generator)
    values = EDGES + spread.tolist() + small.tolist()
    (a, cost), (b, _) = run_parties(
        truncate, world_size=2, args=("exact", shift, values), timeout=TIMEOUT
    )
    results = oracle.add(a, b)
    extra = [r - (v >> shift) for r, v in zip(results, values, strict=True)]
    assert set(extra) <= ({0, 1} if shift else {0})
    assert (cost.rounds, cost.bytes_sent) == ((1, 8 * len(values)) if shift else (0, 0))
    declared = truncation.exact_cost(shift, len(values))
    assert (declared.rounds, declared.bytes_sent) == (cost.rounds, cost.bytes_sent)


def test_exact_is_unbiased():
    value, shift = 5 * 2**14 + 3 * 2**12, 16
    (a, _), (b, _) = run_parties(
        truncate,
        world_size=2,
        args=("exact", shift, [value] * 100_000),
        timeout=TIMEOUT,
    )
    mean = torch.tensor(oracle.add(a, b)).double().mean().item()
    assert mean == pytest.approx(value / 2**shift, abs=6 * 0.5 / 100_000**0.5)


@pytest.mark.parametrize("shift", [0, 1, 16, 30])
def test_local_is_within_one_unit_for_small_values(shift):
    values = torch.randint(-(2**30), 2**30, (20_000,)).tolist()
    (a, cost), (b, _) = run_parties(
        truncate, world_size=2, args=("local", shift, values), timeout=TIMEOUT
    )
    extra = {r - (v >> shift) for r, v in zip(oracle.add(a, b), values, strict=True)}
    assert extra <= ({0, 1} if shift else {0})
    assert (cost.rounds, cost.bytes_sent) == (0, 0)


def test_local_fails_as_often_as_declared():
    value, count = 2**58, 300_000
    (a, _), (b, _) = run_parties(
        truncate, world_size=2, args=("local", 20, [value] * count), timeout=TIMEOUT
    )
    failed = sum(abs(r - (value >> 20)) > 1 for r in oracle.add(a, b))
    expected = count * truncation.failure_probability(1.0, 58)
    assert expected == pytest.approx(count / 64)
    assert abs(failed - expected) < 5 * expected**0.5


def test_exact_never_fails_where_local_does():
    values = [2**61 + 17] * 200_000
    (a, _), (b, _) = run_parties(
        truncate, world_size=2, args=("exact", 30, values), timeout=TIMEOUT
    )
    assert set(oracle.add(a, b)) <= {2**31, 2**31 + 1}


def lift(values, shift, ring_bits):
    """Shares modulo 2**ring_bits, upper bits arbitrary, to shares modulo 2**64."""
    rubbish = rng.generate_random_ring_element((len(values),)) << ring_bits
    share = _share(torch.tensor(values)) + rubbish
    with measure() as measured:
        out = truncation.exact(share, shift, ring_bits=ring_bits)
    return out, measured.cost


@pytest.mark.parametrize("ring_bits", [20, 32, 40, 63])
@pytest.mark.parametrize("shift", [0, 1, 12, 18])
def test_exact_lifts_from_a_narrow_ring(ring_bits, shift):
    limit = 2 ** (ring_bits - 2)
    spread = torch.randint(-limit + 1, limit, (20_000,)).tolist()
    values = [0, 1, -1, limit - 1, -limit + 1, *spread]
    (a, cost), (b, _) = run_parties(
        lift, world_size=2, args=(values, shift, ring_bits), timeout=TIMEOUT
    )
    extra = {r - (v >> shift) for r, v in zip(oracle.add(a, b), values, strict=True)}
    assert extra <= ({0, 1} if shift else {0})
    assert (cost.rounds, cost.bytes_sent) == (1, 8 * len(values))


def three_parties():
    y = torch.arange(-500, 500) * 2**40 + 7
    out = truncation.exact(_share(y), 20)
    return out, rng.generate_random_ring_element((1,))


def test_exact_with_three_parties():
    shares = [
        out for out, _ in run_parties(three_parties, world_size=3, timeout=TIMEOUT)
    ]
    values = (torch.arange(-500, 500) * 2**40 + 7).tolist()
    extra = {r - (v >> 20) for r, v in zip(oracle.add(*shares), values, strict=True)}
    assert extra <= {0, 1}
