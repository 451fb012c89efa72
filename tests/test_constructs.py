"""What a CrypTen user may write, one construct at a time: right here, or refused."""

from __future__ import annotations

import crypten
import pytest
import torch

import crypten_espn as espn
from crypten_espn.errors import ConversionError
from crypten_espn.launch import run_parties
from crypten_espn.masked.planning import masked_model
from crypten_espn.simulate import simulate_model

from .patches.constructs import constructs

CONSTRUCTS = constructs()
# Functions of one value that are no polynomials.
REFUSED = {
    "abs": "Polynomial.fit",
    "exp": "Polynomial.fit",
    "scalar div": "Polynomial.fit",
    "sqrt": "Polynomial.fit",
    "tanh": "replace_activations",
}
# What CrypTen compares or approximates, and says so: slow, with what to do.
COMPARED = {
    "hardtanh": "replace_activations",
    "log softmax": "the client applies it to the logits",
    "max pool": "replace_pooling",
    "max pool pad": "replace_pooling",
    "relu": "replace_activations",
    "relu6": "replace_activations",
    "sigmoid": "replace_activations",
    "softmax": "the client applies it to the logits",
}
# One number an input, and no axis for it.
NOT_MASKED = {*COMPARED, "squeeze"}


@pytest.mark.parametrize("name", sorted(CONSTRUCTS))
def test_a_construct_is_right_in_every_engine_or_refused_with_its_cure(name):
    model, shape = CONSTRUCTS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    report = espn.check(model, x)
    if name in REFUSED:
        assert not report.ok and REFUSED[name] in str(report), report
        return
    assert report.ok and (report.masked is None) == (name not in NOT_MASKED), report
    other = torch.cat([x, -x])[:3]
    with torch.no_grad():
        expected = model(other)
    if name in COMPARED:
        assert COMPARED[name] in str(report) and "works, but slowly" in str(report)
    else:
        private = espn.convert(model, x, protocol="espn")
        found = espn.explain(private, other, runs=1)
        torch.testing.assert_close(found.logits, expected, atol=5e-3, rtol=1e-3)
    if name not in NOT_MASKED:
        model_ = masked_model(espn.convert(model, x))
        logits, _ = simulate_model(model_, other)
        torch.testing.assert_close(logits, expected, atol=5e-3, rtol=1e-3)


def compared() -> dict[str, float]:
    """How far converted constructs are off, as CrypTen computes them."""
    off, draws = {}, torch.Generator().manual_seed(3)
    for name in COMPARED:
        model, shape = CONSTRUCTS[name]
        x = torch.randn(shape, generator=draws)
        private = espn.convert(model, x, protocol="opened_mask").encrypt(src=0)
        got = private(crypten.cryptensor(x)).get_plain_text()
        off[name] = float((got - model(x)).abs().max())
    return off


def test_what_crypten_compares_or_approximates_is_as_right_as_its_own():
    (off,) = run_parties(compared, world_size=1)
    assert {name: error for name, error in off.items() if error > 2e-2} == {}
    model, shape = CONSTRUCTS["sigmoid"]
    x = torch.randn(shape)
    with pytest.raises(ConversionError, match="approximations"):
        espn.explain(espn.convert(model, x, protocol="espn"), x)


def test_a_softmax_over_the_batch_is_refused():
    for head in (torch.nn.Softmax(0), torch.nn.LogSoftmax(0)):
        report = espn.check(head, torch.randn(3, 6))
        assert not report.ok and "all inputs of a batch" in str(report)


def test_at_least_ninety_constructs_are_walked():
    assert len(CONSTRUCTS) >= 90 and set(CONSTRUCTS) >= {*REFUSED, *NOT_MASKED}
