"""A network ready to be served, in one file: plan, description, and secret weights.

    public    the plan as both parties and the dealer hold it; the description
    secret    the weights as the masked engine's integers; the report of calibration

Everything is checked completely when it is read: the seal over all bytes, the plan as
one that came from a peer, the description against the plan, each array against the
weight that the plan gives it, and the weights' digest. Nothing is unpickled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta

from ..errors import CheckpointError, DataError, EspnError, PlanError
from ..masked import kernels
from ..masked.checks import PLAN_BYTES
from ..masked.model import MaskedModel, PartReport, PlanReport
from ..masked.plan import Plan
from ..masked.weights import Quantisation, Weights
from .description import Description, Preprocessing
from .images import load_images
from .sealed import read, write

__all__ = ["Bundle", "Description", "Preprocessing", "load"]

_TEXTS = ("plan", "description", "report", "model")
_Name = Annotated[str, Meta(max_length=1 << 12)]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: _Name
    bound: float
    seen: float
    noise: float


class _Weight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: _Name
    parameter: _Name
    bias: _Name
    factor: float
    bias_factor: float


class _Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    parts: tuple[_Part, ...]
    weights: tuple[_Weight, ...]
    logits_error: float
    coins_error: float
    inputs: Annotated[int, Meta(ge=1)]
    widened: _Name = ""


@dataclass(frozen=True)
class Bundle:
    """What a server starts from.

    Args:
        model: the planned network; the server's secret.
        description: what clients are told beside the plan.

    Raises:
        ShapeError: the description does not belong to the plan.
        PlanError: the plan is longer than clients and dealers take.
    """

    model: MaskedModel = field(repr=False)
    description: Description = field(default_factory=Description)

    def __post_init__(self) -> None:
        self.description.check(self.model.plan)
        size = len(self.model.plan.to_json().encode())
        if size > PLAN_BYTES:
            raise PlanError(
                f"The plan takes {size:,} bytes; clients and dealers take "
                f"{PLAN_BYTES:,}. Polynomials of each channel take most of it: "
                "calibrate with a lower degree, or train with one polynomial a layer "
                "(replace_activations)."
            )

    def read_images(self, *paths: str | os.PathLike[str]) -> torch.Tensor:
        """Image files as this network's inputs; see `images.load_images`.

        Returns: float32 (len(paths), *input_shape).

        Raises:
            DataError: a file is no image that can be used, or the bundle does not say
                how images become inputs.
        """
        return inputs_of(paths, self.description, self.model.plan)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one file of mode 0600; an existing one is replaced in one step.

        Raises:
            CheckpointError: the file cannot be written.
            DataError: the report holds what could not be read again.
        """
        plan, weights = self.model.plan, self.model.weights
        report = msgspec.json.encode(self.model.report).decode()
        _report(report, plan)
        arrays = {}
        for number, array in enumerate(weights.integers):
            arrays[_weight(number)] = array
        for number, bias in enumerate(weights.biases):
            if bias is not None:
                arrays[_bias(number)] = bias
        texts = {
            "plan": plan.to_json(),
            "description": self.description.text.decode(),
            "report": report,
            "model": weights.digest.hex(),
        }
        write(Path(path), texts, arrays)


def load(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle, to serve it.

    Raises:
        CheckpointError: no such file, no bundle, one of a later version, or one whose
            bytes were changed; it is named, with what to do.
    """
    texts, arrays = read(Path(path))
    if sorted(texts) != sorted(_TEXTS):
        raise CheckpointError(
            f"{path} is damaged: it holds {', '.join(sorted(texts))[:200]}; a bundle "
            f"has {', '.join(_TEXTS)}"
        )
    try:
        plan = Plan.from_json(texts["plan"])
        description = Description.from_text(texts["description"].encode())
        report = _report(texts["report"], plan)
        weights = _weights(arrays, plan)
        if weights.digest.hex() != texts["model"]:
            raise DataError("the weights are another model's than its digest says")
        return Bundle(MaskedModel(plan, weights, report), description)
    except EspnError as error:
        raise CheckpointError(f"{path}: {error}") from None


def inputs_of(
    paths: tuple[str | os.PathLike[str], ...],
    description: Description,
    plan: Plan,
) -> torch.Tensor:
    """Image files as a network's inputs, by its description.

    Raises:
        DataError: as `images.load_images`, or nothing is said of images.
    """
    if description.images is None:
        raise DataError(
            "the network's owner does not say how images become inputs; prepare them "
            "as in training and give tensors, or .npy files"
        )
    return load_images(paths, preprocessing=description.images, shape=plan.input.shape)


def _weight(number: int) -> str:
    return f"weight.{number}"


def _bias(number: int) -> str:
    return f"bias.{number}"


def _weights(arrays: dict[str, np.ndarray], plan: Plan) -> Weights:
    """The arrays as the weights of a plan, each of its shape and type.

    Raises:
        DataError: it names the array that is missing, of another kind, or too many.
    """
    integers: list[np.ndarray] = []
    biases: list[np.ndarray | None] = []
    for number, shape in enumerate(plan.weights):
        dtype = np.dtype(kernels.ring_dtype(shape.ring))
        filters = (shape.shape[0],)
        for name, wanted in (
            (_weight(number), shape.kernel_layout),
            (_bias(number), filters),
        ):
            array = arrays.pop(name, None)
            if array is None and name == _bias(number):
                biases.append(None)
                continue
            given = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
            if array is None or array.dtype != dtype or array.shape != wanted:
                raise DataError(
                    f"{name} is {given}; the plan takes {dtype}{list(wanted)}"
                )
            (integers if name == _weight(number) else biases).append(array)
    if arrays:
        raise DataError(f"it holds {sorted(arrays)[0][:80]!r}, which no plan takes")
    return Weights(plan.weights, tuple(integers), tuple(biases))


def _report(text: str, plan: Plan) -> PlanReport:
    """The report of a plan's calibration.

    Raises:
        DataError: it is none, or of another plan.
    """
    try:
        given = _DECODER.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DataError(f"its report is damaged ({str(error)[:200]})") from None
    counts = len(given.parts), len(given.weights)
    if counts != (len(plan.parts), len(plan.weights)):
        raise DataError(
            f"its report tells of {counts[0]} layers and {counts[1]} weights, the plan "
            f"has {len(plan.parts)} and {len(plan.weights)}"
        )
    return PlanReport(
        tuple(PartReport(**msgspec.structs.asdict(part)) for part in given.parts),
        tuple(Quantisation(**msgspec.structs.asdict(w)) for w in given.weights),
        given.logits_error,
        given.coins_error,
        given.inputs,
        given.widened,
    )


# Made here once: two threads that decode a type for the first time crash msgspec.
_DECODER = msgspec.json.Decoder(_Report)
