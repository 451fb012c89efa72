"""Run one function in several local processes, one a party, and return their values.

`run_multiprocess` has the signature of CrypTen's and stands in for it; `run_parties` is
the same as a plain call. Parties start from a fork server that has imported the package
already, so a start takes a fraction of a second, no thread or lock is forked, and
closures, lambdas and functions of `__main__` work. Jobs and results are pickles, read
only from pipes between this process and those it started itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from types import ModuleType
from typing import Any, ParamSpec

import cloudpickle
import torch

from .errors import EspnError, PeerError

P = ParamSpec("P")

#: Seconds a run may take before its parties are stopped; None sets no limit.
timeout_s: float | None = float(os.environ.get("CRYPTEN_ESPN_TIMEOUT", "0")) or None

#: torch threads in each party.
threads: int = int(os.environ.get("CRYPTEN_ESPN_THREADS", "1"))

#: Modules that the fork server imports before the first party starts, for all of them.
preloaded: list[str] = ["crypten_espn"]

# A party that fails in the wake of another is given this long to say so, too: the
# failure that came first is the one worth reading.
_GRACE_S = 0.5
# What a party may take from its last message to its end.
_JOIN_S = 5.0

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20

_main_lock = threading.Lock()


def run_parties(
    function: Callable[..., object],
    *,
    world_size: int,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    timeout: float | None = None,
) -> list[Any]:
    """Run a function in world_size CrypTen processes and return their values by rank.

    1. Start the parties, and CrypTen's dealer if crypten.cfg.mpc.provider is "TTP",
       with this process's crypten.cfg, environment, directory and torch seed.
    2. Each calls crypten.init(), the function, crypten.uninit().
    3. Read the values as they come; end every process before returning or raising.

    Args:
        function: any callable; it is copied to the parties with what it refers to.
        world_size: number of parties.
        args: what each party passes to it.
        kwargs: what each party passes to it by name.
        timeout: seconds for the whole run; None means this module's timeout_s.

    Returns:
        world_size values, rank 0 first.

    Raises:
        EspnError: world_size is less than 1, or the function or its arguments cannot
            be pickled.
        PeerError: a party raised (its traceback is the message, its exception the
            cause), ended without a value or in the middle of it, returned one that
            cannot be pickled or loaded, or the time was over.
    """
    import crypten
    from omegaconf import OmegaConf

    if world_size < 1:
        raise EspnError(f"world_size={world_size} was given; it must be 1 or more")
    limit = timeout_s if timeout is None else timeout
    try:
        call = cloudpickle.dumps((function, tuple(args), dict(kwargs or {})))
    except Exception as error:
        raise EspnError(
            f"the function or its arguments cannot be sent to the parties: {error}; "
            "make what does not pickle inside the function"
        ) from error
    with tempfile.TemporaryDirectory(prefix="crypten-espn-") as folder:
        job = _Job(
            call=call,
            environment={
                **os.environ,
                "WORLD_SIZE": str(world_size),
                "RENDEZVOUS": f"file://{folder}/rendezvous",
                "DISTRIBUTED_BACKEND": "gloo",
            },
            directory=os.getcwd(),
            config=OmegaConf.to_container(crypten.cfg.config),
            rng_state=bytes(torch.get_rng_state().numpy()),
            threads=threads,
        )
        parties = _Parties(limit)
        try:
            for rank in range(world_size):
                parties.start(job, rank)
            if crypten.mpc.ttp_required():
                parties.start(dataclasses.replace(job, call=None), world_size)
            return parties.values()[:world_size]
        finally:
            parties.stop()


def run_multiprocess(
    world_size: int, maxsize: int | None = None
) -> Callable[[Callable[P, object]], Callable[P, list[Any]]]:
    """Decorator: a call runs in world_size processes and returns their values by rank.

    Args:
        world_size: number of parties.
        maxsize: accepted because CrypTen's has it; results of any size are read.

    Raises:
        PeerError: at the call, as `run_parties` does.
    """

    def decorator(function: Callable[P, object]) -> Callable[P, list[Any]]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> list[Any]:
            return run_parties(
                function, world_size=world_size, args=args, kwargs=kwargs
            )

        return wrapper

    return decorator


@dataclass(frozen=True)
class _Job:
    """What a process has to run, and the surroundings it runs in."""

    call: bytes | None  # None: the dealer
    environment: Mapping[str, str]
    directory: str
    config: object
    rng_state: bytes
    threads: int


@dataclass(frozen=True)
class _Outcome:
    """What a process reports: its value, or why and when it failed.

    Value and cause are pickles: a report can be read even if they cannot.
    """

    value: bytes = b""
    failure: str | None = None
    cause: bytes = b""
    at: float = 0.0


class _Reply:
    """One process's report, as it comes in."""

    def __init__(self, end: connection.Connection) -> None:
        self.end = end
        self._data = bytearray()

    def read(self) -> None:
        """Take what is there.

        Raises:
            EOFError: nothing more will come, and the report is not whole.
        """
        data = os.read(self.end.fileno(), _CHUNK)
        if not data:
            raise EOFError
        self._data += data

    def whole(self) -> memoryview | None:
        """The report once all of it is there."""
        if len(self._data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._data)
        whole = len(self._data) == _LENGTH.size + length
        return memoryview(self._data)[_LENGTH.size :] if whole else None


