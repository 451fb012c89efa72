"""One activation layer: every protocol, under delay, over gloo and a direct channel.

Two parties hold shares of as many values as asked for and evaluate one activation;
the clock runs from a common start until the slower party holds its share of the
result. Correlated randomness is made before, and timed as the offline phase.

    python -m benchmarks.activations
    python -m benchmarks.activations --points 32768 --networks loopback wan \\
        --protocols espn opened_mask crypten-relu --json out/activations.json
    python -m benchmarks.activations --networks 100ms --channels direct --repeat 21

Protocols: espn, opened_mask and beaver are this package's, with local truncation;
"-exact" appended, with exact truncation. crypten-relu is CrypTen's comparison circuit,
crypten-polynomial its own polynomial of the same coefficients. masked is a network of
nothing but this activation under the masked engine: from values at one party to results
at the same, so two of its four messages are input and output. By default the round
trip goes from 0 to 100 ms with no limit on the rate. Root is needed for any network
but loopback; see `python -m benchmarks.wan --help`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import link
from .options import add_run_options, finish
from .plots import plot_lines
from .rows import Results, ResultsError, Row, Spread

CRYPTEN_PROTOCOLS = ("crypten-polynomial", "crypten-relu")
NETWORKS = ("loopback", "25ms", "50ms", "75ms", "100ms")
CHANNELS = ("direct", "gloo")
FRAC_BITS = 10  # of the coefficients, as in the recipes


def protocols(*, exact: bool) -> tuple[str, ...]:
    """What --protocols takes, or without the exact ones, its default."""
    from crypten_espn.protocols import PROTOCOLS

    also = (f"{name}-exact" for name in PROTOCOLS if exact)
    return ("masked", *PROTOCOLS, *also, *CRYPTEN_PROTOCOLS)


# ---------------------------------------------------------------------- in the parties


def run_party(task: dict[str, Any]) -> None:
    """Measure the task's protocols in this party."""
    from . import party

    if task["rank"] == 2:
        party.deal()
        return
    import torch

    from crypten_espn.polynomial import Polynomial

    from .masked import MaskedSystem

    control = party.Control(task["rank"], task["address"], task["port"])
    polynomial = Polynomial.fit(torch.relu, degree=task["degree"], frac_bits=FRAC_BITS)
    generator = torch.Generator().manual_seed(2)
    x = 10 * torch.rand(task["points"], generator=generator) - 5
    systems: list[party.System] = []
    with party.crypten_channels(
        task["address"], threads=task["threads"], provider=task["provider"]
    ) as channels:
        import crypten

        shared = crypten.cryptensor(x, src=0)
        traces: dict[str, Any] = {}
        for name in task["protocols"]:
            if name == "masked":
                network, image, check = _alone(x, polynomial)
                systems.append(
                    MaskedSystem(
                        network,
                        image,
                        image,
                        control,
                        address=task["address"],
                        listen=task["address"],
                        threads=task["threads"],
                        check=check,
                    )
                )
                continue
            systems += [
                party.CryptenSystem(
                    name,
                    channel,
                    channels[channel],
                    *_computation(name, shared, x, polynomial),
                    traces=traces,
                    reveal=True,
                    select=functools.partial(_select, name),
                )
                for channel in task["channels"]
            ]
        try:
            party.measure(
                systems,
                control,
                model=f"activation[{task['points']}]",
                batch=1,
                repeat=task["repeat"],
                fill_s=task["fill_s"],
                limit_s=task["limit_s"],
                emit=party.emit_line,
            )
        finally:
            for system in systems:
                system.close()
    control.close()


def _alone(x: Any, polynomial: Any) -> tuple[Any, Any, Any]:
    """A network of one activation, its input, and the check of its output."""
    import torch

    import crypten_espn

    relu = torch.nn.Sequential(torch.nn.ReLU())
    network = crypten_espn.replace_activations(relu, {torch.nn.ReLU: polynomial})
    image = x.reshape(1, -1)
    expected = polynomial(image)

    def check(plain: Any) -> tuple[float, None]:
        return float((plain - expected).abs().max()), None

    return network.eval(), image, check


def _select(name: str) -> None:
    """Set the protocol for good: a `with settings()` per call would be timed too."""
    import crypten

    from crypten_espn.protocols import PROTOCOLS

    protocol = name.removesuffix("-exact")
    if protocol in PROTOCOLS:
        crypten.cfg.espn.protocol = protocol
        crypten.cfg.espn.truncation = "local" if protocol == name else "exact"


def _computation(name: str, shared: Any, x: Any, polynomial: Any) -> tuple[Any, Any]:
    """The online phase of one protocol, and the check of its revealed result."""
    import torch

    from crypten_espn.protocols import polyval

    if name == "crypten-relu":
        expected = torch.relu(x)

        def compute() -> Any:
            return shared.relu()

    elif name == "crypten-polynomial":
        expected = polynomial(x)
        constant, *coeffs = polynomial.coeffs

        def compute() -> Any:
            return shared.polynomial(coeffs) + constant

    else:
        expected = polynomial(x)

        def compute() -> Any:
            return polyval(shared, polynomial)

    def check(plain: Any) -> tuple[float, None]:
        return float((plain - expected).abs().max()), None

    return compute, check


# ----------------------------------------------------------------------- in the parent


def plot(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Seconds against round trip, one figure per channel; the files written."""
    files = []
    for channel in CHANNELS:
        series: dict[str, list[tuple[float, Spread]]] = {}
        for row in rows:
            own = row.engine.partition("+")[2] or "direct"  # what the masked engine has
            if own == channel and row.mbit is None:
                series.setdefault(row.activation, []).append((row.rtt_ms, row.online_s))
        if not series:
            continue
        files += plot_lines(
            stem.with_name(f"{stem.name}-{channel}"),
            {
                name: sorted(points, key=lambda p: p[0])
                for name, points in series.items()
            },
            title=f"{rows[0].model}, online, over {channel}",
            x_label="round trip, ms",
            y_label="seconds (median, 95 % interval)",
        )
    return files


def make_parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.activations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--points", type=int, default=32768, help="values in the layer")
    parser.add_argument("--degree", type=int, default=4, help="of the polynomial")
    parser.add_argument(
        "--protocols",
        nargs="+",
        choices=protocols(exact=True),
        default=protocols(exact=False),
    )
    parser.add_argument("--channels", nargs="+", choices=CHANNELS, default=CHANNELS)
    add_run_options(parser, networks=NETWORKS, repeat=11)
    parser.add_argument("--party", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    from .party import leave, run_on_networks

    options = make_parser().parse_args(arguments)
    if options.party:
        run_party(json.loads(options.party))
        leave()

    results = Results(options.json)
    names = (
        *("points", "degree", "protocols", "channels", "provider", "threads"),
        *("repeat", "fill_s", "limit_s"),
    )
    task = {name: getattr(options, name) for name in names}
    try:
        ended_well = run_on_networks(
            results,
            options.networks,
            module="benchmarks.activations",
            task=task,
            provider=options.provider,
            threads=options.threads,
            idle_restart=not options.warm,
            timeout_s=options.timeout_s,
        )
        if options.plot and results.rows:
            plot(results.rows, Path(options.plot))
        return finish(results, options, ended_well=ended_well)
    except (link.PathError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished rows are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
