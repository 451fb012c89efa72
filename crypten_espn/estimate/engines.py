"""What each engine spends on one inference: rounds, bytes, work, seconds.

Rounds and bytes follow from the plan, from each protocol's declared cost and from
CrypTen's circuits; they are exact. Seconds add computation on a `Processor`, delays,
and bytes at the line's rate; they are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..cost import GLOO_DELAYS, PAYLOAD, RING_BYTES, Cost, Traffic
from ..errors import EspnError
from ..masked.inference import online_bytes
from ..masked.material import client_layout, layout_bytes, server_layout
from ..masked.messages import CLIENT, SERVER, Party
from ..masked.plan import Plan
from ..protocols import PROTOCOLS, settings
from ..protocols.beaver import product_cost
from .processor import Processor
from .workload import Workload

MASKED, RELU = "masked", "crypten-relu"
GLOO = f"{RELU}-gloo"

# CrypTen's ReLU of one element: x [x > 0]. The sign comes from a 64-bit adder (one AND,
# then 6 levels of two), one bit is brought back to the ring, one product is left.
_ANDS = 1 + 2 * 6
RELU_ROUNDS = 1 + 6 + 1 + 1
RELU_WORDS = 2 * _ANDS + 1 + 2  # opened by each party
_RELU_CORRECTIONS = _ANDS + 1 + 1
_RELU_STORED = 3 * _ANDS + 2 + 3  # a triple is three words, a bit is shared twice

# CrypTen's Python around one opening, 1.1 ms on the reference core, and what gloo adds,
# 2.3 ms, in calls of `Processor`: fitted to 48 networks measured over loopback.
_OPENING_CALLS, _COLLECTIVE_CALLS = 900, 1900


def engines() -> tuple[str, ...]:
    """The names of every engine whose cost is known."""
    return (MASKED, *PROTOCOLS, RELU, GLOO)


@dataclass(frozen=True)
class Load:
    """Work in the units of `Processor`."""

    macs32: int = 0
    macs64: int = 0
    values: int = 0
    dealt: int = 0
    words: int = 0
    stream: int = 0
    messages: int = 0
    calls: int = 0

    def __add__(self, other: Load) -> Load:
        names = [f.name for f in fields(self)]
        return Load(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def seconds(self, processor: Processor) -> float:
        """Seconds on one core."""
        names = [f.name for f in fields(self)]
        return float(sum(getattr(self, n) / getattr(processor, n) for n in names))


@dataclass(frozen=True)
class EngineCost:
    """What one inference of a batch costs under one engine.

    Args:
        engine: one of `engines()`.
        batch: images of the inference.
        traffic: online, between rank 0 (server) and rank 1 (client).
        dealer_bytes: offline, from the dealer to one of the two.
        corrections: to which.
        client_bytes: offline, from the client to the server.
        once_bytes: from the server to the client once per model and client.
        stored: bytes of prepared material at the server and at the client.
        online: work one after another in the online phase.
        server, client, dealer: work of each in both phases.
    """

    engine: str
    batch: int
    traffic: Traffic
    dealer_bytes: int
    corrections: Party
    client_bytes: int
    once_bytes: int
    stored: tuple[int, int]
    online: Load
    server: Load
    client: Load
    dealer: Load

    @property
    def received(self) -> tuple[int, int]:
        """Bytes that server and client receive in both phases, without `once_bytes`."""
        down, up = self.traffic.bytes_sent
        dealt = [
            self.dealer_bytes if self.corrections == party else 0
            for party in (SERVER, CLIENT)
        ]
        return up + self.client_bytes + dealt[0], down + dealt[1]

    def online_s(
        self, processor: Processor, *, rtt_s: float, bits_per_second: float
    ) -> float:
        """Seconds from the client's input to its logits on a warm connection."""
        return self.traffic.seconds_at(
            rtt_s=rtt_s,
            bits_per_second=bits_per_second,
            seconds=self.online.seconds(processor),
        )

    def offline_s(
        self,
        processor: Processor,
        *,
        rtt_s: float,
        bits_per_second: float,
        dealer_bits: float,
    ) -> float:
        """Seconds to prepare one inference when nothing overlaps.

        The dealer makes and sends its part over a line of `dealer_bits`, the client
        sends its own over its path; the server takes it in.
        """
        sent = self.dealer_bytes + self.client_bytes
        work = (self.dealer + Load(stream=sent)).seconds(processor)
        work += 8 * self.dealer_bytes / (PAYLOAD * dealer_bits)
        message = Traffic(1, (0, self.client_bytes), alternating=True)
        return message.seconds_at(
            rtt_s=rtt_s, bits_per_second=bits_per_second, seconds=work
        )

    def over_gloo(self) -> EngineCost:
        """The same over CrypTen's own channel, where an opening is a collective."""
        waiting = Load(calls=_COLLECTIVE_CALLS * self.traffic.rounds)
        return replace(
            self,
            traffic=replace(self.traffic, delays=GLOO_DELAYS),
            online=self.online + waiting,
            server=self.server + waiting,
            client=self.client + waiting,
        )


