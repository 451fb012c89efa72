"""A projection as tables for a reader, and as plain values for a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..masked.messages import CLIENT, SERVER
from ..table import aligned
from .deployment import Deployment, capacities, per_million
from .engines import EngineCost
from .processor import Processor
from .workload import Workload

# One engine's numbers by name, as a file holds them.
Row = dict[str, Any]


@dataclass(frozen=True)
class Projection:
    """What each engine costs in a deployment; printed as tables.

    Args:
        work: what is computed.
        costs: one engine's each, of one batch.
        processor: what its cores do in a second, measured here or as given.
    """

    work: Workload
    costs: list[EngineCost]
    processor: Processor
    deployment: Deployment
    measured: bool

    def rows(self) -> list[Row]:
        """Return `row` of each engine."""
        return [row(cost, self.processor, self.deployment) for cost in self.costs]

    def to_json(self) -> str:
        """Return everything but the tables."""
        work = self.work
        content = {
            "network": {
                "name": work.name,
                "input_shape": work.input_shape,
                "macs": work.macs,
                "weights": sum(layer.weights for layer in work.linear),
                "activations": work.activations,
                "unplanned": work.unplanned,
            },
            "processor": {"measured": self.measured, **asdict(self.processor)},
            "deployment": asdict(self.deployment),
            "rows": self.rows(),
        }
        return json.dumps(content, indent=2) + "\n"

    def __str__(self) -> str:
        return _text(self)


def row(cost: EngineCost, processor: Processor, deployment: Deployment) -> Row:
    """Everything about one engine as plain values."""
    path = {"rtt_s": deployment.rtt_s, "bits_per_second": deployment.bits_per_second}
    lines = {
        SERVER: deployment.server_bits,
        CLIENT: deployment.bits_per_second,
    }
    dealt = min(deployment.dealer_bits, lines[cost.corrections])
    capacity = capacities(cost, processor, deployment)
    bottleneck = min(capacity, key=capacity.__getitem__)
    return {
        "engine": cost.engine,
        "batch": cost.batch,
        "rounds": cost.traffic.rounds,
        "bytes_sent": cost.traffic.bytes_sent,
        "dealer_bytes": cost.dealer_bytes,
        "corrections": cost.corrections,
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


def _text(found: Projection) -> str:
    work, d, processor = found.work, found.deployment, found.processor
    rows, measured = found.rows(), found.measured
    degrees = sorted({layer.polynomial.degree for layer in work.nonlinear})
    batch = rows[0]["batch"] if rows else 1
    # What is computed, and where.
    lines = [
        f"{work.name}, input {'x'.join(map(str, work.input_shape))}, batch {batch}: "
        f"{work.macs / 1e9:.3g} G multiply-accumulates, "
        f"{sum(layer.weights for layer in work.linear) / 1e6:.3g} M weights and "
        f"{work.activations / 1e6:.3g} M activations in {len(work.nonlinear)} layers "
        f"of degree {', '.join(map(str, degrees)) or '-'}"
        + (f", {len(work.products)} private products" if work.products else ""),
        f"path {d.rtt_s * 1e3:g} ms, {d.bits_per_second / 1e6:g} Mbit/s each way; one "
        f"core of {processor.macs32 / 1e9:.3g} G 32-bit multiply-accumulates/s "
        f"({'measured here' if measured else 'as given, other rates in proportion'})",
    ]
    if work.unplanned is not None:
        lines.append(f"masked engine: no plan. {work.unplanned}")
    # Three tables with a row an engine: an inference, what limits many, their price.
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
        sizes = (
            down,
            up,
            *(line[f"{n}_bytes"] for n in ("dealer", "client", "once")),
        )
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
        "drop follows calibration, a few bits an activation. The dealer's bytes go to "
        f"{_receivers(rows)}. Seconds are estimates of one inference alone, on one "
        "core; after silence TCP starts slowly.",
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


def _receivers(rows: list[Row]) -> str:
    """Who receives the dealer's bytes, engine by engine where that differs."""
    by_client = [row["engine"] for row in rows if row["corrections"] == CLIENT]
    if not by_client:
        return "the server"
    others = ", the others' to the server" if len(rows) > len(by_client) else ""
    return f"the client for {', '.join(by_client)}{others}"


_PARTS = ("clients", "server cores", "server line", "dealer cores", "dealer line")


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if value >= 1000 else text
