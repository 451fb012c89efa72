"""`crypten-espn calibrate`: a trained network's activations made polynomials."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch

from ..array_file import load_array
from ..errors import EspnError
from ..inputs import check_batch
from ..pillar.calibrate import calibrate as calibrate_network
from ..pillar.calibrate import fits
from ..pillar.guard import guard_of
from ..pillar.guarding import in_words
from ..pillar.storage import load_network, save_network
from ..pillar.stress import stress
from ..sweep import sweep as compare
from .options import INPUTS, NetworkFile, option, positive, whole

_LABELS = ".npy of as many integers, the right classes; --sweep shows accuracies then"
_DEGREE = "of the polynomials, 1 to 10 (default: 8)"
_MARGIN = "interval over what a channel saw (default: 2, up to degree 4 1.5)"
_SWEEP = "compare degrees and margins first, and take what is recommended"
# Enough to see what blows up; every image is run some twenty times.
_STRESSED = 100


def calibrate(
    network: NetworkFile,
    images: Annotated[Path, option(f"{INPUTS}; unlabelled, some hundreds", "FILE")],
    out: Annotated[Path, option("network to write, .safetensors", "FILE")],
    degree: Annotated[int | None, whole(_DEGREE)] = None,
    margin: Annotated[float | None, positive(_MARGIN)] = None,
    sweep: Annotated[bool, option(_SWEEP, None, "--sweep")] = False,
    labels: Annotated[Path | None, option(_LABELS, "FILE")] = None,
) -> int:
    """Make a trained network's activations polynomials, without training.

    examples:
      crypten-espn calibrate fashion-resnet-relu --images images.npy \\
        --out calibrated.safetensors
      crypten-espn calibrate relu.safetensors --images images.npy --sweep \\
        --labels labels.npy --out calibrated.safetensors
    """
    if network.suffix == ".onnx":
        raise EspnError(
            f"{network} is an ONNX file, which keeps no activations to replace; give a "
            "trained .safetensors, or calibrate the torch network with espn.calibrate "
            "and export that"
        )
    if labels is not None and not sweep:
        raise EspnError("--labels are for the table of --sweep; give both")
    if sweep and (degree, margin) != (None, None):
        raise EspnError(
            "--sweep chooses degree and margin; give --sweep, or --degree and --margin"
        )
    if out.is_dir():
        raise EspnError(f"--out {out} is a folder; name a file in it")
    model, inputs = load_network(network), load_array(images)
    check_batch(inputs, model.input_shape, str(images), str(network))
    if sweep:
        table = compare(model, inputs, labels=labels and _classes(labels))
        print(f"{table}\n")
        degree, margin = table.recommended.degree, table.recommended.margin
    found = calibrate_network(model, inputs, degree=degree, margin=margin)
    done = fits(found)
    assert done is not None
    print(f"{done}\n\nstress: {stress(found, inputs[:_STRESSED]).verdict}")
    print(in_words(guard_of(found)))
    notes = {"calibrated": {"degree": done.degree, "margin": done.margin}}
    try:
        save_network(
            found,
            out,
            normalization=model.normalization,
            notes={**(model.notes or {}), **notes},
        )
    except OSError as error:
        raise EspnError(
            f"--out {out} cannot be written ({error.strerror}); name a file in a "
            "folder of yours"
        ) from None
    print(f"wrote {out}")
    return 0


def _classes(path: Path) -> torch.Tensor:
    """The integers of a file.

    Raises:
        EspnError: it holds others.
    """
    numbers = load_array(path)
    if not bool((numbers == numbers.round()).all()):
        raise EspnError(f"{path} holds numbers that are no classes; give integers")
    return numbers.long()
