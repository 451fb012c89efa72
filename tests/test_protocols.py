"""Every protocol against Python integers, its cost against declaration and baseline."""

from __future__ import annotations

from pathlib import Path

import crypten
import crypten.communicator as comm
import pytest
import torch
from crypten.common import rng

import crypten_espn as espn
from crypten_espn.correlated import one_sided_products
from crypten_espn.cost import Cost, measure
from crypten_espn.errors import ProtocolError, RangeError, WorldSizeError
from crypten_espn.launch import run_parties
from crypten_espn.masked.planning import masked_model
from crypten_espn.polynomial import Polynomial
from crypten_espn.protocols import PROTOCOLS, Settings, current_settings, polyval
from crypten_espn.protocols.beaver import product_cost
from tests import oracle
from tests.masked.networks import Written

BASELINE = Path(__file__).with_name("cost.baseline")
DEGREES = (1, 2, 3, 4, 5, 6, 8, 10)
SHAPES = [(), (1,), (7, 3), (2, 3, 4, 5)]
TIMEOUT = 120


def polynomials():
    """One polynomial of each degree, and ones with vanishing coefficients."""
    dense = [Polynomial((*range(3, 3 + n), -5), 10, (-1.0, 1.0)) for n in DEGREES]
    sparse = [(0, 0, 7), (1, 0, 0, 0, 9), (0, 5, 0, 3), (0, 0, 3, 0, 0, 0, 2), (4,)]
    return dense + [Polynomial(c, 10, (-1.0, 1.0)) for c in sparse]


def random_ring(shape):
    return rng.generate_random_ring_element(torch.Size(shape))


def evaluate_all(name):
    """Every polynomial and shape on random shares; what this party holds and paid."""
    results = []
    for polynomial in polynomials():
        form = polynomial.ring_form(frac_bits=16, out_bits=40)
        for shape in SHAPES:
            x, p = random_ring(shape), random_ring(shape)
            with measure() as measured:
                y = PROTOCOLS[name].evaluate(x, p, form)
            results.append((x, p, y, measured.cost))
    return results


@pytest.mark.parametrize(
    ("name", "provider", "world_size"),
    [
        ("espn", "TFP", 2),
        ("espn", "TTP", 2),
        ("opened_mask", "TFP", 2),
        ("opened_mask", "TTP", 2),
        ("opened_mask", "TFP", 3),
        ("opened_mask", "TTP", 3),
        ("beaver", "TFP", 2),
        ("beaver", "TTP", 2),
        ("beaver", "TFP", 3),
    ],
)
def test_exact_modulo_2_64_and_cost_as_declared(name, provider, world_size):
    with crypten.cfg.temp_override({"mpc.provider": provider}):
        parties = run_parties(
            evaluate_all, world_size=world_size, args=(name,), timeout=TIMEOUT
        )
    index = 0
    for polynomial in polynomials():
        form = polynomial.ring_form(frac_bits=16, out_bits=40)
        for shape in SHAPES:
            held = [party[index] for party in parties]
            index += 1
            xs, ps, ys, costs = zip(*held, strict=True)
            expected = oracle.polynomial(form, oracle.add(*xs), oracle.add(*ps))
            assert oracle.add(*ys) == expected, f"{polynomial} {shape}"
            assert all(y.shape == torch.Size(shape) for y in ys)
            declared = PROTOCOLS[name].cost(form, max(torch.Size(shape).numel(), 1))
            if provider == "TFP" and world_size == 2:
                for cost in costs:
                    assert cost.rounds == declared.rounds
                    assert cost.bytes_sent == declared.bytes_sent
    assert index == len(parties[0])


def cost_lines():
    lines = []
    for protocol in PROTOCOLS.values():
        for degree in DEGREES:
            polynomial = Polynomial((1,) * (degree + 1), 10, (-1.0, 1.0))
            for truncation in ("local", "exact"):
                cost = Settings(protocol, truncation, 29).cost(polynomial, 1)
                lines.append(
                    f"{protocol.name} degree {degree} {truncation}: {cost.rounds} "
                    f"rounds, {cost.bytes_sent} bytes per element and party, "
                    f"{cost.offline_elements} offline elements"
                )
    cost, gated = product_cost(1, 1), product_cost(64, 1)
    lines.append(
        f"crypten product: {cost.rounds} rounds, {cost.bytes_sent} bytes per element "
        f"and party, {gated.bytes_sent} for 64 under one gate, "
        f"{cost.offline_elements} offline elements"
    )
    return [*lines, masked_product_line()]