class _Parties:
    """The processes of one run, in the order of their ranks."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._deadline = None if limit is None else time.monotonic() + limit
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(preloaded)
        self._processes: list[ForkServerProcess] = []
        self._replies: list[_Reply] = []

    def start(self, job: _Job, rank: int) -> None:
        reply, far_end = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_party, args=(job, rank, far_end), name=f"party-{rank}"
        )
        self._replies.append(_Reply(reply))
        with far_end, _without_main():
            process.start()
        self._processes.append(process)

    def values(self) -> list[object]:
        """Every process's value; raises for the failure that came first."""
        n = len(self._replies)
        outcomes: dict[int, _Outcome] = {}
        while len(outcomes) < n:
            arrived = self._next(outcomes, self._deadline)
            if not arrived:
                waiting = [str(rank) for rank in range(n) if rank not in outcomes]
                raise PeerError(
                    f"no answer from rank {', '.join(waiting)} within {self._limit} s; "
                    "the run was stopped. Allow more with CRYPTEN_ESPN_TIMEOUT, in "
                    "seconds, or look for a party that waits for what is never sent"
                )
            outcomes |= arrived
            if any(outcome.failure for outcome in arrived.values()):
                grace = time.monotonic() + _GRACE_S
                while late := self._next(outcomes, grace):
                    outcomes |= late
                raise _first_failure(outcomes)
        for process in self._processes:
            process.join(_JOIN_S)
        return [_value(rank, outcomes[rank]) for rank in sorted(outcomes)]

    def stop(self) -> None:
        """End every process that has not ended on its own."""
        for reply in self._replies:
            reply.end.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(_JOIN_S)
            if process.exitcode is None:
                process.kill()
                process.join()
            process.close()

    def _next(
        self, known: Mapping[int, _Outcome], deadline: float | None
    ) -> dict[int, _Outcome]:
        """What is whole next, by rank; nothing when the deadline comes first."""
        pending = {
            self._replies[r].end: r for r in range(len(self._replies)) if r not in known
        }
        while pending:
            wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = connection.wait(list(pending), wait_s)
            ranks = [rank for end, rank in pending.items() if end in ready]
            found = {rank: self._read(rank) for rank in ranks}
            arrived = {r: outcome for r, outcome in found.items() if outcome}
            # The deadline holds for a report, not for each part of it.
            if arrived or not ready or wait_s == 0:
                return arrived
        return {}

    def _read(self, rank: int) -> _Outcome | None:
        """Read on; the outcome once it is whole, or cannot become so."""
        reply = self._replies[rank]
        try:
            reply.read()
        except (EOFError, OSError):
            process = self._processes[rank]
            process.join(_JOIN_S)
            return _Outcome(
                failure=f"it ended with exit code {process.exitcode} and no result"
            )
        data = reply.whole()
        return None if data is None else cloudpickle.loads(data)


def _value(rank: int, outcome: _Outcome) -> object:
    try:
        return cloudpickle.loads(outcome.value)
    except Exception as error:
        raise PeerError(
            f"rank {rank} returned a value that cannot be loaded here: "
            f"{type(error).__name__}: {error}; return tensors, numbers or text"
        ) from error


def _first_failure(outcomes: Mapping[int, _Outcome]) -> PeerError:
    failed = {rank: o for rank, o in outcomes.items() if o.failure}
    rank = min(failed, key=lambda r: failed[r].at)
    error = PeerError(
        f"rank {rank} failed and the run was stopped: {failed[rank].failure}"
    )
    # Not every exception survives a pickle; the traceback always does.
    with contextlib.suppress(Exception):
        error.__cause__ = cloudpickle.loads(failed[rank].cause)
    return error


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from importing the caller's script in the child.

    Functions of `__main__` travel by value, so a script needs no guard around its body.
    """
    with _main_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _party(job: _Job, rank: int, reply: connection.Connection) -> None:
    """Body of each process: run the job and report."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        value = _run(job, rank)
        outcome = _Outcome(value=cloudpickle.dumps(value))
    except BaseException as error:
        outcome = _failure(error)
    data = cloudpickle.dumps(outcome)
    rest = memoryview(_LENGTH.pack(len(data)) + data)
    while rest:
        rest = rest[os.write(reply.fileno(), rest) :]


def _run(job: _Job, rank: int) -> object:
    import crypten
    from omegaconf import OmegaConf

    os.environ.clear()
    os.environ.update(job.environment, RANK=str(rank))
    os.chdir(job.directory)
    torch.set_num_threads(job.threads)
    torch.set_rng_state(torch.frombuffer(bytearray(job.rng_state), dtype=torch.uint8))
    crypten.cfg.set_config(OmegaConf.create(job.config))
    if job.call is None:
        # The dealer joins on its own and serves until rank 0 leaves.
        crypten.mpc.provider.TTPServer()
        crypten.uninit()
        return None
    function, args, kwargs = cloudpickle.loads(job.call)
    crypten.init()
    value = function(*args, **kwargs)
    crypten.uninit()
    return value


def _failure(error: BaseException) -> _Outcome:
    cause = b""
    with contextlib.suppress(Exception):
        cause = cloudpickle.dumps(error)
    text = "".join(traceback.format_exception(error))
    return _Outcome(failure=text, cause=cause, at=time.monotonic())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
