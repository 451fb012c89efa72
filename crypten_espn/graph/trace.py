"""From a torch module to ONNX bytes."""

from __future__ import annotations

import io
import warnings
from typing import Any, cast

import torch

from ..errors import ConversionError
from .network import OPSET


def export(model: torch.nn.Module, example: torch.Tensor) -> bytes:
    """The ONNX bytes of a module in evaluation mode, polynomials kept whole.

    Raises:
        ConversionError: tracing failed; the message carries the cause.
    """
    was_training = model.training
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(),
                (example,),
                cast(Any, buffer),
                dynamo=False,
                opset_version=OPSET,
                do_constant_folding=True,
                # The mode is ours to keep: the exporter would fold batch-norm unasked.
                training=torch.onnx.TrainingMode.PRESERVE,
                input_names=["input"],
                output_names=["output"],
            )
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} could not be traced with an input of shape "
            f"{tuple(example.shape)}: {str(error).splitlines()[0][:300]}. Give an "
            "example the network accepts, and keep control flow that depends on the "
            "data out of forward()"
        ) from error
    finally:
        model.train(was_training)
    return buffer.getvalue()
