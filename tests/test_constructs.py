"""What a CrypTen user may write, one construct at a time: right here, or refused."""

from __future__ import annotations

import pytest
import torch

import crypten_espn as espn
from crypten_espn.masked.planning import masked_model
from crypten_espn.simulate import simulate_model

from .patches.constructs import constructs

CONSTRUCTS = constructs()
# Functions of one value that are no polynomials, and products of two values.
REFUSED = {
    "abs": "Polynomial.fit",
    "exp": "Polynomial.fit",
    "hardtanh": "replace_activations",
    "log softmax": "the client applies it to the logits",
    "mul layers": "a product of two private values",
    "relu6": "replace_activations",
    "scalar div": "Polynomial.fit",
    "sigmoid": "replace_activations",
    "softmax": "the client applies it to the logits",
    "sqrt": "Polynomial.fit",
    "tanh": "replace_activations",
}
COMPARED = {"max pool", "max pool pad", "relu"}
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
    if name not in COMPARED:  # CrypTen's own, of two processes
        private = espn.convert(model, x, protocol="espn")
        found = espn.explain(private, other, runs=1)
        torch.testing.assert_close(found.logits, expected, atol=5e-3, rtol=1e-3)
    if name not in NOT_MASKED:
        model_ = masked_model(espn.convert(model, x))
        logits, _ = simulate_model(model_, other)
        torch.testing.assert_close(logits, expected, atol=5e-3, rtol=1e-3)


def test_at_least_ninety_constructs_are_walked():
    assert len(CONSTRUCTS) >= 90 and set(CONSTRUCTS) >= {*REFUSED, *NOT_MASKED}
