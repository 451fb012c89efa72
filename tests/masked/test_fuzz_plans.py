"""Mutated plans are refused by name, or they can be dealt."""

from __future__ import annotations

import pytest

from . import fuzz_plans
from .cases import fuzzed_plans


@pytest.mark.slow
def test_a_mutated_plan_is_refused_by_name_or_runs():
    outcome = fuzz_plans.run(fuzzed_plans(), seed=1, count=300)
    assert outcome.faults == []
    assert sum(outcome.counts.values()) == 300
    assert outcome.counts[fuzz_plans.RUN] > 30
    assert outcome.counts[fuzz_plans.REFUSED] > 100


@pytest.mark.slow
def test_mutants_are_the_same_for_the_same_seed_and_differ_otherwise():
    texts = fuzzed_plans()
    made = [fuzz_plans.mutant(texts, 1, number) for number in range(50)]
    assert made == [fuzz_plans.mutant(texts, 1, number) for number in range(50)]
    assert len(set(made)) > 40
    assert fuzz_plans.mutant(texts, 2, 0) != made[0]
