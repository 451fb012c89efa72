"""The protocol table, its settings, and `polyval`, which runs one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import crypten
import crypten.communicator as comm
from crypten.mpc import MPCTensor
from omegaconf import OmegaConf

from ..cost import Cost
from ..errors import ProtocolError, RangeError, WorldSizeError
from ..polynomial import AnyPolynomial, Form
from . import truncation
from .beaver import BEAVER
from .espn import ESPN
from .opened_mask import OPENED_MASK
from .protocol import Protocol
from .shares import shared

# Settings, estimates and benchmarks read this table; a protocol enters it here.
PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (ESPN, OPENED_MASK, BEAVER)}
TRUNCATIONS = ("local", "exact")
# local truncation fails with this probability, 2**-29, per element of magnitude 1.
FAILURE_BITS = 29
_FIELDS = ("protocol", "truncation", "failure_bits")

crypten.cfg.config = OmegaConf.merge(
    crypten.cfg.config,
    {"espn": {"protocol": "espn", "truncation": "local", "failure_bits": FAILURE_BITS}},
)


@dataclass(frozen=True)
class Settings:
    """How activations are evaluated: see `settings`."""

    protocol: Protocol
    truncation: str
    failure_bits: int

    def form(self, polynomial: AnyPolynomial, frac_bits: int, world_size: int) -> Form:
        """The integers for one input scale; F follows from the truncation."""
        if self.exact(world_size):
            return polynomial.ring_form(
                frac_bits=frac_bits, out_bits=polynomial.widest_out_bits(frac_bits)
            )
        return polynomial.ring_form(
            frac_bits=frac_bits, out_bits=64 - self.failure_bits
        )

    def exact(self, world_size: int) -> bool:
        """Local truncation is for two parties; more always truncate exactly."""
        return self.truncation == "exact" or world_size > 2

    def cost(
        self,
        polynomial: AnyPolynomial,
        elements: int,
        *,
        frac_bits: int = 16,
        world_size: int = 2,
    ) -> Cost:
        """Declared cost per party of one activation layer of `elements` values."""
        if world_size == 1:
            return Cost()
        form = self.form(polynomial, frac_bits, world_size)
        total = self.protocol.cost(form, elements)
        if self.exact(world_size):
            total += truncation.exact_cost(form.out_bits - frac_bits, elements)
        if world_size > 2:
            total += truncation.exact_cost(form.shift, elements)
        return total


def current_settings() -> Settings:
    """The protocol, truncation and failure target in `crypten.cfg.espn`, checked.

    Raises:
        ProtocolError: an unknown protocol or truncation, or a failure target outside
            1 to 48 bits.
    """
    chosen = crypten.cfg.espn
    return _checked(**{name: chosen[name] for name in _FIELDS})


def _checked(protocol: str, truncation: str, failure_bits: int) -> Settings:
    if protocol not in PROTOCOLS:
        raise ProtocolError(
            f"protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}"
        )
    if truncation not in TRUNCATIONS:
        raise ProtocolError(
            f"truncation {truncation!r}: choose one of {', '.join(TRUNCATIONS)}"
        )
    if not 1 <= failure_bits <= 48:
        raise ProtocolError(
            f"failure_bits {failure_bits!r}: local truncation fails with "
            "probability 2**-failure_bits; choose 1 to 48"
        )
    return Settings(PROTOCOLS[protocol], truncation, int(failure_bits))


@contextmanager
def settings(
    *,
    protocol: str | None = None,
    truncation: str | None = None,
    failure_bits: int | None = None,
) -> Iterator[Settings]:
    """Choose how activations are evaluated inside a `with` block.

    The same can be set for good in `crypten.cfg.espn`. All parties must agree.

    Args:
        protocol: "espn" (two parties, fewest offline elements), "opened_mask" (any
            number, fewest bytes) or "beaver" (CrypTen's tree, a baseline).
        truncation: "local" (no extra round, fails with probability 2**-failure_bits per
            element of magnitude 1) or "exact" (one more round, the output never fails).
        failure_bits: larger is safer and coarser; 29 unless set.

    Raises:
        ProtocolError: an unknown name or a failure target out of range.
    """
    given = {
        "protocol": protocol,
        "truncation": truncation,
        "failure_bits": failure_bits,
    }
    before = {name: crypten.cfg.espn[name] for name in _FIELDS}
    chosen: dict[str, Any] = {
        n: before[n] if value is None else value for n, value in given.items()
    }
    result = _checked(**chosen)
    changed = [name for name in _FIELDS if chosen[name] != before[name]]
    # In place, which takes microseconds: cfg.temp_override copies the whole
    # configuration, milliseconds at every activation. Read anew at the end: the block
    # may have replaced the configuration.
    try:
        for name in changed:
            crypten.cfg.espn[name] = chosen[name]
        yield result
    finally:
        for name in changed:
            crypten.cfg.espn[name] = before[name]


def polyval(x: MPCTensor, polynomial: AnyPolynomial) -> MPCTensor:
    """[p(x)] of a shared tensor, by the protocol and truncation in `crypten.cfg.espn`.

    1. Bring the shares of x to the powers' scale: multiply, truncate.
    2. Evaluate the polynomial in the ring, one round (log2 n for beaver).
    3. Truncate the result back to the scale of x; one more round if exact.

    Args:
        x: arithmetic sharing, any shape, at its encoder's scale 2**f.
        polynomial: public; ChannelPolynomials, with channels the second axis of x.

    Returns:
        MPCTensor of the same shape and scale.

    Cost: `current_settings().cost(polynomial, elements)`.

    Error: at most the ring form's `error_bound` plus one unit of 2**-f for x in the
    interval, its channel's where each has one. The input's local truncation fails with
    probability below |x| 2**(f - 52), times the largest radius over its channel's where
    channels have polynomials of their own; local truncation of the output as
    `truncation.failure_probability` says, exact never.

    Raises:
        ProtocolError, WorldSizeError: before anything is sent.
        PolynomialError: x has another number of channels; nothing is sent.
        HeadroomError: the polynomial does not fit the ring at this scale.
    """
    if not isinstance(x, MPCTensor) or x.ptype != crypten.mpc.arithmetic:
        raise RangeError(
            "polyval needs an arithmetically shared MPCTensor, not "
            f"{type(x).__name__}; share the input with crypten.cryptensor(x, src=rank)"
        )
    chosen = current_settings()
    world_size = comm.get().get_world_size()
    if not chosen.protocol.accepts(world_size):
        raise WorldSizeError(
            f"protocol {chosen.protocol.name!r} was started with {world_size} parties "
            f"and runs with {chosen.protocol.world_sizes}; start two, or choose "
            "protocol='opened_mask'"
        )
    frac_bits = x.encoder._precision_bits
    form = chosen.form(polynomial, frac_bits, world_size)
    share = x.share.data  # on a GPU without CrypTen's wrapper
    form.check(tuple(share.shape))
    # Shares of more than two parties pass the ring's end several times.
    reduce = truncation.exact if world_size > 2 else truncation.local
    powers_input = reduce(form.scaled(share), form.shift)
    result = chosen.protocol.evaluate(share, powers_input, form)
    shrink = truncation.exact if chosen.exact(world_size) else truncation.local
    result = shrink(result, form.out_bits - frac_bits)
    return shared(result, frac_bits=frac_bits)
