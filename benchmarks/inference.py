"""Whole networks: every protocol, over gloo and a direct channel, offline and online.

Rank 0 owns the weights, rank 1 the images and gets the logits. Both phases are timed
from a common start until the slower party is done; systems take turns within one run.

    python -m benchmarks.inference --models resnet18 --networks loopback wan
    python -m benchmarks.inference --models minionn resnet18 --batch 1 --threads 1 \\
        --protocols masked espn crypten-relu --repeat 5 --json out/inference.json
    python -m benchmarks.inference --world-size 2 --multiprocess --networks loopback

On two hosts, one command on each (any free port; rank 1 connects to rank 0):
    python -m benchmarks.inference --rank 0 --rendezvous 10.0.0.1:29500 --json rows.json
    python -m benchmarks.inference --rank 1 --rendezvous 10.0.0.1:29500

Protocols: masked is this package's engine, masked-compact the same at the precision
"compact"; espn, opened_mask and beaver are its activations on CrypTen's layers;
crypten-relu is CrypTen's own ReLU with batch-norm folded, crypten-relu-unfolded the
network as CrypTen converts it. plain is none but the limit: the network with its ReLUs
in plaintext torch, in several forms, over loopback alone. Offline, the masked engine's
phase is a session's `prepare(1)`, with a server and a dealer process; CrypTen's is its
tuple cache, filled from one traced run.

Weights are fresh: neither time nor rounds nor bytes depend on them. Batch-norm is
calibrated so that activations stay where the polynomial is meant to be used, and the
error column compares with the same network in the clear. CrypTen's tuples come from
the first party unless --provider TTP; offline_bytes is then still what a dealer sends.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import link
from .networks import MODELS, build, calibration, images
from .options import add_run_options, finish
from .plots import plot_dots
from .rows import COMPACT, MASKED, PLAIN, Results, ResultsError, Skipped

LOOPBACK = "127.0.0.1"
RELU_PROTOCOLS = ("crypten-relu", "crypten-relu-unfolded")
CHANNELS = ("direct", "gloo")


# ----------------------------------------------------------------- the same everywhere


def protocols() -> tuple[str, ...]:
    """What --protocols takes: the masked, the package's table, CrypTen's own, plain."""
    from crypten_espn.protocols import PROTOCOLS

    return (MASKED, COMPACT, *PROTOCOLS, *RELU_PROTOCOLS, PLAIN)


# ---------------------------------------------------------------------- in the parties


def run_party(task: dict[str, Any], emit: Callable[[Any], None]) -> None:
    """Measure the task's models and protocols in this party."""
    from . import party

    if task["rank"] == 2:
        party.deal()
        return
    control = party.Control(task["rank"], task["address"], task["port"])
    with party.crypten_channels(
        task["address"],
        threads=task["threads"],
        provider=task["provider"],
        listen=task.get("listen"),
    ) as channels:
        for model in task["models"]:
            with contextlib.ExitStack() as stack:
                systems = _systems(model, task, channels, control, emit)
                for system in systems:
                    stack.callback(system.close)
                party.measure(
                    systems,
                    control,
                    model=model,
                    batch=task["batch"],
                    repeat=task["repeat"],
                    fill_s=task["fill_s"],
                    limit_s=task["limit_s"],
                    emit=emit,
                )
    control.close()


def _systems(
    model: str,
    task: dict[str, Any],
    channels: dict[str, Any],
    control: Any,
    emit: Callable[[Any], None],
) -> list[Any]:
    """The systems of one model, in the order of the task's protocols."""
    import crypten
    import torch

    import crypten_espn

    from . import party
    from .masked import MaskedSystem
    from .plain import plain_systems

    relu, twin = build(model)
    torch.manual_seed(11)
    x = images(model, task["batch"])
    with torch.no_grad():
        expected = {"relu": relu(x), "polynomial": twin(x)}
    mine = x if task["rank"] == 1 else torch.zeros_like(x)
    private: dict[str, Any] = {}

    def network(kind: str) -> Any:
        if kind not in private:
            if kind == "unfolded":
                graph = crypten.nn.from_pytorch(relu, x)
            else:
                graph = crypten_espn.convert(twin if kind == "polynomial" else relu, x)
            private[kind] = graph.encrypt(src=0)
        return private[kind]

    def check(kind: str, plain: Any) -> tuple[float, float] | None:
        if task["rank"] == 0:
            return None  # the logits are rank 1's
        wanted = expected[kind]
        agree = (plain.argmax(1) == wanted.argmax(1)).double().mean()
        return float((plain - wanted).abs().max()), float(agree)

    def compute(graph: Any) -> Any:
        with crypten.no_grad():
            return graph(crypten.cryptensor(mine, src=1)).get_plain_text(dst=1)

    def left_out(engine: str, reason: str) -> None:
        cell = {"model": model, "activation": PLAIN, "engine": engine}
        emit({**cell, "skipped": reason})

    systems: list[Any] = []
    traces: dict[str, Any] = {}
    for protocol in task["protocols"]:
        if protocol in (MASKED, COMPACT):
            systems.append(
                MaskedSystem(
                    twin,
                    x,
                    calibration(model),
                    control,
                    address=task["address"],
                    listen=task.get("listen", task["address"]),
                    threads=task["threads"],
                    activation=protocol,
                    check=functools.partial(check, "polynomial"),
                )
            )
            continue
        if protocol == PLAIN:
            if task["address"] == LOOPBACK:  # once: it crosses no network
                systems += plain_systems(
                    relu, x, control, functools.partial(check, "relu"), left_out
                )
            continue
        kind = {"crypten-relu": "relu", "crypten-relu-unfolded": "unfolded"}.get(
            protocol, "polynomial"
        )
        graph = network(kind)
        for channel in task["channels"]:
            systems.append(
                party.CryptenSystem(
                    protocol,
                    channel,
                    channels[channel],
                    functools.partial(compute, graph),
                    functools.partial(
                        check, "polynomial" if kind == "polynomial" else "relu"
                    ),
                    traces=traces,
                    reveal=False,
                    select=functools.partial(_select, protocol),
                    settle=kind == "unfolded",
                )
            )
    return systems


