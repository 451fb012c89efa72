"""A trained network's activations made polynomials, without training.

Each channel of each activation gets the polynomial that fits what this channel sees.
Measured on the bundled networks in docs/training.md.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..array_file import one_input
from ..errors import (
    CalibrationWarning,
    ConversionError,
    DataError,
    NothingReplacedError,
    RangeError,
)
from ..inputs import real_tensor
from ..polynomial import MAX_DEGREE, Polynomial
from .fitting import IDENTITY, Fits, Fitting
from .guard import InputGuard, attach_guard
from .guard_bounds import MOST_CHANNELS, Sample, normalization_of
from .keeping import as_taken
from .sharing import unshare
from .spellings import ACTIVATIONS
from .surgery import Key, activations, changes, replace_activations, replace_pooling

# Higher degrees fit better; the masked engine refuses what its ring does not hold.
DEGREE = 8
# Scalar functions beside those that surgery knows by all their spellings.
_OTHERS: dict[type[nn.Module], tuple[Callable[..., Tensor], ...]] = {
    nn.CELU: (functional.celu, functional.celu_),
    nn.SELU: (functional.selu, functional.selu_),
    nn.Hardtanh: (functional.hardtanh, functional.hardtanh_),
    nn.LogSigmoid: (functional.logsigmoid,),
    nn.PReLU: (),
    nn.Softsign: (functional.softsign,),
    nn.Tanhshrink: (functional.tanhshrink,),
    nn.Hardshrink: (functional.hardshrink,),
    nn.Softshrink: (functional.softshrink,),
    nn.Threshold: (functional.threshold,),
}
KINDS = (*ACTIVATIONS, *_OTHERS)


# Width costs accuracy, and corrupted images decide it for most channels. Through many
# layers errors grow: with the first, 3 of 10,000 images were not finite in ResNet-32.
_MARGIN, _MARGIN_DEEP, _DEEP = 1.5, 2.0, 16


def fits(model: nn.Module) -> Fits | None:
    """What `calibrate` says of a network that it returned; None for any other."""
    found: Fits | None = getattr(model, "_fits", None)
    return found


def calibrate(
    model: nn.Module,
    images: object,
    *,
    degree: int | None = None,
    margin: float | None = None,
    batch_norm: bool = False,
) -> nn.Module:
    """Return the network with a fitted polynomial for each channel of each activation.

    1. An activation that stands at several places becomes one for each place.
    2. Front to back, on what the layers already replaced make of the images: channel
       c is fitted on [-F, F], F = margin times the 99.95th percentile of |input|, at
       least the layer's widest over 16, and 1.2 times the largest that the images and
       `stress.sample`'s corruptions of them reach. Its polynomial has the least squared
       error from what the network as it was makes there of the same images, which
       counts as often as inputs fall there, and 0.5 % from the function everywhere.
       Its interval is 1.25 times as long, for images to come.
    3. Coefficients have 20 fractional bits in units of U, a power of two from R on.
    4. The network carries an `InputGuard` (`guard_of`) fitted to it. Corruptions that
       the guard refuses are not covered in 2: the roughest, and without a
       `normalization` of the model's only those far beyond the images' levels.

    Labels are not needed. Three passes over the images for each activation.

    Args:
        model: any trained network; it is not changed. Its attribute `normalization`, a
            Normalization or None, tells the guard what made the images of [0, 1].
        images: (n, ...) as the network takes them, unlabelled; some hundreds.
        degree: 1 to 10; 8 if None. Below 6, fine-tune afterwards. The masked engine
            computes degree 10 for few networks, and refuses the others.
        margin: if None 1.5, and 2 for more than 16 activations. A higher one gives room
            for inputs unlike the images, and a coarser fit.
        batch_norm: whether each batch-norm's mean and variance are estimated again, on
            what the layers before it make now; for low degrees.

    Returns:
        A copy in evaluation mode, its activations `PolynomialActivation`s of
        `ChannelPolynomials`. `fits` tells what was done.

    Raises:
        ConversionError: no activation, one that cannot be replaced, a max pool (no
            polynomial is one: replace_pooling first), or one shared module at places of
            different numbers of channels.
        DataError: no images, or a single one; or of other channels than the model's
            `normalization`.
        RangeError: images that hold NaN, infinity or values of 2**19 and more, a layer
            whose inputs are not finite, a degree or margin out of range.

    Warns:
        CalibrationWarning: an activation is never called, never fires, or is not known;
            it is named. Or polynomials that were there before leave their intervals, so
            that the guard is fitted to the images alone.
    """
    degree = DEGREE if degree is None else degree
    if type(degree) is not int or not 1 <= degree <= MAX_DEGREE:
        raise RangeError(f"degree={degree!r}: an int from 1 to {MAX_DEGREE} is needed")
    if margin is not None and not 1 <= margin <= 16:
        raise RangeError(f"margin={margin!r}: from 1 to 16 is allowed")
    batches = calibration_batches(model, images)
    network = _prepared(model)
    if margin is None:
        margin = _MARGIN_DEEP if len(activations(network)) > _DEEP else _MARGIN
    unknown = _unknown(network)
    sample = _sample(torch.cat(batches), model)
    beside = [] if sample is None else _beside(sample, batches)
    done, notes = Fitting(network, batches, degree, margin, beside).run(batch_norm)
    if sample is not None:
        attach_guard(network, _guard(network, sample, notes))
    if unknown or notes:
        warnings.warn(
            f"{'; '.join(unknown + notes)}. espn.check(network, images[:1]) says "
            "whether the network can be private",
            CalibrationWarning,
            stacklevel=2,
        )
    object.__setattr__(network, "_fits", done)
    return network


def _sample(images: Tensor, model: nn.Module) -> Sample | None:
    """Clean and corrupted images; None for more channels than a guard is of."""
    if images.shape[1] > MOST_CHANNELS:
        return None
    return Sample.of(images.float().cpu(), normalization_of(model))


def _beside(sample: Sample, batches: list[Tensor]) -> list[Tensor]:
    """Corrupted images that intervals are to cover, as the model takes them."""
    images = sample.images[sample.admitted & ~sample.clean].to(batches[0])
    return list(images.split(len(batches[0])))


def _guard(network: nn.Module, sample: Sample, notes: list[str]) -> InputGuard:
    try:
        return InputGuard.of(sample, network)
    except RangeError as error:
        notes.append(f"the input guard is the images' alone: {error}")
        return InputGuard.of(sample)


def calibration_batches(model: nn.Module, images: object) -> list[Tensor]:
    """The images in batches, as the model takes them.

    Raises:
        DataError: no images, or a single one.
        RangeError: NaN or infinity.
    """
    x = real_tensor(images, "the images", finite=True)
    if x.dim() < 2:
        raise DataError(
            f"the images have shape {tuple(x.shape)}; give a batch, (n, ...)"
        )
    alone = one_input(x)
    if alone is not None:
        raise DataError(alone)
    x = as_taken(model, x)
    # About half a gigabyte for a layer of 64 channels at the input's size.
    size = max(1, min(256, (1 << 21) * x.shape[1] // x[0].numel()))
    return list(x.split(size))


def _prepared(model: nn.Module) -> nn.Module:
    """A copy with an activation of its own at each place, still to be fitted."""
    network = replace_pooling(copy.deepcopy(model)).eval()
    pools = [(c.name, c.before) for c in changes(network)[len(changes(model)) :]]
    pools += [
        (name, type(module).__name__)
        for name, module in network.named_modules()
        if "MaxPool" in type(module).__name__
    ]
    if pools:
        names = ", ".join(f"{name} ({kind})" for name, kind in pools)
        raise ConversionError(
            f"no polynomial computes a maximum: {names}. Replace by average pools, in "
            "two dimensions with espn.replace_pooling(model), train some epochs, then "
            "calibrate"
        )
    unshare(network, KINDS)
    mapping: dict[Key, Polynomial] = dict.fromkeys(KINDS, IDENTITY)
    for calls in _OTHERS.values():
        mapping.update(dict.fromkeys(calls, IDENTITY))
    before = set(activations(network))
    try:
        network = replace_activations(network, mapping)
    except NothingReplacedError:
        raise ConversionError(_no_activation(model)) from None
    replaced = changes(network)[len(changes(model)) :]
    if not replaced:
        raise ConversionError(
            "every activation of the network is a polynomial already; to fit others, "
            "calibrate the network that it was made from"
        )
    found = set(activations(network)) - before
    hidden = len(replaced) - len(found)
    if hidden:
        raise ConversionError(
            f"{hidden} activations stand where named_modules() does not find them, as "
            "in a plain list; keep modules in a torch.nn.ModuleList"
        )
    return network


def _unknown(network: nn.Module) -> list[str]:
    """What torch calls an activation and is none of `KINDS`, in words."""
    return [
        f"{name or '(model)'} ({type(module).__name__}) is no activation that is known "
        "here, and is left as it was"
        for name, module in network.named_modules()
        if type(module).__module__ == nn.ReLU.__module__
    ]


def _no_activation(model: nn.Module) -> str:
    leaves = {type(m).__name__ for m in model.modules() if not list(m.children())}
    known = ", ".join(kind.__name__ for kind in KINDS)
    return (
        f"the network has no activation that is known here; it is built of "
        f"{', '.join(sorted(leaves))}. Known are {known}, as modules and functions; "
        "write yours with one of them, or place "
        "espn.PolynomialActivation(espn.Polynomial.fit(f, degree=4)) yourself"
    )
