"""What torch's exporter has no words for, or takes apart: pools, shuffles, norms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.onnx import symbolic_helper, symbolic_opset9

from .network import ADAPTIVE_OP, OPSET


@contextmanager
def own_symbolics() -> Iterator[None]:
    """Export these as operations that are read, and everything else as torch does."""
    own: dict[str, Callable[..., Any]] = {
        "adaptive_avg_pool1d": _adaptive(1),
        "adaptive_avg_pool2d": _adaptive(2),
        "channel_shuffle": _channel_shuffle,
        "group_norm": _named("GroupNormalization"),
        "instance_norm": _instance_norm,
        "mT": _matrix_transposed,
        "rms_norm": _named("RMSNormalization"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, symbolic in own.items():
            torch.onnx.register_custom_op_symbolic(f"aten::{name}", symbolic, OPSET)
        try:
            yield
        finally:
            for name in own:
                torch.onnx.unregister_custom_op_symbolic(f"aten::{name}", OPSET)


def _channel_shuffle(g: Any, x: Any, groups: Any) -> Any:
    sizes = x.type().sizes()
    count = int(groups.node().t("value"))
    apart = [sizes[0], count, sizes[1] // count, *sizes[2:]]
    shape = g.op("Constant", value_t=torch.tensor(apart))
    order = [0, 2, 1, *range(3, len(apart))]
    y = g.op("Transpose", g.op("Reshape", x, shape), perm_i=order)
    return g.op("Reshape", y, g.op("Constant", value_t=torch.tensor(sizes)))


def _matrix_transposed(g: Any, x: Any) -> Any:
    rank = len(x.type().sizes())
    return g.op("Transpose", x, perm_i=[*range(rank - 2), rank - 1, rank - 2])


def _named(op: str) -> Callable[..., Any]:
    """A layer that is refused, by its own name."""

    def symbolic(g: Any, x: Any, *rest: Any) -> Any:
        return g.op(f"crypten_espn::{op}", x).setType(x.type())

    return symbolic


def _instance_norm(g: Any, x: Any, *rest: Any) -> Any:
    """With statistics of its own it is a batch-norm, which the exporter takes apart."""
    weight, bias, mean, variance, of_input, _, eps, _ = rest
    constant = symbolic_helper._maybe_get_const
    if mean.node().mustBeNone() or constant(of_input, "b"):
        return symbolic_opset9.instance_norm(g, x, *rest)
    channels = x.type().sizes()[1]
    if weight.node().mustBeNone():
        weight = g.op("Constant", value_t=torch.ones(channels))
        bias = g.op("Constant", value_t=torch.zeros(channels))
    values = x, weight, bias, mean, variance
    return g.op("BatchNormalization", *values, epsilon_f=constant(eps, "f"))


def _adaptive(dims: int) -> Callable[..., Any]:
    standard = getattr(symbolic_opset9, f"adaptive_avg_pool{dims}d")

    def symbolic(g: Any, x: Any, output_size: Any) -> Any:
        out = output_size.node().t("value") if _is_constant(output_size) else None
        if out is None:
            out = [v.node().t("value") for v in output_size.node().inputs()]
        out = [int(v) for v in out]
        sizes = x.type().sizes()
        if sizes is None or None in sizes[-dims:]:
            return standard(g, x, output_size)
        size = sizes[-dims:]
        if all(n % k == 0 for n, k in zip(size, out, strict=True)):
            return standard(g, x, output_size)
        # A pool of the same result's size, by which shapes are inferred.
        strides = [max(n // k, 1) for n, k in zip(size, out, strict=True)]
        kernel = [
            max(n - (k - 1) * s, 1) for n, k, s in zip(size, out, strides, strict=True)
        ]
        more = [max(k - n, 0) for n, k in zip(size, out, strict=True)]
        y = g.op(
            f"crypten_espn::{ADAPTIVE_OP}",
            x,
            output_size_i=out,
            kernel_shape_i=kernel,
            strides_i=strides,
            pads_i=[0] * dims + more,
        )
        return y.setType(x.type().with_sizes([*sizes[:-dims], *out]))

    return symbolic


def _is_constant(value: Any) -> bool:
    return bool(value.node().kind() == "onnx::Constant")
