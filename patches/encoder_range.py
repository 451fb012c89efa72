"""Values that fixed point cannot hold, or of another type, are encoded as garbage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from crypten_espn.errors import RangeError
from crypten_espn.inputs import number_tensor

from .patch import Patch, replace


def _probe() -> bool:
    from crypten.encoder import FixedPointEncoder

    encoder = FixedPointEncoder(precision_bits=16)
    try:
        halves = encoder.encode(torch.tensor([4.0], dtype=torch.float16))
        if halves.tolist() != [4 * 2**16]:
            return True
        encoder.encode(torch.tensor([1e30]))
    except RangeError:
        return False
    return True


def _install() -> Callable[[], None]:
    from crypten.cryptensor import CrypTensor
    from crypten.cuda import CUDALongTensor
    from crypten.encoder import FixedPointEncoder

    original = FixedPointEncoder.encode

    def encode(self: Any, x: Any, device: Any = None) -> Any:
        if not isinstance(x, CrypTensor | CUDALongTensor | int | float):
            # CrypTen multiplies half precision in half precision, and cuts a numpy
            # array to whole numbers before it scales it.
            x = number_tensor(x, "what is to be shared")
            if device is not None:
                x = x.to(device)
        _check(x, self._precision_bits)
        return original(self, x, device)

    return replace(FixedPointEncoder, "encode", encode)


def _check(x: Any, frac_bits: int) -> None:
    """Raise RangeError unless every |x| * 2**frac_bits is below 2**63."""
    if isinstance(x, int | float):
        low = high = x
        exact = isinstance(x, int)
    elif isinstance(x, torch.Tensor):
        if not x.numel():
            return
        low, high = (v.item() for v in x.aminmax())
        exact = not x.is_floating_point()
    else:
        return
    limit = 2 ** (63 - frac_bits) if frac_bits <= 63 else 2.0 ** (63 - frac_bits)
    # A comparison with NaN is false, so NaN and infinity fail here too.
    if -limit <= low and high < limit:
        return
    words = (f"{v}" if exact else f"{v:g}" for v in (low, high))
    raise RangeError(
        f"values from {' to '.join(words)} were given to be shared; with {frac_bits} "
        f"fractional bits they must be finite and below 2**{63 - frac_bits} in "
        "magnitude. Clean or scale the data, or lower cfg.encoder.precision_bits"
    )


PATCH = Patch(
    name="encoder_range",
    broke="crypten.cryptensor: NaN, infinity and values of 2**47 or more at 16 bits "
    "are shared as arbitrary integers, as are half precision of 1 or more and numpy "
    "arrays of anything but whole numbers; bfloat16 and booleans are a TypeError",
    seen_on="crypten 0.4.1, any torch",
    delete_when="FixedPointEncoder.encode refuses what it cannot represent, whatever "
    "the type it comes in",
    probe=_probe,
    install=_install,
)
