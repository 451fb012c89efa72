"""Both parties' part of the offline phase, before an input exists.

Once a session the server sends W - B, its weights under a mask. For each inference and
linear part both hold a half of B*t + r: one party draws it, the other receives what is
left from the dealer. The client adds (W-B)*t and the public paths of t, and sends the
sum; the server adds its own half, its bias and 2**(m-2). What is left online is W*D.
The output has no r and is not sent: the client keeps its sum.

With r uniform, the sum that the server receives is uniform beside its own half; of what
the dealer sends, `dealing` says why it is uniform for either party.
"""

from __future__ import annotations

import math

import numpy as np

from ..randomness import Keystream
from . import kernels
from .evaluation import chunks
from .linear import Operands, accumulate
from .material import (
    ClientMaterial,
    Layout,
    Material,
    Pairing,
    ServerMaterial,
    chunk_words,
    client_layout,
    draw,
    inference_seeds,
    server_layout,
    source_mask,
    weight_masks,
)
from .memory import Space, in_one_piece
from .messages import CLIENT, DEALER, SERVER, Protocol, Receive, receive, send
from .plan import Plan
from .steps import Step
from .weights import Weights


class ServerPreparation:
    """The server's side, for one session.

    Args:
        plan, weights: the model.
        seed: the server's session seed from the dealer.
    """

    def __init__(self, plan: Plan, weights: Weights, seed: bytes) -> None:
        self.plan = plan
        self._weights = weights
        _ = weights.filters  # made before an input waits for them
        self._masks = weight_masks(plan, seed)
        self._ratchet = inference_seeds(seed)
        self._biases = [self._bias(number) for number in range(len(plan.parts))]

    def _bias(self, number: int) -> np.ndarray:
        """A part's value for zero sources, plus 2**(m-2) where it is opened."""
        plan, part = self.plan, self.plan.parts[number]
        out = np.zeros(
            (1, *plan.part_shapes[number]), dtype=kernels.ring_dtype(part.ring)
        )
        accumulate(part.root, Operands(plan.shapes, biases=self._weights.biases), out)
        if isinstance(part, Step):
            out += out.dtype.type(1 << (part.ring - 2))
        return out

    def open_weights(self) -> Protocol[None]:
        """Send W - B to the client.

        Cost: one message a layer, one ring element a weight; once a session.
        """
        for shape, integers, mask in zip(
            self.plan.weights, self._weights.integers, self._masks, strict=True
        ):
            yield send(CLIENT, integers - mask, shape.ring)

    def prepare(self, pairing: Pairing) -> Protocol[ServerMaterial]:
        """Make one inference's material; indices rise from call to call.

        Cost: receives the client's sum for each step, m bits an opened element, and the
            corrections if they are the server's.
        """
        plan = self.plan
        seed = self._ratchet.take(pairing.index)
        layout = server_layout(plan, pairing.batch, corrections=pairing.corrections)
        material = ServerMaterial.from_arrays(plan, pairing, _room(layout, seed))
        draws, space = material.draws(plan), Space()
        for number, part in enumerate(plan.parts):
            total = material.linear[number]
            if pairing.corrections == SERVER:
                yield from _corrections(plan, material, number, total)
            else:
                draws.linear(number, out=total)
            if isinstance(part, Step):
                theirs = space.array("theirs", (total.size,), total.dtype)
                yield Receive(CLIENT, ((total.size, part.ring),), (theirs,))
                total += theirs.reshape(total.shape)
            total += self._biases[number]
        material.linear[-1] += _noise(plan, material.linear[-1])
        return material


def _room(layout: Layout, seed: bytes) -> list[np.ndarray]:
    """Memory of an inference's arrays, of which so far the seed is there."""
    arrays = in_one_piece(layout)
    arrays[0][:] = np.frombuffer(seed, dtype=np.uint8)
    return arrays


def _corrections(
    plan: Plan, material: Material, number: int, out: np.ndarray
) -> Protocol[None]:
    """Receive a linear part's B*t + r less what was drawn, and keep the step's words.

    Args:
        out: (batch, *shape) of the part, overwritten.
    """
    part = plan.parts[number]
    yield Receive(DEALER, ((out.size, part.ring),), (out.reshape(-1),))
    if isinstance(part, Step):
        batch = material.pairing.batch
        yield from _words(plan, number, batch, material.words[number])


def _words(plan: Plan, number: int, batch: int, words: np.ndarray) -> Protocol[None]:
    """A step's words from the dealer, one chunk after the other."""
    between = plan.evaluations[number]
    for chunk in chunks(batch):
        parts = between.dealt(chunk.stop - chunk.start)
        place = chunk_words(plan, number, words, chunk)
        lines = between.lines(place, chunk.stop - chunk.start)
        for line, used in zip(place.reshape(len(parts), -1), lines, strict=True):
            line[len(used) :] = 0
        yield Receive(DEALER, parts, tuple(lines))


def _noise(plan: Plan, like: np.ndarray) -> np.ndarray:
    """Uniform below 2**d around zero, from a fresh seed that nobody else knows."""
    bits = plan.output.noise_bits
    if bits == 0:
        return np.zeros_like(like)
    drawn = draw(Keystream(), like.shape, bits=bits).astype(like.dtype, copy=False)
    centred: np.ndarray = drawn - like.dtype.type(1 << (bits - 1))
    return centred


class ClientPreparation:
    """The client's side, for one session.

    Args:
        plan: the plan.
        seed: the client's session seed from the dealer.
    """

    def __init__(self, plan: Plan, seed: bytes) -> None:
        self.plan = plan
        self._ratchet = inference_seeds(seed)
        self._opened: list[kernels.Filters] = []

    def open_weights(self) -> Protocol[None]:
        """Receive W - B from the server, once a session."""
        for shape in self.plan.weights:
            layout = shape.kernel_layout
            (flat,) = yield receive(SERVER, math.prod(layout), shape.ring)
            self._opened.append(shape.filters(flat.reshape(layout)))

    def prepare(self, pairing: Pairing) -> Protocol[ClientMaterial]:
        """Make one inference's material; indices rise from call to call.

        Cost: sends one message for each step, m bits an opened element; receives the
            corrections if they are the client's.
        """
        plan = self.plan
        seed = self._ratchet.take(pairing.index)
        layout = client_layout(plan, pairing.batch, corrections=pairing.corrections)
        material = ClientMaterial.from_arrays(plan, pairing, _room(layout, seed))
        draws, space = material.draws(plan), Space()
        sources = {0: draws.input_mask}
        for number, part in enumerate(plan.parts):
            total = material.output
            if isinstance(part, Step):
                shape = pairing.batch, *plan.part_shapes[number]
                total = space.message("total", shape, kernels.ring_dtype(part.ring))
            if pairing.corrections == SERVER:
                draws.linear(number, out=total)
            else:
                total[...] = 0
            operands = Operands(plan.shapes, sources, self._opened)
            accumulate(part.root, operands, total)
            if pairing.corrections == CLIENT:
                # Last, so that the dealer makes them meanwhile.
                given = space.array("given", total.shape, total.dtype)
                yield from _corrections(plan, material, number, given)
                total += given
            if isinstance(part, Step):
                sources[number + 1] = source_mask(plan, number, draws.hidden(number))
                for dead in plan.last_reads[number]:
                    del sources[dead]
                yield send(SERVER, total, part.ring)
        return material
