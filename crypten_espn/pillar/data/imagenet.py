"""ImageNet from its folders of image files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import DataError
from .splits import (
    Dataset,
    Normalization,
    held_out_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGENET_NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ImageFiles:
    """Image files, read and transformed by worker processes.

    Attributes:
        files: (path, label), as torchvision's ImageFolder lists them.
        training: transform of a training image.
        evaluation: transform of an image to evaluate.
        workers: processes that read.
    """

    files: tuple[tuple[str, int], ...]
    training: Callable[[Image], Tensor]
    evaluation: Callable[[Image], Tensor]
    workers: int = 8

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float32 normalised, labels int64); see `Split`."""
        transform = self.evaluation if generator is None else self.training
        order = torch.arange(len(self))
        count = -(-len(self) // size)
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
            count = len(self) // size
        yield from torch.utils.data.DataLoader(
            _Readable(self.files, transform),
            batch_sampler=[
                order[i * size : (i + 1) * size][part[0] :: part[1]].tolist()
                for i in range(count)
            ],
            generator=generator,
            num_workers=self.workers,
        )


class _Readable(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(
        self,
        files: tuple[tuple[str, int], ...],
        transform: Callable[[Image], Tensor],
    ) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.datasets.folder import default_loader

        path, label = self.files[index]
        try:
            image = default_loader(path)
        except OSError as error:
            raise DataError(
                f"{path} is not a readable image ({error}); fetch it again"
            ) from error
        return self.transform(image), label


def imagenet(
    directory: Path, held_out: int | None, train_size: int, test_size: int
) -> Dataset:
    """Return ImageNet from the folders train and val of a folder.

    Raises:
        DataError: a folder is missing.
    """
    # Late: beside a CPU-only torch it loads only once crypten_espn has been imported.
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    for part in ("train", "val"):
        if not (directory / part).is_dir():
            raise DataError(
                f"ImageNet was not found: {directory / part} is missing. Fetch "
                "ILSVRC2012 from https://image-net.org (an account is needed), unpack "
                "it to train/CLASS/*.JPEG and val/CLASS/*.JPEG, and pass the folder "
                "that holds both as --data"
            )
    # The augmentation of torchvision's own ResNet recipe, and its resize and crop.
    normalize = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(_IMAGENET_NORMALIZATION.mean, _IMAGENET_NORMALIZATION.std),
    ]
    training = v2.Compose(
        [
            v2.RandomResizedCrop(train_size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(),
            *normalize,
            v2.RandomErasing(p=0.1),
        ]
    )
    evaluation = v2.Compose(
        [
            v2.Resize(test_size * 232 // 224, antialias=True),
            v2.CenterCrop(test_size),
            *normalize,
        ]
    )
    # The validation images come from train; val is the test set.
    whole = ImageFolder(str(directory / "train"))
    keep, hold = held_out_of(
        len(whole.samples), 10_000 if held_out is None else held_out, "imagenet"
    )

    def files(samples: Sequence[tuple[str, int]]) -> ImageFiles:
        return ImageFiles(tuple(samples), training, evaluation)

    return Dataset(
        "imagenet",
        tuple(whole.classes),
        3,
        test_size,
        _IMAGENET_NORMALIZATION,
        files([whole.samples[index] for index in keep.tolist()]),
        files([whole.samples[index] for index in hold.tolist()]),
        lambda: files(ImageFolder(str(directory / "val")).samples),
    )
