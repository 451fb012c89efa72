"""A network as a short list of nodes with constants, read from torch or ONNX.

`read` gives a `NetworkGraph`; `simplify` rewrites it in inference form: constants
folded, batch-norm folded into the layer before it, shapes resolved, pools and pads
explicit. Nothing here knows about parties or shares.
"""

from __future__ import annotations

from .index_map import NOTHING, IndexMap
from .network import POLYNOMIAL_OP, NetworkGraph, Node, layer_name
from .passes import simplify
from .read import read
from .trace import export

__all__ = [
    "NOTHING",
    "POLYNOMIAL_OP",
    "IndexMap",
    "NetworkGraph",
    "Node",
    "export",
    "layer_name",
    "read",
    "simplify",
]
