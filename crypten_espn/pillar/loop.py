"""What a training loop of one's own calls, beside the penalties."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import NothingReplacedError, RangeError, ShapeError
from ..polynomial import AnyPolynomial
from .surgery import Key, activations, replace_activations
from .watch import image_reach


def replace_share(
    model: nn.Module, mapping: Mapping[Key, AnyPolynomial], share: float
) -> nn.Module:
    """Return the model with the first of its activations made polynomial, in place.

    With a share that grows over the epochs they give way one after the other, and the
    network has time to adapt to each. The network is searched at every call: call it
    once an epoch, or every so many steps.

    Args:
        model: any network but a lone activation.
        mapping: what to replace, and by which polynomial; see `replace_activations`.
        share: of all activations, those that are polynomials already included, that
            are to be polynomials; rounded up to a whole one.

    Raises:
        RangeError: a share that is not from 0 to 1.
        ConversionError: as of `replace_activations`.
    """
    if not 0 <= share <= 1:
        raise RangeError(f"replace_share was given share={share}; it is from 0 to 1")
    left: list[str] = []

    def note(name: str) -> bool:
        left.append(name)
        return False

    with contextlib.suppress(NothingReplacedError):
        replace_activations(model, mapping, select=note)
    done = len(activations(model))
    # The nudge keeps k of n activations k of them despite the division.
    due = left[: max(math.ceil(share * (done + len(left)) - 1e-9) - done, 0)]
    if not due:
        return model
    return replace_activations(model, mapping, select=set(due).__contains__)


def clip_in_training(model: nn.Module, clip: bool) -> None:
    """Set whether the activations clip their inputs in training; at first they do.

    Without the clip a network learns what evaluation and the parties do to inputs
    beyond the interval: for the last epochs, when few are left there.
    """
    for module in activations(model).values():
        module.clip = clip


def freeze_norm(model: nn.Module) -> None:
    """Let batch-norms use their statistics, and keep them, until the next train()."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


class TailReplay:
    """The images whose activation inputs reach furthest, to be trained on again.

    What leaves an interval is rare: an image in a thousand shows it once an epoch. Kept
    and mixed into the batches that follow, it is seen until its inputs are inside.

    Args:
        size: images kept.

    Raises:
        RangeError: a size below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise RangeError(f"TailReplay was given size={size}; it is from 1 on")
        self.size = size
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return 0 if self._kept is None else len(self._kept[0])

    def mix(self, images: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the batch with its last `count` images replaced by kept ones.

        Those are no longer kept, until `keep` finds that they still reach far; the
        longest kept come first, and where fewer are kept, fewer are replaced.

        Args:
            images: (n, ...).
            targets: (n, ...), of the type and the trailing shape that `keep` was given.
            count: at most n.
        """
        count = min(count, len(self), len(images))
        if self._kept is None or not count:
            return images, targets
        kept_images, kept_targets, _ = self._kept
        stay = len(images) - count
        mixed = (
            torch.cat([images[:stay], kept_images[:count].to(images)]),
            torch.cat([targets[:stay], kept_targets[:count].to(targets)]),
        )
        first, second, third = self._kept
        self._kept = first[count:], second[count:], third[count:]
        return mixed

    def keep(self, model: nn.Module, images: Tensor, targets: Tensor) -> None:
        """Keep what reaches furthest among the batch and those kept before.

        Args:
            model: the network between its forward pass over the batch and the penalty.
            images: (n, ...), the batch.
            targets: (n, ...).

        Raises:
            ShapeError: the network's activations saw another number of images.
            TrainingError: as of `image_reach`.
        """
        reach = image_reach(model)
        if len(reach) != len(images):
            raise ShapeError(
                f"{len(images)} images were given to keep, and the activations saw "
                f"{len(reach)}; give the batch of the last forward pass"
            )
        batch = images.detach(), targets.detach(), reach
        earlier = self._kept or [x[:0] for x in batch]
        kept = [torch.cat(pair) for pair in zip(earlier, batch, strict=True)]
        furthest = kept[2].topk(min(self.size, len(kept[2]))).indices.sort().values
        self._kept = kept[0][furthest], kept[1][furthest], kept[2][furthest]
