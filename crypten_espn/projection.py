"""What private inference of a network would cost: rounds, bytes, seconds, money.

1. `workload` reads a network: its linear layers, activations and masked plan. Weights
   do not matter, so they are set to zero and every network has a plan.
2. `engine_costs` derives rounds and bytes from the plan, from each protocol's declared
   cost and from CrypTen's circuits. These are exact.
3. `EngineCost.online_s` and `offline_s` add computation on a `Processor`, delays, and
   bytes at the line's rate. These are estimates.
4. `capacities` and `per_million` project a deployment: clients, one server, one dealer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from .channel import packed_bytes
from .convert import PrivateNetwork
from .cost import GLOO_DELAYS, PAYLOAD, RING_BYTES, Cost, Traffic
from .errors import ConversionError, EspnError, PlanError, ShapeError
from .graph import POLYNOMIAL_OP, NetworkGraph, layer_name, read, simplify
from .masked.material import record_bytes
from .masked.online import message_sizes
from .masked.plan import Plan
from .masked.planner import make_plan
from .nn import PolynomialActivation
from .pillar.networks import NETWORKS
from .pillar.storage import load_network
from .polynomial import Polynomial
from .processor import Processor
from .protocols import PROTOCOLS, settings

MASKED, RELU = "masked", "crypten-relu"
GLOO = f"{RELU}-gloo"
ENGINES = (MASKED, *PROTOCOLS, RELU, GLOO)
ALIASES = {"minionn": "mini_onn"}
MILLION = 1_000_000

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

_LINEAR = ("Conv", "Gemm")
_LOCAL = (
    "Add", "AveragePool", "GlobalAveragePool", "Flatten", "Concat", "Pad", "Scale",
)  # fmt: skip


# ------------------------------------------------------------------- what is computed


@dataclass(frozen=True)
class Linear:
    """A layer with secret weights; elements of one input image.

    Args:
        name: the layer.
        inputs, weights, outputs: ring elements.
        macs: multiply-accumulates.
    """

    name: str
    inputs: int
    weights: int
    outputs: int
    macs: int


@dataclass(frozen=True)
class Nonlinear:
    """An activation of `elements` values of one image."""

    name: str
    elements: int
    polynomial: Polynomial


@dataclass(frozen=True)
class Workload:
    """What one private inference of a network has to compute.

    Args:
        name: of the network.
        input_shape: of one image, without the batch.
        logits: elements of the result.
        linear, nonlinear: the layers that cost something.
        plan: the masked engine's; its scales are those of zero weights.
        unplanned: why there is no plan; None if there is one.
    """

    name: str
    input_shape: tuple[int, ...]
    logits: int
    linear: tuple[Linear, ...]
    nonlinear: tuple[Nonlinear, ...]
    plan: Plan | None
    unplanned: str | None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(layer.macs for layer in self.linear)

    @property
    def activations(self) -> int:
        """Activations of one image."""
        return sum(layer.elements for layer in self.nonlinear)


def workload(
    network: str,
    *,
    input_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    degree: int = 4,
    precision: str = "fast",
) -> Workload:
    """Read a network by name or file and count what it computes.

    1. Build or load it; in inference form, batch-norm folded.
    2. Put a polynomial of this degree where it has a ReLU.
    3. Set its weights to zero and plan it: the plan's bytes hang on shapes,
       polynomials and ring alone.

    Args:
        network: one of pillar.networks, or a .safetensors or .onnx file.
        input_shape: (channels, height, width); the network's own when None. An .onnx
            file needs it, a .safetensors file brings it.
        classes: of a network given by name.
        degree: of the polynomials in place of ReLU.
        precision: as `masked.planner.make_plan`.

    Raises:
        EspnError: unknown network, or options that it does not take.
        ShapeError: the network does not take this shape.
        ConversionError: a layer whose cost is not known here.
    """
    model, shape = _model(network, input_shape, classes)
    example = torch.zeros(1, *shape)
    graph = read(model, example)
    simplify(graph)
    relu = Polynomial.fit(torch.relu, degree=degree, frac_bits=10)
    _without_relu(graph, relu)
    linear = tuple(_linear_layers(graph))
    nonlinear = tuple(
        Nonlinear(
            layer_name(node),
            _elements(graph, node.output),
            PolynomialActivation.from_onnx(node.attributes).polynomial,
        )
        for node in graph.nodes
        if node.op == POLYNOMIAL_OP
    )
    plan, unplanned = None, None
    for node in graph.nodes:
        if node.op in _LINEAR:
            for name in node.inputs[1:]:
                graph.constants[name] = np.zeros_like(graph.constants[name])
    try:
        private = PrivateNetwork(graph, example=example, protocol=None, truncation=None)
        plan = make_plan(private, example, precision=precision)
    except PlanError as error:
        unplanned = str(error)
    logits = _elements(graph, graph.output)
    return Workload(network, shape, logits, linear, nonlinear, plan, unplanned)


def _model(
    network: str, shape: tuple[int, ...] | None, classes: int | None
) -> tuple[torch.nn.Module | Path, tuple[int, ...]]:
    path = Path(network)
    if path.suffix in (".onnx", ".safetensors"):
        if classes is not None:
            raise EspnError(
                f"--classes {classes}: {path.name} fixes its classes; leave it out"
            )
        if path.suffix == ".onnx":
            if shape is None:
                raise EspnError(
                    f"{path.name} needs --shape, one input without the batch, such as "
                    "--shape 3,224,224"
                )
            return path, shape
        loaded = load_network(path)
        if shape not in (None, loaded.input_shape):
            raise ShapeError(
                f"--shape {shape}: {path.name} takes {loaded.input_shape}; leave it out"
            )
        return loaded.eval(), loaded.input_shape
    build = NETWORKS.get(ALIASES.get(network, network))
    if build is None:
        raise EspnError(
            f"network {network!r}: give one of {', '.join([*ALIASES, *NETWORKS])}, or "
            "a file that ends in .safetensors or .onnx"
        )
    options = {} if classes is None else {"classes": classes}
    if shape is not None:
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ShapeError(
                f"--shape {shape}: {network} takes channels and a square image, such "
                "as 3,32,32; export other shapes to .onnx"
            )
        options |= {"in_channels": shape[0], "size": shape[1]}
    built = build(**options)
    return built.eval(), built.input_shape


def _without_relu(graph: NetworkGraph, polynomial: Polynomial) -> None:
    """Replace ReLU by the polynomial; refuse what has no known cost, all at once."""
    known = (*_LINEAR, *_LOCAL, POLYNOMIAL_OP, "Relu")
    unknown = sorted({node.op for node in graph.nodes if node.op not in known})
    if unknown:
        raise ConversionError(
            f"the cost of {', '.join(unknown)} is not known; `crypten-espn check` "
            "names each layer with its cure, such as replace_pooling for max-pools"
        )
    for node in graph.nodes:
        if node.op == "Relu":
            node.op = POLYNOMIAL_OP
            node.attributes = {
                "numerators": list(polynomial.numerators),
                "frac_bits": polynomial.frac_bits,
                "interval": list(polynomial.interval),
            }


def _linear_layers(graph: NetworkGraph) -> Iterator[Linear]:
    for node in graph.nodes:
        if node.op in _LINEAR:
            weight = graph.constants[node.inputs[1]]
            outputs = _elements(graph, node.output)
            yield Linear(
                layer_name(node),
                _elements(graph, node.inputs[0]),
                weight.size,
                outputs,
                outputs * weight.size // weight.shape[0],
            )


def _elements(graph: NetworkGraph, value: str) -> int:
    return math.prod(graph.shapes[value][1:])


# ------------------------------------------------------------------- what it costs


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
        return sum(getattr(self, n) / getattr(processor, n) for n in names)


@dataclass(frozen=True)
class EngineCost:
    """What one inference of a batch costs under one engine.

    Args:
        engine: one of ENGINES.
        batch: images of the inference.
        traffic: online, between rank 0 (server) and rank 1 (client).
        dealer_bytes: offline, from the dealer to the server.
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
    client_bytes: int
    once_bytes: int
    stored: tuple[int, int]
    online: Load
    server: Load
    client: Load
    dealer: Load

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
        sends its own over its path; the server takes in both.
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
    work: Workload, *, batch: int = 1, truncation: str = "local"
) -> list[EngineCost]:
    """Every engine's cost of one inference; the masked one only where it has a plan.

    Args:
        work: the network.
        batch: images at once.
        truncation: of the CrypTen protocols, "local" or "exact".

    Raises:
        EspnError: a batch below 1.
        ProtocolError: an unknown truncation.
    """
    if batch < 1:
        raise EspnError(f"batch {batch}: give 1 or more images")
    costs = [] if work.plan is None else [_masked(work, work.plan, batch)]
    for name in PROTOCOLS:
        with settings(protocol=name, truncation=truncation) as chosen:
            declared, stored = Cost(), 0
            for layer in work.nonlinear:
                count = batch * layer.elements
                cost = chosen.cost(layer.polynomial, count)
                declared += cost
                stored += count * _stored_words(name, layer.polynomial.degree)
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


