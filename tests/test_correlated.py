"""The correlations themselves, from both providers and CrypTen's tuple cache."""

from __future__ import annotations

import crypten
import crypten.communicator as comm
import pytest
import torch
from crypten.mpc.provider.ttp_provider import TTPClient

from crypten_espn.correlated import (
    Dealer,
    logical_shift,
    one_sided_products,
    powers,
    rescaling,
)
from crypten_espn.errors import PeerError, RandomnessError
from crypten_espn.launch import run_parties
from tests import oracle

SHAPES = [torch.Size(()), torch.Size((5,)), torch.Size((2, 3, 4))]


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
        first, second = run_parties(draw, world_size=2, args=(cached,))
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
    _, second = run_parties(draw, world_size=2, args=(False,))
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


# What rank 0 may ask of the dealer.


def refused_and_served_on() -> tuple[list[str], list[float]]:
    """Rank 0 names what is not dealt; then a product is made as if nothing was."""
    refusals: list[str] = []
    if comm.get().get_rank() == 0:
        for name, *args in (
            ("_setup_generators",),
            ("__init__",),
            ("__class__",),
            ("answer", {}),
            ("_get_generators", "cpu"),
            ("uninit",),
        ):
            with pytest.raises(RandomnessError) as caught:
                TTPClient.get().ttp_request(name, None, *args)
            refusals.append(str(caught.value))
        comm.get().send_obj(["no", "request"], 2, comm.get().ttp_group)
        refusals.append(comm.get().recv_obj(2, comm.get().ttp_group))
    x = crypten.cryptensor(torch.tensor([1.5, -2.0]), src=0)
    y = crypten.cryptensor(torch.tensor([4.0, 0.5]), src=1)
    return refusals, (x * y).get_plain_text().tolist()


def test_the_dealer_refuses_what_it_does_not_deal_by_name_and_serves_on():
    with crypten.cfg.temp_override({"mpc.provider": "TTP"}):
        (refusals, first), (_, second) = run_parties(
            refused_and_served_on, world_size=2
        )
    names = ("_setup_generators", "__init__", "__class__", "answer", "_get_generators")
    for name, refusal in zip((*names, "uninit"), refusals, strict=False):
        assert f"'{name}' was asked of the dealer" in refusal
        assert "one_sided_products" in refusal and "masked_deal" in refusal
    assert "no request" in refusals[-1] and len(refusals) == 7
    assert first == second == pytest.approx([6.0, -1.0], abs=1e-3)


def failed_and_out_of_step() -> list[str]:
    refusals: list[str] = []
    if comm.get().get_rank() == 0:
        for function, *args in (
            ("additive", (2,), (2,), "frombuffer"),
            ("square", (2,)),
        ):
            with pytest.raises(RandomnessError) as caught:
                TTPClient.get().ttp_request(function, None, *args)
            refusals.append(str(caught.value))
    return refusals


def test_a_dealer_that_failed_says_so_and_deals_nothing_wrong_afterwards():
    with crypten.cfg.temp_override({"mpc.provider": "TTP"}):
        refusals, _ = run_parties(failed_and_out_of_step, world_size=2)
    assert "triples of 'frombuffer' were asked for" in refusals[0]
    assert "out of step" in refusals[1] and "frombuffer" in refusals[1]


@pytest.mark.parametrize(
    "message",
    [
        None,
        7,
        "powers",
        {},
        {"function": "powers"},
        {"function": ["powers"], "device": None, "args": (), "kwargs": {}},
        {"function": "powers", "device": None, "args": 3, "kwargs": {}},
        {"function": "powers", "device": 0, "args": (), "kwargs": {}},
        {"function": "powers", "device": None, "args": (), "kwargs": None},
        {"function": "powers", "device": None, "args": (), "kwargs": {}, "more": 1},
    ],
)
def test_what_is_no_request_is_refused(message):
    class Idle(Dealer):
        def __init__(self):
            self._failure = ""

    with pytest.raises(RandomnessError, match="no request"):
        Idle().answer(message)


def test_only_rank_zero_asks_the_dealer():
    def party():
        if comm.get().get_rank() == 1:
            TTPClient.get().ttp_request("square", None, (2,))

    with (
        crypten.cfg.temp_override({"mpc.provider": "TTP"}),
        pytest.raises(PeerError, match="rank 1 asked the dealer; only rank 0 may"),
    ):
        run_parties(party, world_size=2)
