"""The online phase: two openings per activation and one integer pass per layer.

Owner mode (rank 0 holds the weights, rank 1 the input). Sources are x = D + t with D
known to rank 0 and t to rank 1.

1. Rank 1 sends D = x - t for its input.
2. Rank 0 adds W*D to what it prepared: the result is c = z + 2**(m-2) + r. It sends c.
3. Both compute their share of the polynomial from c. With r's dealer-known truncation
   -(r >> s), logical if the top bit of c is 1 and arithmetic if it is 0, (c >> s) -
   2**(m-2-s) plus it equals z >> s or one more, over the integers. The dealer supplied
   the polynomial's coefficients in D for both cases; the public bit selects.
4. Rank 1 sends its share plus its own mask r'. Rank 0 adds its share and drops s bits:
   the next D. Back to 2; the last layer's z goes to rank 1 instead.

So one inference takes 2 messages per segment: the input and c's down, shares up, the
logits. In a large batch 2 to 4 run through the images in parts, so that neither party
waits for the other. In shared mode both parties send their half of each opening at
once.

Who learns what. Rank 1 sees every c, uniform because r is uniform, used once and known
to the dealer alone; its seed-drawn shares; W - B, uniform because B is rank 0's; and
the logits. Rank 0 sees c, and D of each source, uniform because t follows from rank 1's
uniform mask, which is used once. It learns nothing of input or logits. Both know the
plan: architecture, shapes, polynomials and scales. The dealer sees neither data nor
weights nor any message between the parties. The claim is: semi-honest, two parties, a
dealer that does not collude.

Source: truncation by a known top bit after Escudero et al., CRYPTO 2020, and Dalskov et
al., USENIX Security 2021; opened-mask polynomials after HoneyBadgerMPC, CCS 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import MaterialError, ShapeError
from ..wire.channel import Channel
from ..wire.packing import packed_bytes
from . import kernels
from .offline import Material, narrowed
from .plan import INPUT, Plan, Weights, evaluate


def _check_input(plan: Plan, x: np.ndarray, batch: int) -> None:
    if x.shape != (batch, *plan.sources[INPUT].shape):
        raise ShapeError(
            f"The material was made for batches of {batch}; the input has {len(x)}. "
            "Prepare material for this batch size."
        )


def _last_use(plan: Plan) -> list[list[int]]:
    """Sources that no segment after this one reads, by segment."""
    last = {s: k for k, seg in enumerate(plan.segments) for s in seg.sources}
    done: list[list[int]] = [[] for _ in plan.segments]
    for source, number in last.items():
        done[number].append(source)
    return done


def pieces(batch: int) -> list[slice]:
    """The parts of a batch that travel as messages of their own within a layer.

    While rank 1 works on one part, rank 0 convolves the next, and a part's values stay
    in the cache from one step to the next. Less than 8 images travel whole.
    """
    size = batch if batch < 8 else min(4, batch // 4)
    return [slice(a, min(a + size, batch)) for a in range(0, batch, size)]


def _share(
    plan: Plan,
    number: int,
    opened: np.ndarray,
    values: np.ndarray | None,
    *,
    rank: int,
    start: int = 0,
) -> np.ndarray:
    """This party's share of a segment's polynomial, int64 (n,).

    Args:
        opened: c of n elements, the first of them number `start` of the batch.
    """
    act = plan.segments[number].activation
    if act is None or values is None:
        raise MaterialError("The material has no values for this layer.")
    out = np.empty(opened.size, dtype=np.int64)
    kernels.polynomial_share(
        opened.reshape(-1),
        values,
        bits=plan.segments[number].ring,
        shifts=act.shifts,
        degrees=act.degrees,
        public=act.public if rank == 0 else np.zeros_like(act.public),
        constant=act.constant if rank == 0 else 0,
        start=start,
        out=out,
    )
    return out


def serve_one(
    plan: Plan, weights: Weights, channel: Channel, material: Material, *, batch: int
) -> None:
    """Rank 0, owner mode: one inference from the client's first message to the logits.

    Args:
        plan, weights: the model.
        channel: to rank 1.
        material: rank 0's, used up by this call (its arrays are overwritten).
        batch: inputs in this inference.

    Cost: len(segments) messages sent, m bits per opened z; as many received. In large
        batches each message of a layer travels in parts, see `pieces`.

    Error: exact in each ring. Each truncation gives floor or floor + 1, never more.
    """
    first = plan.sources[INPUT]
    count = batch * first.elements
    data = channel.receive(count, bits=first.ring, tag=material.index)
    data = data.reshape(batch, *first.shape)
    opened = serve_layers(plan, weights, channel, material, data, batch=batch)
    channel.send(opened, bits=plan.segments[-1].ring, tag=material.index)


def serve_layers(
    plan: Plan,
    weights: Weights,
    channel: Channel,
    material: Material,
    data: np.ndarray,
    *,
    batch: int,
) -> np.ndarray:
    """Rank 0, owner mode: from D of the input to its share of the output.

    Args:
        data: D = x - t, (batch, *sources[0].shape).

    Returns: rank 0's share of the output segment's integers; `query_layers` has the
        other.

    Cost, Error: as `serve_one`, without its first message and its last.
    """
    tag = material.index
    parts = pieces(batch)
    sources = {INPUT: data}
    done = _last_use(plan)
    shares: list[np.ndarray] = []
    for number, segment in enumerate(plan.segments):
        opened = material.linear[number]
        mine: list[np.ndarray] = []
        if number > 0:
            source = plan.sources[number]
            sources[number] = np.empty(
                (batch, *source.shape), dtype=kernels.ring_dtype(source.ring)
            )
        for place, part in enumerate(parts):
            if number > 0:
                before = plan.segments[number - 1].activation
                assert before is not None
                half = shares[place]
                kernels.rescale(
                    half,
                    channel.receive(half.size, bits=before.value_ring, tag=tag),
                    bits=before.value_ring,
                    drop=before.drop,
                    out=sources[number][part].reshape(-1),
                )
            evaluate(
                segment.root,
                narrowed({s: sources[s][part] for s in segment.sources}, segment),
                weights.integers,
                ring=segment.ring,
                batch=part.stop - part.start,
                out=opened[part],
            )
            if segment.activation is None:
                continue
            channel.send(opened[part], bits=segment.ring, tag=tag)
            values = material.values[number]
            start = part.start * segment.elements
            mine.append(_share(plan, number, opened[part], values, rank=0, start=start))
        if segment.activation is None:
            return opened
        shares = mine
        for dead in done[number]:
            del sources[dead]
    raise MaterialError("The plan has no output segment.")


def query_one(
    plan: Plan, channel: Channel, material: Material, x: np.ndarray, *, batch: int
) -> np.ndarray:
    """Rank 1, owner mode: one inference; computes no linear layer.

    Args:
        plan: the plan.
        channel: to rank 0.
        material: rank 1's, used up by this call.
        x: int64 (batch, *sources[0].shape), as `Plan.encode` gives it.
        batch: inputs in this inference.

    Returns: the output segment's integers, (batch, *shape), modulo 2**ring.

    Cost: len(segments) messages sent: the input at m bits, each activation at v bits.

    Error: as `serve_one`.
    """
    _check_input(plan, x, batch)
    tag = material.index
    first = plan.sources[INPUT]
    masked = x.astype(kernels.ring_dtype(first.ring)) - material.masks[INPUT]
    channel.send(masked, bits=first.ring, tag=tag)
    share = query_layers(plan, channel, material, batch=batch)
    last = plan.segments[-1]
    received = channel.receive(batch * last.elements, bits=last.ring, tag=tag)
    return received.reshape(batch, *last.root.shape) + share


def query_layers(
    plan: Plan, channel: Channel, material: Material, *, batch: int
) -> np.ndarray:
    """Rank 1, owner mode: from the first opening to its share of the output.

    Returns: rank 1's share of the output segment's integers.

    Cost, Error: as `query_one`, without its first message and the logits.
    """
    tag = material.index
    for number, segment in enumerate(plan.segments):
        act = segment.activation
        if act is None:
            return material.linear[number]
        values = material.values[number]
        for part in pieces(batch):
            start = part.start * segment.elements
            count = part.stop * segment.elements - start
            received = channel.receive(count, bits=segment.ring, tag=tag)
            half = _share(plan, number, received, values, rank=1, start=start)
            channel.send(half, bits=act.value_ring, tag=tag)
    raise MaterialError("The plan has no output segment.")


def run_shared(
    plan: Plan,
    weights: Weights,
    channel: Channel,
    material: Material,
    x: np.ndarray | None,
    *,
    rank: int,
    batch: int,
) -> np.ndarray | None:
    """Shared mode, either rank: both hold a share of W and open every value together.

    Args:
        weights: this party's share.
        x: rank 1's input integers; None for rank 0.

    Returns: rank 1: the output segment's integers; rank 0: None.

    Cost: 2 rounds per activation, m + v bits each per party; 1 message for the input
        and 1 for the logits.

    Error: as `serve_one`.
    """
    tag = material.index
    first = plan.sources[INPUT]
    if rank == 1:
        assert x is not None
        _check_input(plan, x, batch)
        data = x.astype(kernels.ring_dtype(first.ring)) - material.masks[INPUT]
        channel.send(data, bits=first.ring, tag=tag)
    else:
        data = channel.receive(batch * first.elements, bits=first.ring, tag=tag)
        data = data.reshape(batch, *first.shape)
    sources = {INPUT: data}
    done = _last_use(plan)
    for number, segment in enumerate(plan.segments):
        half = material.linear[number]
        narrow = narrowed(sources, segment)
        evaluate(
            segment.root,
            narrow,
            weights.integers,
            ring=segment.ring,
            batch=batch,
            out=half,
            public=rank == 0,
        )
        act = segment.activation
        if act is None:
            if rank == 0:
                channel.send(half, bits=segment.ring, tag=tag)
                return None
            received = channel.receive(half.size, bits=segment.ring, tag=tag)
            return received.reshape(half.shape) + half
        opened = half + channel.exchange(half, bits=segment.ring, tag=tag)
        for source in done[number]:
            del sources[source]
        mine = _share(plan, number, opened, material.values[number], rank=rank)
        theirs = channel.exchange(mine, bits=act.value_ring, tag=tag)
        source_ring = plan.sources[number + 1].ring
        revealed = np.empty(opened.shape, dtype=kernels.ring_dtype(source_ring))
        kernels.rescale(
            mine, theirs, bits=act.value_ring, drop=act.drop, out=revealed.reshape(-1)
        )
        sources[number + 1] = revealed
    raise MaterialError("The plan has no output segment.")


def message_sizes(plan: Plan, *, batch: int) -> Sequence[tuple[int, int]]:
    """Sender and payload bytes of every online message in owner mode, in order."""
    first, last = plan.sources[INPUT], plan.segments[-1]
    sizes = [(1, packed_bytes(batch * first.elements, first.ring))]
    for segment in plan.segments:
        act = segment.activation
        if act is None:
            continue
        counts = [(p.stop - p.start) * segment.elements for p in pieces(batch)]
        sizes += [(0, packed_bytes(count, segment.ring)) for count in counts]
        sizes += [(1, packed_bytes(count, act.value_ring)) for count in counts]
    return [*sizes, (0, packed_bytes(batch * last.elements, last.ring))]
