"""What each party draws and holds for one inference.

Halves. Of everything that the dealer shares out (a linear part's B*t + r, a step's
words) one party draws its half from its seed and the other receives what that leaves,
the corrections. Which of the two is a choice of the session, `Pairing.corrections`.

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
from typing import ClassVar

import numpy as np

from ..randomness import Keystream, Ratchet
from . import kernels
from .linear import Shape
from .memory import Space
from .messages import CLIENT, SERVER, Party
from .plan import Plan


def draw(
    stream: Keystream,
    shape: Shape,
    *,
    bits: int,
    lane: int = 0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Uniform ring elements, int32 for up to 32 bits and int64 for more.

    Args:
        lane: of the stream.
        out: where they go, an array of that shape and type; a new one if None.
    """
    if out is None:
        out = np.empty(shape, dtype=kernels.ring_dtype(bits))
    stream.fill(out, lane=lane)
    if bits not in (32, 64):
        out &= kernels.ring_mask(bits)
    return out


def weight_masks(plan: Plan, session_seed: bytes) -> Iterator[np.ndarray]:
    """B: a uniform mask for every weight, in kernel layout, one for a session."""
    stream = Keystream(session_seed).fork(b"weights")
    for shape in plan.weights:
        yield draw(stream, shape.kernel_layout, bits=shape.ring)


def inference_seeds(session_seed: bytes) -> Ratchet:
    """The seeds of a session's inferences, by index."""
    return Ratchet(Keystream(session_seed).fork(b"inferences").bytes(16))


def _inference(seed: bytes, batch: int) -> Keystream:
    return Keystream(seed).fork(b"batch").fork(batch)


# ---------------------------------------------------------------- drawn from seeds


# What is drawn; a chunk's words by the chunk's first input.
_INPUT, _LINEAR, _HIDDEN, _DELTAS, _WORDS = range(1, 6)


def _lane(kind: int, number: int = 0, start: int = 0) -> int:
    """Of the inference's stream; a plan has at most 2**12 steps."""
    return (kind << 16 | number) << 32 | start


