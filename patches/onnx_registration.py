"""`import crypten` asks for a torch module that has moved."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable

from .patch import Patch

OLD = "torch.onnx._internal.registration"
NEW = "torch.onnx._internal.torchscript_exporter.registration"


def _probe() -> bool:
    return all(
        importlib.util.find_spec(name) is None
        for name in ("torch.onnx.symbolic_registry", OLD)
    )


def _install() -> Callable[[], None]:
    # CrypTen only imports the name; it registers through torch's public function.
    sys.modules[OLD] = importlib.import_module(NEW)

    def undo() -> None:
        sys.modules.pop(OLD, None)

    return undo


PATCH = Patch(
    name="onnx_registration",
    broke="import crypten: No module named 'torch.onnx._internal.registration'",
    seen_on="torch 2.13.0 with crypten 0.4.1",
    delete_when="CrypTen no longer imports torch.onnx._internal.registration",
    probe=_probe,
    install=_install,
)
