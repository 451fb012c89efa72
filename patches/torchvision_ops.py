"""torchvision's C++ operators need a CUDA that a CPU-only torch does not have."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from .patch import Patch

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _probe() -> bool:
    if torch._C._dispatch_has_kernel("torchvision::nms"):
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            # Exactly what `import torchvision` would do, and harmless to repeat.
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return False
    return True


def _install() -> Callable[[], None]:
    # torchvision attaches shape functions to these names at import; models and
    # transforms never call the operators.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
    return library._destroy


PATCH = Patch(
    name="torchvision_ops",
    broke="import torchvision: operator torchvision::nms does not exist",
    seen_on="torchvision 0.28.0 from its default wheel beside torch 2.13.0 for CPU",
    delete_when="torchvision imports beside a CPU-only torch",
    probe=_probe,
    install=_install,
)
