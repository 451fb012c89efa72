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
from functools import cached_property

import numpy as np

from ..randomness import Keystream, Ratchet
from . import kernels
from .linear import Shape
from .plan import Plan
from .steps import Step

SERVER, CLIENT = 0, 1


def draw(stream: Keystream, shape: Shape, *, bits: int) -> np.ndarray:
    """Uniform ring elements, int32 for up to 32 bits and int64 for more."""
    out = np.empty(shape, dtype=kernels.ring_dtype(bits))
    stream.fill_array(out)
    if bits not in (32, 64):
        out &= kernels.ring_mask(bits)
    return out


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


class ClientDraws:
    """What the client's seed of an inference gives, drawn when it is asked for.

    Each is a stream of its own: asked for again, it is the same. So what the online
    phase needs is drawn there, and nothing of it is kept before.

    Args:
        plan, batch: the inference's.
        seed: the client's seed of it.
    """

    def __init__(self, plan: Plan, seed: bytes, batch: int) -> None:
        self._plan, self._batch = plan, batch
        self._stream = _inference(seed, batch)

    def __repr__(self) -> str:
        return "ClientDraws(<hidden>)"

    @cached_property
    def input_mask(self) -> np.ndarray:
        """t of the input, (batch, *shape)."""
        first = self._plan.sources[0]
        shape = self._batch, *first.shape
        return draw(self._stream.fork(b"input"), shape, bits=first.ring)

    def linear(self, number: int) -> np.ndarray:
        """G, the client's half of a linear part's mask, (batch, *shape)."""
        part = self._plan.parts[number]
        shape = self._batch, *self._plan.part_shapes[number]
        return draw(self._of(b"linear", number), shape, bits=part.ring)

    def hidden(self, number: int) -> np.ndarray:
        """The second opening's mask without the bits it drops, (batch, elements)."""
        between = self._plan.evaluations[number]
        shape = self._batch, between.elements
        bits = between.step.activation.ring
        return draw(self._of(b"hidden", number), shape, bits=bits)

    def words(self, number: int, chunk: slice) -> np.ndarray:
        """Shares of the dealer's words for a chunk, as the step's evaluation has them.

        Args:
            chunk: one of `chunks(batch)`.
        """
        stream = self._of(b"words", number).fork(chunk.start)
        shape = self._plan.evaluations[number].words_shape(chunk.stop - chunk.start)
        return draw(stream, shape, bits=64)

    def _of(self, label: bytes, number: int) -> Keystream:
        return self._stream.fork(label).fork(number)


def server_draws(plan: Plan, seed: bytes, batch: int) -> Iterator[np.ndarray]:
    """delta of every step, (masks - 1, n): what a further group's mask adds."""
    stream = _inference(seed, batch).fork(b"parts")
    for number, step in enumerate(plan.steps):
        count = batch * plan.elements(number)
        yield draw(stream, (step.activation.masks - 1, count), bits=step.ring)


def chunk_words(plan: Plan, number: int, words: np.ndarray, chunk: slice) -> np.ndarray:
    """A chunk's part of a step's words, as its evaluation has them; a view."""
    between = plan.evaluations[number]
    part = words[chunk.start * between.words : chunk.stop * between.words]
    return part.reshape(between.words_shape(chunk.stop - chunk.start))


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
        words: by step, shares of the dealer's words, one chunk after the other.
    """

    pairing: Pairing
    linear: list[np.ndarray] = field(repr=False)
    deltas: list[np.ndarray] = field(repr=False)
    words: list[np.ndarray] = field(repr=False)

    def arrays(self) -> list[np.ndarray]:
        """Everything secret in it, laid out as `server_layout` says."""
        return [*self.linear, *self.deltas, *self.words]

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
    linear, deltas, words = [], [], []
    for number, part in enumerate(plan.parts):
        dtype = np.dtype(kernels.ring_dtype(part.ring))
        linear.append(((batch, *plan.part_shapes[number]), dtype))
        if isinstance(part, Step):
            act, count = part.activation, batch * plan.elements(number)
            deltas.append(((act.masks - 1, count), dtype))
            dealt = batch * plan.evaluations[number].words
            words.append(((dealt,), np.dtype(np.int64)))
    return (*linear, *deltas, *words)


@dataclass
class ClientMaterial:
    """The client's prepared inference; used up by it.

    Args:
        pairing: which it is.
        seed: what all but `output` follows from; 16 bytes.
        output: its share of the logits for D = 0, (batch, *shape).
    """

    pairing: Pairing
    seed: bytes = field(repr=False)
    output: np.ndarray = field(repr=False)

    def arrays(self) -> list[np.ndarray]:
        """Everything secret in it, laid out as `client_layout` says."""
        return [np.frombuffer(self.seed, dtype=np.uint8), self.output]

    @staticmethod
    def from_arrays(
        plan: Plan, pairing: Pairing, arrays: Sequence[np.ndarray]
    ) -> ClientMaterial:
        del plan
        seed, output = arrays
        return ClientMaterial(pairing, seed.tobytes(), output)

    def draws(self, plan: Plan) -> ClientDraws:
        """What else its seed gives."""
        return ClientDraws(plan, self.seed, self.pairing.batch)


def client_layout(plan: Plan, batch: int) -> Layout:
    """Shapes and types of a stored `ClientMaterial`'s arrays."""
    dtype = np.dtype(kernels.ring_dtype(plan.output.ring))
    return (((16,), np.dtype(np.uint8)), ((batch, *plan.logits_shape), dtype))
