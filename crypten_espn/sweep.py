"""Which degree and margin suit a network: each calibrated, measured and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .convert import convert
from .errors import DataError, EspnError, RangeError, ShapeError
from .inputs import number_tensor, real_tensor
from .masked.inference import online_bytes
from .masked.planning import masked_model
from .pillar.calibrate import calibrate
from .pillar.keeping import as_taken, evaluating
from .pillar.stress import reaches
from .simulate import simulate_model
from .table import aligned

DEGREES = (4, 6, 8, 10)
MARGINS = (1.5, 2.0)
# One image of so many is kept from calibration, to measure on.
_EVERY = 4
# Images that a plan is made of, and that are simulated at once.
_PLANNED = 32
# Accuracy or agreement below the best by less is taken for fewer bytes.
_AS_GOOD = 0.002


@dataclass(frozen=True)
class SweepRow:
    """One calibrated network on images that its calibration did not see.

    Attributes:
        degree, margin: what it was calibrated with.
        agreement: share of answers that are the original network's; None if its
            outputs are no scores of classes, (n, classes). Answers are the masked
            engine's, simulated; the network's in the clear where there is no plan.
        accuracy: share of right answers; None without labels.
        distance: root mean square of the outputs' difference from the original's, over
            that of the original's.
        escaping: images with a value outside an interval.
        not_finite: images with an output or a value before it that is not finite.
        online_bytes: of one private inference by the masked engine, both ways; None if
            it has no plan for the network.
        dealer_bytes: what the dealer sends for it beforehand.
        why: why there is no plan.
    """

    degree: int
    margin: float
    agreement: float | None
    accuracy: float | None
    distance: float
    escaping: int
    not_finite: int
    online_bytes: int | None
    dealer_bytes: int | None
    why: str = ""

    @property
    def score(self) -> float:
        """What is compared: accuracy, else agreement, else minus the distance."""
        if self.accuracy is not None:
            return self.accuracy
        return -self.distance if self.agreement is None else self.agreement


@dataclass(frozen=True)
class Sweep:
    """All rows; `str` is a table with the recommendation as its last line.

    Attributes:
        rows: in the order of degrees, then margins.
        calibrated, measured: how many images for each.
        original: the original network's accuracy on the measured; None without labels.
    """

    rows: tuple[SweepRow, ...]
    calibrated: int
    measured: int
    original: float | None

    @property
    def recommended(self) -> SweepRow:
        """Of the rows as good as the best, to 0.2 points, the one of least degree.

        Rows that the masked engine computes come first, then those with fewer images
        that are not finite, then with fewer that escape.
        """

        def faults(row: SweepRow) -> tuple[bool, int, int]:
            return bool(row.why), row.not_finite, row.escaping

        safest = min(map(faults, self.rows))
        rows = [row for row in self.rows if faults(row) == safest]
        best = max(row.score for row in rows)
        return min(
            (row for row in rows if row.score >= best - _AS_GOOD),
            key=lambda row: (row.degree, -row.score),
        )

    def __str__(self) -> str:
        head = (
            "degree", "margin", "agreement", "accuracy", "distance", "escaping",
            "not finite", "online bytes", "dealer bytes",
        )  # fmt: skip
        rows = [
            (
                f"{row.degree}",
                f"{row.margin:g}",
                _percent(row.agreement),
                _percent(row.accuracy),
                f"{row.distance:.2%}",
                f"{row.escaping}",
                f"{row.not_finite}",
                _count(row.online_bytes),
                _count(row.dealer_bytes),
            )
            for row in self.rows
        ]
        lines = aligned([head, *rows], left=0)
        lines.append(
            f"calibrated on {self.calibrated} images, measured on {self.measured} more"
            + ("" if self.original is None else f"; original {self.original:.2%}")
        )
        lines += sorted({f"no plan: {row.why}" for row in self.rows if row.why})
        best = self.recommended
        return "\n".join(
            [*lines, f"recommended: degree {best.degree}, margin {best.margin:g}"]
        )


def sweep(
    model: nn.Module,
    images: object,
    *,
    labels: object = None,
    degrees: Sequence[int] = DEGREES,
    margins: Sequence[float] = MARGINS,
) -> Sweep:
    """Calibrate a network for each degree and margin, and measure what comes of it.

    Every fourth image is kept from calibration and measured on, in private: both
    parties of the masked engine and its dealer are simulated. Takes as long as so many
    calibrations and simulations.

    Args:
        model: any trained network; it is not changed.
        images: (n, ...) as the network takes them, at least 8; some hundreds.
        labels: (n,) integers, the right classes; without, agreement with the original
            network is what counts.
        degrees, margins: as `calibrate`.

    Raises:
        ConversionError, DataError, RangeError: as `calibrate`, and if nothing is to be
            compared.
        ShapeError: labels that are not one for each image, or outputs not of classes.
    """
    x = real_tensor(images, "the images", finite=True)
    if len(x) < 2 * _EVERY:
        raise DataError(
            f"{len(x)} images to calibrate and measure on; give at least {2 * _EVERY}, "
            "better some hundreds"
        )
    if not degrees or not margins:
        raise RangeError("no degree or no margin to compare; give at least one of each")
    kept = torch.arange(len(x)) % _EVERY == _EVERY - 1
    seen, held = x[~kept], x[kept]
    truth = _outputs(model, held)
    right = None if labels is None else _checked_labels(labels, x, truth)[kept]
    on = _Measured(held, truth, right)
    rows = []
    for degree in degrees:
        for margin in margins:
            network = calibrate(model, seen, degree=degree, margin=margin)
            rows.append(_row(network, degree, margin, seen, on))
    original = None if right is None else _share(truth.argmax(1) == right)
    return Sweep(tuple(rows), len(seen), len(held), original)


@dataclass(frozen=True)
class _Measured:
    """The images kept from calibration, the original's outputs, the right classes."""

    images: Tensor
    truth: Tensor
    right: Tensor | None