def _masked(work: Workload, plan: Plan, batch: int) -> EngineCost:
    down, up = (
        sum(size for sender, size in message_sizes(plan, batch=batch) if sender == rank)
        for rank in (0, 1)
    )
    halves = values = 0
    for segment in plan.segments:
        if segment.activation is not None:
            count = batch * segment.elements
            halves += packed_bytes(count, segment.ring)
            values += count * segment.activation.values
    dealt = plan.dealer_bytes(batch=batch)
    macs = batch * work.macs
    # A share of each value, and per opening a mask and the linear part's share.
    drawn = 2 * values + 2 * batch * sum(s.elements for s in plan.segments)
    online = Load(macs32=macs, values=values, stream=down + up, messages=plan.messages)
    server, client = (record_bytes(plan, rank, batch) for rank in (0, 1))
    return EngineCost(
        MASKED,
        batch,
        Traffic(plan.messages, (down, up), alternating=True),
        dealt,
        halves,
        sum(packed_bytes(math.prod(w.shape), w.ring) for w in plan.weights),
        (server, client),
        online,
        replace(online, stream=down + up + dealt + halves),
        Load(macs32=macs, values=values, dealt=drawn, stream=down + up + halves),
        Load(macs32=macs, dealt=drawn, stream=dealt),
    )


