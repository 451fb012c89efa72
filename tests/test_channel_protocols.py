"""A polynomial a channel in every protocol: exact modulo 2**64, cost as declared."""

from __future__ import annotations

import math

import crypten
import pytest
import torch
from crypten.common import rng

import crypten_espn as espn
from crypten_espn.cost import measure
from crypten_espn.errors import HeadroomError, PolynomialError
from crypten_espn.launch import run_parties
from crypten_espn.polynomial import ChannelForm, ChannelPolynomials, Polynomial
from crypten_espn.protocols import PROTOCOLS
from tests import oracle

from .test_protocols import any_number_of_parties, polyval_everything

TIMEOUT = 120
QUARTIC = (322, 512, 160, 0, -3)


def unit(exponent: int, numerators: tuple[int, ...] = QUARTIC) -> Polynomial:
    """A polynomial of inputs of about 5 * 2**exponent."""
    radius = 5 * 2.0**exponent
    return Polynomial(numerators, 10, (-radius, radius), exponent=exponent)


def channels() -> list[ChannelPolynomials]:
    """Radii, degrees and vanishing coefficients that differ by channel."""
    mixed = (unit(0), unit(-5), unit(2, (1, 0, 0, 7)), unit(1, (9,)), unit(0, (0, 3)))
    return [
        ChannelPolynomials(mixed),
        ChannelPolynomials((unit(-1), unit(-2, (0, 5, 0, 0, 0, 0, 2)))),
        ChannelPolynomials((unit(-3, (4, 5, 6)),)),
        ChannelPolynomials((unit(0, (4, 5)), unit(1, (0,)))),
    ]


def shapes(polynomials: ChannelPolynomials) -> list[tuple[int, ...]]:
    c = polynomials.channels
    return [(3, c), (2, c, 4), (2, c, 3, 2)]


def evaluate_all(name: str):
    results = []
    for polynomials in channels():
        form = polynomials.ring_form(frac_bits=16, out_bits=40)
        for shape in shapes(polynomials):
            x = rng.generate_random_ring_element(torch.Size(shape))
            p = rng.generate_random_ring_element(torch.Size(shape))
            with measure() as measured:
                y = PROTOCOLS[name].evaluate(x, p, form)
            results.append((x, p, y, measured.cost))
    return results


