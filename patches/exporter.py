"""torch.onnx.export now defaults to another exporter than the one CrypTen hooks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .patch import Patch, replace


def _export(f: Any, pytorch_model: torch.nn.Module, dummy_input: Any) -> Any:
    from crypten.nn import onnx_converter

    with warnings.catch_warnings():
        # Ours to know: CrypTen's symbolics are written for the deprecated exporter,
        # which says so itself and once more when it starts its own log.
        warnings.filterwarnings(
            "ignore",
            message="You are using the legacy TorchScript-based ONNX export",
            category=DeprecationWarning,
        )
        warnings.filterwarnings(
            "ignore", module=r"torch\.onnx\.", category=DeprecationWarning
        )
        torch.onnx.export(
            pytorch_model,
            dummy_input,
            f,
            dynamo=False,
            do_constant_folding=False,
            export_params=True,
            input_names=["input"],
            operator_export_type=torch.onnx.OperatorExportTypes.ONNX,
            output_names=["output"],
            opset_version=onnx_converter._OPSET_VERSION,
        )
    return f


def _probe() -> bool:
    from crypten.nn import onnx_converter

    default = inspect.signature(torch.onnx.export).parameters.get("dynamo")
    chooses = "dynamo" in inspect.getsource(onnx_converter._export_pytorch_model)
    return default is not None and default.default is True and not chooses


def _install() -> Callable[[], None]:
    from crypten.nn import onnx_converter

    return replace(onnx_converter, "_export_pytorch_model", _export)


PATCH = Patch(
    name="exporter",
    broke="crypten.nn.from_pytorch: torch.onnx.export runs the dynamo exporter, which "
    "knows none of CrypTen's symbolics",
    seen_on="torch 2.13.0 with crypten 0.4.1",
    delete_when="CrypTen asks for dynamo=False or converts without ONNX",
    probe=_probe,
    install=_install,
)
