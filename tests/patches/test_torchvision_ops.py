"""torchvision beside a torch that lacks its operators."""

from __future__ import annotations

from .cases import python


def test_torchvision_ops() -> None:
    alone = python("import torchvision", check=False)
    patched = python(
        "import crypten_espn, torch, torchvision\n"
        "torchvision.models.resnet18().eval()(torch.zeros(1, 3, 32, 32))\n"
        "torchvision.transforms.Resize(4)(torch.zeros(3, 8, 8))\n"
        "print([p.name for p in crypten_espn.patches.applied()])"
    )
    if alone.returncode:
        assert "operator torchvision::nms does not exist" in alone.stderr
        assert "torchvision_ops" in patched.stdout
    else:
        assert "torchvision_ops" not in patched.stdout
