"""What runs inside each party: a common start, CrypTen over two channels, samples.

The parent process starts this code once per rank and network. The parties agree over
a control connection of their own, so what is measured is not warmed up by it; rank 0
prints one line of JSON per sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

import crypten_espn.correlated  # repairs CrypTen before it is imported, below
import crypten_espn.wire.crypten

from . import wan
from .harness import Results, Row, Skipped, Spread, system_name

MARK = "SAMPLE "
LONG_RUN_S = 10.0  # a run this long needs no warm-up
FILL_S, MANY = 12.0, 41  # short ones are repeated for so long, or so many times
IDLE_RESTART = Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle")
_LENGTH = struct.Struct("<I")


# ------------------------------------------------------------- the control connection


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


# -------------------------------------------------------------------------- systems


@dataclasses.dataclass(frozen=True)
class Result:
    """What one online run gives, apart from its time.

    Args:
        rounds: sequential messages.
        bytes_sent: by this party.
        max_abs_error, argmax_agreement: against the clear; rank 0's are reported,
            rank 1's where rank 0 does not see the result.
    """

    rounds: int
    bytes_sent: int
    max_abs_error: float | None
    argmax_agreement: float | None


class System(Protocol):
    """One way to compute the same thing, measured beside others."""

    activation: str
    engine: str

    def prepare(self) -> float:
        """Whatever happens once per model; seconds one run takes at least, as known."""

    def offline(self) -> int:
        """The offline phase of one run; bytes it sends, all parties together."""

    def online(self) -> Callable[[], Result]:
        """The online phase; the result is looked at after the clock has stopped."""

    def close(self) -> None:
        """Give back what prepare took."""


def measure(
    systems: Sequence[System],
    control: Control,
    *,
    model: str,
    batch: int,
    repeat: int,
    limit_s: float,
    emit: Callable[[Mapping[str, Any]], None],
) -> None:
    """Run the systems in turn, `repeat` times; rank 0 emits each sample.

    1. A first run of each is not counted: it traces, and warms caches. One that takes
       longer than `LONG_RUN_S` has warmed them by itself, and counts.
    2. Every turn runs each system: a short one several times, so that its median rests
       on `FILL_S` seconds or `MANY` runs; a long one only while its runs together stay
       below `limit_s`.
    3. Every online phase begins after `Control.silence_s`, so that it does not depend
       on what the connection carried before.
    4. A system of which one run takes longer than that is left out; that is emitted
       too. The last thing emitted says that the model is done, with the round trip
       that the control connection saw.
    5. Before whatever takes time, rank 0 emits what it is, how many runs are done and
       how many there will be.
    """
    cell = {"model": model, "batch": batch}
    silence_s = max(control.swap(control.silence_s()), control.silence_s())
    spent: dict[int, float] = {}
    wanted: dict[int, int] = {}
    done, total = 0, len(systems) * (1 + repeat)

    def announce(index: int) -> None:
        if control.rank == 0:
            emit({**cell, **_name(systems[index]), "progress": [done, total]})

    def run(index: int, *, counted: bool) -> float:
        nonlocal done
        announce(index)
        sample, seconds = _sample(systems[index], control, silence_s)
        done += 1
        if counted or seconds >= LONG_RUN_S:
            spent[index] = spent.get(index, 0.0) + seconds
            if control.rank == 0:
                emit({**cell, **sample})
        return seconds

    for index, system in enumerate(systems):
        announce(index)
        estimate = system.prepare()
        estimate = max(estimate, control.swap(estimate))
        if estimate < LONG_RUN_S:
            estimate = run(index, counted=False)
        if estimate <= limit_s:
            wanted[index] = max(
                repeat, min(MANY, round(FILL_S / (silence_s + estimate)))
            )
        elif control.rank == 0:
            reason = f"one run of {estimate:.3g} s is over the limit of {limit_s:g} s"
            emit({**cell, **_name(system), "skipped": reason})
    longest = {index: spent.get(index, 0.0) for index in wanted}
    total = done + sum(wanted.values()) - len(wanted.keys() & spent.keys())
    for turn in range(repeat):
        for index, count in wanted.items():
            first = index in spent and turn == 0  # a long first run was this turn's
            for _ in range(_share(count, turn, repeat) - first):
                if spent.get(index, 0.0) + longest[index] <= limit_s:
                    longest[index] = max(longest[index], run(index, counted=True))
    if control.rank == 0:
        names = [[system.activation, system.engine] for system in systems]
        emit({**cell, "done": names, "rtt_ms": round(control.rtt_s * 1e3, 3)})


def _share(count: int, turn: int, turns: int) -> int:
    """How many of `count` runs fall into one of the turns."""
    return count * (turn + 1) // turns - count * turn // turns


def _name(system: System) -> dict[str, str]:
    return {"activation": system.activation, "engine": system.engine}


def emit_line(sample: Mapping[str, Any]) -> None:
    """Print a sample as a line that the parent's Collector reads."""
    sys.stdout.write(MARK + json.dumps(sample) + "\n")
    sys.stdout.flush()


