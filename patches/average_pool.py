"""A converted pooling layer ignores count_include_pad and all but one of its sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .patch import Patch, replace, together

# What a pooling layer may say: what is read below, or has no effect at this value.
_ALLOWED: dict[str, Callable[[Any], bool]] = {
    "auto_pad": lambda value: value in (b"NOTSET", b"VALID"),
    "ceil_mode": lambda value: True,
    "count_include_pad": lambda value: True,
    "dilations": lambda value: all(step == 1 for step in value),
    "kernel_shape": lambda value: True,
    "pads": lambda value: True,
    "storage_order": lambda value: value == 0,
    "strides": lambda value: True,
}


def _window(
    attributes: dict[str, Any],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, stride and padding of each dimension, as torch wants them.

    Raises:
        ValueError: the padding differs between the two ends of a dimension, the pool
            is not two-dimensional, or an attribute is not what CrypTen computes.
    """
    for name, value in attributes.items():
        allowed = _ALLOWED.get(name)
        if allowed is None or not allowed(value):
            raise ValueError(
                f"a pooling layer has {name}={value}, which CrypTen does not compute; "
                "build it without, and pad with a layer of its own"
            )
    if len(attributes["kernel_shape"]) != 2:
        raise ValueError(
            f"a pooling layer has a window of {attributes['kernel_shape']}; CrypTen "
            "pools images of two dimensions: unsqueeze the input"
        )
    kernel = tuple(attributes["kernel_shape"])
    stride = tuple(attributes.get("strides", [1] * len(kernel)))
    pads = attributes.get("pads", [0] * 2 * len(kernel))
    before, after = pads[: len(kernel)], pads[len(kernel) :]
    if before != after:
        raise ValueError(
            f"a pooling layer pads {before} before and {after} after its input; both "
            "ends must agree: pad with a layer of its own"
        )
    return kernel, stride, tuple(before)


def _probe() -> bool:
    from crypten.nn.module import AvgPool2d

    sample = {"kernel_shape": [2, 3], "strides": [2, 2], "pads": [0, 1, 0, 1]}
    pool = AvgPool2d.from_onnx(attributes=sample)
    return pool.padding != (0, 1) and not hasattr(pool, "count_include_pad")


def _install() -> Callable[[], None]:
    from crypten.nn.module import AvgPool2d, MaxPool2d

    stock_forward = AvgPool2d.forward

    def average_from_onnx(attributes: dict[str, Any] | None = None) -> Any:
        attributes = attributes or {}
        kernel, stride, padding = _window(attributes)
        pool = AvgPool2d(
            kernel,
            stride=stride,
            padding=padding,
            ceil_mode=attributes.get("ceil_mode", 0) > 0,
        )
        pool.count_include_pad = attributes.get("count_include_pad", 0) > 0
        return pool

    def average_forward(self: Any, x: Any) -> Any:
        output = stock_forward(self, x)
        if getattr(self, "count_include_pad", True) or not any(self.padding):
            return output
        # The share of each window that lies inside the input; public, as shapes are.
        inside = torch.nn.functional.avg_pool2d(
            torch.ones(1, 1, *x.shape[-2:]), self.kernel_size, self.stride, self.padding
        )
        return output * inside.reciprocal().to(x.device)

    def maximum_from_onnx(attributes: dict[str, Any] | None = None) -> Any:
        attributes = attributes or {}
        kernel, stride, padding = _window(attributes)
        if len(set(padding)) > 1:
            # crypten's max_pool2d gives wrong values or fails; so does its gradient.
            raise ValueError(
                f"MaxPool2d(padding={padding}): CrypTen pads both dimensions alike; "
                "use one padding for both, or pad with a layer of its own"
            )
        return MaxPool2d(
            kernel,
            stride=stride,
            padding=padding,
            ceil_mode=attributes.get("ceil_mode", 0) > 0,
        )

    def forget_forward() -> None:
        del AvgPool2d.forward

    AvgPool2d.forward = average_forward
    return together(
        forget_forward,
        replace(AvgPool2d, "from_onnx", staticmethod(average_from_onnx)),
        replace(MaxPool2d, "from_onnx", staticmethod(maximum_from_onnx)),
    )


PATCH = Patch(
    name="average_pool",
    broke="crypten.nn.from_pytorch: AvgPool2d(count_include_pad=False) counts the "
    "padding; pooling with a (2, 3) kernel is silently converted to (2, 2)",
    seen_on="crypten 0.4.1, any torch",
    delete_when="crypten.nn.module pools honour count_include_pad and every dimension",
    probe=_probe,
    install=_install,
)
