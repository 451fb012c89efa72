"""Batch-norm in evaluation mode recomputes a constant at every inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .patch import Patch, replace


def _state(tensor: Any) -> tuple[torch.Tensor, int]:
    """What changes when a tensor, encrypted or not, is replaced or written to."""
    data = tensor if torch.is_tensor(tensor) else tensor.share
    data = getattr(data, "_tensor", data)  # CrypTen's wrapper on a GPU
    return data, 0 if data.is_inference() else data._version


def _unchanged(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(
        old is new and old_version == new_version
        for (old, old_version), (new, new_version) in zip(before, now, strict=True)
    )


def _affine(module: Any, parameters: list[Any]) -> tuple[Any, Any]:
    """Batch-norm of fixed statistics as x * scale + shift, computed once.

    1. [scale] = [weight] / sqrt([running_var] + eps)
    2. [shift] = [bias] - [running_mean] * [scale]

    Cost: CrypTen's inverse square root and two products of one value a channel, again
    only when a parameter has changed; nothing at any other inference.
    """
    import crypten

    now = [_state(parameter) for parameter in parameters]
    if not _unchanged(getattr(module, "_affine_of", []), now):
        weight, bias, mean, variance = parameters
        with crypten.no_grad(), torch.no_grad():
            scale = module._compute_inv_var(variance) * weight
            shift = bias - scale * mean
        module._affine_of, module._affine = now, (scale, shift)
    return module._affine


def _probe() -> bool:
    from crypten.nn.module import BatchNormalization

    class Sample:
        """Stands in for an encrypted input and notes what it is asked for."""

        cached: object = None

        def batchnorm(self, *args: object, inv_var: object, **options: object) -> None:
            self.cached = inv_var

    sample = Sample()
    one = torch.ones(1)
    try:
        BatchNormalization().eval().forward((sample, one, one, one, one))
    except (TypeError, AttributeError):
        return False
    return sample.cached is None


def _install() -> Callable[[], None]:
    from crypten.nn.module import BatchNormalization

    stock = BatchNormalization.forward

    def forward(self: Any, x: list[Any]) -> Any:
        input, *parameters = x
        if self.training or any(p.requires_grad for p in parameters):
            output = stock(self, x)
            # A node exported for inference has one output; CrypTen gives five here.
            one = len(getattr(self, "_output_names", ())) == 1
            return output[0] if self.training and one else output
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale, shift = (value.reshape(shape) for value in _affine(self, parameters))
        return input * scale + shift

    return replace(BatchNormalization, "forward", forward)


PATCH = Patch(
    name="batch_norm",
    broke="batch-norm of a converted network in evaluation mode: the cached inverse "
    "variance is never used, about 18 extra rounds a layer at every inference",
    seen_on="crypten 0.4.1, any torch",
    delete_when="crypten.nn.module.BatchNormalization tests self.training",
    probe=_probe,
    install=_install,
)
