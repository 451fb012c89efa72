"""What a run of training gives, and the accuracy that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import DataError
from .data import Split
from .keeping import evaluating
from .recipe import Recipe

SELECTION_RULE = (
    "the epoch of highest accuracy on validation images held out of the training set; "
    "the test set was read once, after that choice"
)


@dataclass(frozen=True)
class Result:
    """What a run gave; written as result.json."""

    recipe: Recipe
    epoch: int
    validation_accuracy: float
    test_accuracy: float
    selection_rule: str
    steps: int
    seconds: float
    path: str

    def __str__(self) -> str:
        return (
            f"{self.recipe.name} ({self.recipe.activation}): test accuracy "
            f"{self.test_accuracy:.2%}, validation accuracy "
            f"{self.validation_accuracy:.2%} at epoch {self.epoch} of "
            f"{self.recipe.epochs}\nselection: {self.selection_rule}\n"
            f"network: {self.path}"
        )


def accuracy(model: nn.Module, split: Split, *, batch_size: int = 500) -> float:
    """Return the share of images whose largest logit is the label's, in float32.

    Raises:
        DataError: the split is empty.
    """
    if not len(split):
        raise DataError("accuracy was asked of an empty split")
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    right = 0
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with evaluating(model), exact:
        for images, labels in split.batches(batch_size):
            logits = model(images.to(device))
            right += int((logits.argmax(1).cpu() == labels).sum())
    return right / len(split)
