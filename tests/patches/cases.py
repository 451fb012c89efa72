"""What the tests of all patches use."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import crypten
import pytest
import torch
from torch import nn

from crypten_espn import patches
from crypten_espn.launch import run_parties


@contextmanager
def without(name: str) -> Iterator[None]:
    """The world as it was before a patch; skips where the patch is not needed."""
    patch = patches.get(name)
    if not patch.applied:
        pytest.skip(f"{name} is not needed here")
    patch.revert()
    try:
        yield
    finally:
        patch.apply()


def python(code: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which a warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=check,
    )


def convert(model: nn.Module, example: torch.Tensor) -> crypten.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return crypten.nn.from_pytorch(model, example)


def private(graph: crypten.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The decrypted output: rank 0 owns the network, rank 1 the input."""

    def run() -> torch.Tensor:
        graph.encrypt(src=0)
        return graph(crypten.cryptensor(x, src=1)).get_plain_text()

    first, second = run_parties(run, world_size=2)
    assert torch.equal(first, second)
    return first


def assert_private_agrees(
    model: nn.Module, x: torch.Tensor, *, tolerance: float = 2e-3
) -> None:
    with torch.no_grad():
        expected = model(x)
    result = private(convert(model, x), x)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < tolerance
