"""What TLS costs: processor time a megabyte, and time over a path.

    python -m benchmarks.tls --megabytes 64 --repeat 9
    python -m benchmarks.tls --networks wan cheetah --models resnet18 --json FILE

Plain and TLS alternate, so that both see the same machine. Without a network both ends
are threads of this process, and its processor time counts. Over a path two parties send
each other the messages of one inference, and nothing else, at the sizes and in the
order of the plan; the slower one's time counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from crypten_espn.keys import make_keys
from crypten_espn.masked.inference import message_sizes
from crypten_espn.masked.messages import CLIENT, SERVER
from crypten_espn.wire.channel import Channel
from crypten_espn.wire.connect import Listener, connect_channel
from crypten_espn.wire.tls import TLS

from . import link, party
from .networks import MODELS, PRECISIONS, planned
from .options import add_run_options, finish
from .rows import Results, ResultsError

ENGINES = ("tcp", "tcp+TLS")


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


def processor_time(megabytes: int, repeat: int) -> dict[str, list[float]]:
    """Processor milliseconds a megabyte, plain and TLS in turn."""
    values = np.ones(megabytes * 125_000, dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        files = certificates(Path(folder), "127.0.0.1")
        tls = {role: TLS(*three) for role, three in files.items()}
        with connected({}) as plain, connected(tls) as secured:
            ways = {"plain": plain, "TLS": secured}
            for ends in ways.values():
                milliseconds(*ends, values)
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(repeat):
                for name, ends in ways.items():
                    found[name].append(milliseconds(*ends, values))
    return found


def certificates(folder: Path, server: str) -> dict[str, list[str]]:
    """Files of the server's and of a client's, by role, as TLS takes them."""
    made = make_keys(folder, servers=[server], clients=[CLIENT])
    return {
        key.role: [str(file) for file in (key.certificate, key.key, key.authority)]
        for key in made
    }


# ------------------------------------------------------------------------ over a path


class MessageSystem:
    """The messages of an inference and nothing else, over one connection.

    Args:
        sizes: who sends, and bytes, in order.
        control: the parties' connection for agreement.
        address: of rank 0, the server.
        tls: this party's certificates; without TLS if None.
    """

    activation = "messages"

    def __init__(
        self,
        sizes: Sequence[tuple[str, int]],
        control: party.Control,
        address: str,
        tls: TLS | None,
    ) -> None:
        self.engine = ENGINES[tls is not None]
        self._sizes, self._control, self._address = sizes, control, address
        self._tls = tls
        self._role = (SERVER, CLIENT)[control.rank]
        self._longest = max(size for _, size in sizes)
        self._data = bytes(self._longest)
        self._channel: Channel | None = None

    def prepare(self) -> float:
        """Connect, as sessions do."""
        tls = self._tls
        if self._role == SERVER:
            with Listener(
                f"{self._address}:0", role=SERVER, tls=tls, insecure=True
            ) as listener:
                self._control.send(listener.address)
                incoming = listener.accept(timeout=60.0)
                self._channel = incoming.open(peer_roles=(CLIENT,), timeout=600.0)
        else:
            self._channel = connect_channel(
                self._control.receive(),
                role=CLIENT,
                peer_role=SERVER,
                tls=tls,
                timeout=600.0,
                insecure=True,
            )
        return 0.0

    def offline(self) -> int:
        """Nothing."""
        return 0

    def online(self) -> Callable[[], party.Result]:
        """Every message in turn."""
        channel = self._channel
        assert channel is not None
        channel.pace()
        sent = 0
        for sender, size in self._sizes:
            if sender == self._role:
                channel.send_bytes(self._data[:size])
                sent += size
            else:
                channel.receive_bytes(limit=self._longest)
        return lambda: party.Result(len(self._sizes), sent, 0.0, None)

    def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            self._channel.close()


def run_party(task: dict[str, Any], emit: Callable[[Any], None]) -> None:
    """Both ways in turn, for each model; rank 0 plans, and makes the certificates."""
    address, batch = task["address"], task["batch"]
    control = party.Control(task["rank"], address, task["port"])
    with ExitStack() as stack:
        if control.rank == 0:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            files = certificates(Path(folder), address)
            control.send(files)
            own = files[SERVER]
        else:
            own = control.receive()[CLIENT]
        for model in task["models"]:
            if control.rank == 0:
                sizes = message_sizes(
                    planned(model, precision=task["precision"]).plan, batch=batch
                )
                control.send(sizes)
            else:
                sizes = [(sender, size) for sender, size in control.receive()]
            systems = [
                MessageSystem(sizes, control, address, tls) for tls in (None, TLS(*own))
            ]
            for system in systems:
                stack.callback(system.close)
            party.measure(
                systems,
                control,
                model=model,
                batch=batch,
                repeat=task["repeat"],
                fill_s=task["fill_s"],
                limit_s=task["limit_s"],
                emit=emit,
            )
        control.swap(None)  # the certificates are not needed any more
    control.close()


def differences(results: Results) -> list[str]:
    """What TLS adds to the median of each model's messages on each path."""
    found = {(row.network, row.model, row.engine): row.online_s for row in results.rows}
    lines = []
    for network, model in dict.fromkeys(
        (row.network, row.model) for row in results.rows
    ):
        plain, tls = (found.get((network, model, engine)) for engine in ENGINES)
        if plain is not None and tls is not None:
            share = tls.median / plain.median - 1
            lines.append(
                f"{model}, {network}: {plain.median:.4g} s, with TLS "
                f"{tls.median:.4g} s: {share:+.1%}"
            )
    return lines


def make_parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet18"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=PRECISIONS, default="fast")
    add_run_options(parser, networks=(), repeat=9)
    parser.add_argument("--party", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    options = make_parser().parse_args(arguments)
    if options.party:
        run_party(json.loads(options.party), party.emit_line)
        return 0
    if not options.networks:
        for name, times in processor_time(options.megabytes, options.repeat).items():
            median = statistics.median(times)
            print(f"{name:6} {median:.3f} ms of processor time a MB")
        return 0
    results = Results(options.json)
    names = ("models", "batch", "precision", "repeat", "fill_s", "limit_s")
    try:
        ended_well = party.run_on_networks(
            results,
            options.networks,
            module="benchmarks.tls",
            task={name: getattr(options, name) for name in names},
            provider="TFP",
            threads=options.threads,
            idle_restart=not options.warm,
            timeout_s=options.timeout_s,
        )
    except (link.PathError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = finish(results, options, ended_well=ended_well)
    print("\n".join(differences(results)))
    return status


if __name__ == "__main__":
    sys.exit(main())
