"""`crypten-espn estimate`: a projection's options, tables and file."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import EspnError
from ..pillar.networks import NETWORKS
from ..pillar.storage import BUNDLED
from ..protocols import TRUNCATIONS
from ..table import aligned
from .deployment import Deployment, capacities, per_million
from .engines import EngineCost, engine_costs, engines
from .processor import REFERENCE, Processor, calibrate
from .workload import ALIASES, Workload, workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `estimate`, all but --shape, to a parser for `run`."""
    parser.add_argument(
        "network",
        help=f"one of {', '.join([*ALIASES, *NETWORKS])}; bundled: "
        f"{', '.join(BUNDLED)}; or a .safetensors or .onnx file",
    )
    for name, kind, default, text in (
        ("--classes", _whole, None, "of a network given by name"),
        ("--degree", _whole, 4, "of the polynomials in place of ReLU"),
        ("--batch", _whole, 1, "images in one inference"),
        ("--rtt", _not_negative, 100.0, "round trip of a client's path, ms"),
        ("--bandwidth", _positive, 100.0, "its rate each way, Mbit/s"),
        ("--macs", _positive, None, "10^9 32-bit multiply-accumulates a second of one "
         "core, 40 for Zen 4; other rates in proportion (default: all measured here)"),
        ("--clients", _whole, 100, "clients of one server"),
        ("--server-cores", _whole, 16, "its cores"),
        ("--server-bandwidth", _positive, 10_000.0, "its line each way, Mbit/s"),
        ("--dealer-cores", _whole, 16, "the dealer's cores"),
        ("--dealer-bandwidth", _positive, 10_000.0, "its line each way, Mbit/s"),
        ("--core-hour", _not_negative, 0.05, "price of a core for an hour"),
        ("--gigabyte-egress", _not_negative, 0.05, "price of a gigabyte sent"),
        ("--gigabyte-month", _not_negative, 0.02, "price of a gigabyte stored"),
        ("--storage-days", _not_negative, 1.0, "days that material lies prepared"),
    ):  # fmt: skip
        shown = "" if default is None else f" (default: {default:g})"
        parser.add_argument(name, type=kind, default=default, help=text + shown)
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=engines(),
        default=engines(),
        help="which ones, of " + ", ".join(engines()),
        metavar="ENGINE",
    )
    parser.add_argument(
        "--precision",
        choices=("fast", "high"),
        default="fast",
        help="the masked engine's linear layers: 32 or 40 bits (default: %(default)s)",
    )
    parser.add_argument(
        "--truncation",
        choices=TRUNCATIONS,
        default="local",
        help="of espn, opened_mask and beaver (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")


def run(args: argparse.Namespace) -> int:
    """Body of `crypten-espn estimate`: print the tables, write the file."""
    work = workload(
        args.network,
        input_shape=args.shape,
        classes=args.classes,
        degree=args.degree,
        precision=args.precision,
    )
    costs = [
        cost
        for cost in engine_costs(work, batch=args.batch, truncation=args.truncation)
        if cost.engine in args.engines
    ]
    measured = args.macs is None
    processor = calibrate() if measured else REFERENCE.scaled(1e9 * args.macs)
    deployment = Deployment(
        rtt_s=args.rtt / 1e3,
        bits_per_second=1e6 * args.bandwidth,
        clients=args.clients,
        server_cores=args.server_cores,
        dealer_cores=args.dealer_cores,
        server_bits=1e6 * args.server_bandwidth,
        dealer_bits=1e6 * args.dealer_bandwidth,
        core_hour=args.core_hour,
        gigabyte_egress=args.gigabyte_egress,
        gigabyte_month=args.gigabyte_month,
        storage_days=args.storage_days,
    )
    rows = [row(cost, processor, deployment) for cost in costs]
    print(_text(work, rows, processor, deployment, measured=measured))
    if args.json is not None:
        content = {
            "network": {
                "name": work.name,
                "input_shape": work.input_shape,
                "macs": work.macs,
                "weights": sum(layer.weights for layer in work.linear),
                "activations": work.activations,
                "unplanned": work.unplanned,
            },
            "processor": {"measured": measured, **asdict(processor)},
            "deployment": asdict(deployment),
            "rows": rows,
        }
        try:
            args.json.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise EspnError(
                f"--json {args.json} cannot be written ({error.strerror}); name a "
                "file in a folder that exists"
            ) from None
    return 0


