"""Data sets: train, validation and test splits, in memory or from image files.

The validation images are held out of the training set by a fixed permutation, the same
for every run. The test set is read from disk only when `Dataset.test` is called.
Nothing is downloaded here and nothing unpickled: where a data set is absent, the error
says which command fetches it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ...errors import DataError
from .cifar import CIFAR10_CLASSES, cifar
from .fashion import (
    FASHION_CLASSES,
    FASHION_NORMALIZATION,
    FASHION_SYSTEM_FOLDER,
    fashion_mnist,
    fashion_sample,
)
from .imagenet import ImageFiles, imagenet
from .splits import Dataset, Images, Normalization, Split


def load_dataset(
    name: str,
    *,
    directory: str | Path = "data",
    held_out: int | None = None,
    crop: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
) -> Dataset:
    """Return a data set by name.

    Args:
        name: "fashion-mnist", "cifar10", "cifar100" or "imagenet".
        directory: where its files are, or the folder that holds theirs.
        held_out: validation images taken out of the training set; by default a
            twelfth (Fashion-MNIST), a tenth (CIFAR) or 10,000 (ImageNet).
        crop: pixels of zero padding from which training crops are taken; by default 2
            (Fashion-MNIST) or 4 (CIFAR).
        train_size: height and width of ImageNet's training crops, 176 by default.
        test_size: the same for evaluation, 224 by default.

    Raises:
        DataError: an unknown name; files missing, damaged or of the wrong size; more
            held out than there is.
    """
    if name not in DATASETS:
        raise DataError(
            f"unknown data set {name!r}; known are {', '.join(sorted(DATASETS))}"
        )
    folder = Path(directory)
    if name == "imagenet":
        if crop is not None:
            raise DataError("imagenet has random resized crops; crop is for the others")
        return imagenet(folder, held_out, train_size or 176, test_size or 224)
    if train_size is not None or test_size is not None:
        raise DataError(f"{name} has one image size; train_size is for imagenet")
    dataset = DATASETS[name](folder, held_out)
    if crop is None or not isinstance(dataset.train, Images):
        return dataset
    return replace(dataset, train=replace(dataset.train, crop=crop))


DATASETS: dict[str, Callable[..., Dataset]] = {
    "fashion-mnist": fashion_mnist,
    "cifar10": lambda directory, held_out: cifar(directory, held_out, 10),
    "cifar100": lambda directory, held_out: cifar(directory, held_out, 100),
    "imagenet": imagenet,
}

__all__ = [
    "CIFAR10_CLASSES",
    "DATASETS",
    "FASHION_CLASSES",
    "FASHION_NORMALIZATION",
    "FASHION_SYSTEM_FOLDER",
    "Dataset",
    "ImageFiles",
    "Images",
    "Normalization",
    "Split",
    "fashion_sample",
    "load_dataset",
]
