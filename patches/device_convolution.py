"""Convolutions of integers on a GPU: wrong for many channels, refused for groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .device_dispatch import wrapped
from .patch import Patch, together

_OPERATIONS = ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")
_MANTISSA = 53  # bits up to which whole numbers are exact in float64


def convolution(op: str, x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """A convolution modulo 2**64 where torch has none of integers.

    1. Cut both factors into blocks, so small that sums of their products are exact in
       float64.
    2. Convolve every pair of blocks that counts, all as groups of one convolution.
    3. Add them up, each at its place.

    Args:
        op: torch's name for it.
        x, weight: int64.
        options: as of torch's function; no bias.
    """
    groups = options.pop("groups", 1)
    inputs = weight.size(0) // groups if "transpose" in op else weight.size(1)
    terms = inputs * weight[0, 0].numel()
    blocks, bits = next(
        (count, bits)
        for count, bits in ((n, -(-64 // n)) for n in range(3, 64))
        if 2 * bits + (terms - 1).bit_length() <= _MANTISSA
    )
    pairs = [
        (i, j) for i in range(blocks) for j in range(blocks) if (i + j) * bits < 64
    ]

    def block(value: Tensor, number: int) -> Tensor:
        return ((value >> (bits * number)) & ((1 << bits) - 1)).double()

    products = getattr(torch, op)(
        torch.cat([block(x, i) for i, _ in pairs], 1),
        torch.cat([block(weight, j) for _, j in pairs], 0),
        groups=groups * len(pairs),
        **options,
    )
    parts = products.long().unflatten(1, (len(pairs), -1)).unbind(1)
    result = torch.zeros_like(parts[0])
    for part, (i, j) in zip(parts, pairs, strict=True):
        result += part << ((i + j) * bits)
    return result


def _probe() -> bool:
    from crypten.cuda.cuda_tensor import HANDLED_FUNCTIONS

    one = wrapped(torch.ones(1, 2, 1, 1, dtype=torch.int64))
    weight = wrapped(torch.ones(2, 1, 1, 1, dtype=torch.int64))
    try:
        HANDLED_FUNCTIONS[torch.conv2d](one, weight, groups=2)
    except AssertionError:
        return True
    return False


def _install() -> Callable[[], None]:
    from crypten.cuda.cuda_tensor import HANDLED_FUNCTIONS

    def handler(op: str) -> Callable[..., Any]:
        def handle(x: Any, weight: Any, **options: Any) -> Any:
            return wrapped(convolution(op, x.data, weight.data, **options))

        return handle

    def undo(function: object, stock: object) -> Callable[[], None]:
        return lambda: HANDLED_FUNCTIONS.__setitem__(function, stock)

    undos = []
    for op in _OPERATIONS:
        function = getattr(torch, op)
        undos.append(undo(function, HANDLED_FUNCTIONS[function]))
        HANDLED_FUNCTIONS[function] = handler(op)
    return together(*undos)


PATCH = Patch(
    name="device_convolution",
    broke="on a GPU: a convolution over many channels gives wrong integers (91 of 100 "
    "of 512 channels and 3x3 weights), groups are refused",
    seen_on="crypten 0.4.1, any torch",
    delete_when="CUDALongTensor counts channels among the terms of a convolution's "
    "sums, and takes groups",
    probe=_probe,
    install=_install,
)
