"""A revealed negative number is one too small when its fraction is almost a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .patch import Patch, replace


def _probe() -> bool:
    from crypten.encoder import FixedPointEncoder

    # -3 + 2/4096, which stock CrypTen reads as -4 + 2/4096.
    decoded = FixedPointEncoder(precision_bits=12).decode(torch.tensor([-12286]))
    return abs(float(decoded) + 12286 / 4096) > 0.5


def _install() -> Callable[[], None]:
    from crypten.encoder import FixedPointEncoder

    original = FixedPointEncoder.decode

    def decode(self: Any, tensor: Any) -> Any:
        if tensor is None or self._scale <= 1:
            return original(self, tensor)
        # Whole and fractional part apart: each fits a float32 better than their sum.
        whole = tensor.div(self._scale, rounding_mode="floor")
        fraction = tensor % self._scale
        return (whole.float() + fraction.float() / self._scale).data

    return replace(FixedPointEncoder, "decode", decode)


PATCH = Patch(
    name="decode_negative",
    broke="get_plain_text: -2.9995 is read as -3.9995; of the 2**precision_bits values "
    "just above -k, k - 1 come out one too small",
    seen_on="crypten 0.4.1, any torch",
    delete_when="FixedPointEncoder.decode divides by the scale, not by scale - 1",
    probe=_probe,
    install=_install,
)