def _row(
    network: nn.Module, degree: int, margin: float, seen: Tensor, on: _Measured
) -> SweepRow:
    held, truth, right = on.images, on.truth, on.right
    private = _private(network, seen, held)
    given = _outputs(network, held) if private.outputs is None else private.outputs
    reach, bad, _ = reaches(network, held.float())
    answers = given.argmax(1) if _of_classes(truth) else None
    scale = truth.double().square().mean().sqrt().clamp_min(2.0**-60)
    away = (given.double() - truth.double()).square().mean().sqrt() / scale
    return SweepRow(
        degree,
        margin,
        None if answers is None else _share(answers == truth.argmax(1)),
        None if answers is None or right is None else _share(answers == right),
        float(away.nan_to_num(nan=torch.inf)),
        int((reach > 1.0).sum()),
        int(bad.sum()),
        private.online_bytes,
        private.dealer_bytes,
        private.why,
    )


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model):
        parts = [model(as_taken(model, part)) for part in images.split(128)]
    if not all(isinstance(part, Tensor) for part in parts):
        raise ShapeError(
            f"the network returns a {type(parts[0]).__name__}; it must return a tensor"
        )
    return torch.cat(parts).cpu()


@dataclass(frozen=True)
class _Private:
    """What the masked engine makes of a network, or why it cannot; as in a row."""

    outputs: Tensor | None = None
    online_bytes: int | None = None
    dealer_bytes: int | None = None
    why: str = ""


def _private(network: nn.Module, seen: Tensor, held: Tensor) -> _Private:
    """Both parties and the dealer, simulated; bytes of one inference."""
    few = seen[:_PLANNED].float()
    try:
        model = masked_model(convert(network, few), few)
        batches = held.float().split(_PLANNED)
        # Measured whatever the guard says: one image in a thousand it may refuse.
        parts = [simulate_model(model, x, force=True)[0] for x in batches]
    except EspnError as error:
        return _Private(why=str(error).partition("\n")[0])
    plan = model.plan
    return _Private(torch.cat(parts), sum(online_bytes(plan)), plan.dealer_bytes())


def _checked_labels(labels: object, images: Tensor, outputs: Tensor) -> Tensor:
    """The labels as (n,) int64.

    Raises:
        ShapeError: not one for each image, or the outputs are not of classes.
        RangeError: one that is no class.
    """
    numbers = number_tensor(labels, "the labels")
    if numbers.shape != (len(images),) or numbers.dtype != torch.int64:
        raise ShapeError(
            f"labels of shape {tuple(numbers.shape)} and type {numbers.dtype} for "
            f"{len(images)} images; give one integer for each"
        )
    if not _of_classes(outputs):
        raise ShapeError(
            f"labels were given, and the network's outputs have shape "
            f"{tuple(outputs.shape)}; labels are for outputs (n, classes)"
        )
    if int(numbers.min()) < 0 or int(numbers.max()) >= outputs.shape[1]:
        raise RangeError(
            f"labels from {int(numbers.min())} to {int(numbers.max())}; the network "
            f"has {outputs.shape[1]} classes, 0 to {outputs.shape[1] - 1}"
        )
    return numbers.cpu()


def _of_classes(outputs: Tensor) -> bool:
    return outputs.dim() == 2 and outputs.shape[1] > 1


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
