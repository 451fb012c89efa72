"""Does a path keep what was set? Its round trip and rate, as TCP sees them."""

from __future__ import annotations

import dataclasses

from .path import Path
from .probe import exchange, probe
from .profile import Profile


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """Set and measured figures of a path; rates in Mbit/s of IP packets."""

    profile: Profile
    rtt_ms: float
    rtt_max_ms: float
    mbit: float

    @property
    def passed(self) -> bool:
        """Round trip within 5 % or 0.05 ms of the set one, rate within 5 %."""
        wanted, rate = self.profile.rtt_ms, self.profile.mbit
        if abs(self.rtt_ms - wanted) > max(0.05 * wanted, 0.05):
            return False
        return rate is None or abs(self.mbit - rate) <= 0.05 * rate

    def __str__(self) -> str:
        rate = self.profile.mbit
        wanted = "no limit" if rate is None else f"{rate:g}"
        return (
            f"{self.profile.name}: round trip set {self.profile.rtt_ms:g} ms, measured "
            f"{self.rtt_ms:.3f} (max {self.rtt_max_ms:.3f}); rate set {wanted} Mbit/s, "
            f"measured {self.mbit:.1f} (TCP payload {self.mbit * 1448 / 1500:.1f})"
        )


def self_test(path: Path, *, seconds: float = 3.0, trips: int = 0) -> SelfTest:
    """Round trip and rate of an open path, as TCP sees them.

    Args:
        path: an entered Path.
        seconds: length of the bulk transfer that is timed, after half as much to
            get up to speed.
        trips: exchanges of one byte (0: as many as fit about two seconds).
    """
    rtt_ms = path.profile.rtt_ms
    trips = trips or max(10, min(1000, int(2000 / max(rtt_ms, 0.5))))
    trip = exchange(path, trips)
    bulk = probe(path, ("sink", "source"), seconds + rtt_ms / 50, 60 + 4 * seconds)
    rate = bulk["bytes_per_s"] * 8e-6 * 1500 / 1448
    return SelfTest(path.profile, trip.median_s * 1e3, trip.max_s * 1e3, rate)