def expected(form: ChannelForm, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Python integers, channel by channel, each with its own polynomial."""
    parts = [
        torch.tensor(
            oracle.polynomial(
                row, x[:, c].flatten().tolist(), p[:, c].flatten().tolist()
            )
        ).view_as(x[:, c])
        for c, row in enumerate(form.rows)
    ]
    return torch.stack(parts, dim=1)


@pytest.mark.parametrize(
    ("name", "world_size"),
    [("espn", 2), ("opened_mask", 2), ("opened_mask", 3), ("beaver", 2), ("beaver", 3)],
)
def test_exact_modulo_2_64_and_cost_as_declared(name: str, world_size: int) -> None:
    parties = run_parties(
        evaluate_all, world_size=world_size, args=(name,), timeout=TIMEOUT
    )
    index = 0
    for polynomials in channels():
        form = polynomials.ring_form(frac_bits=16, out_bits=40)
        for shape in shapes(polynomials):
            xs, ps, ys, costs = zip(*(p[index] for p in parties), strict=True)
            index += 1
            # Sums of int64 wrap, as the ring's do.
            wanted = expected(form, sum(xs), sum(ps))
            assert torch.equal(sum(ys), wanted), f"{polynomials} {shape}"
            declared = PROTOCOLS[name].cost(form, math.prod(shape))
            if world_size == 2:
                for cost in costs:
                    assert cost.rounds == declared.rounds
                    assert cost.bytes_sent == declared.bytes_sent
    assert index == len(parties[0])


@pytest.mark.parametrize("out_bits", [35, 44])
def test_each_channel_is_within_its_own_bound(out_bits: int) -> None:
    polynomials = ChannelPolynomials(tuple(unit(e) for e in (-6, -3, 0, 3)))
    form = polynomials.ring_form(frac_bits=16, out_bits=out_bits)
    t = torch.linspace(-1, 1, 999, dtype=torch.float64)
    radii = torch.tensor(polynomials.intervals[:, 1])
    fixed = (t[:, None] * radii * 2**16).round().long()
    y = form.evaluate(fixed, form.reduce(fixed)).double() / 2.0**out_bits
    off = (y - polynomials(fixed.double() / 2**16)).abs().amax(0)
    for channel, row in enumerate(form.rows):
        assert off[channel] <= row.error_bound
        # What the polynomial alone would have: the shared shift costs little.
        alone = row.polynomial.ring_form(frac_bits=16, out_bits=out_bits)
        assert row.error_bound < 5 * alone.error_bound
        # An input's truncation fails no more often than at the largest radius.
        assert row.factor * radii[channel] <= 4096 * radii.max()
    assert form.error_bound == max(row.error_bound for row in form.rows)
    assert form.headroom_bits == min(row.headroom_bits for row in form.rows)
    assert {row.shift for row in form.rows} == {form.shift}


def test_polynomials_without_roundings_take_the_input_as_it_is() -> None:
    rows = (Polynomial((0, 0, 1), 0, (-1, 1)), Polynomial((5, 1), 0, (-1, 1)))
    form = ChannelPolynomials(rows).ring_form(frac_bits=16, out_bits=40)
    assert (form.shift, form.error_bound, form.degree) == (0, 0, 2)


def test_a_channel_that_does_not_fit_is_named() -> None:
    rows = (unit(0), unit(0, (1 << 40,)))
    with pytest.raises(HeadroomError, match="channel 1:"):
        ChannelPolynomials(rows).ring_form(frac_bits=16, out_bits=40)
    with pytest.raises(HeadroomError, match="at least the input's"):
        ChannelPolynomials(rows).ring_form(frac_bits=16, out_bits=8)


def test_polyval_of_channels() -> None:
    polynomials = ChannelPolynomials((unit(0), unit(-2), unit(1, (0, 3))))
    radii = torch.tensor(polynomials.intervals[:, 1]).float().view(-1, 1, 1)
    x = torch.linspace(-1, 1, 3 * 40).reshape(2, 3, 4, 5).mul(radii)
    y = polynomials(x)
    for results in run_parties(
        polyval_everything, world_size=2, args=(x, polynomials), timeout=TIMEOUT
    ):
        assert len(results) == 6
        for got, bound, measured, declared, _ in results:
            # The input is rounded to a unit, at slopes of at most 3.
            assert (got - y).abs().max() <= bound + 4 * 2**-16
            assert (measured.rounds, measured.bytes_sent) == (
                declared.rounds,
                declared.bytes_sent,
            )


@pytest.mark.parametrize("world_size", [1, 3])
def test_other_protocols_run_with_any_number(world_size: int) -> None:
    polynomials = ChannelPolynomials((unit(0), unit(-2)))
    x = torch.linspace(-1, 1, 40).reshape(10, 2, 2)
    for errors in run_parties(
        any_number_of_parties,
        world_size=world_size,
        args=(x, polynomials),
        timeout=TIMEOUT,
    ):
        assert len(errors) == 2 and max(errors) < 2**-6


def refused(polynomials: ChannelPolynomials) -> list[tuple[str, int]]:
    found = []
    for shape in ((2, 3), (2, 4, 2), (2,), ()):
        shared = crypten.cryptensor(torch.ones(shape), src=0)
        with measure() as measured, pytest.raises(PolynomialError) as caught:
            shared.polyval(polynomials)
        found.append((str(caught.value), measured.cost.bytes_sent))
    return found


def test_other_channels_are_refused_before_anything_is_sent() -> None:
    polynomials = ChannelPolynomials((unit(0), unit(1)))
    for found in run_parties(
        refused, world_size=2, args=(polynomials,), timeout=TIMEOUT
    ):
        assert len(found) == 4
        for message, bytes_sent in found:
            assert "polynomials of 2 channels" in message and bytes_sent == 0


def gradient(x: torch.Tensor, polynomials: ChannelPolynomials):
    shared = crypten.cryptensor(x, src=1, requires_grad=True)
    with espn.settings(truncation="exact"):
        shared.polyval(polynomials).sum().backward()
    return shared.grad.get_plain_text()


def test_gradient_is_each_channels_derivative() -> None:
    polynomials = ChannelPolynomials((unit(0), unit(-1), unit(0, (0, 3))))
    x = torch.linspace(-2, 2, 30).reshape(10, 3)
    expected_slope = polynomials.derivative()(x)
    for grad in run_parties(gradient, world_size=2, args=(x, polynomials)):
        torch.testing.assert_close(grad, expected_slope, atol=2**-7, rtol=0)
