"""The process that carries packets between the parties, delayed and paced."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Sequence

from .system import (
    CLONE_NEWNET,
    PR_SET_TIMERSLACK,
    call,
    new_namespace,
    new_user_namespace,
)

QUEUE_BYTES = 64 << 20
SHORT_DELAY_S, SPIN_S = 1e-3, 2e-4
VNET_HEADER = struct.Struct("=BBHHHH")  # flags, kind, header, segment, two offsets


def _wire_bytes(packet: bytes) -> int:
    """Bytes of the IP packets that `packet`, perhaps many segments, stands for."""
    _, kind, header, segment, _, _ = VNET_HEADER.unpack_from(packet)
    size = len(packet) - VNET_HEADER.size
    if kind == 0 or segment == 0:
        return size
    return size + (-(-(size - header) // segment) - 1) * header


class _Pipe:
    """One direction between two parties: a line of set rate, then a set delay."""

    def __init__(self, out: int) -> None:
        self.out = out
        self.free_at = 0.0  # when the line will have sent all it was given
        self.queue: collections.deque[tuple[float, bytes]] = collections.deque()
        self.packets = self.wire_bytes = self.dropped = 0


def _forward(devices: Sequence[int], bits_per_s: float | None) -> None:
    """Carry packets between `devices` until standard input is closed.

    A line of text on standard input, `delay SECONDS`, changes the delay; each is
    answered with a line of counts.
    """
    pipes = {
        (source, target): _Pipe(devices[target])
        for source in range(len(devices))
        for target in range(len(devices))
        if source != target
    }
    rank_of = {device: rank for rank, device in enumerate(devices)}
    control = sys.stdin.fileno()
    watched = [control, *devices]
    per_byte = 8 / bits_per_s if bits_per_s else 0.0
    delay_s = 0.0
    now = time.monotonic
    while True:
        due = min((p.queue[0][0] for p in pipes.values() if p.queue), default=None)
        timeout = None if due is None else max(0.0, due - now())
        if timeout is not None and delay_s < SHORT_DELAY_S and timeout < SPIN_S:
            timeout = 0.0  # a timer would be late by more than the delay is long
        for ready in select.select(watched, [], [], timeout)[0]:
            if ready == control:
                order = os.read(control, 4096).split()
                if not order:
                    return
                delay_s = float(order[1])
                counts = {
                    f"{source}>{target}": [p.packets, p.wire_bytes, p.dropped]
                    for (source, target), p in pipes.items()
                }
                print(json.dumps(counts), flush=True)
                continue
            for _ in range(16):
                try:
                    packet = os.read(ready, 65_600)
                except BlockingIOError:
                    break
                # IPv4 to 10.x.x.(rank + 1); anything else leads nowhere
                if packet[10] >> 4 != 4:
                    continue
                pipe = pipes.get((rank_of[ready], packet[29] - 1))
                if pipe is None:
                    continue
                size, arrived = _wire_bytes(packet), now()
                waiting = max(0.0, pipe.free_at - arrived)
                if per_byte and waiting / per_byte > QUEUE_BYTES:
                    pipe.dropped += 1
                    continue
                pipe.free_at = arrived + waiting + size * per_byte
                pipe.queue.append((pipe.free_at + delay_s, packet))
                pipe.packets += 1
                pipe.wire_bytes += size
        moment = now()
        for pipe in pipes.values():
            while pipe.queue and pipe.queue[0][0] <= moment:
                with contextlib.suppress(OSError):  # device down: a lost packet
                    os.write(pipe.out, pipe.queue.popleft()[1])


def _kill_inhabitants(namespaces: Sequence[int]) -> None:
    """End every process that still lives in one of `namespaces`."""
    keys = {(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in namespaces}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            status = os.stat(f"/proc/{name}/ns/net")
            if (status.st_dev, status.st_ino) in keys:
                os.kill(int(name), signal.SIGKILL)


def forwarder_main(parties: int, mbit: float, idle_restart: str) -> int:
    """Body of the forwarder process: set up, say so in one line of JSON, forward.

    It ends when standard input is closed, that is when its parent ends in whatever
    way, and then ends all that still runs in the namespaces.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        user = bool(os.geteuid())
        if user:
            new_user_namespace()
        made = [
            new_namespace(f"10.77.0.{rank + 1}", idle_restart)
            for rank in range(parties)
        ]
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as handle:
        congestion = handle.read().strip()
    if not user:
        call("setns", home, CLONE_NEWNET)
    namespaces = [namespace for namespace, _ in made]
    with contextlib.suppress(OSError):  # wake at the microsecond, ahead of the parties
        call("prctl", PR_SET_TIMERSLACK, 1, 0, 0, 0)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    answer = {"user": user, "namespaces": namespaces, "congestion": congestion}
    print(json.dumps(answer), flush=True)
    try:
        _forward([device for _, device in made], mbit * 1e6 or None)
    finally:
        _kill_inhabitants(namespaces)
    return 0
