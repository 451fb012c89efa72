"""The dealer's part of the offline phase; it sees neither weights nor data.

For each linear part and inference, with t of every source, G, delta and r as
`material` and this file draw them:

1. Send the server B*t + r - G: with the client's (W-B)*t + G, its opening is ready but
   for W*D.
2. For a step's polynomial, compute the word that belongs to each power of D and what
   it changes by in the other case of the mask, r_k = r + delta_k; for a product the
   masks of both factors and their products. Send the server what the client's
   seed-drawn shares leave, in the bits that reach the result. The second opening's
   rounding coins, uniform below 2**s, are added to the constant: the client's share
   hides them from the server, and the client never sees them.

The client receives a seed from the dealer and nothing else.

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
    CLIENT,
    SERVER,
    ClientDraws,
    draw,
    inference_seeds,
    server_draws,
    source_mask,
    weight_masks,
)
from .messages import SERVER as TO_SERVER
from .messages import Protocol, Send
from .plan import Plan


class Dealing:
    """Makes one pair's correlated randomness.

    Args:
        plan: the parties' plan.
        seed: the dealer's own 16 bytes; from the operating system if None.
        seeds: the parties', where they have them already; drawn from `seed` if None.

    Attributes:
        seeds: what server and client get; each is one party's secret.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        seed: bytes | None = None,
        seeds: tuple[bytes, bytes] | None = None,
    ) -> None:
        self.plan = plan
        root = Keystream(new_seed() if seed is None else seed)
        self.seeds = seeds or (
            root.fork(b"server").bytes(16),
            root.fork(b"client").bytes(16),
        )
        self._masks = weight_masks(plan, self.seeds[SERVER])
        self._ratchets = (
            inference_seeds(root.fork(b"dealer").bytes(16)),
            inference_seeds(self.seeds[SERVER]),
            inference_seeds(self.seeds[CLIENT]),
        )

    def deal(self, index: int, batch: int) -> Protocol[None]:
        """Send the server everything for inference `index`.

        Args:
            index: must rise from call to call.
            batch: inputs in it.

        Cost: offline, one message a linear part, m bits for each element, and one a
            chunk of each step, the bits of each word that count; the client receives
            nothing.

        Raises: RandomnessError if the index was dealt before.
        """
        plan = self.plan
        own, server, client = (ratchet.take(index) for ratchet in self._ratchets)
        draws = ClientDraws(plan, client, batch)
        sources = {0: draws.input_mask}
        dealt = coins(plan, own, server, batch)
        for number, (part, coin) in enumerate(zip(plan.parts, dealt, strict=True)):
            out = -draws.linear(number)
            operands = Operands(plan.shapes, sources, self._masks, public=False)
            accumulate(part.root, operands, out)
            if coin is not None:
                out += coin.masks[0].reshape(out.shape)
            yield Send(TO_SERVER, ((out, part.ring),))
            if coin is None:
                continue
            between = plan.evaluations[number]
            for chunk in chunks(batch):
                given = between.deal(
                    coin.part(chunk, batch), draws.words(number, chunk)
                )
                bits = between.dealt(chunk.stop - chunk.start)
                lines = given.reshape(len(bits), -1)
                parts = tuple(
                    (line, width) for line, (_, width) in zip(lines, bits, strict=True)
                )
                yield Send(TO_SERVER, parts)
            sources[number + 1] = source_mask(plan, number, draws.hidden(number))
            for dead in plan.last_reads[number]:
                del sources[dead]


def coins(plan: Plan, own: bytes, server: bytes, batch: int) -> Iterator[Coins | None]:
    """Every linear part's masks and coins; None for the output.

    Args:
        own, server: the dealer's and the server's seed of the inference.
    """
    stream = Keystream(own).fork(b"batch").fork(batch)
    deltas = server_draws(plan, server, batch)
    for number, (step, delta) in enumerate(zip(plan.steps, deltas, strict=True)):
        between = plan.evaluations[number]
        first = draw(stream, (1, batch * between.opened), bits=step.ring)
        masks = first if not len(delta) else np.concatenate([first, first + delta])
        drop = step.activation.drop
        rounding = draw(stream, (batch * between.elements,), bits=drop)
        rounding = rounding.astype(np.int64, copy=False)
        # A type's own width comes with a sign, and coins are not negative.
        yield Coins(masks, rounding & kernels.ring_mask(drop))
    yield None
