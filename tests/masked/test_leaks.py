"""A client that follows the protocol averages what it knows, and finds nothing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from benchmarks.leaks.asking import ask, small_model
from benchmarks.leaks.attacks import attack_differences, attack_words
from crypten_espn.masked.messages import CLIENT, SERVER, Party
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.steps import Product

from .cases import without_noise


def attacked(
    models: Iterable[MaskedModel], corrections: Party
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By word, |cosine| of every row of all networks; and with the dealer's coins."""
    found: tuple[dict[str, list[np.ndarray]], ...] = ({}, {})
    for model in models:
        torch.manual_seed(100)
        x = (torch.randn(1, 1, 4, 4) * 2).repeat(128, 1, 1, 1)
        given = attack_words(model, x, batches=100, corrections=corrections)
        for all_of, of_this in zip(found, given, strict=True):
            for name, values in of_this.items():
                all_of.setdefault(name, []).append(values)
    words, control = (
        {name: np.concatenate(values) for name, values in which.items()}
        for which in found
    )
    return words, control


def medians(of_words: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.median(values)) for name, values in of_words.items()}


@pytest.mark.slow
@pytest.mark.parametrize("corrections", [SERVER, CLIENT])
def test_no_word_of_the_client_shows_a_row_of_the_last_layer(corrections):
    """Over six networks: masks are drawn anew, and what one shows by chance is chance.

    Of 96 rows nobody knows, half lie within |cos| 0.5; that half would lie above 0.8
    has a chance below 1 in 10**9 for a word, 1 in 10**7 for all of them.
    """
    models = (small_model(seed) for seed in range(6))
    words, control = attacked(models, corrections)
    found, known = medians(words), medians(control)
    # With the dealer's coins the same regression finds every row: it would have.
    assert known["second coins 0"] > 0.9 and known["first coins 0 1"] > 0.6
    assert len(found) > 60
    assert any(name.startswith("server message") for name in found)
    assert max(found.values()) < 0.8
    every = np.concatenate([*words.values()])
    assert abs(np.median(every) - 0.5) < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("corrections", [SERVER, CLIENT])
def test_no_word_of_the_client_shows_a_row_behind_a_product(corrections):
    """As above, where the last layer reads a product of two: both factors round."""
    models = [small_model(seed, gate=True) for seed in range(3)]
    for model in models:
        (step,) = model.plan.steps
        assert isinstance(step.activation, Product) and min(step.activation.dropped)
    words, control = attacked(models, corrections)
    found, known = medians(words), medians(control)
    assert known["second coins 0"] > 0.9 and known.keys() >= {"first coins 0 1"}
    assert max(known["first coins 0 0"], known["first coins 0 1"]) > 0.6
    assert len(found) > 60
    assert any(name.startswith("server message") for name in found)
    # Of 48 rows nobody knows, half lie above 0.8 by a chance below 1 in 10**5.
    assert max(found.values()) < 0.85
    every = np.concatenate([*words.values()])
    assert abs(np.median(every) - 0.5) < 0.08


@pytest.mark.slow
def test_answers_to_one_input_do_not_differ_by_rows_of_the_last_layer():
    model = small_model(0)
    torch.manual_seed(100)
    x = (torch.randn(1, 1, 4, 4) * 2).repeat(100, 1, 1, 1)
    noisy = np.concatenate([a.logits for a in ask(model, x, batches=20)])
    rows = model.weights.integers[-1].reshape(-1, 3)
    bits = model.plan.output.noise_bits
    assert attack_differences(noisy, rows, top=32, noise_bits=bits) == 0
    # Exact answers show most rows.
    exact = ask(without_noise(model), x, batches=20)
    plain = np.concatenate([a.logits for a in exact])
    assert attack_differences(plain, rows, top=32, noise_bits=0) >= 8
