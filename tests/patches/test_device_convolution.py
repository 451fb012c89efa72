"""Convolutions of integers in float64, exact; tests/test_cuda.py has them on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crypten.cuda.cuda_tensor import HANDLED_FUNCTIONS

from crypten_espn.patches.device_convolution import convolution
from crypten_espn.patches.device_dispatch import wrapped

from .cases import without

# By operation: the input, the weight, options of the convolution.
CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ("conv2d", (2, 3, 6, 5), (4, 3, 3, 3), {"padding": 1}),
    "strided": ("conv2d", (1, 6, 9, 9), (4, 6, 5, 3), {"stride": (2, 3)}),
    "dilated": ("conv2d", (1, 6, 9, 9), (4, 6, 3, 3), {"dilation": 2}),
    "as-many-as-three-blocks-hold": ("conv2d", (1, 512, 2, 2), (3, 512, 1, 1), {}),
    "one-more": ("conv2d", (1, 513, 2, 2), (3, 513, 1, 1), {}),
    "wide": ("conv2d", (1, 512, 4, 4), (8, 512, 3, 3), {"padding": 1}),
    "rows": ("conv2d", (2, 16, 12, 12), (8, 16, 1, 7), {}),
    "points": ("conv2d", (2, 64, 12, 12), (8, 64, 1, 1), {"stride": 2}),
    "groups": ("conv2d", (2, 6, 5, 5), (9, 2, 3, 3), {"groups": 3}),
    "depthwise": ("conv2d", (2, 8, 5, 5), (8, 1, 3, 3), {"groups": 8}),
    "flat": ("conv1d", (2, 4, 9), (5, 4, 3), {"padding": 1}),
    "transposed": ("conv_transpose2d", (2, 6, 4, 4), (6, 2, 3, 3), {"groups": 2}),
    "flat-transposed": ("conv_transpose1d", (2, 300, 4), (300, 2, 3), {"stride": 2}),
}


def words(shape: tuple[int, ...]) -> torch.Tensor:
    """Words of all bits, the extremes among them."""
    drawn = torch.randint(-(2**63), 2**63 - 1, shape)
    drawn.view(-1)[0], drawn.view(-1)[-1] = -1, 2**63 - 1
    return drawn


@pytest.mark.parametrize("name", CASES)
def test_every_bit_is_that_of_the_processor(name: str) -> None:
    op, size, kernel, options = CASES[name]
    x, weight = words(size), words(kernel)
    expected = getattr(torch, op)(x, weight, **options)
    assert torch.equal(convolution(op, x, weight, **options), expected)
    extreme = torch.full_like(x, -1), torch.full_like(weight, -1)
    assert torch.equal(
        convolution(op, *extreme, **options), getattr(torch, op)(*extreme, **options)
    )


def test_groups_are_refused_without_it() -> None:
    x, weight = words((1, 4, 3, 3)), words((4, 1, 3, 3))
    expected = torch.conv2d(x, weight, groups=4)
    call = HANDLED_FUNCTIONS[torch.conv2d](wrapped(x), wrapped(weight), groups=4)
    assert torch.equal(call.tensor(), expected)
    with without("device_convolution"), pytest.raises(AssertionError, match="group"):
        HANDLED_FUNCTIONS[torch.conv2d](wrapped(x), wrapped(weight), groups=4)
