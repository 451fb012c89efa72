"""Round trip and rate of a path, by name or by numbers."""

from __future__ import annotations

import dataclasses
import re


class PathError(RuntimeError):
    """The path cannot be set up, or its profile is not understood."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """A round trip in milliseconds and a rate in Mbit/s each way (None: unlimited)."""

    name: str
    rtt_ms: float
    mbit: float | None

    @classmethod
    def parse(cls, text: str) -> Profile:
        """The profile of that name, or one by numbers such as "50ms,20mbit".

        Args:
            text: a name from PROFILES, or a round trip ("50ms"), a rate ("20mbit",
                "1gbit") or both, joined by a comma.
        Raises: PathError when it is neither.
        """
        if text in PROFILES:
            return PROFILES[text]
        rtt_ms: float | None = None
        mbit: float | None = None
        for part in text.lower().split(","):
            match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s|mbit|gbit)\s*", part)
            if match is None:
                break
            number, unit = float(match[1]), match[2]
            if unit in ("us", "ms", "s") and rtt_ms is None:
                rtt_ms = number * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]
            elif unit in ("mbit", "gbit") and mbit is None and number > 0:
                mbit = number * {"mbit": 1.0, "gbit": 1e3}[unit]
            else:
                break
        else:
            return cls(text, rtt_ms or 0.0, mbit)
        raise PathError(
            f"unknown network profile {text!r}: use one of {', '.join(PROFILES)}, or "
            'numbers such as "50ms,20mbit" (round trip, rate each way)'
        )

    @property
    def is_loopback(self) -> bool:
        """True when nothing is to be delayed or paced."""
        return self.rtt_ms == 0 and self.mbit is None

    def __str__(self) -> str:
        rate = "no rate limit" if self.mbit is None else f"{self.mbit:g} Mbit/s"
        return f"{self.name}: {self.rtt_ms:g} ms round trip, {rate} each way"


PROFILES = {
    "loopback": Profile("loopback", 0.0, None),
    "lan": Profile("lan", 0.25, 1000.0),
    "metro": Profile("metro", 20.0, 1000.0),
    "wan": Profile("wan", 100.0, 100.0),
    "cheetah": Profile("cheetah", 40.0, 400.0),  # as Cheetah's authors assume
}
