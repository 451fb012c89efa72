"""onnx hands out read-only arrays; CrypTen writes to the tensors made of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from onnx import TensorProto, numpy_helper

from .patch import Patch, replace


def _to_array(tensor: TensorProto) -> np.ndarray:
    return np.array(numpy_helper.to_array(tensor))


def _probe() -> bool:
    from crypten.nn import onnx_converter

    sample = numpy_helper.from_array(np.zeros(1, dtype=np.float32))
    return not onnx_converter.numpy_helper.to_array(sample).flags.writeable


def _install() -> Callable[[], None]:
    from crypten.nn import onnx_converter

    return replace(onnx_converter, "numpy_helper", SimpleNamespace(to_array=_to_array))


PATCH = Patch(
    name="onnx_arrays",
    broke="crypten.nn.from_pytorch: parameters share read-only memory, a warning at "
    "conversion and undefined behaviour once they are trained",
    seen_on="onnx 1.23.2 with crypten 0.4.1",
    delete_when="CrypTen copies the arrays it gets from onnx",
    probe=_probe,
    install=_install,
)
