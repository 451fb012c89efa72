"""An attribute that CrypTen does not compute is refused, not ignored."""

from __future__ import annotations

from typing import Any

import crypten
import pytest
import torch
from crypten.nn.module import AvgPool2d, Conv, MaxPool2d
from torch import nn

WINDOW = {"kernel_shape": [2, 2], "strides": [2, 2]}


@pytest.mark.parametrize("pool", [AvgPool2d, MaxPool2d])
@pytest.mark.parametrize(
    "attribute",
    [
        {"auto_pad": b"SAME_UPPER"},
        {"dilations": [2, 2]},
        {"storage_order": 1},
        {"kernel_shape": [2]},
        {"unheard_of": 1},
    ],
)
def test_pools(pool: Any, attribute: dict[str, Any]) -> None:
    pool.from_onnx(attributes=WINDOW | {"dilations": [1, 1], "auto_pad": b"NOTSET"})
    with pytest.raises(ValueError, match=next(iter(attribute)).replace("_shape", "|")):
        pool.from_onnx(attributes=WINDOW | attribute)


def test_convolutions() -> None:
    sample = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1]}
    assert Conv.from_onnx(attributes=sample) is not None
    with pytest.raises(ValueError, match="SAME_LOWER"):
        Conv.from_onnx(attributes=sample | {"auto_pad": b"SAME_LOWER"})


def test_a_dilated_max_pool_is_refused_on_the_drop_in_path() -> None:
    with pytest.raises(ValueError, match="dilations"):
        crypten.nn.from_pytorch(nn.MaxPool2d(2, 2, dilation=2), torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match="two dimensions"):
        crypten.nn.from_pytorch(nn.MaxPool1d(2), torch.ones(1, 1, 6))
