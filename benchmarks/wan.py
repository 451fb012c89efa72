"""A network path on one machine: real TCP under a set delay and bandwidth.

Every party gets a network namespace of its own with one TUN device in it. A
forwarder process joins the devices: it reads what the kernel's TCP sends, holds
each packet until a line of the set rate would have carried it and the set delay
has passed, and writes it to the receiver's device. What is measured is therefore
the kernel's own TCP: slow start, windows, slow start after idle, acknowledgements.

    with Path("wan") as path:
        results = path.run([[sys.executable, "party.py", "--rank", str(rank),
                             "--server", path.addresses[0]] for rank in range(2)])

What the path does and does not model:
  * Each ordered pair of parties has a pipe of its own, with the set one-way delay
    (half the round trip) and the set rate, counted in bytes of IP packets of at most
    1,500 bytes. TCP payload is 1448/1500 of that.
  * Nothing is lost: the queue before the line holds 64 MiB, more than TCP's windows
    let anyone send. Bulk traffic thus never pays for retransmissions.
  * The kernel hands over up to 64 KiB at a time (segmentation offload), so one Python
    process carries a gigabit; the segments inside still count 1,448 bytes each, in
    the windows as on the line, and arrive together when the last one would.
  * What the forwarder itself needs is measured on entry and taken off the delay, so
    that a one-byte TCP exchange takes the set round trip.
  * Congestion control is cubic, Linux's default, or reno where the kernel lets only
    its first namespace have cubic: on a path without loss they differ little. The
    machine's own choice is not taken: bbr would spread each burst over a round trip.
    All other settings are the kernel's, slow start after idle among them: a
    connection that was silent for about a round trip and 0.2 s starts over with ten
    segments a round trip. `idle_restart=False` turns that off, as an administrator
    can with net.ipv4.tcp_slow_start_after_idle=0, and says so in the label.

Needs root, or a kernel that lets users make namespaces, and /dev/net/tun. No
program is called and no name is given out: namespaces are anonymous and devices
are not persistent, so the kernel removes both when the last process in them ends,
however it ends. Where they cannot be had, `Path(profile, fallback=True)` falls back
to a sleep per message over loopback, and says so in its label.

    python -m benchmarks.wan --selftest --profile wan
    python -m benchmarks.wan --selftest --profile 50ms,20mbit
    python -m benchmarks.wan --profile metro -- python3 my_party.py   # run per rank
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import json
import os
import re
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_TIMERSLACK = 1, 29
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU = 0x8916, 0x891C, 0x8922
SIOCSIFTXQLEN = 0x8943

DEVICE = "path0"
MTU = 1500
CONGESTION_CONTROL = ("cubic", "reno")
QUEUE_BYTES = 64 << 20
SHORT_DELAY_S, SPIN_S = 1e-3, 2e-4
VNET_HEADER = struct.Struct("=BBHHHH")  # flags, kind, header, segment, two offsets
SLEEP_VARIABLE = "CRYPTEN_ESPN_SLEEP_MODEL"


class PathError(RuntimeError):
    """The path cannot be set up, or its profile is not understood."""


class PartyError(PathError):
    """A party ended with an error, was killed, or ran out of time."""


# --------------------------------------------------------------------- profiles


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
}


# ------------------------------------------------- system calls Python has no name for


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc(), name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it ends."""
    _call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _interface(request: int, name: str, payload: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        packed = struct.pack("16s24s", name.encode(), payload)
        return fcntl.ioctl(handle, request, packed)[16:]


def _set_up(name: str) -> None:
    flags = struct.unpack("=h", _interface(SIOCGIFFLAGS, name, b"")[:2])[0]
    _interface(SIOCSIFFLAGS, name, struct.pack("=h", flags | IFF_UP))


def _sysctl(name: str, value: str) -> None:
    with contextlib.suppress(OSError), open(f"/proc/sys/net/{name}", "w") as handle:
        handle.write(value)


# -------------------------------------------------------------------- the forwarder


def _new_namespace(address: str, idle_restart: str) -> tuple[int, int]:
    """A namespace with one TUN device: its descriptor and the device's."""
    _call("unshare", CLONE_NEWNET)
    namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        raise OSError(error.errno, f"/dev/net/tun: {error.strerror}") from error
    flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
    fcntl.ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    _sysctl("ipv6/conf/all/disable_ipv6", "1")
    for name in reversed(CONGESTION_CONTROL):  # the last one that is allowed stays
        _sysctl("ipv4/tcp_congestion_control", name)
    _sysctl("ipv4/tcp_no_metrics_save", "1")
    _sysctl("ipv4/tcp_slow_start_after_idle", idle_restart)
    for request, host in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.0")):
        packed = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(host))
        _interface(request, DEVICE, packed)
    _interface(SIOCSIFMTU, DEVICE, struct.pack("=i", MTU))
    with contextlib.suppress(OSError):  # 500 packets do, where only root may ask
        _interface(SIOCSIFTXQLEN, DEVICE, struct.pack("=i", 10_000))
    _set_up("lo")
    _set_up(DEVICE)
    return namespace, device


