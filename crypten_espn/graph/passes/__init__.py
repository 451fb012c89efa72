"""The rewriting of a network into inference form, in the order of the passes."""

from __future__ import annotations

from collections.abc import Callable

from ..network import NetworkGraph
from .constants import fold_constants
from .norms import fold_batch_norms
from .pads import explicit_pads
from .pools import uniform_pools
from .shapes import drop_identities, flatten_reshapes, means_to_pools
from .weights import convolutions, linear_layers

PASSES: tuple[Callable[[NetworkGraph], None], ...] = (
    fold_constants,
    drop_identities,
    flatten_reshapes,
    means_to_pools,
    linear_layers,
    convolutions,
    fold_batch_norms,
    explicit_pads,
    uniform_pools,
)


def simplify(graph: NetworkGraph) -> None:
    """Run every pass, in the order each needs the one before."""
    for rewrite in PASSES:
        rewrite(graph)
    graph.drop_unused()


__all__ = ["simplify"]
