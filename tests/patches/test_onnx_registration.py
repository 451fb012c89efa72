"""CrypTen's import of a module that torch has moved."""

from __future__ import annotations

from .cases import python


def test_onnx_registration() -> None:
    alone = python("import crypten", check=False)
    assert "torch.onnx._internal.registration" in alone.stderr
    python("import crypten_espn, crypten; crypten.nn.Linear(2, 2)")
