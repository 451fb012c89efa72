"""Noise on logits at the reveal: bounded, unbiased, known to rank 0 alone."""

from __future__ import annotations

import pytest
import torch

from crypten_espn.errors import RangeError
from crypten_espn.launch import run_parties
from crypten_espn.protocols.noise import checked_noise_bits, with_noise

BITS = 8


def reveal():
    """This party's share before and after, and what rank 1 learns."""
    import crypten

    x = crypten.cryptensor(torch.full((4000,), 1.25), src=1)
    noisy = with_noise(x, noise_bits=BITS)
    quiet = with_noise(x, noise_bits=0)
    answers = [value.get_plain_text(dst=1) for value in (noisy, quiet)]
    return x.share.clone(), noisy.share.clone(), answers


def test_noise_is_bounded_and_unbiased_and_only_rank_0_adds_it():
    first, second = run_parties(reveal, world_size=2, timeout=120)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(second[0], second[1])
    noisy, quiet = second[2]
    assert torch.equal(quiet, torch.full((4000,), 1.25))
    errors = (noisy - 1.25) * 2**16
    assert errors.min() >= -(2 ** (BITS - 1)) and errors.max() < 2 ** (BITS - 1)
    assert len(errors.unique()) > 200
    # Uniform: standard deviation 2**8 / sqrt(12), here within six of its own errors.
    assert abs(float(errors.mean())) < 6 * 2**BITS / (12 * 4000) ** 0.5


@pytest.mark.parametrize("bits", [-1, 41, 1.5, True, "8"])
def test_a_number_of_bits_that_is_none_is_refused(bits):
    with pytest.raises(RangeError, match="noise_bits"):
        checked_noise_bits(bits)
