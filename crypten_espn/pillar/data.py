"""Data sets: train, validation and test splits, in memory or from image files.

The validation images are held out of the training set by a fixed permutation, the same
for every run. The test set is read from disk only when `Dataset.test` is called.
Nothing is downloaded here and nothing unpickled: where a data set is absent, the error
says which command fetches it.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import DataError

# Seed of the permutation that holds validation images out; part of the selection rule.
SPLIT_SEED = 20240814

# Where Debian's package dataset-fashion-mnist puts it.
FASHION_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_BUNDLED = Path(__file__).parent.parent / "data"


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

FASHION_NORMALIZATION = Normalization((0.2860,), (0.3530,))
_CIFAR10_NORMALIZATION = Normalization(
    (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
)
_CIFAR100_NORMALIZATION = Normalization(
    (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
)
_IMAGENET_NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
        return _imagenet(folder, held_out, train_size or 176, test_size or 224)
    if train_size is not None or test_size is not None:
        raise DataError(f"{name} has one image size; train_size is for imagenet")
    dataset = DATASETS[name](folder, held_out)
    if crop is None or not isinstance(dataset.train, Images):
        return dataset
    return replace(dataset, train=replace(dataset.train, crop=crop))


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


def _fashion_mnist(directory: Path, held_out: int | None) -> Dataset:
    places = [
        directory,
        directory / "FashionMNIST" / "raw",
        directory / "fashion-mnist",
        FASHION_SYSTEM_FOLDER,
    ]
    folder = _first_with(
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
            _checked_labels(labels, 10, "Fashion-MNIST"),
            FASHION_NORMALIZATION,
            crop=2 if augmented else 0,
            flip=augmented,
        )

    return _in_memory(
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


def _cifar(directory: Path, held_out: int | None, classes: int) -> Dataset:
    """Read the binary version of CIFAR: label bytes, then 3072 pixels, per image."""
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
    folder = _first_with(
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
            if len(raw) != count // len(files) * (label_bytes + 3072):
                raise DataError(f"{path} has {len(raw)} bytes; fetch it again")
            records.append(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        table = torch.cat(records).view(count, label_bytes + 3072)
        return Images(
            table[:, label_bytes:].reshape(count, 3, 32, 32).contiguous(),
            _checked_labels(table[:, label_bytes - 1], classes, name),
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
    return _in_memory(
        f"cifar{classes}",
        names,
        part(train, 50_000, augmented=True),
        5_000 if held_out is None else held_out,
        lambda: part((test,), 10_000, augmented=False),
    )


def _in_memory(
    name: str,
    class_names: tuple[str, ...],
    whole: Images,
    held_out: int,
    test: Callable[[], Images],
) -> Dataset:
    training, validation = _held_out(len(whole), held_out, name)
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


def _held_out(count: int, held_out: int, name: str) -> tuple[Tensor, Tensor]:
    """Return the indices of training and validation images."""
    if not 0 < held_out < count:
        raise DataError(
            f"{held_out} of {name}'s {count} training images were to be held out for "
            f"validation; it must be 1 to {count - 1}"
        )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(count, generator=generator)
    return order[held_out:].sort().values, order[:held_out].sort().values


def _checked_labels(labels: Tensor, classes: int, name: str) -> Tensor:
    labels = labels.long()
    if int(labels.max()) >= classes:
        raise DataError(
            f"{name} has {classes} classes and a label is {int(labels.max())}; "
            "the files are of another data set"
        )
    return labels


def _first_with(
    places: Sequence[Path], files: Sequence[str], what: str, command: str
) -> Path:
    for place in places:
        if any((place / file).exists() for file in files):
            return place
    looked = ", ".join(str(place) for place in places)
    raise DataError(
        f"{what} was not found in {looked}. Fetch it with\n  {command}\n"
        "and pass the folder as --data"
    )


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
    training: Callable[[Any], Tensor]
    evaluation: Callable[[Any], Tensor]
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
        transform: Callable[[Any], Tensor],
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


def _imagenet(
    directory: Path, held_out: int | None, train_size: int, test_size: int
) -> Dataset:
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
    whole = ImageFolder(str(directory / "train"))
    keep, hold = _held_out(
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


DATASETS: dict[str, Callable[..., Dataset]] = {
    "fashion-mnist": _fashion_mnist,
    "cifar10": lambda directory, held_out: _cifar(directory, held_out, 10),
    "cifar100": lambda directory, held_out: _cifar(directory, held_out, 100),
    "imagenet": _imagenet,
}
