"""Readers, splits and augmentation; missing and damaged files are named."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from crypten_espn.errors import DataError
from crypten_espn.pillar import data
from crypten_espn.pillar.data import (
    FASHION_NORMALIZATION,
    Images,
    Normalization,
    fashion,
    fashion_sample,
    load_dataset,
)

PLAIN = Normalization((0.0,), (1.0,))


def write_idx(path: Path, array: torch.Tensor, *, compressed: bool = True) -> None:
    shape = tuple(array.shape)
    raw = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    raw += array.to(torch.uint8).numpy().tobytes()
    if compressed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw, 1))
    else:
        path.write_bytes(raw)


def write_fashion(folder: Path) -> None:
    """Write files of the right size; image i holds its own index."""
    for stem, count in (("train", 60_000), ("t10k", 10_000)):
        images = (torch.arange(count) % 251).view(-1, 1, 1).expand(count, 28, 28)
        write_idx(folder / f"{stem}-images-idx3-ubyte", images, compressed=False)
        write_idx(folder / f"{stem}-labels-idx1-ubyte", torch.arange(count) % 10)


@pytest.mark.slow
def test_fashion_mnist_from_its_files(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    dataset = load_dataset("fashion-mnist", directory=tmp_path, held_out=1000, crop=3)
    assert isinstance(dataset.train, Images) and dataset.train.crop == 3
    assert (len(dataset.train), len(dataset.validation)) == (59_000, 1000)
    assert (dataset.in_channels, dataset.size, dataset.classes) == (1, 28, 10)
    test = dataset.test()
    assert len(test) == 10_000
    images, labels = next(test.batches(20))
    assert images.shape == (20, 1, 28, 28) and images.dtype == torch.float32
    assert labels.tolist() == [i % 10 for i in range(20)]
    expected = (3 / 255 - 0.2860) / 0.3530
    assert images[3, 0, 5, 5].item() == pytest.approx(expected, abs=1e-6)


def test_the_test_set_is_not_opened_before_it_is_asked_for(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    for file in tmp_path.glob("t10k-*"):
        file.unlink()
    dataset = load_dataset("fashion-mnist", directory=tmp_path)
    with pytest.raises(DataError, match="t10k-images"):
        dataset.test()


@pytest.mark.slow
def test_validation_is_held_out_and_always_the_same(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    one = load_dataset("fashion-mnist", directory=tmp_path)
    two = load_dataset("fashion-mnist", directory=tmp_path)
    assert isinstance(one.train, Images) and isinstance(one.validation, Images)
    assert isinstance(two.validation, Images)
    assert torch.equal(one.validation.images, two.validation.images)
    # Every image is in exactly one part.
    together = torch.cat([one.train.images, one.validation.images])[:, 0, 0, 0]
    whole = torch.arange(60_000) % 251
    assert torch.equal(together.sort().values, whole.sort().values.to(torch.uint8))
    assert (one.validation.crop, one.validation.flip) == (0, False)


def test_files_that_are_missing_come_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cs\.toronto\.edu.*cifar-10-binary"):
        load_dataset("cifar10", directory=tmp_path)
    with pytest.raises(DataError, match=r"cifar-100-binary[\s\S]*--data"):
        load_dataset("cifar100", directory=tmp_path)
    with pytest.raises(DataError, match=r"train is missing[\s\S]*--data"):
        load_dataset("imagenet", directory=tmp_path)


def test_fashion_mnist_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "FASHION_SYSTEM_FOLDER", tmp_path / "none")
    with pytest.raises(DataError, match=r"dataset-fashion-mnist[\s\S]*--data"):
        load_dataset("fashion-mnist", directory=tmp_path)


@pytest.mark.slow
def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(labels.read_bytes()[:-30])
    with pytest.raises(DataError, match="train-labels"):
        load_dataset("fashion-mnist", directory=tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.zeros(59_999))
    with pytest.raises(DataError, match="60000"):
        load_dataset("fashion-mnist", directory=tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.full((60_000,), 10))
    with pytest.raises(DataError, match="10 classes and a label is 10"):
        load_dataset("fashion-mnist", directory=tmp_path)


@pytest.mark.parametrize("held_out", [0, 60_000])
def test_a_bad_split_is_named(tmp_path: Path, held_out: int) -> None:
    write_fashion(tmp_path)
    with pytest.raises(DataError, match=f"{held_out} of fashion-mnist's 60000"):
        load_dataset("fashion-mnist", directory=tmp_path, held_out=held_out)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_binary_version(tmp_path: Path, classes: int) -> None:
    labels = 1 if classes == 10 else 2
    folder = tmp_path / (
        "cifar-10-batches-bin" if classes == 10 else "cifar-100-binary"
    )
    folder.mkdir()

    def write(file: str, count: int) -> None:
        table = torch.zeros(count, labels + 3072, dtype=torch.uint8)
        table[:, labels - 1] = torch.arange(count) % classes
        table[:, labels] = 200  # the first red pixel
        (folder / file).write_bytes(table.numpy().tobytes())

    if classes == 10:
        for index in range(1, 6):
            write(f"data_batch_{index}.bin", 10_000)
        write("test_batch.bin", 10_000)
    else:
        write("train.bin", 50_000)
        write("test.bin", 10_000)
        (folder / "fine_label_names.txt").write_text(
            "\n".join(f"class{i}" for i in range(100)) + "\n"
        )
    dataset = load_dataset(f"cifar{classes}", directory=tmp_path)
    assert len(dataset.train) + len(dataset.validation) == 50_000
    assert dataset.classes == classes
    assert dataset.class_names[7] == ("horse" if classes == 10 else "class7")
    test = dataset.test()
    assert isinstance(test, Images)
    assert test.labels.tolist()[:11] == [i % classes for i in range(11)]
    assert test.images[0, :, 0, 0].tolist() == [200, 0, 0]
    assert int(test.images.sum(dtype=torch.int64)) == 200 * 10_000
    next(iter(folder.glob("*test*"))).write_bytes(b"short")
    with pytest.raises(DataError, match="has 5 bytes"):
        dataset.test()


def test_imagenet_folders(tmp_path: Path) -> None:
    from PIL import Image

    for part, count in (("train", 3), ("val", 1)):
        for label in ("n01", "n02"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (50, 40), (index, 9, 9)).save(folder / f"{index}.png")
    dataset = load_dataset(
        "imagenet", directory=tmp_path, held_out=2, train_size=16, test_size=24
    )
    assert dataset.class_names == ("n01", "n02")
    assert (len(dataset.train), len(dataset.validation)) == (4, 2)
    assert dataset.size == 24
    object.__setattr__(dataset.train, "workers", 0)
    generator = torch.Generator().manual_seed(0)
    (batch,) = dataset.train.batches(3, generator=generator)
    assert batch[0].shape == (3, 3, 16, 16)
    test = dataset.test()
    object.__setattr__(test, "workers", 0)
    images, labels = next(test.batches(5))
    assert images.shape == (2, 3, 24, 24)
    assert labels.tolist() == [0, 1]


def test_batches_shuffle_and_drop_the_rest_only_in_training() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    split = Images(images, torch.arange(10), PLAIN)
    order = [labels.tolist() for _, labels in split.batches(4)]
    assert order == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    def shuffled(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        batches = list(split.batches(4, generator=generator))
        assert [len(x) for x, _ in batches] == [4, 4]
        for x, labels in batches:
            torch.testing.assert_close(x.flatten() * 255, labels.float())
        return torch.cat([labels for _, labels in batches]).tolist()

    assert shuffled(1) == shuffled(1)
    assert shuffled(1) != shuffled(2)
    # Processes share a batch, and see what one process would.
    for seed in (None, 4):

        def of(part: tuple[int, int], seed: int | None = seed) -> list[list[int]]:
            generator = seed and torch.Generator().manual_seed(seed)
            batches = split.batches(4, generator=generator or None, part=part)
            return [labels.tolist() for _, labels in batches]

        for whole, even, odd in zip(of((0, 1)), of((0, 2)), of((1, 2)), strict=True):
            assert whole[::2] == even and whole[1::2] == odd
    with pytest.raises(DataError, match="batch of 11 was asked of 10"):
        next(split.batches(11, generator=torch.Generator()))


def test_augmentation_is_a_shift_and_a_mirror() -> None:
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    split = Images(
        image.expand(200, 1, 5, 5), torch.zeros(200), PLAIN, crop=2, flip=True
    )
    generator = torch.Generator().manual_seed(3)
    ((batch, _),) = split.batches(200, generator=generator)
    padded = torch.nn.functional.pad(image, [2] * 4)
    allowed = {
        tuple(window.flatten().tolist())
        for source in (padded, padded.flip(3))
        for row in range(5)
        for column in range(5)
        for window in [source[0, 0, row : row + 5, column : column + 5]]
    }
    seen = {tuple(x.flatten().round().int().tolist()) for x in batch * 255}
    assert seen <= allowed
    assert len(seen) > 40


def test_normalization_checks_its_input() -> None:
    with pytest.raises(DataError, match="float32"):
        FASHION_NORMALIZATION(torch.zeros(1, 1, 28, 28))
    with pytest.raises(DataError, match="3 channels"):
        FASHION_NORMALIZATION(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


def test_an_unknown_data_set_is_named() -> None:
    with pytest.raises(DataError, match=r"'mnist'.*fashion-mnist"):
        load_dataset("mnist")
    with pytest.raises(DataError, match="crop is for the others"):
        load_dataset("imagenet", crop=1)
    with pytest.raises(DataError, match="train_size is for imagenet"):
        load_dataset("cifar10", train_size=4)


def test_the_bundled_sample() -> None:
    sample = fashion_sample()
    assert sample.images.shape == (256, 1, 28, 28)
    assert sample.images.dtype == torch.uint8
    assert set(sample.labels.tolist()) == set(range(10))
    # The test set begins with an ankle boot, a pullover and two pairs of trousers.
    assert sample.labels[:4].tolist() == [9, 2, 1, 1]


def test_the_bundled_sample_is_the_start_of_the_test_set() -> None:
    if not data.FASHION_SYSTEM_FOLDER.is_dir():
        pytest.skip(
            "Fashion-MNIST is not installed; apt-get install dataset-fashion-mnist"
        )
    test = load_dataset("fashion-mnist").test()
    sample = fashion_sample()
    assert isinstance(test, Images)
    assert torch.equal(test.images[:256], sample.images)
    assert torch.equal(test.labels[:256], sample.labels)