def _sample(
    system: System, control: Control, silence_s: float
) -> tuple[dict[str, Any], float]:
    """One run of both phases; the sample, and the seconds both agree it took."""
    start = control.start_together()
    offline_bytes = system.offline()
    offline_s = time.monotonic() - start
    time.sleep(silence_s)
    start = control.start_together()
    finish = system.online()
    online_s = time.monotonic() - start
    result = finish()
    mine = {
        "offline_s": offline_s,
        "online_s": online_s,
        "offline_bytes": offline_bytes,
        **dataclasses.asdict(result),
    }
    theirs = control.swap(mine)
    first, second = (mine, theirs) if control.rank == 0 else (theirs, mine)
    sample = {
        **_name(system),
        "online_s": max(first["online_s"], second["online_s"]),
        "offline_s": max(first["offline_s"], second["offline_s"]),
        "offline_bytes": max(first["offline_bytes"], second["offline_bytes"]),
        "rounds": max(first["rounds"], second["rounds"]),
        "bytes_sent": [first["bytes_sent"], second["bytes_sent"]],
    }
    for name in ("max_abs_error", "argmax_agreement"):
        sample[name] = second[name] if first[name] is None else first[name]
    return sample, sample["online_s"] + sample["offline_s"]


# -------------------------------------------------------------------------- CrypTen


@contextlib.contextmanager
def crypten_channels(
    address: str, *, threads: int, provider: str, listen: str | None = None
) -> Iterator[dict[str, Any]]:
    """CrypTen started in this party, over gloo and over the direct channel.

    Args:
        address: where rank 1 reaches rank 0.
        threads: of torch, in this party.
        provider: "TFP" (the first party deals) or "TTP" (a third process does).
        listen: the address rank 0 binds, if not that one.
    Returns: CrypTen's communicators by channel name, to be given to `use_channel`.
    """
    os.environ.update(RENDEZVOUS="env://", DISTRIBUTED_BACKEND="gloo", WORLD_SIZE="2")
    import crypten
    import crypten.communicator as comm

    torch.set_num_threads(threads)
    crypten.cfg.mpc.provider = provider
    crypten.cfg.communicator.verbose = True  # count; it sends as much as it receives
    crypten.init()
    try:
        base = comm.get()
        with crypten_espn.wire.crypten.use_direct_channel(
            host=address, listen=listen or address, timeout=600.0
        ) as channel:
            direct = comm.get()
            _install_sleep_model(base, channel)
            try:
                yield {"gloo": base, "direct": direct}
            finally:
                use_channel(direct)
    finally:
        crypten.uninit()


def use_channel(communicator: Any) -> None:
    """Have CrypTen talk over this one of the channels from now on."""
    from crypten.communicator.distributed_communicator import DistributedCommunicator

    DistributedCommunicator.instance = communicator


