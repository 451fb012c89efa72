"""What a sidecar puts up with."""

from __future__ import annotations

from dataclasses import dataclass

from ..serving.link import check_positive


@dataclass(frozen=True)
class SidecarLimits:
    """What a sidecar puts up with; what exceeds it is refused by name.

    Args:
        batch: inputs of one request.
        waiting: requests that wait for their turn.
        held_bytes: requests' bodies, all together.
        image_bytes: an image file.
        request_s: seconds for a request to arrive.
        connections: of applications.
        grace_s: seconds for what is under way once it is told to stop.
    """

    batch: int = 16
    waiting: int = 64
    held_bytes: int = 1 << 29
    image_bytes: int = 1 << 25
    request_s: float = 30.0
    connections: int = 256
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        check_positive(self)
