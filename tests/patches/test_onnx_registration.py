"""CrypTen's import of a module that torch has moved."""

from __future__ import annotations

from crypten_espn import patches

from .cases import python


def test_onnx_registration() -> None:
    alone = python("import crypten", check=False)
    assert "torch.onnx._internal.registration" in alone.stderr
    python("import crypten_espn, crypten; crypten.nn.Linear(2, 2)")


def test_an_import_of_crypten_that_failed_before_does_no_harm() -> None:
    done = python(
        "try:\n"
        "    import crypten\n"
        "except ModuleNotFoundError:\n"
        "    print('failed')\n"
        "import crypten_espn, crypten, torch\n"
        "crypten.init()\n"
        "print(crypten.cryptensor(torch.tensor([1.5, -2])).get_plain_text().tolist())\n"
        "print(len(crypten_espn.patches.applied()))"
    )
    applied = len(patches.applied())
    assert done.stdout == f"failed\n[1.5, -2.0]\n{applied}\n"
