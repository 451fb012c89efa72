"""The offline phase: what dealer and parties prepare before an input exists.

Owner mode (rank 0 holds the weights W). Every source is x = D + t, where t comes from
rank 1's seed and D will be opened to rank 0 alone. For each segment and inference:

1. The dealer draws r and, from rank 1's seed, t and G_1. It sends rank 0
   G_0 = B*t + r - G_1, with B a weight-shaped mask from rank 0's seed.
2. Rank 1 computes (W-B)*t + (public paths of t) + G_1 and sends it to rank 0: its half
   of the opening, ready before the input exists. W - B was opened once per model.
3. Rank 0 adds G_0, the bias and 2**(m-2). What is left online is W*D.
4. For the polynomial, the dealer draws rank 1's shares from rank 1's seed and sends
   rank 0 the corrected ones, for both values the mask can take (see `online`).

Rank 1 receives a seed from the dealer and nothing else. Shared mode (both parties hold
a share of W) gives rank 0 also the corrected half of t, and each party a mask of its
share of W; both compute step 2 and keep the result.

Source: Delphi (Mishra et al., USENIX Security 2020) for the server-held weights; the
two-valued truncation mask as in `online`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ..randomness import Keystream, new_seed
from ..wire.channel import Channel
from . import kernels
from .plan import Plan, Segment, Weights, evaluate

_SERVER, _CLIENT = 0, 1


def draw(stream: Keystream, shape: tuple[int, ...], *, bits: int) -> np.ndarray:
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


def weight_masks(plan: Plan, seed: bytes) -> list[np.ndarray]:
    """A uniform mask for every weight, in kernel layout, used for every inference."""
    stream = Keystream(seed).fork(b"weights")
    return [draw(stream, s.kernel_shape, bits=s.ring) for s in plan.weights]


# ---------------------------------------------------------------- seeds


@dataclass
class SeedShares:
    """One party's seed-drawn shares of one inference, in the order they are drawn.

    Args:
        masks: t by source, channels last, in R of the source's ring.
        linear: G by segment.
        values: (2, V, n) by segment; None for the output.
    """

    masks: dict[int, np.ndarray] = field(default_factory=dict)
    linear: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray | None] = field(default_factory=list)
    openings: list[np.ndarray | None] = field(default_factory=list)


def expand(plan: Plan, seed: bytes, index: int, *, batch: int) -> SeedShares:
    """Draw rank 1's shares of inference `index` from its seed.

    Owner mode: `openings` are rank 1's own masks r of the second openings, and
    t = -(r >> s) follows from them.
    """
    shares = SeedShares()
    for _ in expanding(plan, seed, index, batch=batch, shares=shares):
        pass
    return shares


def expanding(
    plan: Plan, seed: bytes, index: int, *, batch: int, shares: SeedShares
) -> Iterator[int]:
    """`expand`, one segment at a time, into `shares`; yields each segment's number.

    What is no longer needed may be dropped from `shares` between two segments.
    """
    stream = Keystream(seed).fork(b"inference").fork(index)
    first = plan.sources[0]
    shares.masks[0] = draw(stream, (batch, *first.shape), bits=first.ring)
    for number, segment in enumerate(plan.segments):
        shape = (batch, *segment.root.shape)
        shares.linear.append(draw(stream, shape, bits=segment.ring))
        act = segment.activation
        if act is None:
            shares.values.append(None)
            shares.openings.append(None)
            yield number
            continue
        source = plan.sources[number + 1]
        count = batch * segment.elements
        shares.values.append(draw(stream, (2, act.values, count), bits=64))
        if plan.mode == "shared":
            shares.openings.append(None)
            shares.masks[number + 1] = draw(stream, shape, bits=source.ring)
            yield number
            continue
        r = draw(stream, (count,), bits=act.value_ring)
        t = np.empty(count, dtype=kernels.ring_dtype(source.ring))
        kernels.mask_shift(
            r.astype(np.int64, copy=False), bits=act.value_ring, drop=act.drop, out=t
        )
        shares.openings.append(r)
        shares.masks[number + 1] = t.reshape(shape)
        yield number


def narrowed(sources: dict[int, np.ndarray], segment: Segment) -> dict[int, np.ndarray]:
    """The sources a segment reads, in the dtype of its ring."""
    dtype = kernels.ring_dtype(segment.ring)
    return {s: sources[s].astype(dtype, copy=False) for s in segment.sources}


# ---------------------------------------------------------------- the dealer


# One segment of a deal: G_0, the values, and in shared mode the share of the next t.
Dealt = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


@dataclass
class Deal:
    """What the dealer sends rank 0 for one inference.

    Args:
        linear: G_0 by segment.
        values: rank 0's (2, V, n) by segment; None for the output.
        masks: shared mode only: rank 0's share of t by source.
    """

    linear: list[np.ndarray]
    values: list[np.ndarray | None]
    masks: dict[int, np.ndarray]


class Dealer:
    """Makes correlated randomness for one pair of parties; sees neither W nor data.

    Args:
        plan: the parties' plan.
        batch: inputs per inference.
        seed: the dealer's own 16 bytes; from the operating system if None.
        seeds: the parties', where they have them already; drawn from `seed` if None.

    Attributes:
        seeds: what rank 0 and rank 1 get; each is one party's secret.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        batch: int = 1,
        seed: bytes | None = None,
        seeds: tuple[bytes, bytes] | None = None,
    ) -> None:
        self.plan = plan
        self.batch = batch
        self._root = Keystream(new_seed() if seed is None else seed)
        self.seeds = seeds or (
            self._root.fork(b"rank 0").bytes(16),
            self._root.fork(b"rank 1").bytes(16),
        )
        self._masks = weight_masks(plan, self.seeds[_SERVER])
        if plan.mode == "shared":
            others = weight_masks(plan, self.seeds[_CLIENT])
            self._masks = [a + b for a, b in zip(self._masks, others, strict=True)]

    def first_masks(self, index: int) -> Iterator[np.ndarray | None]:
        """The mask r of each segment's first opening, for tests of exactness."""
        stream = self._root.fork(b"openings").fork(index)
        for segment in self.plan.segments:
            if segment.activation is None:
                yield None
            else:
                shape = (self.batch, *segment.root.shape)
                yield draw(stream, shape, bits=segment.ring)

    def second_masks(self, index: int) -> list[np.ndarray | None]:
        """The mask r of each segment's second opening, likewise."""
        if self.plan.mode == "owner":
            return expand(
                self.plan, self.seeds[_CLIENT], index, batch=self.batch
            ).openings
        stream = self._root.fork(b"second openings").fork(index)
        return [
            None
            if s.activation is None
            else draw(stream, (self.batch * s.elements,), bits=s.activation.value_ring)
            for s in self.plan.segments
        ]

    def deal(self, index: int) -> Deal:
        """Everything rank 0 gets for inference `index`, exact in each ring.

        Cost: offline, rank 0 receives for each activation 16 V bytes and m bits (owner
            mode), m bits more (shared mode); rank 1 receives nothing.
        """
        deal = Deal([], [], {})
        for number, (linear, values, mask) in enumerate(self._dealing(index)):
            deal.linear.append(linear)
            deal.values.append(values)
            if mask is not None:
                deal.masks[number + 1] = mask
        return deal

    def _dealing(self, index: int) -> Iterator[Dealt]:
        plan, batch = self.plan, self.batch
        shares = SeedShares()
        openings = self.first_masks(index)
        shared = plan.mode == "shared"
        seconds = self.second_masks(index) if shared else None
        whole = shares.masks if seconds is None else {}
        steps = expanding(plan, self.seeds[_CLIENT], index, batch=batch, shares=shares)
        for number, r in zip(steps, openings, strict=True):
            segment = plan.segments[number]
            act = segment.activation
            if number == 0:
                whole[0] = shares.masks[0]
            product = evaluate(
                segment.root,
                narrowed(whole, segment),
                self._masks,
                ring=segment.ring,
                batch=batch,
                public=False,
            )
            if r is not None:
                product += r
            product -= shares.linear[number]
            shares.linear[number] = product[:0]
            taken, shares.values[number] = shares.values[number], None
            shares.openings[number] = None
            if act is None or taken is None or r is None:
                yield product, None, None
                continue
            values = np.empty_like(taken)
            kernels.deal_polynomial(
                r.reshape(-1).astype(np.int64),
                taken,
                bits=segment.ring,
                shifts=act.shifts,
                degrees=act.degrees,
                table=act.table,
                out=values,
            )
            mask = None
            if seconds is not None:
                second = seconds[number]
                assert second is not None
                values[:, 0] += second
                source = plan.sources[number + 1]
                t = np.empty(second.size, dtype=kernels.ring_dtype(source.ring))
                kernels.mask_shift(second, bits=act.value_ring, drop=act.drop, out=t)
                whole[number + 1] = t.reshape(product.shape)
                mask = whole[number + 1] - shares.masks[number + 1]
            yield product, values, mask

    def send(self, channel: Channel, index: int) -> None:
        """Stream `deal(index)` to rank 0 as it is made, at each ring's width."""
        for number, (linear, values, mask) in enumerate(self._dealing(index)):
            channel.send(linear, bits=self.plan.segments[number].ring, tag=index)
            if values is not None:
                channel.send(values, bits=64, tag=index)
            if mask is not None:
                bits = self.plan.sources[number + 1].ring
                channel.send(mask, bits=bits, tag=index)


