"""A polynomial for each channel: what calibration fits to what a channel sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import torch

from ..errors import PolynomialError
from .ring import ChannelForm, across, best_channel_form, check_channels
from .value import Polynomial, check_headroom, check_scales

MAX_CHANNELS = 1 << 16


@dataclass(frozen=True)
class ChannelPolynomials:
    """Polynomial c for channel c, the second axis of what it is applied to.

    Args:
        rows: one polynomial a channel; degrees, scales and intervals may differ.

    Raises:
        PolynomialError: no rows, more than 65,536, or one that is no Polynomial.
    """

    rows: tuple[Polynomial, ...]

    def __post_init__(self) -> None:
        rows = tuple(self.rows)
        object.__setattr__(self, "rows", rows)
        if not 1 <= len(rows) <= MAX_CHANNELS:
            raise PolynomialError(
                f"{len(rows):,} polynomials; 1 to {MAX_CHANNELS:,} channels are allowed"
            )
        for row in rows:
            if not isinstance(row, Polynomial):
                raise PolynomialError(
                    f"a {type(row).__name__} among the channels' polynomials; each is "
                    "a Polynomial"
                )

    def widened(self, factors: Sequence[float]) -> ChannelPolynomials:
        """The same polynomials, channel c's interval `factors[c]` times as long."""
        pairs = zip(self.rows, factors, strict=True)
        return ChannelPolynomials(tuple(row.widened([f]) for row, f in pairs))

    @property
    def channels(self) -> int:
        """Channels of what it applies to."""
        return len(self.rows)

    @property
    def degree(self) -> int:
        """The largest effective degree."""
        return max(row.degree for row in self.rows)

    @property
    def requested_degree(self) -> int:
        """The largest degree that was asked for."""
        return max(row.requested_degree for row in self.rows)

    @property
    def collapsed(self) -> bool:
        """Whether every channel has a lower degree than was asked for."""
        return self.degree < self.requested_degree

    @property
    def interval(self) -> tuple[float, float]:
        """The smallest that holds every channel's."""
        low, high = self.intervals.T
        return float(low.min()), float(high.max())

    @cached_property
    def intervals(self) -> np.ndarray:
        """(channels, 2) float64, each channel's low and high end."""
        return np.array([row.interval for row in self.rows], dtype=np.float64)

    @property
    def radii(self) -> np.ndarray:
        """(channels,) float64, the largest |x| of each channel's interval."""
        radii: np.ndarray = np.abs(self.intervals).max(1)
        return radii

    @cached_property
    def coeffs(self) -> np.ndarray:
        """(channels, degree + 1) float64; column k multiplies x**k."""
        table = np.zeros((self.channels, self.degree + 1))
        for line, row in zip(table, self.rows, strict=True):
            line[: row.degree + 1] = row.coeffs
        return table

    def check_channels(self, shape: tuple[int, ...]) -> None:
        """Refuse a shape, batch first, whose second axis is not the channels'.

        Raises:
            PolynomialError: it names both numbers.
        """
        check_channels(shape, self.channels)

    def columns(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The coefficients, constant first, as tensors that broadcast over x."""
        self.check_channels(tuple(x.shape))
        table = torch.from_numpy(self.coeffs).to(x.dtype)
        return [across(column, x) for column in table.unbind(1)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Evaluate in floating point (Horner); differentiable, shape of x.

        Args:
            x: (batch, channels, ...).

        Raises:
            PolynomialError: another number of channels.
        """
        *below, top = self.columns(x)
        result = top.expand_as(x)
        for column in reversed(below):
            result = result * x + column
        return result.clone() if not below else result

    def derivative(self) -> ChannelPolynomials:
        """Each row's exact derivative."""
        return ChannelPolynomials(tuple(row.derivative() for row in self.rows))

    def max_abs(self, low: float, high: float) -> float:
        """max |p_c(x)| over [low, high] and all channels."""
        return max(row.max_abs(low, high) for row in self.rows)

    def ring_form(self, *, frac_bits: int, out_bits: int) -> ChannelForm:
        """The integers that two parties evaluate, for one input and output scale.

        Each channel has its own scale of the powers, P_c = X * factor_c >> shift: that
        is local too, and an input of a small interval keeps its own precision.

        Args:
            frac_bits: f, the input's fractional bits.
            out_bits: F, the result's fractional bits before its truncation.

        Returns:
            A ChannelForm, checked for headroom.

        Raises:
            HeadroomError: a channel's values on its interval do not fit the ring, or
                F is below f.
        """
        check_scales(frac_bits, out_bits)
        form = best_channel_form(self.rows, frac_bits, out_bits)
        for channel, row in enumerate(form.rows):
            check_headroom(row, f"channel {channel}: ")
        return form

    def widest_out_bits(self, frac_bits: int) -> int:
        """The largest F at which every |p| leaves `SPARE_BITS` in the ring.

        Raises:
            HeadroomError: even F = frac_bits does not fit.
        """
        return min(row.widest_out_bits(frac_bits) for row in self.rows)

    def to_json(self) -> str:
        """A JSON object with one field, the rows in order."""
        return json.dumps({"channels": [json.loads(r.to_json()) for r in self.rows]})

    def __str__(self) -> str:
        radii = self.radii
        asked = f" (degree {self.requested_degree} asked)" if self.collapsed else ""
        return (
            f"{self.channels} channels on radii {radii.min():.3g} to "
            f"{radii.max():.3g}, degree {self.degree}{asked}"
        )


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows still unread: each is what `Polynomial.from_json` takes."""

    channels: tuple[msgspec.Raw, ...]


AnyPolynomial = Polynomial | ChannelPolynomials


def polynomial_from_json(text: str) -> AnyPolynomial:
    """What `to_json` of either kind wrote.

    Raises:
        PolynomialError: not a JSON object of the expected fields and types.
    """
    try:
        rows = _DECODER.decode(text).channels
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Polynomial.from_json(text)
    if len(rows) > MAX_CHANNELS:
        raise PolynomialError(
            f"{len(rows):,} polynomials; at most {MAX_CHANNELS:,} channels are allowed"
        )
    return ChannelPolynomials(
        tuple(Polynomial.from_json(bytes(row).decode()) for row in rows)
    )


# Made here once: two threads that decode a type for the first time crash msgspec.
_DECODER = msgspec.json.Decoder(_Stored)
