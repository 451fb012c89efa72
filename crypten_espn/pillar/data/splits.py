"""What a data set is: three splits, images in memory, validation held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import DataError

# Seed of the permutation that holds validation images out; part of the selection rule.
SPLIT_SEED = 20240814


@dataclass(frozen=True)
class Normalization:
    """(image / 255 - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 images of the same shape (n, channels, height, width).

        Raises:
            DataError: not uint8, or another number of channels.
        """
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"images of type {images.dtype} and shape {tuple(images.shape)} were "
                "given; uint8 of shape (n, channels, height, width) is needed"
            )
        if images.shape[1] != len(self.mean):
            raise DataError(
                f"images of {images.shape[1]} channels were given; this network was "
                f"trained on {len(self.mean)}"
            )
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std


class Split(Protocol):
    """One part of a data set."""

    def __len__(self) -> int: ...

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float32 normalised, labels int64).

        With a generator: shuffled, augmented, incomplete last batch dropped.
        Without: in order, as they are, the last batch as long as it comes.
        part = (rank, processes) yields each process its share of every batch.
        """
        ...


@dataclass(frozen=True)
class Images:
    """Images in memory.

    Attributes:
        images: uint8 (n, channels, height, width).
        labels: int64 (n,).
        normalization: what `batches` applies.
        crop: pixels of zero padding from which training crops are taken.
        flip: whether training images are mirrored at random.
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization
    crop: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float32 normalised, labels int64); see `Split`."""
        mine = slice(part[0], None, part[1])
        if generator is None:
            for start in range(0, len(self), size):
                images = self.images[start : start + size][mine]
                yield (
                    self.normalization(images),
                    self.labels[start : start + size][mine],
                )
            return
        order = torch.randperm(len(self), generator=generator)
        if len(self) < size:
            raise DataError(
                f"a batch of {size} was asked of {len(self)} training images; "
                "lower the batch size"
            )
        for start in range(0, len(self) - size + 1, size):
            chosen = order[start : start + size]
            # Drawn for the whole batch, so that any number of processes sees the same.
            images = self._augmented(self.images[chosen], generator)[mine]
            yield self.normalization(images), self.labels[chosen][mine]

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, channels, height, width = images.shape
        rows = torch.arange(height).expand(count, height)
        columns = torch.arange(width).expand(count, width)
        if self.flip:
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        if self.crop:
            images = torch.nn.functional.pad(images, [self.crop] * 4)
            shift = torch.randint(2 * self.crop + 1, (2, count, 1), generator=generator)
            rows, columns = rows + shift[0], columns + shift[1]
        return images[
            torch.arange(count).view(-1, 1, 1, 1),
            torch.arange(channels).view(1, -1, 1, 1),
            rows.view(count, 1, height, 1),
            columns.view(count, 1, 1, width),
        ]


@dataclass(frozen=True)
class Dataset:
    """A data set split in three; the test part is read when it is asked for."""

    name: str
    class_names: tuple[str, ...]
    in_channels: int
    size: int
    normalization: Normalization
    train: Split
    validation: Split
    test: Callable[[], Split]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def in_memory(
    name: str,
    class_names: tuple[str, ...],
    whole: Images,
    held_out: int,
    test: Callable[[], Images],
) -> Dataset:
    """Return a data set of images in memory; the test images are read when asked."""
    training, validation = held_out_of(len(whole), held_out, name)
    channels, size = whole.images.shape[1], whole.images.shape[2]
    return Dataset(
        name,
        class_names,
        channels,
        size,
        whole.normalization,
        Images(
            whole.images[training],
            whole.labels[training],
            whole.normalization,
            whole.crop,
            whole.flip,
        ),
        Images(whole.images[validation], whole.labels[validation], whole.normalization),
        test,
    )


def held_out_of(count: int, held_out: int, name: str) -> tuple[Tensor, Tensor]:
    """Return the indices of training and validation images."""
    if not 0 < held_out < count:
        raise DataError(
            f"{held_out} of {name}'s {count} training images were to be held out for "
            f"validation; it must be 1 to {count - 1}"
        )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(count, generator=generator)
    return order[held_out:].sort().values, order[:held_out].sort().values


def checked_labels(labels: Tensor, classes: int, name: str) -> Tensor:
    """Return labels as int64.

    Raises:
        DataError: one is of no class.
    """
    labels = labels.long()
    if int(labels.max()) >= classes:
        raise DataError(
            f"{name} has {classes} classes and a label is {int(labels.max())}; "
            "the files are of another data set"
        )
    return labels


def first_with(
    places: Sequence[Path], files: Sequence[str], what: str, command: str
) -> Path:
    """Return the first of the folders that holds one of the files.

    Raises:
        DataError: none does; names the command that fetches them.
    """
    for place in places:
        if any((place / file).exists() for file in files):
            return place
    looked = ", ".join(str(place) for place in places)
    raise DataError(
        f"{what} was not found in {looked}. Fetch it with\n  {command}\n"
        "and pass the folder as --data"
    )
