"""From a torch module to ONNX bytes.

The module is the caller's: it is traced in evaluation mode on a clone of the example,
and every module's mode, buffers and attributes are as before afterwards. A Python
branch on a value that depends on the input would be frozen into one of its sides;
shapes are fixed, so a branch on these is harmless.
"""

from __future__ import annotations

import io
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
from torch.onnx import OperatorExportTypes
from torch.overrides import TorchFunctionMode

from ..errors import ConversionError
from .network import OPSET
from .symbolics import own_symbolics

# How a tensor's value becomes Python's, where the tracer loses sight of it.
_LEAVES_TORCH = {
    "__bool__",
    "__int__",
    "__float__",
    "__complex__",
    "__index__",
    "__array__",
    "__contains__",
    "item",
    "tolist",
    "numpy",
}
# Their values depend on the shape of what they are given, and on nothing else.
_SHAPE_ONLY = {
    "aten::size",
    "aten::numel",
    "aten::dim",
    "aten::zeros_like",
    "aten::ones_like",
    "aten::empty_like",
    "aten::new_zeros",
    "aten::new_ones",
}
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "aten::eq": operator.eq,
    "aten::ne": operator.ne,
    "aten::lt": operator.lt,
    "aten::le": operator.le,
    "aten::gt": operator.gt,
    "aten::ge": operator.ge,
}
# CrypTen's converter registers symbolics of its own for these and leaves them behind.
_CRYPTENS = ("softmax", "log_softmax", "dropout", "feature_dropout")


class DataDependence(ConversionError):
    """Python read a value that depends on the input."""


def export(model: torch.nn.Module, example: torch.Tensor) -> bytes:
    """The ONNX bytes of a module in evaluation mode, polynomials kept whole.

    Raises:
        ConversionError: tracing failed, or Python code in a `forward` reads a value
            that depends on the input; the message carries the cause, or the line.
    """
    _standard_symbolics()
    with as_it_was(model):
        model.eval()
        try:
            return _export(model, example, OperatorExportTypes.ONNX)
        except DataDependence:
            raise
        except Exception as error:
            try:
                # Operations ONNX lacks keep torch's name, so that they can be refused
                # by name with all others.
                return _export(model, example, OperatorExportTypes.ONNX_FALLTHROUGH)
            except Exception:
                lines = str(error).splitlines() or [type(error).__name__]
                raise ConversionError(
                    f"{type(model).__name__} could not be traced with an input of "
                    f"shape {tuple(example.shape)}: {lines[0][:300]}. Give an example "
                    "the network accepts, and keep control flow that depends on the "
                    "data out of forward()"
                ) from error


@contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Put back what running a module changes: modes, buffers, attributes, seeds."""
    modes = {module: module.training for module in model.modules()}
    attributes = {module: dict(vars(module)) for module in modes}
    members = [
        (found, dict(found))
        for module in modes
        for found in (module._parameters, module._buffers)
        if isinstance(found, dict)  # a TorchScript module's stand in C++
    ]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            for name in vars(module).keys() - attributes[module].keys():
                del vars(module)[name]
            vars(module).update(attributes[module])
            module.training = training
        for found, kept in members:
            cast("dict[str, object]", found).clear()
            cast("dict[str, object]", found).update(kept)
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def _export(
    model: torch.nn.Module, example: torch.Tensor, kind: OperatorExportTypes
) -> bytes:
    buffer = io.BytesIO()
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        _Watch(),
        _without_log(),
        own_symbolics(),
    ):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example.detach().clone(),),
            cast(Any, buffer),
            dynamo=False,
            opset_version=OPSET,
            do_constant_folding=True,
            # The mode is ours to keep: the exporter would fold batch-norm unasked.
            training=torch.onnx.TrainingMode.PRESERVE,
            operator_export_type=kind,
            input_names=["input"],
            output_names=["output"],
        )
    return buffer.getvalue()


class _Watch(TorchFunctionMode):
    """Refuses to let a value that depends on the traced input become Python's."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = getattr(func, "__name__", "")
        if torch.jit.is_tracing() and args and isinstance(args[0], torch.Tensor):
            if name in _LEAVES_TORCH and _depends_on_input(args[0]):
                where = _line()
                raise DataDependence(
                    f"{where}: Python reads a value that depends on the input, by "
                    f"{name}. A trace keeps one side of such a branch, and on private "
                    "data it would reveal the value; compute both sides, or branch on "
                    "shapes only"
                )
            if name == "__bool__" and not _is_torchs_own() and _by_batch(args[0]):
                raise DataDependence(
                    f"{_line()}: a branch on the batch size. A trace keeps one side, "
                    "for any batch; compute the same for every batch size"
                )
            if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
                return args[0].detach()  # x.data would be a constant in the trace
        return func(*args, **(kwargs or {}))


