"""The online phase: two openings per activation and one integer pass per layer.

Sources are x = D + t with D known to the server and t to the client.

1. The client sends D = x - t for its input.
2. The server adds W*D to what it prepared: the result is c = z + 2**(m-2) + r. Group k
   of the polynomial's powers has a mask of its own, c_k = c + delta_k; the server sends
   c_k >> s_k.
   For a product z is its two factors, each with a mask and a shift of its own.
3. Both compute their share of the polynomial, or of the product. With r_k's
   dealer-known truncation -(r_k >> s_k), logical if the top bit of c_k is 1 and
   arithmetic if it is 0, (c_k >> s_k) - 2**(m-2-s_k) plus it equals z >> s_k or one
   more, over the integers. The dealer supplied the polynomial's coefficients in D, and
   what they change by where the public top bit is 1. Whoever draws its words does so
   while it waits for the other.
4. The client sends the top bits of its share plus its own mask r'. The server adds its
   share and drops s bits: the next D. Where all that reads an activation is one average
   pool, both sum their shares over its windows first; mask and coin are the sum's.
   Back to 2; the last layer's z goes to the client instead, with noise.

So one inference takes 2 messages for each linear part: the input and openings down,
shares up, the logits. In a large batch 2 to 4 run through the images in chunks, so that
neither party waits for the other.

Who learns what; of products `evaluation.OfProduct` says more. The client sees every
c_k >> s_k, uniform because r_k is uniform, used once and known to the dealer alone; its
shares of what the dealer shared out, uniform whether its seed gave them or the dealer
took the server's from them; W - B, uniform because B is the server's; and the logits.
What rounds a value is hidden from it: the bits of c_k below s_k, and the dealer's
coins, which the server's share covers or holds. Of its own share it drops bits worth
2**-16 of a unit, and what the dealer leaves out of a word weighs no more: signals so
small take 2**32 times as many queries to average out. The server sees c, its own
shares, likewise uniform, and D of each source, uniform because t follows from the
client's uniform mask, used once; what the client sends of its share of a value is
hidden by that mask from bit s on, and by the coins below. It learns nothing of input or
logits.
Both know the plan. The dealer sees neither data nor weights nor any message between the
parties. The claim is: semi-honest, two parties, a dealer that does not collude.

Source: truncation by a known top bit after Escudero et al., CRYPTO 2020, and Dalskov et
al., USENIX Security 2021; opened-mask polynomials after HoneyBadgerMPC, CCS 2019.
"""

from __future__ import annotations

import numpy as np

from ..errors import ShapeError
from ..wire.packing import packed_bytes
from . import kernels
from .evaluation import chunks
from .linear import Operands, accumulate
from .material import ClientMaterial, ServerMaterial
from .memory import Space
from .messages import (
    CLIENT,
    SERVER,
    Compare,
    Protocol,
    Receive,
    Send,
    Tell,
    receive,
    send,
)
from .plan import INPUT, Plan
from .steps import Step
from .weights import Weights

# ---------------------------------------------------------------- the server


def server(plan: Plan, weights: Weights, material: ServerMaterial) -> Protocol[None]:
    """One inference at the server, from the client's first message to the logits.

    Args:
        plan, weights: the model.
        material: used up by this call (its arrays are overwritten).

    Cost: a message for each linear part, as many received: m - s_k bits sent for an
        activation and group, or for an element of a factor; m + 16 received. In large
        batches each layer's travel in chunks.

    Error: exact in each ring. A truncation gives floor or floor + 1; before the second
        opening's, y is off by less than 2**-16 of a unit for the client's share and for
        each of the dealer's words. The logits' noise is below 2**(d-1).
    """
    batch = material.pairing.batch
    first = plan.sources[INPUT]
    (data,) = yield receive(CLIENT, batch * first.elements, first.ring)
    share = yield from server_layers(
        plan, weights, material, data.reshape(batch, *first.shape)
    )
    # Whoever used other material than the client would send it noise, or worse.
    digest = material.pairing.digest(plan)
    yield Compare(CLIENT, digest)
    yield Tell(CLIENT, digest)
    yield send(CLIENT, share, plan.output.ring)


def server_layers(
    plan: Plan, weights: Weights, material: ServerMaterial, data: np.ndarray
) -> Protocol[np.ndarray]:
    """From D of the input to the server's share of the output.

    Args:
        data: D = x - t, (batch, *sources[0].shape).

    Returns: the server's share of the output's integers, (batch, *logits_shape).

    Cost, Error: as `server`, without its first message and its last.
    """
    parts, draws = chunks(material.pairing.batch), material.draws(plan)
    space = Space()
    sources = {INPUT: data}
    halves: list[np.ndarray] = []  # by chunk, the last polynomial's share
    for number, part in enumerate(plan.parts):
        opened = material.linear[number]
        if number > 0:
            source = plan.sources[number]
            sources[number] = np.empty(
                (len(opened), *source.shape), dtype=kernels.ring_dtype(source.ring)
            )
        # What is drawn is drawn before a message is waited for.
        deltas = draws.deltas(number) if isinstance(part, Step) else None
        mine: list[np.ndarray] = []
        for place, chunk in enumerate(parts):
            words = None
            if deltas is not None:
                words = material.chunk(draws, number, chunk, space=space)
            if number > 0:
                yield from _truncated(
                    plan.steps[number - 1], halves[place], sources[number][chunk]
                )
            here = {s: sources[s][chunk] for s in plan.reads[number]}
            operands = Operands(plan.shapes, here, weights.filters)
            accumulate(part.root, operands, opened[chunk])
            if deltas is not None and words is not None:
                within = _within(chunk, plan.elements(number))
                c = opened[chunk]
                half = yield from _open(plan, number, c, deltas[:, within], words)
                mine.append(half)
        halves = mine
        for dead in plan.last_reads[number]:
            del sources[dead]
    return material.linear[-1]


