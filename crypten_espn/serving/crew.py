"""Several processes that answer on one address, for `serve` and `deal --workers N`.

All of them accept from one listening socket, so a worker that is gone loses nobody who
waits. A session is in one of them at a time: a peer that arrives at another is handed
over. One that dies is replaced; its sessions in memory are lost, those on the disk
are gone on with.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

import torch

from ..errors import EspnError
from ..wire.connect import host_port, listen, parse_address, to_listen_on
from .events import WorkerGone, report
from .host import Host
from .metrics import summed
from .share import Share

Make = Callable[[Share], Host]

_ASK, _READY = b"?", b"ready"
_ANSWER_S = 2.0
_TICK_S = 0.25
_AGAIN_S = 1.0  # before a worker is replaced
_END_S = 30.0  # beyond the grace period, until a worker is killed

log = logging.getLogger(__name__)


class _Worker:
    """One process, seen from the one that started it."""

    def __init__(self, name: str, process: BaseProcess, pipe: connection.Connection):
        self.name, self.process, self.pipe = name, process, pipe
        self._lock = threading.Lock()
        self._started = False
        self.text = b""

    def await_ready(self) -> bool:
        """Wait until it listens; False if it ended instead."""
        with self._lock, contextlib.suppress(OSError, EOFError):
            self._started = self.pipe.recv_bytes() == _READY
        return self._started

    def look(self) -> dict[str, bool]:
        """How it is; its metrics are kept in `text`."""
        with self._lock, contextlib.suppress(OSError, EOFError):
            if not self._started:
                self._started = self.pipe.poll() and self.pipe.recv_bytes() == _READY
            if not self._started:
                return {"live": False, "ready": False}
            self.pipe.send_bytes(_ASK)
            if self.pipe.poll(_ANSWER_S):
                state = json.loads(self.pipe.recv_bytes())
                self.text = self.pipe.recv_bytes()
                return {"live": state["live"], "ready": state["ready"]}
        return {"live": False, "ready": False}


class Crew:
    """Runs as `Host` does, by processes of this host; use it as a context manager.

    Args:
        make: makes one process's host; it is pickled.
        address: "host:port" to listen on.
        role: of the hosts.
        workers: how many.
        grace_s: as in the hosts' limits.

    Raises:
        PeerError: the address cannot be listened on.
        EspnError: a worker did not start; it says why.
    """

    def __init__(
        self, make: Make, address: str, *, role: str, workers: int, grace_s: float
    ) -> None:
        self.role, self._make, self._count, self._grace = role, make, workers, grace_s
        self._sock = listen(address, to_listen_on(address))
        host, _ = parse_address(address)
        self.address = host_port(host, self._sock.getsockname()[1])
        self._folder = Path(tempfile.mkdtemp(prefix="crypten-espn-"))
        # A process that has imported all this once, and nothing else, is their parent.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([make.__module__, __name__])
        self._workers: list[_Worker] = []
        self._gone: list[bytes] = []
        self._made = 0
        self._stopping = threading.Event()
        self._closed = False
        self.metrics = self

    def __enter__(self) -> Crew:
        try:
            self._workers = [self._start() for _ in range(self._count)]
            for worker in self._workers:
                if not worker.await_ready():
                    worker.process.join()
                    raise EspnError(
                        f"A worker did not start (status {worker.process.exitcode}); "
                        "what it wrote says why."
                    )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def live(self) -> bool:
        """Whether every worker has looked for connections lately."""
        return all(worker.look()["live"] for worker in list(self._workers))

    @property
    def ready(self) -> bool:
        """Whether a worker accepts connections."""
        found = [worker.look()["ready"] for worker in list(self._workers)]
        return any(found) and not self._stopping.is_set()

    def text(self) -> bytes:
        """The metrics of all workers, added up, with what those that died counted."""
        workers = list(self._workers)
        for worker in workers:
            worker.look()
        return summed([worker.text for worker in workers], gone=list(self._gone))

    def run(self) -> None:
        """Replace workers that die, until `stop` or `close` is called."""
        while not self._stopping.wait(_TICK_S):
            for number, worker in enumerate(self._workers):
                if worker.process.exitcode is None:
                    continue
                report(log, WorkerGone(worker.name, worker.process.exitcode))
                self._gone.append(worker.text)
                worker.pipe.close()
                if self._stopping.wait(_AGAIN_S):
                    return
                self._workers[number] = self._start()

    def stop(self) -> None:
        """Make `run` return, from a signal handler or another thread."""
        self._stopping.set()

    def reload(self) -> None:
        """Have every worker read its files again, from a signal handler too."""
        self._signal(signal.SIGHUP)

    def close(self) -> None:
        """Stop accepting, have every worker finish, and end those that do not."""
        if self._closed:
            return
        self._closed = True
        self._stopping.set()
        self._sock.close()
        self._signal(signal.SIGTERM)
        end = time.monotonic() + self._grace + _END_S
        for worker in self._workers:
            worker.process.join(max(0.0, end - time.monotonic()))
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.process.exitcode is None and worker.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process.pid, number)

    def _start(self) -> _Worker:
        self._made += 1
        name = f"worker-{self._made}"
        ours, theirs = self._context.Pipe()
        share = Share(self._sock, self._folder, name)
        threads = max(1, (os.cpu_count() or 1) // self._count)
        process = self._context.Process(
            target=_work, args=(self._make, share, theirs, threads), name=name
        )
        process.start()
        theirs.close()
        return _Worker(name, process, ours)


def _work(make: Make, share: Share, pipe: connection.Connection, threads: int) -> None:
    """Be a worker, until told to stop or the process that started it is gone."""
    torch.set_num_threads(threads)
    # Ctrl-C reaches the whole group of processes; the first one passes it on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with make(share) as host:
        signal.signal(signal.SIGTERM, lambda *_: host.stop())
        signal.signal(signal.SIGHUP, lambda *_: host.reload())
        answering = threading.Thread(target=_answer, args=(host, pipe), daemon=True)
        answering.start()
        host.run()


def _answer(host: Host, pipe: connection.Connection) -> None:
    """Tell how this worker is whenever it is asked."""
    try:
        pipe.send_bytes(_READY)
        while pipe.recv_bytes() == _ASK:
            state = {"live": host.live, "ready": host.ready}
            pipe.send_bytes(json.dumps(state).encode())
            pipe.send_bytes(host.metrics.text())
    except (EOFError, OSError):
        host.stop()
