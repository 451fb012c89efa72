"""What CrypTen 0.4.1 needs before it works, and works right: one file per matter.

`import crypten_espn` applies every patch whose probe finds its matter broken. Order
matters for the first two: they come before `import crypten` and `import torchvision`.
"""

from __future__ import annotations

import sys

from . import (
    any_batch,
    average_pool,
    batch_norm,
    concat_one,
    conv_padding,
    decode_negative,
    device_convolution,
    device_dispatch,
    encoder_range,
    exporter,
    generator,
    graph_inputs,
    identity,
    launcher,
    onnx_arrays,
    onnx_registration,
    torch_load,
    torchvision_ops,
    tuple_cache,
)
from .patch import Patch

PATCHES: list[Patch] = [
    torchvision_ops.PATCH,
    onnx_registration.PATCH,
    exporter.PATCH,
    any_batch.PATCH,
    identity.PATCH,
    onnx_arrays.PATCH,
    torch_load.PATCH,
    launcher.PATCH,
    tuple_cache.PATCH,
    generator.PATCH,
    encoder_range.PATCH,
    decode_negative.PATCH,
    conv_padding.PATCH,
    average_pool.PATCH,
    batch_norm.PATCH,
    graph_inputs.PATCH,
    concat_one.PATCH,
    device_convolution.PATCH,
    device_dispatch.PATCH,
]


def apply() -> None:
    """Apply every patch that is needed here; a second call does nothing."""
    _forget_failed_import()
    for patch in PATCHES:
        patch.apply()


def _forget_failed_import() -> None:
    """Drop what an `import crypten` that failed has left behind.

    Whoever caught its error and goes on has CrypTen's submodules without the package,
    and Python would not import them again into it.
    """
    if "crypten" not in sys.modules:
        for name in [name for name in sys.modules if name.startswith("crypten.")]:
            del sys.modules[name]


def applied() -> list[Patch]:
    """The patches in force, in the order in which they were applied."""
    return [patch for patch in PATCHES if patch.applied]


def get(name: str) -> Patch:
    """The patch with this name.

    Raises:
        KeyError: there is none.
    """
    for patch in PATCHES:
        if patch.name == name:
            return patch
    raise KeyError(f"no patch {name!r}; there are {[p.name for p in PATCHES]}")


__all__ = ["PATCHES", "Patch", "applied", "apply", "get"]