def masked_product_line():
    """What a product of 64 elements and one gate takes in the masked engine."""
    torch.manual_seed(0)
    one, two = torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1)
    network = Written(lambda x, a, b: a(x) * b(x).mean((2, 3), True), one, two).eval()
    plan = masked_model(espn.convert(network, torch.randn(4, 1, 8, 8))).plan
    (between,) = plan.evaluations
    (first, _), (second, _) = between.payload(1)
    return (
        f"masked product: {plan.messages - 2} messages; {first} and {second} opened "
        f"elements and {between.elements} returned, {8 * between.words} bytes from the "
        "dealer"
    )


def test_cost_baseline():
    """A change on the wire shows as a change of tests/cost.baseline."""
    assert BASELINE.read_text().splitlines() == cost_lines()


def polyval_everything(x, polynomial):
    """Every protocol and truncation through polyval.

    Returns: of each the result, the form's error bound, the cost as measured and as
        declared, and the result's scale.
    """
    results = []
    for name in PROTOCOLS:
        for truncation in ("local", "exact"):
            with espn.settings(protocol=name, truncation=truncation) as chosen:
                shared = crypten.cryptensor(x, src=1)
                with measure() as measured:
                    y = shared.polyval(polynomial)
                declared = chosen.cost(polynomial, x.numel())
                bound = chosen.form(polynomial, 16, 2).error_bound
            got, scale = y.get_plain_text(), y.encoder.scale
            results.append((got, bound, measured.cost, declared, scale))
    return results


def test_polyval_error_and_cost():
    polynomial = Polynomial.fit(torch.relu, degree=4)
    x = torch.linspace(-5, 5, 12_000).reshape(3, 40, 100)
    for results in run_parties(
        polyval_everything, world_size=2, args=(x, polynomial), timeout=TIMEOUT
    ):
        assert len(results) == 6
        for got, bound, measured, declared, scale in results:
            error = (got - polynomial(x)).abs().max().item()
            assert error <= bound + 2**-16 + 2**-16 * 4
            assert scale == 2**16
            assert measured.rounds == declared.rounds
            assert measured.bytes_sent == declared.bytes_sent


def test_bytes_per_activation_at_degree_four():
    polynomial = Polynomial.fit(torch.relu, degree=4)
    chosen = Settings(PROTOCOLS["espn"], "local", 29)
    assert chosen.cost(polynomial, 1) == Cost(1, 24, 1)
    chosen = Settings(PROTOCOLS["opened_mask"], "local", 29)
    assert chosen.cost(polynomial, 1) == Cost(1, 8, 3)


def ten_million(truncation):
    """The largest error but for failed truncations, and how many failed."""
    torch.manual_seed(0)
    polynomial = Polynomial.fit(torch.relu, degree=4)
    worst, failed = 0.0, 0
    with espn.settings(protocol="espn", truncation=truncation):
        for _ in range(10):
            x = torch.rand(1_000_000) * 10 - 5
            y = crypten.cryptensor(x, src=1).polyval(polynomial).get_plain_text()
            errors = (y - polynomial(x)).abs()
            # One that failed is off by 2**64 over what is cut off: by far more.
            kept = errors < 2**10
            failed += int((~kept).sum())
            worst = max(worst, errors[kept].max().item())
    return worst, failed


# Of ten million local truncations, at the default failure_bits of 29, 0.03 fail; that
# three do has a chance of one in 200,000.
@pytest.mark.parametrize(
    ("truncation", "bound", "most_failed"), [("local", 2**-6, 2), ("exact", 2**-9, 0)]
)
def test_largest_error_over_ten_million_inputs(truncation, bound, most_failed):
    worst, failed = run_parties(
        ten_million, world_size=2, args=(truncation,), timeout=TIMEOUT
    )[0]
    assert 0 < worst < bound
    assert failed <= most_failed


def failures_at(failure_bits):
    polynomial = Polynomial((0, 2**10), 10, (-8.0, 8.0))
    x = torch.full((400_000,), 4.0)
    with espn.settings(protocol="espn", truncation="local", failure_bits=failure_bits):
        y = crypten.cryptensor(x, src=1).polyval(polynomial).get_plain_text()
    return int(((y - 4).abs() > 1).sum())


def test_measured_failure_rate_is_the_declared_one():
    failed = run_parties(failures_at, world_size=2, args=(10,), timeout=TIMEOUT)[0]
    expected = 400_000 * espn.failure_probability(4.0, 64 - 10)
    assert expected == pytest.approx(1562.5)
    assert abs(failed - expected) < 5 * expected**0.5


