"""Image files as a network's inputs, prepared by its description.

Of an image file only its header is read before its kind and its size are known to be
harmless: a few bytes can announce more pixels than memory holds.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import DataError
from .description import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png")
# Of one image, as it lies in the file and as it is resized; 200 MB of memory.
MAX_PIXELS = 1 << 26
_FORMATS = ("JPEG", "PNG")
# Eight bits a channel. Pillow cuts 16 bits off at 255 when it converts them.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder and of the folders in it, by name; no hidden ones.

    Raises:
        DataError: there is none, or the folder cannot be read.
    """
    found = [
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if not found:
        raise DataError(
            f"{folder} holds no image files ({', '.join(SUFFIXES)}); name a folder "
            "that does"
        )
    return sorted(found)


def load_images(
    paths: Sequence[str | os.PathLike[str]],
    *,
    preprocessing: Preprocessing,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Image files as inputs: resized, cut and normalised as the network was trained.

    An image is turned upright as its camera noted; what is transparent becomes white.
    Grey and colour become what the network takes.

    Args:
        paths: JPEG or PNG files of 8 bits a channel.
        preprocessing: of the network's description.
        shape: of one input, (channels, height, width).

    Returns: float32 (len(paths), *shape).

    Raises:
        DataError: no path; a file that is missing, no JPEG or PNG, damaged, of 16 bits
            a channel, or of more pixels than `MAX_PIXELS`; it is named.
        ShapeError: the preprocessing does not give this shape.
    """
    if isinstance(paths, str | os.PathLike):
        raise DataError(f"{os.fspath(paths)!r} is one path; give a list of paths")
    if not paths:
        raise DataError("no image file was given; give at least one")
    preprocessing.check(shape)
    found = [_pixels(Path(path), str(path), preprocessing, shape) for path in paths]
    return _normalised(found, preprocessing)


def decode_image(
    data: bytes, *, preprocessing: Preprocessing, shape: tuple[int, ...]
) -> torch.Tensor:
    """The bytes of an image file as an input, as `load_images` has it.

    Returns: float32 (1, *shape).

    Raises:
        DataError, ShapeError: as `load_images`.
    """
    preprocessing.check(shape)
    pixels = _pixels(io.BytesIO(data), "the image", preprocessing, shape)
    return _normalised([pixels], preprocessing)


def _normalised(found: list[np.ndarray], preprocessing: Preprocessing) -> torch.Tensor:
    pixels = np.stack(found)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float()
    mean = torch.tensor(preprocessing.mean, dtype=torch.float32).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std, dtype=torch.float32).view(1, -1, 1, 1)
    return (images / 255 - mean) / std


def _pixels(
    source: Path | io.BytesIO,
    name: str,
    preprocessing: Preprocessing,
    shape: tuple[int, ...],
) -> np.ndarray:
    """One image at its final size: uint8 (height, width, channels)."""
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with Image.open(source, formats=_FORMATS) as file:
            _check(file, name)
            whole = ImageOps.exif_transpose(file)
            made = _fitted(_in_mode(whole, channels), name, preprocessing, shape)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large(name, "more pixels than Pillow opens")) from None
    except FileNotFoundError:
        raise DataError(f"{name} is not there; name an image file") from None
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{name} is no JPEG or PNG image; convert it to one of them"
        ) from None
    except Exception as error:  # decoders raise many kinds
        raise DataError(
            f"{name} cannot be read as an image ({ascii(str(error))[1:-1][:120]}); "
            "save it again"
        ) from None
    return np.asarray(made, dtype=np.uint8).reshape(height, width, channels)


def _check(file: Image, name: str) -> None:
    if file.width * file.height > MAX_PIXELS:
        raise DataError(_too_large(name, f"{file.width}x{file.height} pixels"))
    if file.mode not in _MODES:
        raise DataError(
            f"{name} has pixels of kind {file.mode!r}, more than 8 bits a channel; "
            "save it with 8"
        )
    if getattr(file, "n_frames", 1) > 1 and file.format == "PNG":
        raise DataError(f"{name} is an animation; save the frame that is meant")


def _too_large(name: str, what: str) -> str:
    return f"{name} has {what}; {MAX_PIXELS:,} are the most: scale it down first"


def _in_mode(image: Image, channels: int) -> Image:
    """As grey or as colours, on white where it is transparent."""
    from PIL import Image as pillow

    if image.mode in ("P", "PA", "LA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pillow.new("RGBA", image.size, "white")
        image = pillow.alpha_composite(white, image)
    return image.convert("L" if channels == 1 else "RGB")


def _fitted(
    image: Image,
    name: str,
    preprocessing: Preprocessing,
    shape: tuple[int, ...],
) -> Image:
    """Resized and cut as torchvision's Resize and CenterCrop do it."""
    from PIL import Image as pillow

    _, height, width = shape
    if preprocessing.fit == "stretch":
        return image.resize((width, height), pillow.Resampling.BILINEAR)
    if preprocessing.resize is not None:
        short, least = min(image.size), preprocessing.resize
        size = tuple(
            least if side == short else least * side // short for side in image.size
        )
    else:
        # The side that is closer to being too small decides.
        if image.width * height <= image.height * width:
            size = (width, max(height, width * image.height // image.width))
        else:
            size = (max(width, height * image.width // image.height), height)
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f"{name} has {image.width}x{image.height} pixels, {size[0]}x{size[1]} "
            "resized; cut its long side first"
        )
    image = image.resize((size[0], size[1]), pillow.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


def existing(paths: Iterable[Path]) -> list[Path]:
    """These files, and in the place of a folder its image files.

    Raises:
        DataError: one is not there, or a folder holds none.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += image_files(path)
        elif path.exists():
            found.append(path)
        else:
            raise DataError(
                f"{path} is not there; give image files, folders of them, or .npy files"
            )
    return found
