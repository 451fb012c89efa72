"""What a training loop of one's own calls, beside the penalties: plain functions."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .surgery import activations


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