def deal() -> None:
    """Body of the third process under provider TTP: CrypTen's dealer."""
    os.environ.update(RENDEZVOUS="env://", DISTRIBUTED_BACKEND="gloo", WORLD_SIZE="2")
    import crypten

    crypten.cfg.mpc.provider = "TTP"
    torch.set_num_threads(1)
    crypten_espn.correlated.Dealer()


def _install_sleep_model(base: Any, channel: Any) -> None:
    """Under the fallback of `wan.Path`: one sleep per message received."""
    model = wan.sleep_per_message()
    if model is None:
        return
    per_message_s, per_byte_s = model

    def tensor_bytes(value: Any) -> int:
        if torch.is_tensor(value):
            return value.numel() * value.element_size()
        return sum(map(tensor_bytes, value)) if isinstance(value, list) else 0

    def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            time.sleep(per_message_s + per_byte_s * tensor_bytes(args[0]))
            return result

        return call

    for name in ("all_reduce", "broadcast", "reduce", "all_gather", "recv", "scatter"):
        setattr(base, name, slowed(getattr(base, name)))
    slow_down(channel)


def slow_down(channel: Any) -> None:
    """The sleep model, where it is in force, for one direct channel."""
    model = wan.sleep_per_message()
    if model is None:
        return
    per_message_s, per_byte_s = model
    receive = channel._receive_frame

    def receive_late(
        kind: int,
        tag: int,
        size: int | None,
        *,
        limit: int = crypten_espn.wire.channel.MAX_BYTES_MESSAGE,
        outgoing: Any = None,
    ) -> Any:
        data = receive(kind, tag, size, limit=limit, outgoing=outgoing)
        # after it came: a sleep before would run beside the sender's own
        time.sleep(per_message_s + per_byte_s * len(data))
        return data

    channel._receive_frame = receive_late


class CryptenSystem:
    """A computation on CrypTen tensors, its correlated randomness traced once.

    Args:
        activation: name of the row.
        channel: "gloo" or "direct", with its communicator.
        compute: the online phase; returns an encrypted or a plain tensor.
        check: largest error and agreement of the result; None at a party that does
            not see it.
        traces: what runs of each activation ask for, and the seconds the traced run
            took; the same over every channel, so the first system traces for all.
        reveal: whether to open the result, for `check`, after the clock has stopped.
        select: sets what the computation reads from crypten.cfg, before the clock.
        settle: the first run does more than the others (CrypTen's batch-norm then
            keeps its inverse variance), so the second is traced.
    """

    def __init__(
        self,
        activation: str,
        channel: str,
        communicator: Any,
        compute: Callable[[], Any],
        check: Callable[[torch.Tensor], tuple[float, float | None] | None],
        *,
        traces: dict[str, tuple[list[Any], float]],
        reveal: bool,
        select: Callable[[], None] = lambda: None,
        settle: bool = False,
    ) -> None:
        import crypten

        self.activation = activation
        self.engine = f"crypten+{channel}"
        self._communicator = communicator
        self._compute = compute
        self._check = check
        self._traces = traces
        self._reveal = reveal
        self._select = select
        self._settle = settle
        self._provider = crypten.mpc.get_default_provider()
        self._requests: list[Any] = []
        self._offline_bytes = 0

    def prepare(self) -> float:
        """Run once to see which correlated randomness the computation asks for."""
        if self.activation not in self._traces:
            self._traces[self.activation] = self._trace()
        self._requests, seconds = self._traces[self.activation]
        self._offline_bytes = 8 * sum(
            corrections(function, args, kwargs)
            for function, args, kwargs in self._requests
        )
        return seconds

    def _trace(self) -> tuple[list[Any], float]:
        use_channel(self._communicator)
        self._select()
        provider = self._provider
        provider.request_cache, provider.tuple_cache = [], {}
        if self._settle:
            self._compute()
        start = time.monotonic()
        provider.trace()
        try:
            self._compute()
        finally:
            provider.trace(False)
            requests, provider.request_cache = provider.request_cache, []
        return requests, time.monotonic() - start

    def offline(self) -> int:
        """Make the tuples of one run; bytes a dealer has to send for them."""
        use_channel(self._communicator)
        self._select()
        provider = self._provider
        provider.request_cache, provider.tuple_cache = self._requests, {}
        provider.fill_cache()
        provider.request_cache = []
        return self._offline_bytes

    def online(self) -> Callable[[], Result]:
        """Compute from the tuples made offline."""
        communicator = self._communicator
        communicator.reset_communication_stats()
        output = self._compute()
        rounds, both_ways = communicator.comm_rounds, communicator.comm_bytes
        left = sum(map(len, self._provider.tuple_cache.values()))
        self._provider.tuple_cache = {}

        def finish() -> Result:
            if left:
                raise RuntimeError(
                    f"{self.activation} over {self.engine}: {left} tuples made offline "
                    "were not used online"
                )
            plain = output.get_plain_text() if self._reveal else output
            error, agreement = self._check(plain) or (None, None)
            return Result(rounds, round(both_ways / 2), error, agreement)

        return finish

    def close(self) -> None:
        """Forget the tuples; the channels are the caller's."""
        self._requests = []
        self._provider.tuple_cache = {}