def receive_deal(
    plan: Plan, channel: Channel, index: int, *, batch: int
) -> Iterator[Dealt]:
    """Rank 0's end of `Dealer.send`, one segment at a time."""
    for number, segment in enumerate(plan.segments):
        count = batch * segment.elements
        shape = (batch, *segment.root.shape)
        linear = channel.receive(count, bits=segment.ring, tag=index).reshape(shape)
        act = segment.activation
        if act is None:
            yield linear, None, None
            continue
        values = channel.receive(2 * act.values * count, bits=64, tag=index)
        mask = None
        if plan.mode == "shared":
            bits = plan.sources[number + 1].ring
            mask = channel.receive(count, bits=bits, tag=index).reshape(shape)
        yield linear, values.reshape(2, act.values, count), mask


# ---------------------------------------------------------------- each party


@dataclass
class Material:
    """One party's prepared inference, ready for the online phase.

    Args:
        index: which inference; both parties must use the same one.
        linear: by segment, what the online pass starts from.
        values: (2, V, n) shares by segment; None for the output.
        masks: rank 1: its t by source; in shared mode both parties' shares of t.
    """

    index: int
    linear: list[np.ndarray]
    values: list[np.ndarray | None]
    masks: dict[int, np.ndarray]


def share_weights(plan: Plan, weights: Weights, seed: bytes) -> tuple[Weights, Weights]:
    """Two additive shares of a model; the second is all drawn from `seed`."""
    stream = Keystream(seed).fork(b"weight shares")
    mine: list[np.ndarray] = []
    theirs: list[np.ndarray] = []
    my_biases: list[np.ndarray | None] = []
    their_biases: list[np.ndarray | None] = []
    for spec, array, bias in zip(
        plan.weights, weights.integers, weights.biases, strict=True
    ):
        other = draw(stream, array.shape, bits=spec.ring)
        theirs.append(other)
        mine.append(array - other)
        if bias is None:
            my_biases.append(None)
            their_biases.append(None)
        else:
            drawn = draw(stream, bias.shape, bits=spec.ring)
            their_biases.append(drawn)
            my_biases.append(bias - drawn)
    return (
        Weights(tuple(mine), tuple(my_biases)),
        Weights(tuple(theirs), tuple(their_biases)),
    )


