"""What a private computation costs: rounds, bytes, seconds, and its time elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from .errors import EspnError

RING_BYTES = 8
PAYLOAD = 1448 / 1500  # TCP payload of an Ethernet packet, with time stamps
GLOO_DELAYS = 4  # its all_reduce of two ranks makes two round trips
_FIRST_WINDOW = 10 * 1448  # bytes TCP sends before it has seen an acknowledgement


@dataclass(frozen=True)
class Cost:
    """Cost of one phase for one party.

    Args:
        rounds: sequential messages: each waits for the one before.
        bytes_sent: payload bytes this party sends.
        offline_elements: ring elements of 8 bytes the dealer has to send; what a seed
            expands to is free.
        seconds: measured wall-clock time; 0 for a declared cost.
    """

    rounds: int = 0
    bytes_sent: int = 0
    offline_elements: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.rounds + other.rounds,
            self.bytes_sent + other.bytes_sent,
            self.offline_elements + other.offline_elements,
            self.seconds + other.seconds,
        )

    def seconds_at(self, *, rtt_s: float, bits_per_second: float) -> float:
        """Predicted seconds when each round takes a one-way delay and bytes queue.

        Args:
            rtt_s: round-trip time in seconds; both parties send at once, so a round
                takes half of it.
            bits_per_second: what the link carries in one direction.

        Raises:
            EspnError: a negative delay or a rate that is not positive.
        """
        if rtt_s < 0 or bits_per_second <= 0:
            raise EspnError(
                f"rtt_s={rtt_s}, bits_per_second={bits_per_second}: the delay must not "
                "be negative and the rate must be positive"
            )
        wire = 8 * self.bytes_sent / bits_per_second
        return self.seconds + self.rounds * rtt_s / 2 + wire


@dataclass(frozen=True)
class SessionCost(Cost):
    """What an inference cost; the fields of Cost are the client's online phase.

    Args:
        peer_bytes_sent: online bytes the server sends.
        offline: the client's part of the offline phase.
        peer_offline_bytes_sent: bytes the server sends offline: its masked weights.
        dealer_bytes_sent: bytes the dealer sends offline.
        corrections: to whom, "server" or "client".
    """

    peer_bytes_sent: int = 0
    offline: Cost = field(default_factory=Cost)
    peer_offline_bytes_sent: int = 0
    dealer_bytes_sent: int = 0
    corrections: str = "server"


@dataclass(frozen=True)
class Traffic:
    """What two parties send each other in one phase, and how.

    Args:
        rounds: sequential messages.
        bytes_sent: payload of rank 0 and of rank 1.
        alternating: one message after another and paced, as in the masked engine's
            sessions; else a message travels both ways at once, as CrypTen's openings.
        delays: one-way delays a round takes: 1, or GLOO_DELAYS.
    """

    rounds: int
    bytes_sent: tuple[int, int]
    alternating: bool
    delays: int = 1

    def seconds_at(
        self, *, rtt_s: float, bits_per_second: float, seconds: float = 0.0
    ) -> float:
        """Predicted seconds: computation, delays, and the bytes at the line's rate.

        Args:
            rtt_s: round-trip time in seconds.
            bits_per_second: rate of the line each way, TCP's headers included.
            seconds: of computation.

        Raises:
            EspnError: as `Cost.seconds_at`.
        """
        total = sum if self.alternating else max
        cost = Cost(
            rounds=self.delays * self.rounds,
            bytes_sent=total(self.bytes_sent),
            seconds=seconds,
        )
        return cost.seconds_at(rtt_s=rtt_s, bits_per_second=PAYLOAD * bits_per_second)

    def slow_start_s(self, *, rtt_s: float, bits_per_second: float) -> float:
        """Seconds to add when the connection was silent before.

        TCP then doubles its window once a round trip, from ten packets to what fills
        the path or holds all there is to send. Paced messages keep their rate.
        """
        if self.alternating or rtt_s <= 0:
            return 0.0
        window = min(bits_per_second * rtt_s / 8, max(self.bytes_sent))
        return rtt_s * max(0, math.floor(math.log2(max(1, window) / _FIRST_WINDOW)))


@dataclass
class Measurement:
    """Filled by `measure` when its block ends."""

    cost: Cost = field(default_factory=Cost)


@contextmanager
def measure() -> Iterator[Measurement]:
    """Count rounds, bytes sent and seconds of a block through CrypTen's communicator.

    CrypTen's counter adds what is sent and what is received. Every protocol here and
    CrypTen's own openings send as much as they receive, so half of it was sent. A
    dealer asked inside the block (provider TTP) is counted too: prepare tuples before.

    Raises:
        EspnError: CrypTen is not initialised.
    """
    import crypten
    import crypten.communicator as comm

    if not comm.is_initialized():
        raise EspnError(
            "measure() needs a running party: call crypten.init() or start the parties "
            "with crypten.mpc.context.run_multiprocess"
        )
    communicator = comm.get()
    measurement = Measurement()
    with crypten.cfg.temp_override({"communicator.verbose": True}):
        rounds, received = communicator.comm_rounds, communicator.comm_bytes
        start = time.perf_counter()
        yield measurement
        measurement.cost = replace(
            measurement.cost,
            rounds=communicator.comm_rounds - rounds,
            bytes_sent=round((communicator.comm_bytes - received) / 2),
            seconds=time.perf_counter() - start,
        )
