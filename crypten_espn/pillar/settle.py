"""The intervals of polynomials that are there already, made to hold what they see."""

from __future__ import annotations

import copy
import math

from torch import Tensor, nn

from ..errors import RangeError
from ..inputs import real_tensor
from .data import Normalization
from .guard import InputGuard, attach_guard
from .guard_bounds import Sample, normalization_of
from .stress import reaches
from .surgery import activations

# Corrupted images that reach so many times as far as interval and clean images are left
# to the guard; where it cannot tell them from the clean, the next is tried. Width costs
# the ring's bits.
_LIMITS = (1.5, 2.0, 3.0, 4.0)
# Training images that a network is settled on once it is trained.
SAMPLE = 1000
# Rounding, where an interval has been settled before.
_AS_BEFORE = 1.001
# Room beyond the largest seen. Nothing is fitted, so it costs bits alone. Of 25,000
# images corrupted in ways not tried here, six went 1.35 times as far, none 1.4.
_SLACK = 1.5


def settle_intervals(
    network: nn.Module,
    images: object,
    *,
    normalization: Normalization | None = None,
) -> nn.Module:
    """Return the network with intervals that hold what it sees, and with its guard.

    After training or fine-tuning: planner, penalties and reports take an interval for
    the truth. Each channel's interval, or the one that channels share, grows about its
    middle to 1.5 times what the images and `stress.sample`'s corruptions of them
    reach, and never shrinks. What reaches 1.5 times as far as interval and images is
    left to the guard; up to 4 times, if no bound tells it from them.

    In evaluation the network computes the same, bit for bit: coefficients, their scales
    and units stay. In training, the clip and the penalties are at the new ends. The
    masked engine's plan has fewer bits where intervals have grown.

    Args:
        network: with `PolynomialActivation`s; it is not changed.
        images: (n, channels, ...) as the network takes them, unlabelled; some hundreds.
        normalization: of the images; the network's attribute of that name if None.

    Returns:
        A copy in evaluation mode, carrying its `InputGuard` (`guard_of`).

    Raises:
        RangeError: no polynomial activation; images that hold NaN or infinity, or of
            which the network makes such; corrupted ones that go beyond all bounds, and
            that no guard tells from clean ones.
        DataError: no images, or of others than the normalisation's channels or more
            than 4,096.
    """
    x = real_tensor(images, "the images", finite=True).float().cpu()
    sample = Sample.of(x, normalization or normalization_of(network))
    settled = copy.deepcopy(network).eval()
    reach, _, layers = reaches(settled, sample.images)
    usual = max(1.0, float(reach[sample.clean].max()))
    if math.isinf(usual):
        worst = next(layer.name for layer in layers if not layer.finite)
        raise RangeError(
            f"{worst} gets values that are not finite, from the images alone; train "
            "again with a larger beta or a lower learning rate, or calibrate the "
            "network that this one was made from"
        )
    for limit in _LIMITS:
        held = sample.clean | (sample.admitted & (reach <= limit * usual))
        _widen(settled, sample.images[held])
        try:
            attach_guard(settled, InputGuard.of(sample, settled))
        except RangeError:
            if limit == _LIMITS[-1]:
                raise
        else:
            break
    return settled


def _widen(network: nn.Module, images: Tensor) -> None:
    """Let every interval hold what its channel sees of images, in place."""
    _, _, layers = reaches(network, images)
    modules = activations(network)
    for layer in layers:
        module = modules[layer.name]
        # Beyond what is there, and more than rounding.
        wanted = [_SLACK * largest for largest in layer.rows.tolist()]
        factors = [want if want > _AS_BEFORE else 1.0 for want in wanted]
        module.polynomial = module.polynomial.widened(factors)