def open_uniformity():
    """The values ESPN opens, for a constant input: they must look uniform."""
    polynomial = Polynomial.fit(torch.relu, degree=4)
    seen = []
    original = comm.get().all_reduce

    def record(tensor, *args, **kwargs):
        seen.append(tensor.clone())
        return original(tensor, *args, **kwargs)

    shared = crypten.cryptensor(torch.full((100_000,), 1.5), src=1)
    comm.get().all_reduce = record
    try:
        for name in ("espn", "opened_mask"):
            with espn.settings(protocol=name, truncation="exact"):
                shared.polyval(polynomial)
    finally:
        del comm.get().all_reduce
    return seen


def test_everything_sent_is_uniform_and_fresh():
    for sent in run_parties(open_uniformity, world_size=2, timeout=TIMEOUT):
        assert [tuple(t.shape) for t in sent] == [
            (3, 100_000),
            (100_000,),
            (100_000,),
            (100_000,),
        ]
        for tensor in sent:
            values = tensor.flatten()
            assert len(values.unique()) == len(values)
            for byte in (0, 56):
                counts = torch.bincount((values >> byte) & 255, minlength=256).double()
                expected = len(values) / 256
                chi = ((counts - expected) ** 2 / expected).sum().item()
                # 255 degrees of freedom: mean 255, deviation 22.6; six of them.
                assert 120 < chi < 391


def refuse(world_size):
    x = crypten.cryptensor(torch.ones(3), src=0)
    polynomial = Polynomial.fit(torch.relu, degree=4)
    messages = []
    with measure() as measured:
        try:
            x.polyval(polynomial)
        except WorldSizeError as error:
            messages.append(str(error))
    return messages, measured.cost.rounds, world_size


@pytest.mark.parametrize("world_size", [1, 3])
def test_espn_needs_two_parties(world_size):
    for messages, rounds, _ in run_parties(
        refuse, world_size=world_size, args=(world_size,), timeout=TIMEOUT
    ):
        assert rounds == 0 and len(messages) == 1
        assert f"{world_size} parties" in messages[0]
        assert "exactly 2" in messages[0] and "opened_mask" in messages[0]


def any_number_of_parties(x, polynomial):
    """The largest error of each protocol that is not for two; rounds as declared."""
    errors = []
    for name in ("opened_mask", "beaver"):
        with espn.settings(protocol=name) as chosen:
            with measure() as measured:
                y = crypten.cryptensor(x, src=0).polyval(polynomial)
            world_size = comm.get().get_world_size()
            declared = chosen.cost(polynomial, x.numel(), world_size=world_size)
            assert measured.cost.rounds == declared.rounds
            errors.append((y.get_plain_text() - polynomial(x)).abs().max().item())
    return errors


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_other_protocols_run_with_any_number(world_size):
    polynomial, x = Polynomial.fit(torch.relu, degree=4), torch.linspace(-5, 5, 500)
    for errors in run_parties(
        any_number_of_parties,
        world_size=world_size,
        args=(x, polynomial),
        timeout=TIMEOUT,
    ):
        assert len(errors) == 2 and max(errors) < 2**-6


def test_settings_are_checked_and_restored():
    before = current_settings()
    with espn.settings(protocol="opened_mask", truncation="exact", failure_bits=20):
        inside = current_settings()
        assert (inside.protocol.name, inside.truncation) == ("opened_mask", "exact")
        assert inside.failure_bits == 20
    assert current_settings() == before
    for wrong in (
        {"protocol": "nope"},
        {"truncation": "roughly"},
        {"failure_bits": 0},
        {"failure_bits": 49},
    ):
        with pytest.raises(ProtocolError, match="choose"), espn.settings(**wrong):
            pass
    assert current_settings() == before


def binary_input():
    x = crypten.cryptensor(torch.ones(3), src=0, ptype=crypten.mpc.binary)
    try:
        polyval(x, Polynomial((0, 1), 10, (-1.0, 1.0)))
    except RangeError as error:
        return str(error)
    return "no error"


def test_polyval_wants_arithmetic_shares():
    for message in run_parties(binary_input, world_size=2, timeout=TIMEOUT):
        assert "arithmetically shared" in message


def reuse():
    a, _ = one_sided_products(torch.Size((1000,)), 3)
    b, _ = one_sided_products(torch.Size((1000,)), 3)
    return a, b


def test_masks_are_used_once():
    for a, b in run_parties(reuse, world_size=2, timeout=TIMEOUT):
        values = torch.cat([a, b]).flatten()
        assert len(values.unique()) == len(values)
