"""Values that fixed point cannot hold are encoded as garbage, without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from crypten_espn.errors import RangeError

from .patch import Patch, replace


def _probe() -> bool:
    from crypten.encoder import FixedPointEncoder

    try:
        FixedPointEncoder(precision_bits=16).encode(torch.tensor([1e30]))
    except RangeError:
        return False
    return True


def _install() -> Callable[[], None]:
    from crypten.encoder import FixedPointEncoder

    original = FixedPointEncoder.encode

    def encode(self: Any, x: Any, device: Any = None) -> Any:
        _check(x, self._precision_bits)
        return original(self, x, device)

    return replace(FixedPointEncoder, "encode", encode)


def _check(x: Any, frac_bits: int) -> None:
    """Raise RangeError unless every |x| * 2**frac_bits is below 2**63."""
    if isinstance(x, int | float | list | np.ndarray):
        values = torch.as_tensor(x)
    elif torch.is_tensor(x):
        values = x
    else:
        return
    exact = not values.is_floating_point()
    if values.numel() == 0 or (exact and frac_bits == 0):
        return
    low, high = (v.item() for v in values.detach().aminmax())
    limit = 2.0 ** (63 - frac_bits)
    # A comparison with NaN is false, so NaN and infinity fail here too.
    if -limit <= low and high < limit:
        return
    raise RangeError(
        f"values from {low:g} to {high:g} were given to be shared; with {frac_bits} "
        f"fractional bits they must be finite and below 2**{63 - frac_bits} in "
        "magnitude. Clean or scale the data, or lower cfg.encoder.precision_bits"
    )


PATCH = Patch(
    name="encoder_range",
    broke="crypten.cryptensor: NaN, infinity and values of 2**47 or more at 16 bits "
    "are shared as arbitrary integers",
    seen_on="crypten 0.4.1, any torch",
    delete_when="FixedPointEncoder.encode refuses what it cannot represent",
    probe=_probe,
    install=_install,
)
