"""Which engine computes a converted network, and how: given once, to `convert`."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ProtocolError
from .masked.planning import HEADROOM, ring_bits
from .protocols import PROTOCOLS, settings
from .protocols.noise import checked_noise_bits

MASKED = "masked"


@dataclass(frozen=True)
class Masked:
    """The masked engine: exact truncation, an offline phase, a fraction of the bytes.

    Args:
        precision: "compact", "fast" or "high", as `make_plan` says, wider where the
            network needs it, as its plan then says; or the bits, 20 to 56.
        headroom: how far beyond the calibration inputs values may go.

    Raises:
        PlanError: an unknown precision, or a headroom below 1.
    """

    precision: str | int = "fast"
    headroom: float = HEADROOM

    def __post_init__(self) -> None:
        ring_bits(self.precision, self.headroom)


@dataclass(frozen=True)
class CrypTen:
    """CrypTen's engine with one of this package's protocols.

    Args:
        protocol, truncation, failure_bits: as in `settings`; what crypten.cfg.espn says
            when None.
        noise_bits: noise on the logits before they are revealed, see
            `protocols.noise.with_noise`; 0 adds none.

    Raises:
        ProtocolError: an unknown name, or a failure target out of range.
        RangeError: noise_bits is none.
    """

    protocol: str | None = None
    truncation: str | None = None
    failure_bits: int | None = None
    noise_bits: int = 0

    def __post_init__(self) -> None:
        if self.protocol not in (None, *PROTOCOLS):
            names = ", ".join([*PROTOCOLS, MASKED])
            raise ProtocolError(f"protocol {self.protocol!r}: choose one of {names}")
        checked_noise_bits(self.noise_bits)
        with settings(truncation=self.truncation, failure_bits=self.failure_bits):
            pass


Engine = Masked | CrypTen


def chosen_engine(
    engine: Engine | None, protocol: str | None, truncation: str | None
) -> Engine | None:
    """The engine that was given whole or by names; None leaves it open.

    Raises:
        TypeError: both were given.
        ProtocolError: an unknown name.
    """
    if engine is not None:
        if (protocol, truncation) != (None, None):
            raise TypeError("give engine=, or protocol= and truncation=, not both")
        return engine
    if protocol == MASKED:
        with settings(truncation=truncation):
            return Masked()
    if protocol is None and truncation is None:
        return None
    return CrypTen(protocol, truncation)
