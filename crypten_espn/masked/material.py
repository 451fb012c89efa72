"""What each party draws and holds for one inference.

Seeds. A session gives the server and the client a seed each; the dealer knows both and
has its own. Every inference takes the next seeds of a ratchet, so that used ones can be
forgotten, and forks them by the batch: the same seed never serves two shapes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..randomness import Keystream, Ratchet
from . import kernels
from .evaluation import Evaluation
from .linear import Shape
from .plan import Plan
from .steps import Step

SERVER, CLIENT = 0, 1


def draw(stream: Keystream, shape: Shape, *, bits: int) -> np.ndarray:
    """Uniform ring elements, int32 for up to 32 bits and int64 for more."""
    count = int(np.prod(shape, dtype=np.int64))
    if bits <= 32:
        data = np.frombuffer(stream.bytes(4 * count), dtype=np.int32).copy()
        return kernels.reduce_ring(data, bits).reshape(shape)
    out = torch.empty(count, dtype=torch.int64)
    stream.fill(out)
    array = out.numpy().reshape(shape)
    if bits < 64:
        array &= kernels.ring_mask(bits)
    return array


def weight_masks(plan: Plan, session_seed: bytes) -> list[np.ndarray]:
    """B: a uniform mask for every weight, in kernel layout, one for a session."""
    stream = Keystream(session_seed).fork(b"weights")
    return [draw(stream, w.kernel_layout, bits=w.ring) for w in plan.weights]


def inference_seeds(session_seed: bytes) -> Ratchet:
    """The seeds of a session's inferences, by index."""
    return Ratchet(Keystream(session_seed).fork(b"inferences").bytes(16))


def _inference(seed: bytes, batch: int) -> Keystream:
    return Keystream(seed).fork(b"batch").fork(batch)


# ---------------------------------------------------------------- drawn from seeds


@dataclass
class ClientDraws:
    """What the client's seed gives for one linear part.

    Args:
        linear: G, the client's half of a product's mask, (batch, *shape).
        values: shares of the dealer's words, shaped as the step's evaluation says; None
            for the output.
        hidden: of the result's elements, the second opening's mask without the bits it
            drops; None likewise.
    """

    linear: np.ndarray
    values: np.ndarray | None
    hidden: np.ndarray | None


def client_input_mask(plan: Plan, seed: bytes, batch: int) -> np.ndarray:
    """t of the input, (batch, *shape)."""
    first = plan.sources[0]
    stream = _inference(seed, batch).fork(b"input")
    return draw(stream, (batch, *first.shape), bits=first.ring)


def client_draws(plan: Plan, seed: bytes, batch: int) -> Iterator[ClientDraws]:
    """The client's draws of every linear part, in order."""
    stream = _inference(seed, batch).fork(b"parts")
    for number, part in enumerate(plan.parts):
        count = batch * plan.elements(number)
        linear = draw(stream, (count,), bits=part.ring)
        values = hidden = None
        if isinstance(part, Step):
            between = plan.evaluations[number]
            values = draw(stream, between.values_shape(batch), bits=64)
            size = batch * between.elements
            hidden = draw(stream, (size,), bits=part.activation.ring)
        yield ClientDraws(
            linear.reshape(batch, *plan.part_shapes[number]), values, hidden
        )


def server_draws(plan: Plan, seed: bytes, batch: int) -> Iterator[np.ndarray]:
    """delta of every step, (masks - 1, n): what a further group's mask adds."""
    stream = _inference(seed, batch).fork(b"parts")
    for number, step in enumerate(plan.steps):
        count = batch * plan.elements(number)
        yield draw(stream, (step.activation.masks - 1, count), bits=step.ring)


def source_mask(plan: Plan, number: int, hidden: np.ndarray) -> np.ndarray:
    """t = -(r >> s) of step `number`'s second opening, whose mask is hidden * 2**s."""
    source = plan.sources[number + 1]
    mask = (-hidden).astype(kernels.ring_dtype(source.ring), copy=False)
    return mask.reshape(-1, *source.shape)


# ---------------------------------------------------------------- prepared


