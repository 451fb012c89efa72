"""Every exception a user of crypten-espn can catch.

Each message states what was given, what is allowed and how to fix it. All derive
from `EspnError`; those that refine a built-in kind of failure derive from that too,
so `except ValueError` keeps working.
"""

from __future__ import annotations


class EspnError(Exception):
    """Base of every error raised on purpose by this package."""


class PolynomialError(EspnError, ValueError):
    """A polynomial cannot be fitted, or its coefficients are not usable."""


class HeadroomError(EspnError, ValueError):
    """A polynomial or a layer does not fit the ring at the requested scale."""


class RangeError(EspnError, ValueError):
    """A value lies outside what the fixed-point format can represent."""


class ShapeError(EspnError, ValueError):
    """A tensor has a shape the network or protocol does not accept."""


class ProtocolError(EspnError, ValueError):
    """An unknown protocol or truncation was asked for."""


class WorldSizeError(EspnError, RuntimeError):
    """The protocol does not run with this number of parties."""


class ConversionError(EspnError, ValueError):
    """A network holds layers that cannot be converted; all are listed."""


class NothingReplacedError(ConversionError):
    """A network holds no activation of the kinds that were to be replaced."""


class DataError(EspnError, ValueError):
    """Data are missing, malformed, no real numbers, or not finite."""


class CheckpointError(EspnError, ValueError):
    """A checkpoint is damaged or belongs to another network."""


class TrainingError(EspnError, RuntimeError):
    """Training diverged or cannot be right; the message names layer and remedy."""


class RandomnessError(EspnError, RuntimeError):
    """Correlated randomness is missing, malformed or would be used twice."""


class MaterialError(RandomnessError):
    """Stored offline material is exhausted, truncated or made for another model."""


class PlanError(EspnError, ValueError):
    """A network has no plan in the ring; the message names the layer."""


class TransportError(EspnError, ValueError):
    """A certificate, a key or an address cannot be used; nothing was connected."""


class PeerError(EspnError, ConnectionError):
    """The other party is gone, silent, or does not speak our protocol."""


class PlanMismatchError(PeerError):
    """The two parties hold different plans; nothing was sent."""


class LimitError(PeerError):
    """Something exceeds what a party puts up with; others are served on.

    Args:
        text: what was given, what is allowed, and how to fix it.
        limit: which limit, a field of `Limits`; empty where the other party refused.
    """

    def __init__(self, text: str, limit: str = "") -> None:
        super().__init__(text)
        self.limit = limit


class IdleError(LimitError):
    """A connection asked for nothing for too long; connect again."""


class QuotaError(PeerError):
    """A client has had as many inferences as the server allows it in a day."""


class RevokedError(PeerError):
    """A certificate is on the list of those that are no longer accepted."""


class ClosingError(PeerError):
    """The other party is shutting down; connect again later."""


class DegreeCollapsedWarning(UserWarning):
    """The best fit at these fractional bits has a lower degree than was asked for."""


class CalibrationWarning(UserWarning):
    """What calibration could not learn, or not bound, and went on without."""