def _select(protocol: str) -> None:
    import crypten

    from crypten_espn.protocols import PROTOCOLS

    if protocol in PROTOCOLS:
        crypten.cfg.espn.protocol = protocol


# ----------------------------------------------------------------------- in the parent


def _run_on_two_hosts(results: Results, options: argparse.Namespace) -> bool:
    """Be one of the two parties; rank 0 keeps the rows."""
    import os

    from . import party

    host, _, port = options.rendezvous.rpartition(":")
    if not host or not port.isdigit():
        raise link.PathError(
            f"--rendezvous {options.rendezvous!r} is not HOST:PORT; give rank 0's "
            "address as rank 1 reaches it, for example 10.0.0.1:29500"
        )
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port, RANK=str(options.rank))
    task = {
        **_task(options),
        "rank": options.rank,
        "address": host,
        "port": int(port) + 1,
        "listen": "0.0.0.0",
    }
    if options.rank == 1:
        run_party(task, lambda _: None)
        return True
    collector = party.Collector(results, options.name, None, None, options.threads)
    ended_well = True
    try:
        run_party(task, collector.take)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        ended_well = False
        print(f"error: {error}; finished samples are kept", file=sys.stderr)
        results.skip(Skipped("", "", "", options.name, str(error)))
    finally:
        collector.flush()
    return ended_well


def _task(options: argparse.Namespace) -> dict[str, Any]:
    names = (
        *("models", "protocols", "channels", "batch", "threads", "provider"),
        *("repeat", "fill_s", "limit_s"),
    )
    return {name: getattr(options, name) for name in names}


def make_parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet18"])
    names = protocols()
    parser.add_argument("--protocols", nargs="+", choices=names, default=names)
    parser.add_argument("--channels", nargs="+", choices=CHANNELS, default=CHANNELS)
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument(
        "--world-size", type=int, default=2, choices=(2,), help="two parties, always"
    )
    parser.add_argument(
        "--multiprocess",
        action="store_true",
        help="both parties on this machine: the default without --rank",
    )
    parser.add_argument("--rank", type=int, choices=(0, 1), help="two hosts: which one")
    parser.add_argument("--rendezvous", help="two hosts: HOST:PORT of rank 0")
    parser.add_argument("--name", default="hosts", help="two hosts: name in the rows")
    add_run_options(parser, networks=("loopback", "wan"), repeat=5)
    parser.add_argument("--party", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.party:
        from . import party

        run_party(json.loads(options.party), party.emit_line)
        party.leave()
    if (options.rank is None) != (options.rendezvous is None):
        parser.error("--rank and --rendezvous go together, one command on each host")
    if options.multiprocess and options.rank is not None:
        parser.error("--multiprocess starts both parties here; leave --rank out")
    from .party import run_on_networks

    results = Results(options.json)
    try:
        if options.rank is not None:
            ended_well = _run_on_two_hosts(results, options)
        else:
            ended_well = run_on_networks(
                results,
                options.networks,
                module="benchmarks.inference",
                task=_task(options),
                provider=options.provider,
                threads=options.threads,
                idle_restart=not options.warm,
                timeout_s=options.timeout_s,
            )
        if options.plot and results.rows:
            plot_dots(results.rows, options.plot)
        return finish(results, options, ended_well=ended_well)
    except (link.PathError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished rows are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
