"""A path between parties on this machine, and parties started on it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from .forwarder import SHORT_DELAY_S
from .probe import exchange, free_port
from .profile import PathError, Profile
from .system import DEVICE, worker


class PartyError(PathError):
    """A party ended with an error, was killed, or ran out of time."""


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
        idle_restart: whether TCP slow-starts again after an idle time, as kernels do
            unless told otherwise; if not, `label` says "(warm)".
    Raises: PathError, on entry, when the path cannot be set up.

    Attributes, after entry:
        kind: "loopback", or "tcp" in namespaces.
        addresses: the parties' IPv4 addresses.
        congestion: TCP's congestion control on the path; "" on loopback.
        label: the profile's name, with "(warm)" where it applies.
    """

    def __init__(
        self,
        profile: Profile | str,
        *,
        parties: int = 2,
        idle_restart: bool = True,
    ) -> None:
        self.profile = Profile.parse(profile) if isinstance(profile, str) else profile
        if not 2 <= parties <= 8:
            raise PathError(f"a path joins 2 to 8 parties, not {parties}")
        self.parties = parties
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
        return name if self.idle_restart or self.kind != "tcp" else f"{name} (warm)"

    # ------------------------------------------------------------ entry and exit

    def __enter__(self) -> Path:
        if self.profile.is_loopback:
            return self
        try:
            self._start_forwarder()
            self._calibrate()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_forwarder(self) -> None:
        rate = self.profile.mbit or 0.0
        self._forwarder = subprocess.Popen(
            worker("forwarder", self.parties, rate, int(self.idle_restart)),
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
                "SYS_ADMIN --device /dev/net/tun), or measure on loopback alone"
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
            trip = exchange(self, trips)
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
        process = subprocess.Popen(
            worker("enter", here, user, network, *command),
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