def corrections(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Ring elements a dealer sends for one of CrypTen's requests.

    Under provider TTP everything else expands from seeds. Under TFP nothing is sent at
    all, since the first party knows every mask: no deployment may do that, so the
    dealer's figure is given for both.
    """
    if function == "generate_additive_triple":
        first, second, op = args[:3]
        left = torch.empty(first, device="meta")
        right = torch.empty(second, device="meta")
        options = {k: _untuple(v) for k, v in kwargs.items() if k != "device"}
        return getattr(torch, op)(left, right, *args[4:], **options).numel()
    if function == "generate_binary_triple":
        return torch.broadcast_shapes(*map(tuple, args[:2])).numel()
    size = torch.Size(args[0]).numel()
    factor = {"powers": lambda: args[1] - 1, "rescaling": lambda: 2}
    return size * factor.get(function, lambda: 1)()


def _untuple(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def leave() -> None:
    """End a party that has printed everything.

    At once: gloo's threads now and then abort a process that tears down in order.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ----------------------------------------------------------------- the parent's side


class Collector:
    """Turns the lines that parties print into rows, as soon as a model is done.

    Args:
        results: where rows and skipped cells go.
        label, rtt_ms, mbit: the network of the rows; with rtt_ms None, the round trip
            that the parties saw.
        threads: of each party.
    """

    def __init__(
        self,
        results: Results,
        label: str,
        rtt_ms: float | None,
        mbit: float | None,
        threads: int,
    ) -> None:
        self._results = results
        self._label, self._rtt_ms, self._mbit = label, rtt_ms, mbit
        self._threads = threads
        self._bar: tqdm | None = None
        self._samples: dict[tuple[str, str, str, int], list[Mapping[str, Any]]] = {}

    def line(self, rank: int, text: str) -> None:
        """Take one line of a party's output; others are passed on to standard error."""
        if not text.startswith(MARK):
            self._hide_progress()
            print(f"[{rank}] {text.rstrip()}", file=sys.stderr, flush=True)
            return
        self.take(json.loads(text[len(MARK) :]))

    def take(self, sample: Mapping[str, Any]) -> None:
        """Take a sample, a cell that was left out, progress, or the end of a model."""
        if "progress" in sample:
            self._show_progress(sample)
            return
        if "done" in sample:
            self.flush(sample["rtt_ms"], map(tuple, sample["done"]))
            return
        model, activation, engine = (
            sample[name] for name in ("model", "activation", "engine")
        )
        if "skipped" in sample:
            self._hide_progress()
            cell = (model, activation, engine, self._label, sample["skipped"])
            self._results.skip(Skipped(*cell))
            return
        key = (model, activation, engine, sample["batch"])
        self._samples.setdefault(key, []).append(sample)

    def flush(self, rtt_ms: float = 0.0, order: Iterable[tuple[str, ...]] = ()) -> None:
        """Add one row for each system with samples.

        Args:
            rtt_ms: the round trip that the parties saw.
            order: of the rows, by activation and engine; those not named come last.
        """
        self._hide_progress()
        collected, self._samples = self._samples, {}
        place = {name: index for index, name in enumerate(order)}
        ordered = sorted(
            collected.items(), key=lambda item: place.get(item[0][1:3], len(place))
        )
        for (model, activation, engine, batch), samples in ordered:
            last = samples[-1]
            agreements = [
                sample["argmax_agreement"]
                for sample in samples
                if sample["argmax_agreement"] is not None
            ]
            row = Row(
                model=model,
                activation=activation,
                engine=engine,
                network=self._label,
                rtt_ms=rtt_ms if self._rtt_ms is None else self._rtt_ms,
                mbit=self._mbit,
                batch=batch,
                threads=self._threads,
                rounds=last["rounds"],
                bytes_sent=(last["bytes_sent"][0], last["bytes_sent"][1]),
                online_s=Spread.of(sample["online_s"] for sample in samples),
                offline_s=Spread.of(sample["offline_s"] for sample in samples),
                total_s=Spread.of(
                    sample["online_s"] + sample["offline_s"] for sample in samples
                ),
                offline_bytes=last["offline_bytes"],
                max_abs_error=max(sample["max_abs_error"] for sample in samples),
                argmax_agreement=min(agreements, default=None),
            )
            self._results.add(row)

    def _show_progress(self, sample: Mapping[str, Any]) -> None:
        if self._bar is None:  # on a terminal only
            title = f"{sample['model']} on {self._label}"
            self._bar = tqdm(
                desc=title, unit="run", leave=False, dynamic_ncols=True, disable=None
            )
        self._bar.n, self._bar.total = sample["progress"]
        self._bar.set_postfix_str(system_name(sample["activation"], sample["engine"]))

    def _hide_progress(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def run_on_networks(
    results: Results,
    networks: Sequence[str],
    *,
    module: str,
    task: Mapping[str, Any],
    provider: str,
    threads: int,
    fallback: bool,
    idle_restart: bool,
    timeout_s: float,
) -> bool:
    """Run `module` as two parties (and a dealer under TTP) on each network in turn.

    1. Make the path; start `python -m module --party TASK` for each rank.
    2. Collect samples; add a row per system as soon as its model is done.
    3. If a party fails, keep what was measured, say what happened, go on; if the run is
       interrupted, keep it too.

    Args:
        task: what the parties are to do, as JSON can hold it; "address", "port" and
            "rank" are added.
    Returns: whether every network ended well.
    Raises: PathError, before anything is measured, for an unknown network.
    """
    profiles = [wan.Profile.parse(name) for name in networks]
    parties = 3 if provider == "TTP" else 2
    ended_well = True
    for profile in profiles:
        with wan.Path(
            profile, parties=parties, fallback=fallback, idle_restart=idle_restart
        ) as path:
            how = f", congestion control {path.congestion}" if path.congestion else ""
            print(f"{profile} ({path.label}{how})", flush=True)
            if path.congestion:
                results.machine["congestion_control"] = path.congestion
            collector = Collector(
                results, path.label, profile.rtt_ms, profile.mbit, threads
            )
            port = wan.free_port()
            commands = []
            for rank in range(parties):
                text = json.dumps(
                    {**task, "rank": rank, "address": path.addresses[0], "port": port}
                )
                commands.append([sys.executable, "-m", module, "--party", text])
            try:
                path.run(
                    commands,
                    timeout=timeout_s,
                    environment={"OMP_NUM_THREADS": str(threads)},
                    on_line=collector.line,
                )
            except wan.PartyError as error:
                ended_well = False
                print(f"error on {path.label}: {error}", file=sys.stderr, flush=True)
                results.skip(Skipped("", "", "", path.label, _first_line(error)))
            finally:
                collector.flush()
    return ended_well


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if len(lines) < 2 else f"{lines[0]} {lines[-1]}"