class Draws:
    """What a party's seed of an inference gives, drawn when it is asked for.

    The input's mask and the second openings' are the client's, the deltas the
    server's, and the halves are of whoever receives no corrections. Each is a lane of
    its own: asked for again, it is the same. So what the online phase needs is drawn
    there, and nothing of it is kept before.

    Args:
        plan, batch: the inference's.
        seed: the party's seed of it.
    """

    def __init__(self, plan: Plan, seed: bytes, batch: int) -> None:
        self.plan, self._batch = plan, batch
        self._stream = _inference(seed, batch)

    def __repr__(self) -> str:
        return "Draws(<hidden>)"

    @cached_property
    def input_mask(self) -> np.ndarray:
        """t of the input, (batch, *shape)."""
        first = self.plan.sources[0]
        shape = self._batch, *first.shape
        return draw(self._stream, shape, bits=first.ring, lane=_lane(_INPUT))

    def linear(self, number: int, *, out: np.ndarray | None = None) -> np.ndarray:
        """G, this party's half of a linear part's B*t + r, (batch, *shape)."""
        part = self.plan.parts[number]
        shape = self._batch, *self.plan.part_shapes[number]
        lane = _lane(_LINEAR, number)
        return draw(self._stream, shape, bits=part.ring, lane=lane, out=out)

    def hidden(self, number: int) -> np.ndarray:
        """The second opening's mask without the bits it drops, (batch, elements)."""
        between = self.plan.evaluations[number]
        shape = self._batch, between.elements
        bits = between.step.activation.ring
        return draw(self._stream, shape, bits=bits, lane=_lane(_HIDDEN, number))

    def deltas(self, number: int, *, out: np.ndarray | None = None) -> np.ndarray:
        """What each further group's mask adds to a step's first, (masks - 1, n)."""
        step = self.plan.steps[number]
        shape = step.activation.masks - 1, self._batch * self.plan.elements(number)
        lane = _lane(_DELTAS, number)
        return draw(self._stream, shape, bits=step.ring, lane=lane, out=out)

    def words(
        self, number: int, chunk: slice, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """This party's half of the words for a chunk, as the evaluation has them.

        Args:
            chunk: one of `chunks(batch)`.
            out: where they go; a new array if None.
        """
        lane = _lane(_WORDS, number, chunk.start)
        shape = self.plan.evaluations[number].words_shape(chunk.stop - chunk.start)
        return draw(self._stream, shape, bits=64, lane=lane, out=out)


def chunk_words(plan: Plan, number: int, words: np.ndarray, chunk: slice) -> np.ndarray:
    """A chunk's part of a step's words, as its evaluation has them; a view."""
    between = plan.evaluations[number]
    part = words[chunk.start * between.words : chunk.stop * between.words]
    return part.reshape(between.words_shape(chunk.stop - chunk.start))


def source_mask(plan: Plan, number: int, hidden: np.ndarray) -> np.ndarray:
    """t = -(r >> s) of step `number`'s second opening, whose mask is hidden * 2**s.

    Args:
        hidden: overwritten.
    """
    np.negative(hidden, out=hidden)
    return hidden.reshape(-1, *plan.sources[number + 1].shape)


# ---------------------------------------------------------------- prepared


@dataclass(frozen=True)
class Pairing:
    """Which material this is: both parties' must be the same.

    Args:
        session: 16 bytes that both parties' material of one dealing share.
        index: which inference of it.
        batch: inputs in it.
        corrections: who receives the dealer's; the other party draws its halves.
    """

    session: bytes
    index: int
    batch: int
    corrections: Party = SERVER

    def digest(self, plan: Plan) -> bytes:
        """32 bytes that both parties compare after the last layer."""
        text = f"{self.session.hex()} {self.index} {self.batch} {self.corrections} "
        return hashlib.sha256(b"pairing " + text.encode() + plan.digest).digest()


@dataclass
class Material:
    """One party's prepared inference; used up by it.

    Args:
        pairing: which it is.
        seed: this party's of the inference, from which it draws; 16 bytes.
        words: by step, its halves of the words, one chunk after the other, if it
            receives the corrections; it draws them otherwise.
    """

    party: ClassVar[Party]

    pairing: Pairing
    seed: bytes = field(repr=False)
    words: list[np.ndarray] = field(repr=False)

    def draws(self, plan: Plan) -> Draws:
        """What its seed gives."""
        return Draws(plan, self.seed, self.pairing.batch)

    def chunk(
        self, draws: Draws, number: int, chunk: slice, *, space: Space | None = None
    ) -> np.ndarray:
        """Its half of a step's words for a chunk, as the evaluation has them.

        Args:
            draws: its own.
            space: of the inference alone, where words that are drawn take the place of
                the chunk's before; each has memory of its own if None.
        """
        if self.pairing.corrections == self.party:
            return chunk_words(draws.plan, number, self.words[number], chunk)
        shape = draws.plan.evaluations[number].words_shape(chunk.stop - chunk.start)
        out = None if space is None else space.array("words", shape, np.int64)
        return draws.words(number, chunk, out=out)


@dataclass
class ServerMaterial(Material):
    """The server's prepared inference.

    Args:
        linear: by linear part, what the online pass starts from, (batch, *shape).
    """

    party = SERVER

    linear: list[np.ndarray] = field(repr=False)

    def arrays(self) -> list[np.ndarray]:
        """Everything secret in it, laid out as `server_layout` says."""
        return [np.frombuffer(self.seed, dtype=np.uint8), *self.linear, *self.words]

    @staticmethod
    def from_arrays(
        plan: Plan, pairing: Pairing, arrays: Sequence[np.ndarray]
    ) -> ServerMaterial:
        seed, *others = arrays
        parts = len(plan.parts)
        return ServerMaterial(pairing, seed.tobytes(), others[parts:], others[:parts])


Layout = tuple[tuple[Shape, np.dtype], ...]


def layout_bytes(layout: Layout) -> int:
    """Bytes of a record's arrays."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout)


def _layout(
    plan: Plan, batch: int, arrays: Layout, *, corrections: Party, party: Party
) -> Layout:
    """A seed, a party's own arrays, and the words if it receives corrections."""
    words: Layout = ()
    if corrections == party:
        words = tuple(
            ((batch * one.words,), np.dtype(np.int64)) for one in plan.evaluations
        )
    return (((16,), np.dtype(np.uint8)), *arrays, *words)


def server_layout(plan: Plan, batch: int, *, corrections: Party) -> Layout:
    """Shapes and types of a stored `ServerMaterial`'s arrays."""
    linear = tuple(
        ((batch, *shape), np.dtype(kernels.ring_dtype(part.ring)))
        for shape, part in zip(plan.part_shapes, plan.parts, strict=True)
    )
    return _layout(plan, batch, linear, corrections=corrections, party=SERVER)


@dataclass
class ClientMaterial(Material):
    """The client's prepared inference.

    Args:
        output: its share of the logits for D = 0, (batch, *shape).
    """

    party = CLIENT

    output: np.ndarray = field(repr=False)

    def arrays(self) -> list[np.ndarray]:
        """Everything secret in it, laid out as `client_layout` says."""
        return [np.frombuffer(self.seed, dtype=np.uint8), self.output, *self.words]

    @staticmethod
    def from_arrays(
        plan: Plan, pairing: Pairing, arrays: Sequence[np.ndarray]
    ) -> ClientMaterial:
        del plan
        seed, output, *words = arrays
        return ClientMaterial(pairing, seed.tobytes(), words, output)


def client_layout(plan: Plan, batch: int, *, corrections: Party) -> Layout:
    """Shapes and types of a stored `ClientMaterial`'s arrays."""
    dtype = np.dtype(kernels.ring_dtype(plan.output.ring))
    output = (((batch, *plan.logits_shape), dtype),)
    return _layout(plan, batch, output, corrections=corrections, party=CLIENT)
