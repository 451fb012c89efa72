"""A converted convolution takes every second entry of its padding list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .patch import Patch, replace


def _probe() -> bool:
    from crypten.nn.module import Conv

    sample = {"strides": [1, 1], "pads": [1, 0, 1, 0], "dilations": [1, 1]}
    return list(Conv.from_onnx(attributes=sample).padding) != [1, 0]


def _install() -> Callable[[], None]:
    from crypten.nn.module import Conv

    class UnevenConv(Conv):
        """Convolution whose input is padded first, differently at the two ends."""

        def __init__(self, before: list[int], after: list[int], **options: Any) -> None:
            super().__init__(padding=[0] * len(before), **options)
            # torch counts from the last dimension: before, after, before, after, ...
            ends = zip(reversed(before), reversed(after), strict=True)
            self.input_padding = tuple(count for pair in ends for count in pair)

        def forward(self, x: list[Any]) -> Any:
            input, *parameters = x
            if torch.is_tensor(input):
                input = torch.nn.functional.pad(input, self.input_padding)
            else:
                input = input.pad(self.input_padding)
            return super().forward([input, *parameters])

    def from_onnx(attributes: dict[str, Any] | None = None) -> Conv:
        attributes = attributes or {}
        if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
            raise ValueError(
                f"Conv node with auto_pad={attributes['auto_pad'].decode()}: give its "
                "pads as numbers, for the image sizes of the network"
            )
        for name in ("strides", "pads", "dilations"):
            if name not in attributes:
                raise ValueError(f"Conv node without {name}; given: {list(attributes)}")
        # ONNX lists the pads before each dimension, then those after each.
        pads = attributes["pads"]
        before, after = pads[: len(pads) // 2], pads[len(pads) // 2 :]
        options = {
            "stride": attributes["strides"],
            "dilation": attributes["dilations"],
            "groups": attributes.get("group", 1),
        }
        if before == after:
            return Conv(padding=before, **options)
        return UnevenConv(before, after, **options)

    return replace(Conv, "from_onnx", staticmethod(from_onnx))


PATCH = Patch(
    name="conv_padding",
    broke="crypten.nn.from_pytorch: a convolution with padding=(1, 0) is converted to "
    "padding=(1, 1) and silently gives another shape",
    seen_on="crypten 0.4.1, any torch",
    delete_when="crypten.nn.module.Conv.from_onnx reads the first half of pads",
    probe=_probe,
    install=_install,
)
