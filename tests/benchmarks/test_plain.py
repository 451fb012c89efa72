"""Plaintext torch as the limit: every form computes the network, or is left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import party, plain
from benchmarks.squeeze import GatedNorm

from .test_party import as_parties


@pytest.fixture
def network() -> nn.Module:
    """Batch-norms behind convolutions, one of them that weighs its channels too."""
    torch.manual_seed(3)
    made = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3), GatedNorm(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )
    with torch.no_grad():
        made(torch.randn(4, 3, 8, 8) + 1)  # statistics that are not 0 and 1
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("form", ["eager", "folded", "frozen"])
def test_every_form_is_the_same_network(form: str, network: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    made = plain.in_form(form, network, x)
    torch.testing.assert_close(made(x), network(x), rtol=1e-3, atol=1e-3)


def test_folding_takes_plain_batch_norms_and_leaves_the_network(
    network: nn.Module,
) -> None:
    def norms(module: nn.Module) -> int:
        return sum(type(one) is nn.BatchNorm2d for one in module.modules())

    assert norms(plain.fold(network)) == 0 and norms(network) == 1


def test_a_form_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plain, "fold", lambda network: nn.Flatten())
    network = nn.Sequential(nn.Flatten(), nn.ReLU())
    with pytest.raises(plain.FormError, match="logits differ by 1 "):
        plain.in_form("folded", network, torch.full((1, 1, 1, 1), -1.0))


def test_a_form_that_cannot_be_had_is_left_out_on_both_sides() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten())
    x = torch.ones(1, 1, 2, 2)
    skipped: list[tuple[str, str]] = []

    def broken(form: str, network: nn.Module, x: torch.Tensor) -> nn.Module:
        if form == "compiled":
            raise plain.FormError("no compiler")
        return network

    def skip(engine: str, reason: str) -> None:
        skipped.append((engine, reason))

    def body(control: party.Control) -> list[str]:
        systems = plain.plain_systems(network, x, control, lambda _: (0.5, None), skip)
        results = [system.online()() for system in systems]
        errors = [result.max_abs_error for result in results]
        assert errors == [0.5 if control.rank else None] * len(systems)
        return [system.engine for system in systems]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "in_form", broken)
        mine, theirs = as_parties(body)
    assert mine == theirs == ["torch+eager", "torch+folded", "torch+frozen"]
    assert skipped == [("torch+compiled", "no compiler")]
