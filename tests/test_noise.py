"""Noise on logits at the reveal: bounded, unbiased, known to rank 0 alone."""

from __future__ import annotations

import pytest
import torch

from benchmarks.leaks import reveal as reveal_benchmark
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


def test_the_mean_of_many_answers_takes_noise_off_by_the_root_of_their_number():
    alone = reveal_benchmark.averaged(BITS, 1, trials=2000)
    assert alone == pytest.approx(2**BITS / 12**0.5, rel=0.1)
    assert reveal_benchmark.averaged(BITS, 64, trials=2000) == pytest.approx(
        alone / 8, rel=0.1
    )
    answers = reveal_benchmark.average_until(BITS, alone / 4)
    assert 8 < answers < 32


def test_noise_costs_classes_only_where_logits_are_as_close_as_it_is_large():
    answers = torch.tensor([[0, 1000, 5], [3, 2, 1]])
    labels = torch.tensor([1, 0])
    none = reveal_benchmark.cost(answers, labels, 0)
    assert none == {"accuracy": 1.0, "agreement": 1.0, "largest": 0.0}
    some = reveal_benchmark.cost(answers.repeat(200, 1), labels.repeat(200), 8)
    assert 0.5 < some["agreement"] < 1.0
    assert 0 < some["largest"] <= 2.0 ** (7 - 16)


def test_the_party_that_knows_its_shares_low_bits_finds_rows_without_noise():
    found = reveal_benchmark.attack((0,), (4096,))
    # The best of a hundred words without a row in it stays below 0.7.
    assert found[0][-1] > 0.72
