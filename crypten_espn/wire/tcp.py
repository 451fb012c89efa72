"""What this package asks of TCP beside what a socket does by itself."""

from __future__ import annotations

import contextlib
import socket

# Seconds until a peer that vanished without a word is noticed while nothing is under
# way: idle, then probes apart, and how many.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


def tune(sock: socket.socket) -> None:
    """Send at once, and notice a host that vanished; nothing on other sockets."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    # Kernel buffers are left alone: setting them would switch off autotuning, which a
    # long fast link needs.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def pace(sock: socket.socket) -> None:
    """Keep TCP's speed through one inference, where the kernel offers BBR.

    For messages that alternate: after a pause, loss-based congestion control starts
    slowly again, which on a long path costs a round trip or more for every message.
    BBR does not; begun afresh for each inference, it does not stop either for its look
    at the round trip, 0.2 s every ten seconds. Not for exchanges, where both directions
    fill at once and pacing delays them.
    """
    with contextlib.suppress(OSError, AttributeError):
        option = socket.TCP_CONGESTION
        for name in (b"bbr", b"reno", b"bbr"):  # the first fails without BBR
            sock.setsockopt(socket.IPPROTO_TCP, option, name)
