"""Training images whose activation inputs reach far, seen again in later batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import RangeError, ShapeError
from .watch import image_reach


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
