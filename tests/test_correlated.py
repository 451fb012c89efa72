"""The correlations themselves, from both providers and CrypTen's tuple cache."""

from __future__ import annotations

import crypten
import pytest
import torch

from crypten_espn.correlated import (
    logical_shift,
    one_sided_products,
    powers,
    rescaling,
)
from crypten_espn.errors import RandomnessError
from crypten_espn.launch import run_parties
from tests import oracle

SHAPES = [torch.Size(()), torch.Size((5,)), torch.Size((2, 3, 4))]
TIMEOUT = 120


def draw(cached):
    provider = crypten.mpc.get_default_provider()

    def all_of_them():
        return [
            (
                one_sided_products(shape, 3),
                powers(shape, 5),
                powers(shape, 2),
                rescaling(shape, 19),
            )
            for shape in SHAPES
        ]

    if not cached:
        return all_of_them()
    provider.trace(True)
    traced = all_of_them()
    provider.trace(False)
    provider.fill_cache()
    filled = sum(len(v) for v in provider.tuple_cache.values())
    drawn = all_of_them()
    left = sum(len(v) for v in provider.tuple_cache.values())
    assert filled == 4 * len(SHAPES) and left == 0
    assert not torch.equal(traced[2][1], drawn[2][1])
    return drawn


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
@pytest.mark.parametrize("cached", [False, True])
def test_correlations_hold(provider, cached):
    with crypten.cfg.temp_override({"mpc.provider": provider}):
        first, second = run_parties(draw, world_size=2, args=(cached,), timeout=TIMEOUT)
    for mine, theirs in zip(first, second, strict=True):
        (a, c0), (b, c1) = mine[0], theirs[0]
        products = [
            sum(x * y for x, y in zip(row_a, row_b, strict=True))
            for row_a, row_b in zip(
                a.reshape(3, -1).t().tolist(),
                b.reshape(3, -1).t().tolist(),
                strict=True,
            )
        ]
        assert oracle.add(c0, c1) == [oracle.signed(v) for v in products]

        for index, degree in ((1, 5), (2, 2)):
            r = oracle.add(mine[index][0], theirs[index][0])
            for k in range(degree):
                expected = [oracle.signed(v ** (k + 1)) for v in r]
                assert oracle.add(mine[index][k], theirs[index][k]) == expected
            assert len(mine[index]) == degree

        r, logical, arithmetic = (
            oracle.add(mine[3][k], theirs[3][k]) for k in range(3)
        )
        assert logical == [-((v % 2**64) >> 19) for v in r]
        assert arithmetic == [-(v >> 19) for v in r]


def test_party_one_cannot_be_told_from_uniform_without_rank_zero():
    """Party 1's rescaling shares alone carry no relation to each other."""
    _, second = run_parties(draw, world_size=2, args=(False,), timeout=TIMEOUT)
    r, logical, arithmetic = second[2][3]
    assert not torch.equal(-(r >> 19), arithmetic)
    assert not torch.equal(-logical_shift(r, 19), logical)


@pytest.mark.parametrize("bits", [0, 1, 19, 62, 63])
def test_logical_shift(bits):
    values = [0, 1, -1, 2**63 - 1, -(2**63), 12345, -98765]
    shifted = logical_shift(torch.tensor(values), bits)
    assert shifted.tolist() == [oracle.signed((v % 2**64) >> bits) for v in values]


def test_unknown_provider_is_named():
    with (
        crypten.cfg.temp_override({"mpc.provider": "HE"}),
        pytest.raises(RandomnessError, match=r"'HE'.*TTP"),
    ):
        powers(torch.Size((2,)), 2)


def test_a_linear_polynomial_takes_no_powers():
    with pytest.raises(RandomnessError, match="at least 2"):
        powers(torch.Size((2,)), 1)
