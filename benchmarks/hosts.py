"""A served model as its users have it: `serve` and `deal`, processes of their own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from crypten_espn.bundle import Bundle
from crypten_espn.masked.drivers import TOLD_BYTES
from crypten_espn.masked.inference import message_sizes
from crypten_espn.masked.messages import SERVER, Party
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.plan import Plan
from crypten_espn.serving.client import Client, connect
from crypten_espn.wire.frames import HEADER_BYTES

from .processes import Process, peak_memory

TIMEOUT_S = 600
# Nothing is refused that the machine can hold, and nobody leaves while others are
# measured.
_LIMITS = {"idle_s": 86_400, "waiting_s": TIMEOUT_S, "material_bytes": 1 << 40}
_LATE_S = 10.0


class Hosts:
    """A dealer and a server of one model; a context manager that ends both.

    Args:
        model: what is served, from a bundle.
        host: where both listen.
        threads: of torch, in each process.
        workers: processes of the server.

    Attributes:
        dealer, server: the processes; their addresses are `127.0.0.1` where `host` is
            every address of this machine.
    """

    def __init__(
        self,
        model: MaskedModel,
        *,
        host: str = "127.0.0.1",
        threads: int = 1,
        workers: int = 1,
    ) -> None:
        common = ["--timeout", str(TIMEOUT_S), "--insecure", "--log-json"]
        for name, limit in _LIMITS.items():
            common += ["--limit", f"{name}={limit}"]
        with ExitStack() as stack:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-"))
            )
            bundle = folder / "model.espn"
            Bundle(model).save(bundle)
            self.dealer = Process(
                "deal", [f"{host}:0", *common], folder, threads=threads
            )
            stack.callback(self.dealer.end)
            dealer = f"127.0.0.1:{port(self.dealer)}" if host == "0.0.0.0" else None
            common += ["--dealer", dealer or self.dealer.address]
            if workers > 1:
                common += ["--workers", str(workers)]
            self.server = Process(
                "serve", [str(bundle), f"{host}:0", *common], folder, threads=threads
            )
            stack.callback(self.server.end)
            self._stack = stack.pop_all()

    def events(self, process: Process, name: str, count: int) -> list[dict[str, Any]]:
        """The first so many events of that name in a log, once they are there.

        Raises: TimeoutError if they do not come.
        """
        end = time.monotonic() + _LATE_S
        while len(found := process.events(name)) < count:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{process.name} reported {len(found)} of {count} {name} events"
                )
            time.sleep(0.01)
        return found[:count]

    @property
    def peaks(self) -> tuple[int, int]:
        """The most bytes that server and dealer ever had in memory."""
        return peak_memory(self.server.pid), peak_memory(self.dealer.pid)

    def close(self) -> None:
        """End both processes."""
        self._stack.close()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def port(process: Process) -> int:
    """Where it listens."""
    return int(process.address.rpartition(":")[2])


def reach(address: str, ports: Sequence[int], *, corrections: Party = SERVER) -> Client:
    """A client of the server and the dealer at these ports of one host, in order."""
    server, dealer = (f"{address}:{port}" for port in ports)
    return connect(
        server,
        dealer=dealer,
        timeout=TIMEOUT_S,
        insecure=True,
        corrections=corrections,
    )


# --------------------------------------------------------- what a session's bytes are


def online_payload(plan: Plan, sender: str, sent: int, *, batch: int) -> int:
    """What a party sent online, without frames and what it tells of its material.

    Raises: RuntimeError if that is not what the plan says, byte for byte.
    """
    sizes = [size for who, size in message_sizes(plan, batch=batch) if who == sender]
    payload = sent - HEADER_BYTES * (len(sizes) + 1) - TOLD_BYTES
    if payload != sum(sizes):
        raise RuntimeError(
            f"the {sender} sent {payload} bytes online, its plan says {sum(sizes)}"
        )
    return payload


def check_offline(
    plan: Plan, *, dealt: int, received: int, batch: int, count: int = 1
) -> None:
    """Check the bytes of a preparation: what the plan says, and frames.

    Args:
        dealt: what the dealer says it sent.
        received: what the server says it received from the client.
        batch, count: inputs of an inference, and inferences.

    Raises: RuntimeError if they are not.
    """
    expected = {
        "dealer": (dealt, plan.dealer_bytes(batch=batch)),
        "client": (received, plan.client_bytes(batch=batch)),
    }
    for sender, (sent, payload) in expected.items():
        frames = sent - count * payload
        if frames <= 0 or frames % (count * HEADER_BYTES):
            raise RuntimeError(
                f"the {sender} sent {sent} bytes for {count} inference(s); the plan "
                f"says {payload} each, and frames of {HEADER_BYTES}"
            )
