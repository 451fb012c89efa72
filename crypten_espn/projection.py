"""What private inference of a network would cost: rounds, bytes, seconds, money.

1. `workload` reads a network: its linear layers, activations and masked plan. Weights
   do not matter, so they are set to zero and every network has a plan.
2. `engine_costs` derives rounds and bytes from the plan, from each protocol's declared
   cost and from CrypTen's circuits. These are exact.
3. `calibrate` measures this processor; `EngineCost.online_s` and `offline_s` add
   computation, delays and bytes at the line's rate. These are estimates.
4. `capacities` and `per_million` project a deployment: clients, one server, one dealer.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .channel import Channel, Listener, connect_channel, packed_bytes
from .convert import PrivateNetwork
from .cost import GLOO_DELAYS, PAYLOAD, RING_BYTES, Cost, Traffic
from .errors import ConversionError, EspnError, PlanError, ShapeError
from .masked import kernels
from .masked.material import record_bytes
from .masked.online import message_sizes
from .masked.plan import Plan
from .masked.planner import make_plan
from .nn import PolynomialActivation
from .onnx_graph import POLYNOMIAL_OP, NetworkGraph, layer_name, read
from .pillar.networks import NETWORKS
from .pillar.storage import load_network
from .polynomial import Polynomial
from .protocols import PROTOCOLS, TRUNCATIONS, settings
from .randomness import Keystream
from .table import aligned

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
    graph.simplify()
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


# ------------------------------------------------------------------- this processor


@dataclass(frozen=True)
class Processor:
    """What one core does in a second.

    Args:
        macs32: multiply-accumulates of the masked engine's convolution.
        macs64: of CrypTen's, 64-bit integers in torch.
        values: dealer values combined in the masked engine's polynomials.
        dealt: 8-byte words of correlated randomness drawn and completed.
        words: 8-byte words masked, opened and combined by CrypTen.
        stream: bytes through a local socket.
        messages: messages between waiting threads.
    """

    macs32: float
    macs64: float
    values: float
    dealt: float
    words: float
    stream: float
    messages: float

    def scaled(self, macs32: float) -> Processor:
        """A processor of the same proportions with this many `macs32`.

        Raises:
            EspnError: not a positive number.
        """
        if not 0 < macs32 < math.inf:
            raise EspnError(
                f"{macs32:g} multiply-accumulates a second: give a positive number, "
                "about 4e10 for a core with 512-bit vectors, or let it be measured"
            )
        factor = macs32 / self.macs32
        rates = {f.name: factor * getattr(self, f.name) for f in fields(self)}
        return Processor(**rates)


# Rounded from `calibrate` on one core of an AMD EPYC of the Zen 4 generation.
REFERENCE = Processor(
    macs32=40e9,
    macs64=7.6e9,
    values=6.2e8,
    dealt=4e8,
    words=5e7,
    stream=4.5e9,
    messages=5e4,
)


def calibrate(*, seconds: float = 0.1) -> Processor:
    """Measure this processor on one thread: each rate in about `seconds`, best kept.

    Kernels by processor time, so that other work on the machine counts little;
    messages by the clock.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _connected() as (left, right):
            return Processor(
                macs32=_fastest(_convolutions(torch.int32), seconds),
                macs64=_fastest(_convolutions(torch.int64), seconds),
                values=_fastest(_polynomials(), seconds),
                dealt=_fastest(_deals(), seconds),
                words=_fastest(_openings(), seconds),
                stream=_fastest(_copies(left, right), seconds, time.perf_counter),
                messages=_fastest(_exchanges(left, right), seconds, time.perf_counter),
            )
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _connected() -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a connection over loopback."""
    with (
        Listener("127.0.0.1:0") as listener,
        connect_channel(listener.address, timeout=30.0, peer="rank 0") as right,
        listener.accept(timeout=30.0, peer_timeout=30.0, peer="rank 1") as left,
    ):
        yield left, right


# A task and how many units of work one call of it does.
_Task = tuple[Callable[[], object], int]


def _fastest(
    task: _Task, seconds: float, clock: Callable[[], float] = time.thread_time
) -> float:
    """Units a second of the fastest run, by this thread's processor time."""
    run, units = task
    run()
    best, start = math.inf, time.perf_counter()
    while True:
        before = clock()
        run()
        best = min(best, clock() - before)
        if time.perf_counter() - start > seconds:
            return units / best


