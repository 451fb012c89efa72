"""The rewriting of a network into inference form, in the order of the passes."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import ConversionError, EspnError
from ..attributes import check_attributes
from ..network import NetworkGraph
from ..sizes import check_sizes
from .activations import name_activations
from .affine import fold_affine
from .channel_scales import absorb_channel_scales
from .constants import fold_constants
from .images import on_images
from .moves import moves
from .pads import explicit_pads, pads_and_constants
from .pools import uniform_pools
from .shapes import drop_identities, flatten_reshapes
from .weights import convolutions, linear_layers

PASSES: tuple[Callable[[NetworkGraph], None], ...] = (
    fold_constants,
    check_attributes,
    drop_identities,
    flatten_reshapes,
    name_activations,
    pads_and_constants,
    on_images,
    linear_layers,
    convolutions,
    moves,
    uniform_pools,
    explicit_pads,
    fold_affine,
    moves,
    absorb_channel_scales,
)


def simplify(graph: NetworkGraph) -> None:
    """Run every pass, in the order each needs the one before.

    What a pass did not foresee becomes the problem of the node it was at, and the pass
    goes over the other nodes again.

    Raises:
        ConversionError: a pass failed at no node in particular, or the result is out
            of proportion.
    """
    for rewrite in PASSES:
        while True:
            try:
                rewrite(graph)
            except EspnError:
                raise
            except Exception as error:
                node = graph.current
                cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                if node is None or node.problem:
                    raise ConversionError(
                        f"the network could not be simplified ({cause})"
                    ) from error
                node.problem = (
                    f"a form of {node.op} that conversion does not know ({cause}); "
                    "write the layer in another way"
                )
            else:
                break
    graph.drop_unused()
    check_sizes(graph)


__all__ = ["simplify"]
