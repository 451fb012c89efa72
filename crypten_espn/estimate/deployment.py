"""Many clients with one server and one dealer: what holds them back, and the price."""

from __future__ import annotations

from dataclasses import dataclass

from ..cost import PAYLOAD
from .engines import EngineCost
from .processor import Processor

MILLION = 1_000_000


@dataclass(frozen=True)
class Deployment:
    """Many clients with one server and one dealer. Every figure is an assumption.

    Args:
        rtt_s, bits_per_second: each client's path to the server, rate each way.
        clients: each with one inference at a time, on material prepared before.
        server_cores, dealer_cores: all as fast as the processor given.
        server_bits, dealer_bits: rate each way of the server's and the dealer's line.
        core_hour, gigabyte_egress, gigabyte_month: prices, in any one currency.
        storage_days: how long prepared material lies at the server.
    """

    rtt_s: float
    bits_per_second: float
    clients: int = 100
    server_cores: int = 16
    dealer_cores: int = 16
    server_bits: float = 10e9
    dealer_bits: float = 10e9
    core_hour: float = 0.05
    gigabyte_egress: float = 0.05
    gigabyte_month: float = 0.02
    storage_days: float = 1.0


def capacities(
    cost: EngineCost, processor: Processor, deployment: Deployment
) -> dict[str, float]:
    """Images a second that each part of a deployment can sustain; the least counts.

    The server's figures include what it receives and adds up offline; so does a
    client's line, which may take longer than its inference.
    """
    down, _ = cost.traffic.bytes_sent
    server, client = cost.received
    online = cost.online_s(
        processor,
        rtt_s=deployment.rtt_s,
        bits_per_second=deployment.bits_per_second,
    )
    download = 8 * client / (PAYLOAD * deployment.bits_per_second)
    seconds = {
        "clients": max(online, download) / deployment.clients,
        "server cores": cost.server.seconds(processor) / deployment.server_cores,
        "server line": 8 * max(down, server) / (PAYLOAD * deployment.server_bits),
        "dealer cores": cost.dealer.seconds(processor) / deployment.dealer_cores,
        "dealer line": 8 * cost.dealer_bytes / (PAYLOAD * deployment.dealer_bits),
    }
    return {part: cost.batch / each for part, each in seconds.items()}


@dataclass(frozen=True)
class Bill:
    """What a million images take, weights opened once per client left out.

    Args:
        server_bytes, client_bytes: prepared material, if all of it is kept at once.
        core_hours: of server and dealer; the clients' own are not counted.
        egress_bytes: what server and dealer send.
        price: core hours, egress, and the server's storage for the days it lies there.
    """

    server_bytes: float
    client_bytes: float
    core_hours: float
    egress_bytes: float
    price: float


def per_million(cost: EngineCost, processor: Processor, deployment: Deployment) -> Bill:
    """What a million images take under this engine."""
    times = MILLION / cost.batch
    hours = times * (cost.server + cost.dealer).seconds(processor) / 3600
    egress = times * (cost.traffic.bytes_sent[0] + cost.dealer_bytes)
    server, client = (times * size for size in cost.stored)
    months = deployment.storage_days / 30
    price = (
        hours * deployment.core_hour
        + egress / 1e9 * deployment.gigabyte_egress
        + server / 1e9 * months * deployment.gigabyte_month
    )
    return Bill(server, client, hours, egress, price)
