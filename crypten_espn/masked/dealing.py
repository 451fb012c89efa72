"""The dealer's part of the offline phase; it sees neither weights nor data.

For each linear part and inference, with t of every source, G, delta and r as
`material` and this file draw them; G and shares of the words from the seed of the party
that receives no corrections, which the session chooses:

1. Send the other party B*t + r - G. The client adds (W-B)*t to its half of the two, and
   with both the opening is ready but for W*D.
2. For a step's polynomial, compute the word that belongs to each power of D and what
   it changes by in the other case of the mask, r_k = r + delta_k; for a product the
   masks of both factors and their products. Send that party what the seed-drawn shares
   leave, in the bits that reach the result. The second opening's rounding coins,
   uniform below 2**s, are added to the constant: the drawn share hides them from
   whoever receives what is left, and whoever draws never sees them.

The party that receives no corrections gets a seed from the dealer and nothing else.

Who learns what does not hang on the choice. A value v that is shared out is held as
(G, v - G) or as (v - G, G), with G uniform in v's ring: the same distribution, jointly
with all else. So both parties' views are as `inference` says, whoever draws.

Source: Delphi (Mishra et al., USENIX Security 2020) for the server-held weights; the
two-valued truncation mask after Escudero et al., CRYPTO 2020, and Dalskov et al.,
USENIX Security 2021.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..randomness import Keystream, new_seed
from . import kernels
from .evaluation import Coins, chunks
from .linear import Operands, accumulate
from .material import (
    Draws,
    draw,
    inference_seeds,
    source_mask,
    weight_masks,
)
from .memory import Space
from .messages import SERVER, Party, Protocol, Send
from .plan import Plan


class Dealing:
    """Makes one pair's correlated randomness.

    Args:
        plan: the parties' plan.
        corrections: the party that receives them.
        seed: the dealer's own 16 bytes; from the operating system if None.
        seeds: the parties', where they have them already; drawn from `seed` if None.

    Attributes:
        seeds: what server and client get; each is one party's secret.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        corrections: Party = SERVER,
        seed: bytes | None = None,
        seeds: tuple[bytes, bytes] | None = None,
    ) -> None:
        self.plan = plan
        self._corrections: Party = corrections
        root = Keystream(new_seed() if seed is None else seed)
        self.seeds = seeds or (
            root.fork(b"server").bytes(16),
            root.fork(b"client").bytes(16),
        )
        masks = zip(plan.weights, weight_masks(plan, self.seeds[0]), strict=True)
        self._masks = [shape.filters(mask) for shape, mask in masks]
        own = root.fork(b"dealer").bytes(16)
        self._ratchets = tuple(inference_seeds(seed) for seed in (own, *self.seeds))

    def deal(
        self, index: int, batch: int, *, space: Space | None = None
    ) -> Protocol[None]:
        """Send one party its corrections for inference `index`.

        Args:
            index: must rise from call to call.
            batch: inputs in it.
            space: memory of a dealing before this one, to be used again.

        Cost: offline, one message a linear part, m bits for each element, and one a
            chunk of each step, the bits of each word that count; the other party
            receives nothing.

        Raises: RandomnessError if the index was dealt before.
        """
        plan = self.plan
        own, server, client = (ratchet.take(index) for ratchet in self._ratchets)
        masks = Draws(plan, client, batch)
        to = self._corrections
        halves = masks if to == SERVER else Draws(plan, server, batch)
        sources = {0: masks.input_mask}
        space = Space() if space is None else space
        dealt = coins(plan, own, server, batch, space=space)
        for number, (part, coin) in enumerate(zip(plan.parts, dealt, strict=True)):
            shape = batch, *plan.part_shapes[number]
            out = space.message("linear", shape, kernels.ring_dtype(part.ring))
            halves.linear(number, out=out)
            np.subtract(0 if coin is None else coin.masks[0].reshape(shape), out, out)
            operands = Operands(plan.shapes, sources, self._masks, public=False)
            accumulate(part.root, operands, out)
            yield Send(to, ((out, part.ring),))
            if coin is None:
                continue
            between = plan.evaluations[number]
            for chunk in chunks(batch):
                rows = chunk.stop - chunk.start
                words = space.message("words", between.words_shape(rows), np.int64)
                halves.words(number, chunk, out=words)
                between.deal(coin.part(chunk, batch), words)
                bits = [width for _, width in between.dealt(rows)]
                lines = between.lines(words, rows)
                yield Send(to, tuple(zip(lines, bits, strict=True)))
            sources[number + 1] = source_mask(plan, number, masks.hidden(number))
            for dead in plan.last_reads[number]:
                del sources[dead]


def coins(
    plan: Plan, own: bytes, server: bytes, batch: int, *, space: Space | None = None
) -> Iterator[Coins | None]:
    """Every linear part's masks and coins; None for the output.

    Args:
        own, server: the dealer's and the server's seed of the inference.
        space: memory that each part's are drawn into after the last one's; each has
            memory of its own if None.
    """
    stream = Keystream(own).fork(b"batch").fork(batch)
    draws = Draws(plan, server, batch)
    for number, (step, between) in enumerate(
        zip(plan.steps, plan.evaluations, strict=True)
    ):
        here = Space() if space is None else space
        act, dtype = step.activation, kernels.ring_dtype(step.ring)
        masks = here.array("masks", (act.masks, batch * between.opened), dtype)
        draw(stream, masks[:1].shape, bits=step.ring, out=masks[:1])
        draws.deltas(number, out=masks[1:])
        masks[1:] += masks[0]
        rounding = here.array("rounding", (batch * between.elements,), np.int64)
        if act.drop > 32:
            draw(stream, rounding.shape, bits=act.drop, out=rounding)
        else:
            # A type's own width comes with a sign, and coins are not negative.
            drawn = here.array("drawn", rounding.shape, np.int32)
            draw(stream, drawn.shape, bits=act.drop, out=drawn)
            rounding[:] = drawn.view(np.uint32)
        yield Coins(masks, rounding)
    yield None
