"""CIFAR-10 and CIFAR-100 from their binary versions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import DataError
from .splits import (
    Dataset,
    Images,
    Normalization,
    checked_labels,
    first_with,
    in_memory,
)

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_CIFAR10_NORMALIZATION = Normalization(
    (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
)
_CIFAR100_NORMALIZATION = Normalization(
    (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
)


def cifar(directory: Path, held_out: int | None, classes: int) -> Dataset:
    """Read the binary version of CIFAR: label bytes, then 3072 pixels, per image."""
    # Where the versions differ: in names, and a coarse label before CIFAR-100's fine.
    folder_name, archive, label_bytes, train, test = {
        10: (
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            1,
            tuple(f"data_batch_{index}.bin" for index in range(1, 6)),
            "test_batch.bin",
        ),
        100: (
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            2,
            ("train.bin",),
            "test.bin",
        ),
    }[classes]
    name = f"CIFAR-{classes}"
    folder = first_with(
        [directory, directory / folder_name],
        (train[0],),
        f"{name} (binary version)",
        f"mkdir -p {directory} && curl -L https://www.cs.toronto.edu/~kriz/{archive} "
        f"| tar xz -C {directory}",
    )
    normalization = _CIFAR10_NORMALIZATION if classes == 10 else _CIFAR100_NORMALIZATION

    def part(files: Sequence[str], count: int, *, augmented: bool) -> Images:
        records = []
        for file in files:
            path = folder / file
            try:
                raw = path.read_bytes()
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read ({error}); fetch it again"
                ) from error
            # A file has no header; only its length tells a truncated one.
            if len(raw) != count // len(files) * (label_bytes + 3072):
                raise DataError(f"{path} has {len(raw)} bytes; fetch it again")
            records.append(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        table = torch.cat(records).view(count, label_bytes + 3072)
        return Images(
            table[:, label_bytes:].reshape(count, 3, 32, 32).contiguous(),
            checked_labels(table[:, label_bytes - 1], classes, name),
            normalization,
            crop=4 if augmented else 0,
            flip=augmented,
        )

    names: tuple[str, ...] = CIFAR10_CLASSES
    if classes == 100:
        listed = folder / "fine_label_names.txt"
        names = tuple(str(index) for index in range(100))
        if listed.exists():
            names = tuple(listed.read_text().split())
    return in_memory(
        f"cifar{classes}",
        names,
        part(train, 50_000, augmented=True),
        5_000 if held_out is None else held_out,
        lambda: part((test,), 10_000, augmented=False),
    )