@dataclass(frozen=True)
class Pairing:
    """Which material this is: both parties' must be the same.

    Args:
        session: 16 bytes that both parties' material of one dealing share.
        index: which inference of it.
        batch: inputs in it.
    """

    session: bytes
    index: int
    batch: int

    def digest(self, plan: Plan) -> bytes:
        """32 bytes that both parties compare after the last layer."""
        text = f"{self.session.hex()} {self.index} {self.batch} {plan.digest.hex()}"
        return hashlib.sha256(b"pairing " + text.encode()).digest()


@dataclass
class ServerMaterial:
    """The server's prepared inference; used up by it.

    Args:
        pairing: which it is.
        linear: by linear part, what the online pass starts from, (batch, *shape).
        deltas: by step, (masks - 1, n).
        values: by step, shares of the dealer's words.
    """

    pairing: Pairing
    linear: list[np.ndarray] = field(repr=False)
    deltas: list[np.ndarray] = field(repr=False)
    values: list[np.ndarray] = field(repr=False)

    def arrays(self) -> list[np.ndarray]:
        """Everything secret in it, laid out as `server_layout` says."""
        return [*self.linear, *self.deltas, *self.values]

    @staticmethod
    def from_arrays(
        plan: Plan, pairing: Pairing, arrays: Sequence[np.ndarray]
    ) -> ServerMaterial:
        parts, steps = len(plan.parts), len(plan.steps)
        return ServerMaterial(
            pairing,
            list(arrays[:parts]),
            list(arrays[parts : parts + steps]),
            list(arrays[parts + steps :]),
        )


Layout = tuple[tuple[Shape, np.dtype], ...]


def layout_bytes(layout: Layout) -> int:
    """Bytes of a record's arrays."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout)


def server_layout(plan: Plan, batch: int) -> Layout:
    """Shapes and types of a stored `ServerMaterial`'s arrays."""
    linear, deltas, values = [], [], []
    for number, part in enumerate(plan.parts):
        dtype = np.dtype(kernels.ring_dtype(part.ring))
        linear.append(((batch, *plan.part_shapes[number]), dtype))
        if isinstance(part, Step):
            act, count = part.activation, batch * plan.elements(number)
            deltas.append(((act.masks - 1, count), dtype))
            shape = plan.evaluations[number].values_shape(batch)
            values.append((shape, np.dtype(np.int64)))
    return (*linear, *deltas, *values)


@dataclass
class ClientMaterial:
    """The client's prepared inference; used up by it.

    Args:
        pairing: which it is.
        input_mask: t of the input, (batch, *shape).
        values: by step, shares of the dealer's words, with the second opening's mask.
        output: its share of the logits for D = 0, (batch, *shape).
        seed: what all but `output` follows from; 16 bytes.
    """

    pairing: Pairing
    input_mask: np.ndarray = field(repr=False)
    values: list[np.ndarray] = field(repr=False)
    output: np.ndarray = field(repr=False)
    seed: bytes = field(repr=False)

    def arrays(self) -> list[np.ndarray]:
        """What is kept of it, laid out as `client_layout` says."""
        return [np.frombuffer(self.seed, dtype=np.uint8), self.output]

    @staticmethod
    def from_arrays(
        plan: Plan, pairing: Pairing, arrays: Sequence[np.ndarray]
    ) -> ClientMaterial:
        seed, output = arrays
        return ClientMaterial.expand(plan, pairing, seed.tobytes(), output)

    @staticmethod
    def expand(
        plan: Plan, pairing: Pairing, seed: bytes, output: np.ndarray
    ) -> ClientMaterial:
        """Draw everything else from an inference's seed."""
        batch = pairing.batch
        values = [
            with_mask(between, drawn)
            for between, drawn in zip(
                plan.evaluations, client_draws(plan, seed, batch), strict=False
            )
        ]
        mask = client_input_mask(plan, seed, batch)
        return ClientMaterial(pairing, mask, values, output, seed)


def with_mask(between: Evaluation, drawn: ClientDraws) -> np.ndarray:
    """The client's shares; the second opening's mask joins them."""
    assert drawn.values is not None and drawn.hidden is not None
    between.hide(drawn.values, drawn.hidden)
    return drawn.values


def client_layout(plan: Plan, batch: int) -> Layout:
    """Shapes and types of a stored `ClientMaterial`'s arrays."""
    dtype = np.dtype(kernels.ring_dtype(plan.output.ring))
    return (((16,), np.dtype(np.uint8)), ((batch, *plan.logits_shape), dtype))