def opened_weights(
    plan: Plan,
    channel: Channel,
    *,
    seed: bytes | None,
    weights: Weights | None,
) -> list[np.ndarray]:
    """Open W - B, once per model.

    Owner mode: rank 0 sends, rank 1 receives. Shared mode: both send their half.

    Args:
        seed: this party's seed for its part of B; None for rank 1 in owner mode.
        weights: this party's W or share of W; None for rank 1 in owner mode.

    Cost: 1 message of one ring element per weight, from rank 0 (owner) or from each.
    """
    masks = None if seed is None else weight_masks(plan, seed)
    opened = []
    for number, spec in enumerate(plan.weights):
        if weights is not None and masks is not None:
            half = weights.integers[number] - masks[number]
            if plan.mode == "shared":
                whole = half + channel.exchange(half, bits=spec.ring)
                opened.append(whole.astype(half.dtype, copy=False))
            else:
                channel.send(half, bits=spec.ring)
                opened.append(half)
        else:
            count = int(np.prod(spec.kernel_shape))
            flat = channel.receive(count, bits=spec.ring)
            opened.append(flat.reshape(spec.kernel_shape))
    return opened


class Preparation:
    """One party's side of the offline phase, after seeds were dealt.

    Args:
        plan: the plan.
        rank: 0 or 1.
        seed: this party's seed from the dealer.
        weights: W (owner mode, rank 0), this party's share (shared mode), or None.
        batch: inputs per inference.
        opened: W - B, as `opened_weights` returned it.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        rank: int,
        seed: bytes,
        weights: Weights | None,
        batch: int,
        opened: list[np.ndarray],
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.seed = seed
        self.batch = batch
        self.opened = opened
        self._biases = None if weights is None else self._bias_values(weights)

    def _bias_values(self, weights: Weights) -> list[np.ndarray]:
        """Each segment's value for zero sources, plus 2**(m-2) where it is opened."""
        values = []
        for segment in self.plan.segments:
            bias = evaluate(
                segment.root,
                None,
                None,
                ring=segment.ring,
                batch=1,
                biases=weights.biases,
            )
            if segment.activation is not None and self.rank == _SERVER:
                bias += bias.dtype.type(1 << (segment.ring - 2))
            values.append(bias)
        return values

    def server(
        self,
        dealt: Iterable[Dealt],
        halves: Callable[[int], np.ndarray] | None,
        index: int,
    ) -> Material:
        """Rank 0: add up what the dealer and rank 1 send, segment by segment.

        Args:
            dealt: from the dealer.
            halves: owner mode: gives rank 1's half of segment k's opening.
            index: which inference.
        """
        assert self._biases is not None
        material = Material(index, [], [], self._first_mask())
        for number, (given, values, mask) in enumerate(dealt):
            segment = self.plan.segments[number]
            total = given + self._biases[number]
            if self.plan.mode == "shared":
                evaluate(
                    segment.root,
                    narrowed(material.masks, segment),
                    self.opened,
                    ring=segment.ring,
                    batch=self.batch,
                    out=total,
                )
            elif segment.activation is not None:
                assert halves is not None
                total += halves(number)
            if mask is not None:
                material.masks[number + 1] = mask
            material.linear.append(total)
            material.values.append(values)
        return material

    def _first_mask(self) -> dict[int, np.ndarray]:
        """Rank 0's part of the input's mask is zero: the input is rank 1's."""
        if self.plan.mode == "owner":
            return {}
        first = self.plan.sources[0]
        shape = (self.batch, *first.shape)
        return {0: np.zeros(shape, dtype=kernels.ring_dtype(first.ring))}

    def client(
        self, index: int, send: Callable[[np.ndarray, int], None] | None
    ) -> Material:
        """Rank 1: compute its half of every opening, and send it in owner mode.

        Args:
            index: which inference.
            send: owner mode: takes the half and the ring's bits.
        """
        shares = expand(self.plan, self.seed, index, batch=self.batch)
        linear = []
        for number, segment in enumerate(self.plan.segments):
            total = shares.linear[number]
            evaluate(
                segment.root,
                narrowed(shares.masks, segment),
                self.opened,
                ring=segment.ring,
                batch=self.batch,
                out=total,
            )
            if self._biases is not None:
                total += self._biases[number]
            if self.plan.mode == "owner" and segment.activation is not None:
                assert send is not None
                send(total, segment.ring)
                linear.append(np.empty(0, dtype=total.dtype))
            else:
                linear.append(total)
        return Material(index, linear, client_values(shares), shares.masks)


def client_values(shares: SeedShares) -> list[np.ndarray | None]:
    """Rank 1's values; in owner mode the second opening's mask joins the constant."""
    for values, r in zip(shares.values, shares.openings, strict=True):
        if values is not None and r is not None:
            values[:, 0] += r
    return shares.values