def row(
    cost: EngineCost, processor: Processor, deployment: Deployment
) -> dict[str, Any]:
    """Everything about one engine as plain values."""
    path = {"rtt_s": deployment.rtt_s, "bits_per_second": deployment.bits_per_second}
    dealt = min(deployment.dealer_bits, deployment.server_bits)
    capacity = capacities(cost, processor, deployment)
    bottleneck = min(capacity, key=capacity.__getitem__)
    return {
        "engine": cost.engine,
        "batch": cost.batch,
        "rounds": cost.traffic.rounds,
        "bytes_sent": cost.traffic.bytes_sent,
        "dealer_bytes": cost.dealer_bytes,
        "client_bytes": cost.client_bytes,
        "once_bytes": cost.once_bytes,
        "stored_bytes": cost.stored,
        "offline_s": cost.offline_s(processor, **path, dealer_bits=dealt),
        "online_s": cost.online_s(processor, **path),
        "slow_start_s": cost.traffic.slow_start_s(**path),
        "images_per_s": capacity,
        "bottleneck": bottleneck,
        "per_million": asdict(per_million(cost, processor, deployment)),
    }


def _text(
    work: Workload,
    rows: list[dict[str, Any]],
    processor: Processor,
    deployment: Deployment,
    *,
    measured: bool,
) -> str:
    d = deployment
    degrees = sorted({layer.polynomial.degree for layer in work.nonlinear})
    batch = rows[0]["batch"] if rows else 1
    lines = [
        f"{work.name}, input {'x'.join(map(str, work.input_shape))}, batch {batch}: "
        f"{work.macs / 1e9:.3g} G multiply-accumulates, "
        f"{sum(layer.weights for layer in work.linear) / 1e6:.3g} M weights and "
        f"{work.activations / 1e6:.3g} M activations in {len(work.nonlinear)} layers "
        f"of degree {', '.join(map(str, degrees)) or '-'}",
        f"path {d.rtt_s * 1e3:g} ms, {d.bits_per_second / 1e6:g} Mbit/s each way; one "
        f"core of {processor.macs32 / 1e9:.3g} G 32-bit multiply-accumulates/s "
        f"({'measured here' if measured else 'as given, other rates in proportion'})",
    ]
    if work.unplanned is not None:
        lines.append(f"masked engine: no plan. {work.unplanned}")
    phases: list[tuple[str, ...]] = [
        ("engine", "rounds", "server MB", "client MB", "dealer MB", "offline client MB",
         "once MB", "offline s", "online s", "after silence s")
    ]  # fmt: skip
    limits: list[tuple[str, ...]] = [("engine", *_PARTS, "images/s, held by")]
    bills: list[tuple[str, ...]] = [
        ("engine", "server TB", "client TB", "core hours", "egress TB", "price")
    ]
    for line in rows:
        down, up = line["bytes_sent"]
        sizes = (down, up, *(line[f"{n}_bytes"] for n in ("dealer", "client", "once")))
        silent = line["online_s"] + line["slow_start_s"]
        seconds = (line["offline_s"], line["online_s"], silent)
        phases.append(
            (
                line["engine"],
                str(line["rounds"]),
                *(f"{size / 1e6:.2f}" for size in sizes),
                *map(_short, seconds),
            )
        )
        capacity, least = line["images_per_s"], line["bottleneck"]
        limits.append(
            (
                line["engine"],
                *(_short(capacity[part]) for part in _PARTS),
                f"{_short(capacity[least])}, {least}",
            )
        )
        bill = line["per_million"]
        bills.append(
            (
                line["engine"],
                _short(bill["server_bytes"] / 1e12),
                _short(bill["client_bytes"] / 1e12),
                _short(bill["core_hours"]),
                _short(bill["egress_bytes"] / 1e12),
                _short(bill["price"]),
            )
        )
    lines += [
        "",
        *aligned(phases, left=1),
        "Rounds and bytes are exact, but for the masked engine's openings: what they "
        "drop follows calibration, a few bits an activation. Seconds are estimates of "
        "one inference alone, on one core; after silence TCP starts slowly.",
        "",
        f"Assumed: {d.clients} such clients, a server of {d.server_cores} cores and "
        f"{d.server_bits / 1e6:g} Mbit/s, a dealer of {d.dealer_cores} cores and "
        f"{d.dealer_bits / 1e6:g} Mbit/s. Images/s that each part can sustain:",
        *aligned(limits, left=1),
        "",
        f"A million images, at assumed prices of {d.core_hour:g} a core hour, "
        f"{d.gigabyte_egress:g} a GB sent by server or dealer and "
        f"{d.gigabyte_month:g} a GB month, {d.storage_days:g} days of it:",
        *aligned(bills, left=1),
    ]
    return "\n".join(lines)


_PARTS = ("clients", "server cores", "server line", "dealer cores", "dealer line")


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if value >= 1000 else text


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 on")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give one like 100")
    return value


def _positive(text: str) -> float:
    if _number(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return float(text)


def _not_negative(text: str) -> float:
    if _number(text) < 0:
        raise argparse.ArgumentTypeError(f"{text}: give 0 or more")
    return float(text)
