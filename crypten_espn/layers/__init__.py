"""What a converted network is made of: one class a kind of layer, one file a family.

A kind says which ONNX operation it is, why a node of it cannot be converted, what it
computes in any arithmetic, and which CrypTen module it becomes. Every file here is
imported, so a new kind is one file.

Interpreters of what a kind computes: `arithmetic.Reals` (calibration, comparison,
reference), `explain.shares.Shares`, `masked.planning.forms.Forms` (the plan) and
`estimate.counts.Counts` (the cost).
"""

from __future__ import annotations

import importlib
import pkgutil

from ..errors import ConversionError
from ..graph import Node, layer_name
from .arithmetic import Arithmetic, Reals
from .kind import Kind

__all__ = ["KINDS", "Arithmetic", "Kind", "Reals", "kind_of"]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

# By ONNX operation.
KINDS: dict[str, type[Kind]] = {kind.op: kind for kind in Kind.__subclasses__()}


def kind_of(node: Node) -> Kind:
    """The layer that a simplified node is.

    Raises:
        ConversionError: no kind computes what the node says.
    """
    found = KINDS[node.op].read(node) if node.op in KINDS else None
    if found is None:
        raise ConversionError(
            f"{layer_name(node)} ({node.op}): no layer computes it; `crypten-espn "
            "check` names each with its cure"
        )
    return found
