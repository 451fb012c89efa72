"""Image files as inputs: as torchvision prepares them, and harmless."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crypten_espn.bundle import Preprocessing
from crypten_espn.bundle import images as product
from crypten_espn.bundle.images import existing, load_images
from crypten_espn.errors import DataError, ShapeError

PLAIN = Preprocessing((0.0,) * 3, (1.0,) * 3)
GREY = Preprocessing((0.0,), (1.0,))


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    draws = np.random.default_rng(0)
    shape = (height, width, 3)
    pixels = draws.integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(folder: Path, image: Image.Image, name: str = "image.png", **how) -> Path:
    image.save(folder / name, **how)
    return folder / name


def pixels(path: Path, how: Preprocessing, *shape: int) -> np.ndarray:
    """One image's input, undone to bytes."""
    return load_images([path], preprocessing=how, shape=shape)[0].mul(255).numpy()


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (17, 90), (8, 8)])
@pytest.mark.parametrize("resize", [None, 20])
def test_images_are_prepared_as_torchvision_does(
    tmp_path: Path, size: tuple[int, int], resize: int | None
) -> None:
    from torchvision import transforms

    image = drawn(*size)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    as_trained = transforms.Compose(
        [
            transforms.Resize(resize or 16),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    made = load_images(
        [saved(tmp_path, image)],
        preprocessing=Preprocessing(mean, std, resize),
        shape=(3, 16, 16),
    )
    assert made.dtype == torch.float32 and made.shape == (1, 3, 16, 16)
    assert float((made[0] - as_trained(image)).abs().max()) < 1e-6


def test_stretching_resizes_both_sides(tmp_path: Path) -> None:
    from torchvision import transforms

    image = drawn(40, 30)
    how = Preprocessing((0.0,) * 3, (1.0,) * 3, fit="stretch")
    wanted = np.asarray(transforms.Resize((12, 20))(image)).transpose(2, 0, 1)
    assert np.allclose(pixels(saved(tmp_path, image), how, 3, 12, 20), wanted)


@pytest.mark.parametrize("size", [(40, 30), (10, 90), (90, 10), (3, 3)])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_cut_that_is_no_square_stays_inside_the_image(
    tmp_path: Path, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    white = saved(tmp_path, Image.new("RGB", size, "white"))
    assert (pixels(white, PLAIN, 3, *shape) == 255).all()  # no border came in


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_become_what_the_network_takes(
    tmp_path: Path, mode: str, channels: int
) -> None:
    image = drawn(8, 8, mode)
    found = pixels(
        saved(tmp_path, image), PLAIN if channels == 3 else GREY, channels, 8, 8
    )
    wanted = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    wanted = wanted.reshape(8, 8, channels).transpose(2, 0, 1)
    assert np.abs(found - wanted).max() <= 1


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (pixels(saved(tmp_path, clear), PLAIN, 3, 8, 8) == 255).all()
    palette = Image.new("P", (8, 8), 0)
    path = saved(tmp_path, palette, transparency=bytes([0] * 256))
    assert (pixels(path, PLAIN, 3, 8, 8) == 255).all()


def test_images_are_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste((255, 255, 255), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = saved(tmp_path, image, "image.jpg", exif=exif, quality=100)
    found = pixels(path, PLAIN, 3, 8, 8)
    assert found[:, :3].max() < 100 and found[:, 5:].min() > 155


def test_sixteen_bits_are_refused_rather_than_cut(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)))
    with pytest.raises(DataError, match="more than 8 bits a channel"):
        pixels(path, GREY, 1, 8, 8)


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that announces side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8_200, 10_000, 60_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(Image.Image, "load", decoded)
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side))
    with pytest.raises(DataError, match=r"bomb\.png"):
        pixels(path, PLAIN, 3, 8, 8)


def test_a_thread_of_an_image_is_refused_before_it_is_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "MAX_PIXELS", 10_000)
    path = saved(tmp_path, Image.new("RGB", (1, 2_000)))
    with pytest.raises(DataError, match="cut its long side"):
        pixels(path, PLAIN, 3, 8, 8)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    whole = io.BytesIO()
    drawn(64, 64).save(whole, "JPEG")
    gif = io.BytesIO()
    drawn(8, 8).save(gif, "GIF")
    for name, data, named in (
        ("cut.jpg", whole.getvalue()[:400], "cannot be read as an image"),
        ("text.png", b"no image", "no JPEG or PNG"),
        ("empty.png", b"", "no JPEG or PNG"),
        ("other.png", gif.getvalue(), "no JPEG or PNG"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=named) as error:
            pixels(tmp_path / name, PLAIN, 3, 8, 8)
        assert name in str(error.value)
    with pytest.raises(DataError, match="is not there"):
        pixels(tmp_path / "missing.png", PLAIN, 3, 8, 8)


def test_an_animation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "moving.png"
    drawn(8, 8).save(path, save_all=True, append_images=[drawn(8, 8, "L")])
    with pytest.raises(DataError, match="animation"):
        pixels(path, PLAIN, 3, 8, 8)


def test_images_of_other_channels_than_the_network_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, drawn(8, 8))
    with pytest.raises(ShapeError, match="images of 1 channels are described"):
        pixels(path, GREY, 3, 8, 8)
    with pytest.raises(DataError, match="is one path"):
        load_images(str(path), preprocessing=PLAIN, shape=(3, 8, 8))
    with pytest.raises(DataError, match="at least one"):
        load_images([], preprocessing=PLAIN, shape=(3, 8, 8))


def test_a_folder_gives_its_images_by_name(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/10.jpeg", "a.png", "._a.png", "notes.txt", "c/c.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    one = tmp_path / "notes.txt"
    found = existing([one, tmp_path])
    names = ["notes.txt", "a.png", "b/10.jpeg", "b/2.JPG"]
    assert [str(path.relative_to(tmp_path)) for path in found] == names
    with pytest.raises(DataError, match="holds no image files"):
        existing([tmp_path / "c"])
    with pytest.raises(DataError, match="is not there"):
        existing([tmp_path / "missing"])
