"""crypten.nn.from_pytorch takes any batch, whatever the example's."""

from __future__ import annotations

import crypten
import pytest
import torch
from torch import nn

from crypten_espn import patches
from crypten_espn.launch import run_parties
from tests.patches.constructs import constructs

# What CrypTen has no module for, says so, or (exp) approximates coarsely.
NOT_IN_CRYPTEN = {
    "abs",
    "avg pool ceil",
    "cat ones",
    "conv same",
    "conv same even",
    "conv transposed",
    "exp",
    "neg",
    "pad",
    "pad value",
    "scalar div",
    "scalar sub",
    "slice steps",
    "split",
    "squeeze",
    "sum channels",
    "sum keepdim",
    "tanh",
    "zero pad",
}
# What was not right before these patches: with the example's batch, and with another.
MENDED = {"cat one", "dropout 2d"}
MENDED_FOR_OTHER_BATCHES = {"head", "reshape", "unflatten", "view size"}


def differences(*, one: bool) -> dict[str, str]:
    """What is not right, encrypted, converted with the whole batch or its first."""
    found = {}
    draws = torch.Generator().manual_seed(3)
    for name, (model, shape) in constructs().items():
        x = torch.randn(shape, generator=draws)
        with torch.no_grad():
            expected = model(torch.cat([x, -x]) if one else x)
        try:
            graph = crypten.nn.from_pytorch(model, x[:1] if one else x)
            graph.encrypt(src=0)
            given = crypten.cryptensor(torch.cat([x, -x]) if one else x)
            got = graph(given).get_plain_text()
        except Exception as error:
            found[name] = type(error).__name__
            continue
        if got.shape != expected.shape:
            found[name] = f"shape {tuple(got.shape)}"
        elif (got - expected).abs().max() > 2e-2:
            found[name] = "values"
    return found


@pytest.mark.parametrize("one", [False, True])
def test_every_construct_that_was_right_is_right_for_any_batch(one: bool) -> None:
    (found,) = run_parties(differences, world_size=1, kwargs={"one": one})
    assert set(found) == NOT_IN_CRYPTEN, found
    assert "shape" not in " ".join(found.values())


def test_without_the_patch_the_examples_batch_is_baked_in() -> None:
    model, shape = constructs()["view size"]
    x = torch.randn(shape)

    def size(patched: bool) -> tuple[int, ...]:
        if not patched:
            patches.get("any_batch").revert()
        graph = crypten.nn.from_pytorch(model, x[:1])
        graph.encrypt(src=0)
        return tuple(graph(crypten.cryptensor(x)).size())

    assert run_parties(size, world_size=1, args=(True,)) == [(2, 192)]
    assert run_parties(size, world_size=1, args=(False,)) == [(1, 384)]


def test_a_dimension_that_is_not_the_batch_is_left_alone() -> None:
    class Moved(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(0, 1).reshape(2, -1)

    x = torch.randn(2, 2, 3)

    def run() -> torch.Tensor:
        graph = crypten.nn.from_pytorch(Moved(), x)
        graph.encrypt(src=0)
        return graph(crypten.cryptensor(torch.cat([x, x]))).get_plain_text()

    (got,) = run_parties(run, world_size=1)
    torch.testing.assert_close(got, Moved()(torch.cat([x, x])), atol=1e-3, rtol=0)