def _open(
    plan: Plan, number: int, c: np.ndarray, deltas: np.ndarray, words: np.ndarray
) -> Protocol[np.ndarray]:
    """Send a chunk's openings; return the server's share of the value."""
    between = plan.evaluations[number]
    openings = between.open(c, deltas)
    yield Send(CLIENT, tuple(zip(openings, between.opened_bits, strict=True)))
    return between.share(openings, words, c=c)


def _within(chunk: slice, elements: int) -> slice:
    """A chunk's elements, where every input has so many."""
    return slice(chunk.start * elements, chunk.stop * elements)


def _truncated(step: Step, half: np.ndarray, out: np.ndarray) -> Protocol[None]:
    """Receive the client's half of a second opening; write the next D."""
    act = step.activation
    (theirs,) = yield receive(CLIENT, half.size, act.sent_bits)
    kernels.truncate(
        half,
        theirs,
        bits=act.ring + act.drop,
        drop=act.drop,
        step=act.unsent,
        out=out.reshape(-1),
    )


# ---------------------------------------------------------------- the client


def client(plan: Plan, material: ClientMaterial, x: np.ndarray) -> Protocol[np.ndarray]:
    """One inference at the client; it computes no linear layer.

    Args:
        plan: the plan.
        material: used up by this call.
        x: int64 (batch, *sources[0].shape), as `Plan.encode` gives it.

    Returns: the output's integers, (batch, *logits_shape), modulo 2**ring.

    Cost: a message for each linear part: the input at m bits, an activation at m + 16.

    Error: as `server`.

    Raises: ShapeError for another batch than the material's, before anything is sent.
    """
    first, batch = plan.sources[INPUT], material.pairing.batch
    if x.shape != (batch, *first.shape):
        raise ShapeError(
            f"The material was made for batches of {batch}; the input has {len(x)}. "
            "Prepare material for this batch size."
        )
    yield send(SERVER, masked_input(plan, material, x), first.ring)
    share = yield from client_layers(plan, material)
    digest = material.pairing.digest(plan)
    yield Tell(SERVER, digest)
    yield Compare(SERVER, digest)
    (theirs,) = yield receive(SERVER, share.size, plan.output.ring)
    logits: np.ndarray = theirs.reshape(share.shape) + share
    return logits


def masked_input(plan: Plan, material: ClientMaterial, x: np.ndarray) -> np.ndarray:
    """D = x - t: all that the server receives of an input.

    Returns: (batch, *sources[0].shape); the lower `sources[0].ring` bits count.
    """
    dtype = kernels.ring_dtype(plan.sources[INPUT].ring)
    masked: np.ndarray = x.astype(dtype) - material.draws(plan).input_mask
    return masked


def client_layers(plan: Plan, material: ClientMaterial) -> Protocol[np.ndarray]:
    """From the first opening to the client's share of the output.

    Returns: the client's share of the output's integers.

    Cost, Error: as `client`, without its first message and the logits.
    """
    draws, space = material.draws(plan), Space()
    for number, between in enumerate(plan.evaluations):
        hidden = draws.hidden(number)
        for chunk in chunks(material.pairing.batch):
            # While the server computes.
            words = material.chunk(draws, number, chunk, space=space)
            between.hide(words, hidden[chunk])
            rows = chunk.stop - chunk.start
            openings = between.room(rows, space)
            yield Receive(SERVER, between.payload(rows), tuple(openings))
            half = between.share(openings, words)
            yield send(SERVER, half, between.step.activation.sent_bits)
    return material.output


# ---------------------------------------------------------------- what it costs


def message_sizes(plan: Plan, *, batch: int) -> list[tuple[str, int]]:
    """Sender and payload bytes of every online message, in order.

    The same counts that the generators send, without an inference.
    """
    first = plan.sources[INPUT]
    sizes = [(CLIENT, packed_bytes(batch * first.elements, first.ring))]
    for between in plan.evaluations:
        rows = [chunk.stop - chunk.start for chunk in chunks(batch)]
        sizes += [
            (SERVER, sum(packed_bytes(*part) for part in between.payload(count)))
            for count in rows
        ]
        bits = between.step.activation.sent_bits
        sizes += [
            (CLIENT, packed_bytes(count * between.elements, bits)) for count in rows
        ]
    last = batch * plan.elements(len(plan.steps))
    return [*sizes, (SERVER, packed_bytes(last, plan.output.ring))]


def online_bytes(plan: Plan, *, batch: int = 1) -> tuple[int, int]:
    """Online payload bytes that server and client send, frame headers excluded."""
    sizes = message_sizes(plan, batch=batch)
    down, up = (
        sum(size for sender, size in sizes if sender == party)
        for party in (SERVER, CLIENT)
    )
    return down, up