def _traced(value: torch.Tensor) -> torch._C.Value:
    """What a tensor is in the trace."""
    found: torch._C.Value = torch._C._get_value_trace(value)  # type: ignore[attr-defined]
    return found


def _behind(value: torch.Tensor) -> Iterator[torch._C.Value]:
    """What a traced tensor's value hangs on, back to the sizes of tensors."""
    waiting = [_traced(value)]
    seen: set[str] = set()
    while waiting:
        traced = waiting.pop()
        if traced.debugName() not in seen:
            seen.add(traced.debugName())
            yield traced
            if traced.node().kind() not in _SHAPE_ONLY:
                waiting += list(traced.node().inputs())


def _depends_on_input(value: torch.Tensor) -> bool:
    """Whether a traced tensor's value hangs on the example's, not on its shape."""
    for traced in _behind(value):
        node = traced.node()
        # The example comes first; the module's parameters follow it.
        if (
            node.kind() == "prim::Param"
            and next(iter(node.outputs())).debugName() == traced.debugName()
        ):
            return True
    return False


def _by_batch(value: torch.Tensor) -> bool:
    """Whether a traced condition differs between batch sizes, from 1 upwards."""
    batches = [traced for traced in _behind(value) if _is_batch(traced)]
    if not batches:
        return False
    node = _traced(value).node()
    compare = _COMPARISONS.get(node.kind())
    if compare is None:
        return True
    sides = [_source(traced) for traced in list(node.inputs())[:2]]
    if all(_is_batch(side) for side in sides):
        return False  # of two values: the same, for any batch
    numbers = [None if _is_batch(side) else _number(side) for side in sides]
    known = [n for n in numbers if n is not None]
    if len(known) != 1 or sum(map(_is_batch, sides)) != 1:
        return True
    sizes = [1.0, *(known[0] + d for d in (-1, -0.5, 0, 0.5, 1)), 1e9]
    return (
        len(
            {
                compare(*((size if n is None else n) for n in numbers))
                for size in sizes
                if size >= 1
            }
        )
        > 1
    )


def _is_batch(traced: torch._C.Value) -> bool:
    """Whether a traced value is the size of a tensor's first dimension."""
    if traced.node().kind() != "aten::size":
        return False
    inputs = list(traced.node().inputs())
    return len(inputs) < 2 or _number(inputs[1]) == 0


def _number(traced: torch._C.Value) -> float | None:
    """What a traced constant is; None for what is computed."""
    value = cast("float | None", traced.toIValue())
    return None if value is None else float(value)


def _source(traced: torch._C.Value) -> torch._C.Value:
    """A size or number, without the conversions between it and a tensor."""
    while traced.node().kind() in ("prim::NumToTensor", "aten::Int", "aten::to"):
        traced = next(iter(traced.node().inputs()))
    return traced


def _callers() -> Iterator[tuple[str, FrameType]]:
    """The frames outside this file, innermost first, each with its module's name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module != __name__:
            yield module, frame
        frame = frame.f_back


def _line() -> str:
    """Where the user's code is: the innermost line that is not torch's."""
    for module, frame in _callers():
        if module.split(".")[0] != "torch" and not module.startswith(__package__ or ""):
            return f"{frame.f_code.co_filename}, line {frame.f_lineno}"
    return "in forward()"


def _is_torchs_own() -> bool:
    """Whether torch asks, as its layers do to check their inputs."""
    module, _ = next(_callers())
    return module.split(".")[0] == "torch"


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep out what torch prints on failure: its whole graph, hundreds of lines."""
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *parts: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log


def _standard_symbolics() -> None:
    """Let torch export with its own symbolics; CrypTen's drop the mode of a dropout.

    crypten.nn.from_pytorch registers its own anew at every call.
    """
    for name in _CRYPTENS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.unregister_custom_op_symbolic(f"aten::{name}", OPSET)
