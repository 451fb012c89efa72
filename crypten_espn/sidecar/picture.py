"""What a server receives of an image, as a picture."""

from __future__ import annotations

import io

import numpy as np


def picture(masked: np.ndarray, *, ring: int) -> bytes:
    """The upper eight bits of each masked value, as a PNG.

    Args:
        masked: (height, width, 1 or 3), of which the lower `ring` bits count.
        ring: at least 8.
    """
    from PIL import Image

    shades = (masked.astype(np.int64) >> (ring - 8)).astype(np.uint8)
    image = Image.fromarray(shades[..., 0] if shades.shape[-1] == 1 else shades)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