def _convolutions(dtype: torch.dtype) -> _Task:
    """One 3x3 layer each of a residual network's first, second and last stage."""
    layers = []
    for side, channels in ((32, 64), (16, 128), (4, 512)):
        x = torch.ones(1, side, side, channels, dtype=dtype)
        weight = torch.ones(1, 3, 3, channels, channels, dtype=dtype)
        layers.append((x, weight))
    units = sum(x.numel() * 9 * x.shape[-1] for x, _ in layers)
    if dtype == torch.int64:
        images = [
            (x.permute(0, 3, 1, 2).contiguous(), w[0].permute(3, 2, 0, 1).contiguous())
            for x, w in layers
        ]
        return lambda: [torch.conv2d(x, w, padding=1) for x, w in images], units
    arrays = [(x.numpy(), w.numpy(), np.zeros_like(x.numpy())) for x, w in layers]

    def run() -> None:
        for x, weight, out in arrays:
            kernels.convolve(
                x, weight, out, stride=(1, 1), dilation=(1, 1), pads=(1, 1, 1, 1)
            )

    return run, units


_ELEMENTS = 1 << 17
_MANY = 1 << 19  # the dealer's values then come from memory, as in an inference
# Degree 4 as the planner groups it: x, x^2, and x^3 with x^4.
_SHIFTS, _DEGREES = np.array([0, 10, 14]), np.array([1, 2, 4])
_VALUES = 1 + sum(int(d) - 1 for d in _DEGREES)


def _polynomials() -> _Task:
    """A party's share of one activation layer, and the next opening."""
    opened = np.arange(_MANY, dtype=np.int32)
    values = np.ones((2, _VALUES, _MANY), dtype=np.int64)
    public = np.ones((3, 5), dtype=np.int64)
    out = np.empty(_MANY, dtype=np.int64)
    following = np.empty(_MANY, dtype=np.int32)

    def run() -> None:
        kernels.polynomial_share(
            opened, values, bits=32, shifts=_SHIFTS, degrees=_DEGREES, public=public,
            constant=1, out=out,
        )  # fmt: skip
        kernels.rescale(out, out, bits=64, drop=32, out=following)

    return run, _VALUES * _MANY


def _deals() -> _Task:
    """What the dealer does for one activation layer."""
    stream = Keystream()
    masks = np.arange(_ELEMENTS, dtype=np.int64)
    table = np.ones((3, 4, 5), dtype=np.int64)

    def run() -> None:
        taken = torch.empty(2, _VALUES, _ELEMENTS, dtype=torch.int64)
        stream.fill(taken)
        array = taken.numpy()
        kernels.deal_polynomial(
            masks, array, bits=32, shifts=_SHIFTS, degrees=_DEGREES, table=table,
            out=np.empty_like(array),
        )  # fmt: skip

    return run, 2 * _VALUES * _ELEMENTS


def _openings() -> _Task:
    """A level of CrypTen's 64-bit adder without the messages: four words an element."""
    pairs, a, b, c = (torch.ones(2, _MANY, dtype=torch.int64) for _ in range(4))

    def run() -> torch.Tensor:
        first = (pairs[1] & 3).expand(2, -1)
        second = (pairs & 5) * 6
        sent = torch.stack([first ^ a, second ^ b])
        epsilon, delta = sent ^ sent.clone()
        update = (b & epsilon) ^ (a & delta) ^ (epsilon & delta) ^ c
        return pairs ^ update

    return run, 4 * _MANY


def _copies(left: Channel, right: Channel) -> _Task:
    """Four megabytes from one thread to another."""
    values = np.ones(1 << 19, dtype=np.int64)

    def send() -> None:
        left.send(values, bits=64)

    def run() -> None:
        sender = threading.Thread(target=send)
        sender.start()
        right.receive(values.size, bits=64)
        sender.join()

    return run, values.nbytes


def _exchanges(left: Channel, right: Channel) -> _Task:
    """Small messages there and back between two threads."""
    one, count = np.ones(1, dtype=np.int64), 100

    def answer() -> None:
        for _ in range(count):
            right.send(right.receive(1, bits=64), bits=64)

    def run() -> None:
        thread = threading.Thread(target=answer)
        thread.start()
        for _ in range(count):
            left.send(one, bits=64)
            left.receive(1, bits=64)
        thread.join()

    return run, 2 * count


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
    slow = replace(relu.traffic, delays=GLOO_DELAYS)
    return [*costs, relu, replace(relu, engine=GLOO, traffic=slow)]


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


# ------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `estimate`, all but --shape, to a parser for `run`."""
    parser.add_argument(
        "network",
        help=f"one of {', '.join([*ALIASES, *NETWORKS])}, or a .safetensors or .onnx "
        "file",
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
        choices=ENGINES,
        default=ENGINES,
        help="which ones, of " + ", ".join(ENGINES),
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
        "Rounds and bytes are exact. Seconds are estimates of one inference alone, on "
        "one core; after silence TCP starts slowly.",
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
