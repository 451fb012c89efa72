"""The connection over which two parties agree, apart from the measured one."""

from __future__ import annotations

import json
import socket
import struct
import time
from pathlib import Path
from typing import Any

IDLE_RESTART = Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle")
_LENGTH = struct.Struct("<I")


class Control:
    """A connection between the two parties for agreement, apart from the measured one.

    Attributes:
        rank: 0 or 1.
        rtt_s: the smallest round trip seen while connecting.
        ahead_s: how far this party's clock is ahead of rank 0's; 0 on one machine.
    """

    def __init__(self, rank: int, address: str, port: int) -> None:
        self.rank = rank
        if rank == 0:
            with socket.create_server((address, port)) as listener:
                listener.settimeout(120)
                self._socket, _ = listener.accept()
        else:
            self._socket = _connect(address, port)
        self._socket.settimeout(600)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = [self._ping() for _ in range(5)]
        self.rtt_s, ahead = min(trips)
        if self.swap(_boot_identity()) == _boot_identity():
            ahead = 0.0  # one clock; the estimate would only add noise
        self.ahead_s = ahead if rank == 1 else 0.0

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def send(self, value: Any) -> None:
        """Send anything JSON can hold."""
        text = json.dumps(value).encode()
        self._socket.sendall(_LENGTH.pack(len(text)) + text)

    def receive(self) -> Any:
        """Receive what the other party sent."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return json.loads(self._read(length))

    def swap(self, value: Any) -> Any:
        """Send a value and receive the other party's; also a barrier."""
        self.send(value)
        return self.receive()

    def start_together(self) -> float:
        """Wait until both parties are here; both return at the same moment.

        Returns: that moment on this party's `time.monotonic`.
        """
        self.swap(None)
        if self.rank == 0:
            start = time.monotonic() + self.rtt_s + 0.01
            self.send(start)
        else:
            start = self.receive() + self.ahead_s
        while (left := start - time.monotonic()) > 0:
            if left > 0.002:
                time.sleep(left - 0.001)
        return start

    def silence_s(self) -> float:
        """How long a connection has to be silent until TCP starts as slowly as it can.

        The kernel halves the window for each retransmission timeout of silence, about
        two round trips and 0.2 s: seven of them turn a thousand segments into the ten
        that a new connection has. No time at all where it keeps the window (`--warm`),
        or where a slow start costs less than a millisecond or so.
        """
        if self.rtt_s < 1e-3 or IDLE_RESTART.read_text().strip() == "0":
            return 0.0
        return 7 * (2 * self.rtt_s + 0.2)

    def _ping(self) -> tuple[float, float]:
        """One round trip: its seconds and how far this clock is ahead of the other."""
        if self.rank == 1:
            sent = time.monotonic()
            self.send(sent)
            theirs = self.receive()
            back = time.monotonic()
            self.send(back - sent)
            return back - sent, (sent + back) / 2 - theirs
        self.receive()
        self.send(time.monotonic())
        return self.receive(), 0.0

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self._socket.recv(length - len(data))
            if not part:
                raise ConnectionError(f"party {1 - self.rank} is gone")
            data += part
        return bytes(data)


def _connect(address: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 120
    while True:
        try:
            return socket.create_connection((address, port), timeout=30)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _boot_identity() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()
