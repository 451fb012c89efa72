"""Average pools that both parties apply to their shares, before a second opening."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..checks import MAX_WINDOW
from ..linear import NO_PADS, Expression, Flatten, Pair, Pool, Read
from .layers import Layer
from .network import Network


def common_pools(network: Network) -> dict[str, Pair]:
    """Windows by activation, where all its readers read it through one average pool.

    Its windows lie side by side and cover the image, so that no element is wanted but
    in one sum. Then the sums are opened, and not the elements.
    """
    readers: dict[str, list[Layer]] = {}
    for name in network.order:
        for value in network.layers[name].inputs:
            readers.setdefault(value, []).append(network.layers[name])
    found = {}
    for name in network.order:
        layer = network.layers[name]
        if layer.form.polynomial is None or name == network.output:
            continue
        windows = {_window(reader) for reader in readers.get(name, [])}
        if len(windows) != 1 or None in windows:
            continue
        (window,) = windows
        assert window is not None
        _, *image = layer.shape
        if all(size % part == 0 for size, part in zip(image, window, strict=True)):
            found[name] = window
    return found


def _window(layer: Layer) -> Pair | None:
    """The window of a layer that only sums an image over windows side by side."""
    if layer.weighted or layer.activates or len(layer.inputs) != 1:
        return None
    assert layer.form.write is not None
    node = layer.form.write([Read(0)], 0)
    pool = node.x if isinstance(node, Flatten) else node
    if not isinstance(pool, Pool) or not isinstance(pool.x, Read):
        return None
    plain = pool.stride == pool.kernel and pool.pads == NO_PADS
    if not plain or not 1 < math.prod(pool.kernel) <= MAX_WINDOW:
        return None
    return pool.kernel


def of_sums(layer: Layer, sums: Sequence[Expression]) -> Expression:
    """A pool's expression, where what it reads is sums over its windows already."""
    assert layer.form.write is not None
    node = layer.form.write(sums, 0)
    if isinstance(node, Flatten):
        assert isinstance(node.x, Pool)
        return Flatten(node.x.x)
    assert isinstance(node, Pool)
    return node.x