def _crypten(
    engine: str, work: Workload, batch: int, declared: Cost, stored: int
) -> EngineCost:
    """A Beaver product for each linear layer, activations as declared, one reveal.

    A linear layer opens its input and its weights under masks a and b, of which the
    parties hold a, b and the product; the dealer corrects the product.
    """
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
        0,
        0,
        (RING_BYTES * words, RING_BYTES * words),
        online,
        party + Load(stream=corrections),
        party,
        # The dealer expands both parties' seeds to find the product's correction.
        Load(macs64=macs, dealt=2 * words, stream=corrections),
    )


def _stored_words(protocol: str, degree: int) -> int:
    """Words a party keeps for one activation element."""
    if degree < 2:
        return 0
    if protocol == "espn":
        return degree  # n - 1 masks and a share of the sum of products
    if protocol == "opened_mask":
        return degree  # n powers of the mask
    words, known = 2, 2  # the square's
    while known < degree:
        added = min(known, degree - known)
        words += 2 * added + 1
        known += added
    return words


# ------------------------------------------------------------------- a deployment


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

    The server's figures include what it receives and adds up offline.
    """
    down, up = cost.traffic.bytes_sent
    online = cost.online_s(
        processor,
        rtt_s=deployment.rtt_s,
        bits_per_second=deployment.bits_per_second,
    )
    received = max(down, up + cost.client_bytes + cost.dealer_bytes)
    seconds = {
        "clients": online / deployment.clients,
        "server cores": cost.server.seconds(processor) / deployment.server_cores,
        "server line": 8 * received / (PAYLOAD * deployment.server_bits),
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
