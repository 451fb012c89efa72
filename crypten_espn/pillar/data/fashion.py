"""Fashion-MNIST from its idx files, and the sample that is bundled."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...errors import DataError
from .splits import (
    Dataset,
    Images,
    Normalization,
    checked_labels,
    first_with,
    in_memory,
)

# Where Debian's package dataset-fashion-mnist puts it.
FASHION_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_BUNDLED = Path(__file__).parents[2] / "data"

FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

FASHION_NORMALIZATION = Normalization((0.2860,), (0.3530,))


def fashion_sample() -> Images:
    """Return the bundled sample: the first 256 test images of Fashion-MNIST.

    Raises:
        DataError: the package was installed without its data.
    """
    path = _BUNDLED / "fashion_sample.safetensors"
    if not path.exists():
        raise DataError(f"{path.name} is missing from the package; install it again")
    tensors = load_file(path)
    return Images(tensors["images"], tensors["labels"].long(), FASHION_NORMALIZATION)


def fashion_mnist(directory: Path, held_out: int | None) -> Dataset:
    """Return Fashion-MNIST from a folder, or from where the system keeps it.

    Raises:
        DataError: it is in none of them, or its files are not what they should be.
    """
    places = [
        directory,
        directory / "FashionMNIST" / "raw",
        directory / "fashion-mnist",
        FASHION_SYSTEM_FOLDER,
    ]
    folder = first_with(
        places,
        ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"),
        "Fashion-MNIST",
        "apt-get install dataset-fashion-mnist   (Debian, Ubuntu), or\n"
        '  python -c "import crypten_espn; from torchvision.datasets import '
        f'FashionMNIST; FashionMNIST({str(directory)!r}, download=True)"',
    )

    def part(stem: str, count: int, *, augmented: bool) -> Images:
        images = _idx(folder, f"{stem}-images-idx3-ubyte", (count, 28, 28))
        labels = _idx(folder, f"{stem}-labels-idx1-ubyte", (count,))
        return Images(
            images.unsqueeze(1),
            checked_labels(labels, 10, "Fashion-MNIST"),
            FASHION_NORMALIZATION,
            crop=2 if augmented else 0,
            flip=augmented,
        )

    return in_memory(
        "fashion-mnist",
        FASHION_CLASSES,
        part("train", 60_000, augmented=True),
        5_000 if held_out is None else held_out,
        lambda: part("t10k", 10_000, augmented=False),
    )


def _idx(folder: Path, stem: str, shape: tuple[int, ...]) -> Tensor:
    """Read one idx file of bytes, compressed or not."""
    path = folder / stem
    try:
        if path.exists():
            raw = path.read_bytes()
        else:
            path = folder / f"{stem}.gz"
            raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    head = 4 + 4 * len(shape)
    expected = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    size = head + int(torch.tensor(shape).prod())
    if raw[:head] != expected or len(raw) != size:
        raise DataError(
            f"{path} is not an idx file of {shape} bytes (its length is {len(raw)}, "
            f"{size} is expected); fetch it again"
        )
    return torch.frombuffer(bytearray(raw[head:]), dtype=torch.uint8).reshape(shape)
