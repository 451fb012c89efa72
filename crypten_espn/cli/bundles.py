"""`crypten-espn bundle`: a network made ready to be served, in one file."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import torch

from ..bundle import Bundle, Description, Preprocessing
from ..bundle.description import DESCRIPTION_BYTES, MAX_SIDE
from ..bundle.images import image_files, load_images
from ..errors import EspnError
from ..graph.read import declared_shape
from ..pillar.networks import Network
from ..pillar.storage import load_network
from .networks import calibration_inputs, planned_on
from .options import (
    INPUTS,
    GuardFile,
    NetworkFile,
    Precision,
    checked,
    option,
    whole,
)

_CALIBRATION = f"{INPUTS}, or a folder of images; they bound every layer"
_LABELS = "text file of the classes' names in the logits' order, one a line"
_NUMBER = "was given; give a number, such as 0.485"
_MEANS = "of (image / 255), subtracted, one a channel (default: the network's)"
_DEVIATIONS = "that is divided by, one a channel (default: the network's)"
_RESIZE = "pixels of an image's shorter side before the middle is cut out"
_STRETCH = "resize both sides to the network's size instead of cutting"
# Values of all calibration images: every layer's are held at once, in float64.
_VALUES = 64 * 3 * 224 * 224
_IMAGES = 16, 512


def _sides(text: str) -> torch.Size:
    height, width = map(int, text.split("x"))
    return torch.Size((height, width))


_SIZE = checked(
    "of the network's images (default: what the network says)",
    "HxW",
    _sides,
    lambda sides: 1 <= min(sides) <= max(sides) <= MAX_SIDE,
    "is no size; give height and width, such as 224x224",
)


def bundle(
    network: NetworkFile,
    calibration: Annotated[Path, option(_CALIBRATION, "PATH")],
    out: Annotated[Path, option("bundle to write, such as net.espn", "FILE")],
    labels: Annotated[Path | None, option(_LABELS, "FILE")] = None,
    size: Annotated[torch.Size | None, _SIZE] = None,
    mean: Annotated[
        list[float] | None, checked(_MEANS, "MEAN...", float, math.isfinite, _NUMBER)
    ] = None,
    std: Annotated[
        list[float] | None,
        checked(_DEVIATIONS, "STD...", float, math.isfinite, _NUMBER),
    ] = None,
    resize: Annotated[int | None, whole(_RESIZE)] = None,
    stretch: Annotated[bool, option(_STRETCH, None, "--stretch")] = False,
    precision: Precision = "fast",
    guard: GuardFile = None,
) -> int:
    """Make a network ready to be served: plan, weights, and what clients need.

    examples:
      crypten-espn bundle model.onnx --calibration images/ --labels labels.txt \\
        --size 224x224 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 \\
        --resize 256 --out net.espn
      crypten-espn bundle fashion-resnet --calibration images.npy --out net.espn
    """
    classes = () if labels is None else _names(labels)
    model = None if network.suffix == ".onnx" else load_network(network)
    images = _preprocessing(model, mean, std, resize, stretch)
    if calibration.is_dir():
        if images is None:
            raise EspnError(
                f"{calibration} holds images, and {network} does not say how they are "
                "normalised; give --mean and --std as in its training, for ImageNet's "
                "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
            )
        inputs = _images(calibration, images, _shape(network, model, images, size))
    else:
        inputs = calibration_inputs(calibration)
        if size is not None and inputs.shape[2:] != size:
            raise EspnError(
                f"--size {size[0]}x{size[1]} was given, {calibration} has shape "
                f"{tuple(inputs.shape)}; give inputs of one size"
            )
        if images is None:
            print(
                "crypten-espn: note: without --mean and --std clients cannot send "
                "image files, only .npy",
                file=sys.stderr,
            )
    planned = planned_on(network, (calibration, inputs), precision, guard)
    made = Bundle(planned, Description(images, classes))
    made.save(out)
    print(planned)
    print(f"digest {planned.plan.digest.hex()}\nwrote {out}")
    return 0


def _preprocessing(
    model: Network | None,
    mean: list[float] | None,
    std: list[float] | None,
    resize: int | None,
    stretch: bool,
) -> Preprocessing | None:
    """How images become inputs, by the options, else by what the network's file says.

    Raises:
        EspnError: half of it was given.
    """
    known = None if model is None else model.normalization
    if (mean is None) != (std is None):
        raise EspnError("--mean and --std belong together; give both, or neither")
    if mean is not None and std is not None:
        means, deviations = tuple(mean), tuple(std)
    elif known is not None:
        means, deviations = known.mean, known.std
    elif resize is not None or stretch:
        raise EspnError("--resize and --stretch are of images; give --mean and --std")
    else:
        return None
    return Preprocessing(means, deviations, resize, "stretch" if stretch else "crop")


def _shape(
    network: Path,
    model: Network | None,
    images: Preprocessing,
    size: torch.Size | None,
) -> tuple[int, ...]:
    """The shape of one input.

    Raises:
        EspnError: nothing says it, or two say it differently.
    """
    if model is not None:
        declared: tuple[int | None, ...] = tuple(model.input_shape)
    else:
        declared = declared_shape(network)[1:] or (None, None, None)
    given = (len(images.mean), *(size or (None, None)))
    shape = tuple(
        here if there is None else there
        for here, there in zip(given, declared, strict=False)
    )
    if len(declared) != 3 or any(
        here not in (None, there) for here, there in zip(given, shape, strict=True)
    ):
        takes = ", ".join("any" if side is None else str(side) for side in declared)
        asked = "x".join(map(str, size)) if size else "no --size"
        raise EspnError(
            f"{network} takes inputs of ({takes}), and {len(images.mean)} means and "
            f"{asked} were given; --mean and --std take one number a channel, --size "
            "its height and width"
        )
    if any(side is None for side in shape):
        raise EspnError(
            f"{network} leaves its input's size open; give it, such as --size 224x224"
        )
    return tuple(side for side in shape if side is not None)


def _images(
    folder: Path, images: Preprocessing, shape: tuple[int, ...]
) -> torch.Tensor:
    """Calibration inputs from a folder: all of its images, or some evenly chosen."""
    files = image_files(folder)
    least, most = _IMAGES
    wanted = min(max(_VALUES // math.prod(shape), least), most, len(files))
    chosen = [files[i * len(files) // wanted] for i in range(wanted)]
    if wanted < len(files):
        print(
            f"crypten-espn: note: {wanted} of {len(files)} images, evenly chosen by "
            "name, bound the layers",
            file=sys.stderr,
        )
    return load_images(chosen, preprocessing=images, shape=shape)


def _names(path: Path) -> tuple[str, ...]:
    """The names of a file, one a line; blank lines are none.

    Raises:
        EspnError: it cannot be read as text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = file.read(DESCRIPTION_BYTES + 1).splitlines()
    except (OSError, UnicodeError) as error:
        raise EspnError(
            f"--labels {path} cannot be read ({error}); give UTF-8 text, a class's "
            "name a line"
        ) from None
    return tuple(line.strip() for line in lines if line.strip())