def engine_costs(
    work: Workload,
    *,
    batch: int = 1,
    truncation: str = "local",
    corrections: Party = SERVER,
) -> list[EngineCost]:
    """Every engine's cost of one inference; the masked one only where it has a plan.

    Args:
        work: the network.
        batch: images at once.
        truncation: of the CrypTen protocols, "local" or "exact".
        corrections: who receives the masked engine's from the dealer.

    Raises:
        EspnError: a batch below 1.
        ProtocolError: an unknown truncation.
    """
    if batch < 1:
        raise EspnError(f"batch {batch}: give 1 or more images")
    costs = []
    if work.plan is not None:
        costs.append(_masked(work, work.plan, batch, corrections))
    for name, protocol in PROTOCOLS.items():
        with settings(protocol=name, truncation=truncation) as chosen:
            declared, stored = Cost(), 0
            for layer in work.nonlinear:
                count = batch * layer.elements
                cost = chosen.cost(layer.polynomial, count)
                declared += cost
                stored += count * protocol.stored_words(layer.polynomial.degree)
                if chosen.exact(2):
                    stored += count * 3
        costs.append(_crypten(name, work, batch, declared, stored))
    relus = batch * work.activations
    declared = Cost(
        RELU_ROUNDS * len(work.nonlinear),
        RING_BYTES * RELU_WORDS * relus,
        _RELU_CORRECTIONS * relus,
    )
    relu = _crypten(RELU, work, batch, declared, _RELU_STORED * relus)
    return [*costs, relu, replace(relu.over_gloo(), engine=GLOO)]


def _masked(work: Workload, plan: Plan, batch: int, corrections: Party) -> EngineCost:
    down, up = online_bytes(plan, batch=batch)
    halves = plan.client_bytes(batch=batch)
    values = hidden = 0
    for between in plan.evaluations:
        values += batch * between.words
        hidden += batch * between.elements
    dealt = plan.dealer_bytes(batch=batch)
    macs = batch * work.macs
    # By the dealer for both: the halves of each word and linear part, and the client's
    # mask of each second opening.
    shared = values + hidden + batch * plan.elements(len(plan.steps))
    drawn = {SERVER: 0, CLIENT: hidden}
    drawn[CLIENT if corrections == SERVER else SERVER] += shared
    dealing = Load(macs32=macs, dealt=shared + hidden, stream=dealt)
    taken = {party: dealt if corrections == party else 0 for party in drawn}
    online = Load(macs32=macs, values=values, stream=down + up, messages=plan.messages)
    stored = tuple(
        layout_bytes(layout(plan, batch, corrections=corrections))
        for layout in (server_layout, client_layout)
    )
    return EngineCost(
        MASKED,
        batch,
        Traffic(plan.messages, (down, up), alternating=True),
        dealt,
        corrections,
        halves,
        plan.weight_bytes,
        (stored[0], stored[1]),
        online,
        replace(
            online,
            dealt=drawn[SERVER],
            stream=down + up + halves + taken[SERVER],
        ),
        Load(
            macs32=macs,
            values=values,
            dealt=drawn[CLIENT],
            stream=down + up + halves + taken[CLIENT],
        ),
        dealing,
    )


def _crypten(
    engine: str, work: Workload, batch: int, declared: Cost, stored: int
) -> EngineCost:
    """A Beaver product for each linear layer and each product, activations as declared.

    A linear layer opens its input and its weights under masks a and b, of which the
    parties hold a, b and the product; the dealer corrects the product. The result is
    revealed once.
    """
    for product in work.products:
        first, second = (batch * size for size in product.elements)
        declared += product_cost(first, second)
        stored += 2 * first + second
    inputs = batch * sum(layer.inputs for layer in work.linear)
    weights = sum(layer.weights for layer in work.linear)
    outputs = batch * sum(layer.outputs for layer in work.linear)
    logits = batch * work.logits
    opened = inputs + weights + declared.bytes_sent // RING_BYTES
    words = inputs + weights + outputs + stored
    corrections = RING_BYTES * (outputs + declared.offline_elements)
    traffic = Traffic(
        len(work.linear) + declared.rounds + 1,
        (RING_BYTES * (opened + logits), RING_BYTES * opened),
        alternating=False,
    )
    macs = batch * work.macs
    online = Load(
        macs64=3 * macs,
        words=opened,
        stream=sum(traffic.bytes_sent),
        messages=traffic.rounds,
        calls=_OPENING_CALLS * traffic.rounds,
    )
    party = online + Load(dealt=words)
    return EngineCost(
        engine,
        batch,
        traffic,
        corrections,
        SERVER,
        0,
        0,
        (RING_BYTES * words, RING_BYTES * words),
        online,
        party + Load(stream=corrections),
        party,
        # The dealer expands both parties' seeds to find the product's correction.
        Load(macs64=macs, dealt=2 * words, stream=corrections),
    )