def _new_user_namespace() -> None:
    """Root in a namespace of its own, for users who are not root outside."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)


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


def _forwarder_main(parties: int, mbit: float, idle_restart: str) -> int:
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
            _new_user_namespace()
        made = [
            _new_namespace(f"10.77.0.{rank + 1}", idle_restart)
            for rank in range(parties)
        ]
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as handle:
        congestion = handle.read().strip()
    if not user:
        _call("setns", home, CLONE_NEWNET)
    namespaces = [namespace for namespace, _ in made]
    with contextlib.suppress(OSError):  # wake at the microsecond, ahead of the parties
        _call("prctl", PR_SET_TIMERSLACK, 1, 0, 0, 0)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    answer = {"user": user, "namespaces": namespaces, "congestion": congestion}
    print(json.dumps(answer), flush=True)
    try:
        _forward([device for _, device in made], mbit * 1e6 or None)
    finally:
        _kill_inhabitants(namespaces)
    return 0


def _enter_main(parent: int, user: str, network: str, command: list[str]) -> int:
    """Become `command` inside the namespaces behind the given paths."""
    _die_with_parent(parent)
    for path, kind in ((user, CLONE_NEWUSER), (network, CLONE_NEWNET)):
        if path != "-":
            descriptor = os.open(path, os.O_RDONLY)
            _call("setns", descriptor, kind)
            os.close(descriptor)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
    return 127


# ----------------------------------------------------------------------- the path


@dataclasses.dataclass(frozen=True)
class PartyResult:
    """What one party left behind: exit status, standard output and error."""

    returncode: int
    stdout: str
    stderr: str


class Path:
    """A network path between parties on this machine, as a context manager.

    Args:
        profile: a Profile, or what Profile.parse accepts.
        parties: how many ends the path has (2, or 3 with the dealer).
        fallback: without the right to make namespaces, sleep per message over
            loopback instead of failing; `label` says so.
        idle_restart: whether TCP slow-starts again after an idle time, as kernels do
            unless told otherwise; if not, `label` says "(warm)".
    Raises: PathError, on entry, when the path cannot be set up.

    Attributes, after entry:
        kind: "loopback", "tcp" (namespaces) or "sleep" (the fallback).
        addresses: the parties' IPv4 addresses.
        congestion: TCP's congestion control on the path; "" on loopback.
        label: the profile's name, with "(sleep model)" or "(warm)" where it applies.
    """

    def __init__(
        self,
        profile: Profile | str,
        *,
        parties: int = 2,
        fallback: bool = False,
        idle_restart: bool = True,
    ) -> None:
        self.profile = Profile.parse(profile) if isinstance(profile, str) else profile
        if not 2 <= parties <= 8:
            raise PathError(f"a path joins 2 to 8 parties, not {parties}")
        self.parties = parties
        self.fallback = fallback
        self.idle_restart = idle_restart
        self.kind = "loopback"
        self.addresses = ("127.0.0.1",) * parties
        self.overhead_s = self.delay_s = 0.0
        self.congestion = ""
        self._forwarder: subprocess.Popen[str] | None = None
        self._namespaces: list[str] = []
        self._user = "-"
        self._running: list[subprocess.Popen[str]] = []

    @property
    def label(self) -> str:
        name = self.profile.name
        if self.kind == "sleep":
            return f"{name} (sleep model)"
        return name if self.idle_restart or self.kind != "tcp" else f"{name} (warm)"

    # ------------------------------------------------------------ entry and exit

    def __enter__(self) -> Path:
        if self.profile.is_loopback:
            return self
        try:
            self._start_forwarder()
            self._calibrate()
        except PathError as error:
            self.close()
            if not self.fallback:
                raise
            print(f"{error}\nusing the sleep model instead", file=sys.stderr)
            self.kind = "sleep"
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_forwarder(self) -> None:
        rate = self.profile.mbit or 0.0
        own = [sys.executable, "-S", os.path.abspath(__file__)]
        restart = str(int(self.idle_restart))
        order = ["--forwarder", str(self.parties), str(rate), restart]
        self._forwarder = subprocess.Popen(
            own + order,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._forwarder.stdout is not None
        answer = json.loads(self._forwarder.stdout.readline() or '{"error": "it died"}')
        if "error" in answer:
            raise PathError(
                f"no network namespaces here ({answer['error']}): run as root, with "
                "/dev/net/tun present (in a container: --cap-add NET_ADMIN --cap-add "
                "SYS_ADMIN --device /dev/net/tun), or accept the sleep-per-message "
                "model (--fallback)"
            )
        folder = f"/proc/{self._forwarder.pid}"
        self._namespaces = [f"{folder}/fd/{fd}" for fd in answer["namespaces"]]
        self._user = f"{folder}/ns/user" if answer["user"] else "-"
        self.addresses = tuple(f"10.77.0.{rank + 1}" for rank in range(self.parties))
        self.congestion = answer["congestion"]
        self.kind = "tcp"

    def _order(self, delay_s: float) -> dict[str, list[int]]:
        """Set the one-way delay; the counts per direction up to now."""
        assert self._forwarder is not None
        assert self._forwarder.stdin is not None and self._forwarder.stdout is not None
        try:
            self._forwarder.stdin.write(f"delay {delay_s:.9f}\n")
            self._forwarder.stdin.flush()
            return json.loads(self._forwarder.stdout.readline())
        except (OSError, ValueError) as error:
            raise PathError("the forwarder process is gone; start again") from error

    def _calibrate(self) -> None:
        """Set the delay such that a one-byte exchange takes the profile's round trip.

        The forwarder, and the waking of processes, cost some tens of microseconds;
        they are measured at the set delay and taken off it, again and again where
        they are a good part of it.
        """
        wanted = self.profile.rtt_ms * 1e-3
        self.delay_s = wanted / 2
        short = wanted < 4 * SHORT_DELAY_S
        trips = max(6, min(400, int(0.1 / max(wanted, 1e-9))))
        for _ in range(4 if short else 2):
            self._order(self.delay_s)
            trip = _exchange(self, trips)
            # of few trips, one on a busy machine would count for too much
            measured = trip.median_s if short else trip.min_s
            self.overhead_s = measured - 2 * self.delay_s
            self.delay_s = max(0.0, wanted - self.overhead_s) / 2
        self._order(self.delay_s)

    def counts(self) -> dict[str, list[int]]:
        """Per direction ("0>1"): packets, bytes on the line, packets dropped."""
        return self._order(self.delay_s) if self.kind == "tcp" else {}

    def close(self) -> None:
        """End the parties and the forwarder; namespaces and devices go with them."""
        self._stop(self._running)
        self._running = []
        forwarder, self._forwarder = self._forwarder, None
        if forwarder is not None:
            assert forwarder.stdin is not None and forwarder.stdout is not None
            with contextlib.suppress(OSError):
                forwarder.stdin.close()
            try:
                forwarder.wait(timeout=5)
            except subprocess.TimeoutExpired:
                forwarder.kill()
                forwarder.wait()
            forwarder.stdout.close()
        self.kind = "loopback"
        self.addresses = ("127.0.0.1",) * self.parties

    # ------------------------------------------------------------------- parties

    def environment(self, rank: int) -> dict[str, str]:
        """Environment for a party: this process's, and what torch and gloo read."""
        environment = {
            **os.environ,
            "RANK": str(rank),
            "MASTER_ADDR": self.addresses[0],
        }
        environment["WORLD_SIZE"] = str(self.parties)
        environment["GLOO_SOCKET_IFNAME"] = DEVICE if self.kind == "tcp" else "lo"
        if self.kind == "sleep":
            rate = self.profile.mbit or 0.0
            environment[SLEEP_VARIABLE] = f"{self.profile.rtt_ms},{rate}"
        return environment

    def start(
        self,
        rank: int,
        command: Sequence[str],
        *,
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start `command` as party `rank`, inside its namespace.

        It is killed when this process ends, and by close().
        """
        here = os.getpid()
        network = self._namespaces[rank] if self.kind == "tcp" else "-"
        user = self._user if self.kind == "tcp" else "-"
        own = [sys.executable, "-S", os.path.abspath(__file__)]
        process = subprocess.Popen(
            [*own, "--enter", str(here), user, network, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment(rank), **(environment or {})},
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def run(
        self,
        commands: Sequence[Sequence[str]],
        *,
        timeout: float | None = None,
        environment: dict[str, str] | None = None,
        on_line: Callable[[int, str], None] | None = None,
    ) -> list[PartyResult]:
        """Run one command per rank to its end.

        Args:
            commands: a command line for each rank, rank 0 first.
            timeout: seconds after which all are ended.
            environment: variables to add to every party's environment.
            on_line: called with (rank, line) for each line a party prints.
        Returns: each party's exit status and output.
        Raises: PartyError when a party fails, is killed, or time is up; the other
            parties are ended first, and lines printed before then were delivered.
        """
        if len(commands) > self.parties:
            raise PathError(f"{len(commands)} commands for {self.parties} parties")
        shared = {"MASTER_PORT": str(free_port()), **(environment or {})}
        processes = [
            self.start(rank, command, environment=shared)
            for rank, command in enumerate(commands)
        ]
        lines: list[list[str]] = [[] for _ in processes]
        errors: list[list[str]] = [[] for _ in processes]
        readers = []
        for rank, process in enumerate(processes):
            assert process.stdout is not None and process.stderr is not None
            for stream, sink in (
                (process.stdout, lines[rank]),
                (process.stderr, errors[rank]),
            ):
                reader = threading.Thread(
                    target=lambda stream=stream, sink=sink: sink.extend(stream),
                    daemon=True,
                )
                if stream is process.stdout and on_line is not None:
                    reader = threading.Thread(
                        target=_deliver, args=(stream, sink, rank, on_line), daemon=True
                    )
                reader.start()
                readers.append(reader)
        problem = self._await(processes, timeout)
        self._stop(processes)
        for reader in readers:
            reader.join(timeout=5)
        for process in processes:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            process.stderr.close()
            self._running.remove(process)
        results = [
            PartyResult(process.returncode, "".join(out), "".join(err))
            for process, out, err in zip(processes, lines, errors, strict=True)
        ]
        if problem is not None:
            rank, what = problem
            tail = "\n".join(results[rank].stderr.strip().splitlines()[-12:])
            raise PartyError(f"party {rank} {what}" + (f":\n{tail}" if tail else ""))
        return results

    def _await(
        self, processes: Sequence[subprocess.Popen[str]], timeout: float | None
    ) -> tuple[int, str] | None:
        """None when all ended well, else the first rank that did not and why."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            statuses = [process.poll() for process in processes]
            for rank, status in enumerate(statuses):
                if status is not None and status < 0:
                    return rank, f"was killed by {signal.Signals(-status).name}"
                if status:
                    return rank, f"ended with status {status}"
            if None not in statuses:
                return None
            if self._forwarder is not None and self._forwarder.poll() is not None:
                return 0, "was cut off: the forwarder process ended"
            if deadline is not None and time.monotonic() > deadline:
                return statuses.index(None), f"did not end within {timeout:g} s"
            time.sleep(0.01)

    @staticmethod
    def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
        """End the given parties and whatever they started."""
        for process in processes:
            with contextlib.suppress(OSError):  # the group may be gone already
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _deliver(
    stream: Iterator[str],
    sink: list[str],
    rank: int,
    on_line: Callable[[int, str], None],
) -> None:
    for line in stream:
        sink.append(line)
        on_line(rank, line)


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as handle:
        handle.bind(("127.0.0.1", 0))
        return handle.getsockname()[1]


# ------------------------------------------------------------------ the sleep model


def sleep_per_message() -> tuple[float, float] | None:
    """(seconds per message, seconds per byte) if the sleep model is asked for.

    Parties ask this once; Path sets the variable behind it only in the fallback.
    """
    text = os.environ.get(SLEEP_VARIABLE)
    if text is None:
        return None
    rtt_ms, mbit = (float(part) for part in text.split(","))
    return rtt_ms / 2e3, 8 / (mbit * 1e6) if mbit else 0.0


# -------------------------------------------------------------------- the self-test


def _connect(address: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 30
    while True:
        try:
            handle = socket.create_connection((address, port), timeout=30)
            break
        except OSError as error:
            late = time.monotonic() > deadline
            if late or error.errno not in (errno.ECONNREFUSED, errno.ETIMEDOUT):
                raise
            time.sleep(0.02)
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return handle


def _accept(address: str, port: int) -> socket.socket:
    with socket.create_server((address, port)) as listener:
        listener.settimeout(30)
        handle, _ = listener.accept()
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return handle


def _receive_rate(handle: socket.socket, warm_up: float, seconds: float) -> float:
    """Payload bytes per second received once `warm_up` seconds have passed."""
    handle.settimeout(30)
    start = time.monotonic() + warm_up
    received, first, last = 0, 0.0, 0.0
    while True:
        size = len(handle.recv(1 << 20))
        last = time.monotonic()
        if size == 0:
            raise PathError("the sender closed the connection early")
        if last < start:
            continue
        if first == 0.0:
            first = last  # the clock starts with bytes that are then not counted
            continue
        received += size
        if last - first > seconds:
            return received / (last - first)


def _probe_main(role: str, address: str, port: int, amount: float) -> int:
    """One end of the self-test; prints a line of JSON."""
    if role == "echo-server":
        with _accept(address, port) as handle:
            while data := handle.recv(64):
                handle.sendall(data)
    elif role == "echo":
        trips = []
        with _connect(address, port) as handle:
            for _ in range(int(amount)):
                start = time.perf_counter()
                handle.sendall(b"x")
                handle.recv(1)
                trips.append(time.perf_counter() - start)
        trips = trips[len(trips) // 10 :]
        figures = _Trip(statistics.median(trips), min(trips), max(trips))
        print(json.dumps(dataclasses.asdict(figures)))
    elif role == "sink":
        with _accept(address, port) as handle:
            rate = _receive_rate(handle, amount / 2, amount)
            print(json.dumps({"bytes_per_s": rate}))
    elif role == "source":
        block = bytes(1 << 20)
        with _connect(address, port) as handle, contextlib.suppress(OSError):
            while True:
                handle.sendall(block)
    return 0


def _probe(
    path: Path, roles: Sequence[str], amount: float, timeout: float
) -> dict[str, float]:
    """Run the self-test's server and client roles over `path`; their figures."""
    command = [sys.executable, "-S", os.path.abspath(__file__), "--probe"]
    where = [path.addresses[0], str(free_port()), str(amount)]
    results = path.run([[*command, role, *where] for role in roles], timeout=timeout)
    return json.loads("".join(result.stdout for result in results))


@dataclasses.dataclass(frozen=True)
class _Trip:
    """Seconds of one-byte exchanges."""

    median_s: float
    min_s: float
    max_s: float


def _exchange(path: Path, trips: int) -> _Trip:
    """Seconds of `trips` one-byte exchanges over `path`; the first tenth is dropped."""
    timeout = 60 + trips * path.profile.rtt_ms / 1e3
    return _Trip(**_probe(path, ("echo-server", "echo"), trips, timeout))


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
    trip = _exchange(path, trips)
    bulk = _probe(path, ("sink", "source"), seconds + rtt_ms / 50, 60 + 4 * seconds)
    rate = bulk["bytes_per_s"] * 8e-6 * 1500 / 1448
    return SelfTest(path.profile, trip.median_s * 1e3, trip.max_s * 1e3, rate)


# ---------------------------------------------------------------------- command line


def _print_line(rank: int, line: str) -> None:
    print(f"[{rank}] {line}", end="", flush=True)


def _self_test_main(names: Sequence[str], parties: int, fallback: bool) -> int:
    failed = False
    for name in names:
        with Path(name, parties=parties, fallback=fallback) as path:
            if path.kind == "sleep":
                print(f"{path.label}: nothing to measure, no path was made")
                failed = True
                continue
            result = self_test(path)
            verdict = "ok"
            if path.kind == "tcp" and not result.passed:
                verdict, failed = "NOT within 5 % (or 0.05 ms)", True
            print(f"{result}  [{verdict}]")
            if path.kind == "tcp":
                taken_us = path.overhead_s * 1e6
                print(
                    f"    congestion control {path.congestion}; taken off the round "
                    f"trip for the forwarder: {taken_us:.0f} us"
                )
    return int(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--forwarder"]:
        return _forwarder_main(int(given[1]), float(given[2]), given[3])
    if given[:1] == ["--enter"]:
        return _enter_main(int(given[1]), given[2], given[3], given[4:])
    if given[:1] == ["--probe"]:
        return _probe_main(given[1], given[2], int(given[3]), float(given[4]))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--profile",
        action="append",
        help=f"{', '.join(PROFILES)}, or numbers such as 50ms,20mbit (may be repeated)",
    )
    parser.add_argument("--parties", type=int, default=2, help="2, or 3 with a dealer")
    parser.add_argument(
        "--selftest", action="store_true", help="measure delay and rate of the path"
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="without namespaces, sleep per message instead of failing",
    )
    parser.add_argument(
        "command",
        nargs="*",
        help="run this per rank, with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set",
    )
    options = parser.parse_args(given)
    profiles = options.profile or ["wan"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.selftest:
            return _self_test_main(profiles, options.parties, options.fallback)
        if not options.command:
            parser.error("nothing to do: give --selftest or a command to run")
        with Path(
            profiles[0], parties=options.parties, fallback=options.fallback
        ) as path:
            print(path.profile, file=sys.stderr)
            commands = [options.command] * options.parties
            path.run(commands, on_line=_print_line)
    except PathError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
