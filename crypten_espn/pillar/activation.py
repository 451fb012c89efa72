"""A polynomial as a torch module, with the inputs that penalties read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConversionError
from ..polynomial import AnyPolynomial, ChannelPolynomials
from . import elementwise
from .elementwise import Number


class PolynomialActivation(nn.Module):
    """A polynomial, element by element: the same for all, or one for each channel.

    In training the input is clipped to its polynomial's interval, unless `clip` is set
    to False, and recorded before that for `range_penalty` to read. In evaluation the
    polynomial is applied as it is, as the parties will. An ONNX export keeps the module
    whole, as one operator crypten_espn::PolynomialActivation.

    Args:
        polynomial: what to apply. Of ChannelPolynomials, row c applies to channel c:
            the input's second axis, after the batch.
        inplace: whether the result also overwrites the input, as torch.nn.ReLU's
            inplace does: a network may rely on it.
    """

    def __init__(self, polynomial: AnyPolynomial, *, inplace: bool = False) -> None:
        super().__init__()
        self.polynomial = polynomial
        self.inplace = inplace
        self.clip = True
        self._recorded: dict[object, Tensor] = {}
        self._hidden = False
        self._replaced: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return the polynomial of x, same shape and type; x itself if in place.

        Raises:
            PolynomialError: the input has another number of channels.
            ConversionError: an export traces a change in place to a part of a tensor,
                which it would lose.
        """
        if torch.jit.is_tracing():
            return self._traced(x)
        self._check_channels(x)
        if self.training and not torch.is_grad_enabled():
            self._hidden = self._hidden or _inside_function()
        elif _in_backward():
            # A checkpoint computes again what went by; its penalty's time is over.
            self._hidden = False
        elif self.training and x.requires_grad:
            seen = x.clone() if self.inplace else x
            y = _Evaluate.apply(seen, self.polynomial, self.clip, False)
            self._record(seen, y)
            return x.copy_(y) if self.inplace else y
        out: Tensor
        clip = self.training and self.clip
        out = _Evaluate.apply(x, self.polynomial, clip, self.inplace)
        return out

    def recorded(self) -> list[Tensor]:
        """Return the inputs since the last call of `take_recorded` or backward pass."""
        return list(self._recorded.values())

    def take_recorded(self) -> list[Tensor]:
        """Return the inputs since the last call or backward pass, and forget them."""
        recorded = self.recorded()
        self._recorded.clear()
        return recorded

    def take_hidden(self) -> bool:
        """Whether inputs passed since the last call that autograd could not see.

        So it is under torch.utils.checkpoint with use_reentrant=True: they are computed
        again, with gradients, when the backward pass has begun.
        """
        hidden, self._hidden = self._hidden, False
        return hidden

    def _record(self, x: Tensor, y: Tensor) -> None:
        # One ticket for each: an old backward pass must not forget a new input.
        recorded, ticket = self._recorded, object()
        recorded[ticket] = x

        def forget(_: Tensor) -> None:
            # A backward pass without penalty must not leave its graph behind.
            recorded.pop(ticket, None)

        y.register_hook(forget)

    def _traced(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # A trace fixes shapes and coefficients, as it should.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            self._check_traceable(x)
            self._check_channels(x)
            out: Tensor
            clip = self.training and self.clip
            out = _Evaluate.apply(x, self.polynomial, clip, self.inplace)
            return out

    def _check_channels(self, x: Tensor) -> None:
        if isinstance(self.polynomial, ChannelPolynomials):
            self.polynomial.check_channels(tuple(x.shape))

    def _check_traceable(self, x: Tensor) -> None:
        base = x._base
        if self.inplace and base is not None and base.numel() != x.numel():
            raise ConversionError(
                f"an activation ({self.polynomial}) changes a part of a tensor in "
                "place, which an export cannot follow; use what it returns, and set "
                "its inplace to False"
            )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_recorded": {}, "_hidden": False}

    def __setstate__(self, state: dict[str, object]) -> None:
        # A module pickled before these existed.
        earlier = {"inplace": False, "clip": True, "_hidden": False}
        super().__setstate__({**earlier, **state})

    def extra_repr(self) -> str:
        """Return the polynomial, for print(model)."""
        return f"{self.polynomial}{', inplace=True' if self.inplace else ''}"


class _Evaluate(torch.autograd.Function):
    """p(x), or p(clip(x)) in training; float32 inside, whatever the type of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, polynomial: AnyPolynomial, clip: bool, inplace: bool
    ) -> Tensor:
        ctx.coeffs = _coeffs(polynomial)
        ctx.interval = interval_of(polynomial) if clip else None
        value = elementwise.polynomial(x, ctx.coeffs, ctx.interval)
        if not inplace:
            ctx.save_for_backward(x)
            return value
        if x.requires_grad:
            ctx.save_for_backward(x.clone())
        ctx.mark_dirty(x)
        return x.copy_(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        if gradient.stride() != x.stride():
            gradient = torch.empty_like(x).copy_(gradient)
        slope = [k * c for k, c in enumerate(ctx.coeffs)][1:] or [0.0]
        return elementwise.slope(x, gradient, slope, ctx.interval), None, None, None

    @staticmethod
    def symbolic(
        g: Any, x: Any, polynomial: AnyPolynomial, clip: bool, inplace: bool
    ) -> Any:
        given: dict[str, Any]
        if isinstance(polynomial, ChannelPolynomials) or polynomial.exponent:
            # As text: ONNX's floats would round the intervals.
            given = {"polynomial_s": polynomial.to_json()}
        else:
            given = {
                "numerators_i": list(polynomial.numerators),
                "frac_bits_i": polynomial.frac_bits,
                "interval_f": list(polynomial.interval),
                "requested_degree_i": polynomial.requested_degree,
            }
        y = g.op("crypten_espn::PolynomialActivation", x, **given)
        return y.setType(x.type())


def interval_of(polynomial: AnyPolynomial) -> tuple[Number, Number]:
    """Return the low end and the high end; arrays where channels have their own."""
    if isinstance(polynomial, ChannelPolynomials):
        low, high = polynomial.intervals.T
        return low, high
    return polynomial.interval


def _coeffs(polynomial: AnyPolynomial) -> Sequence[Number]:
    """The constant first; arrays where channels have their own."""
    if isinstance(polynomial, ChannelPolynomials):
        return list(polynomial.coeffs.T)
    return polynomial.coeffs


def _in_backward() -> bool:
    """Whether a backward pass computes this forward pass again, for a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def _inside_function() -> bool:
    """Whether the forward of an autograd.Function is running, such as checkpoint's."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and "ctx" in code.co_varnames[:1]:
            return isinstance(
                frame.f_locals.get("ctx"), torch.autograd.function.FunctionCtx
            )
        frame = frame.f_back  # type: ignore[assignment]
    return False
