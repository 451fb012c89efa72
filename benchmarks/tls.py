"""What TLS costs: processor time of both ends for a megabyte over loopback.

    python -m benchmarks.tls --megabytes 64 --repeat 9

Plain and TLS alternate, so that both see the same machine. The time is this process's,
in which both ends are threads.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from crypten_espn.keys import make_keys
from crypten_espn.wire.channel import Channel
from crypten_espn.wire.connect import Listener, connect_channel
from crypten_espn.wire.tls import TLS


@contextmanager
def connected(tls: dict[str, TLS]) -> Iterator[tuple[Channel, Channel]]:
    """The server's and the client's end of a connection over loopback."""
    with Listener("127.0.0.1:0", role="server", tls=tls.get("server")) as listener:
        ends: list[Channel] = []

        def connect() -> None:
            client = tls.get("client")
            address = listener.address
            ends.append(
                connect_channel(address, role="client", peer_role="server", tls=client)
            )

        thread = threading.Thread(target=connect)
        thread.start()
        with listener.accept(timeout=30.0).open(peer_roles=("client",)) as server:
            thread.join()
            with ends[0] as client:
                yield server, client


def milliseconds(server: Channel, client: Channel, values: np.ndarray) -> float:
    """Processor time of one message, for each of its megabytes."""
    sender = threading.Thread(target=lambda: client.send(values, bits=64))
    before = time.process_time()
    sender.start()
    server.receive(values.size, bits=64)
    sender.join()
    return 1e9 * (time.process_time() - before) / values.nbytes


def main() -> None:
    """Measure both in turn; print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    values = np.ones(options.megabytes * 125_000, dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        made = make_keys(Path(folder), servers=["127.0.0.1"], clients=["client"])
        tls = {key.role: TLS(key.certificate, key.key, key.authority) for key in made}
        with connected({}) as plain, connected(tls) as secured:
            ways = {"plain": plain, "TLS": secured}
            for ends in ways.values():
                milliseconds(*ends, values)
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(options.repeat):
                for name, ends in ways.items():
                    found[name].append(milliseconds(*ends, values))
    for name, times in found.items():
        print(f"{name:6} {statistics.median(times):.3f} ms of processor time a MB")


if __name__ == "__main__":
    main()
