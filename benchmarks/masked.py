"""The masked engine as a system beside CrypTen's, phase by phase.

Offline, as under CrypTen's provider TFP, the first party's process plays the dealer:
the dealer's work is timed, what it would send is counted from the plan, and what rank
1 sends rank 0 crosses the network. Online both parties run as they would in a session,
over a connection of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch

import crypten_espn
from crypten_espn.channel import Channel, Listener, connect_channel, parse_address
from crypten_espn.masked import offline, online
from crypten_espn.masked.plan import Plan, quantise
from crypten_espn.masked.planning.builder import make_plan, parameters_of

from .party import Control, Result

FRAME_BYTES = 20  # the channel's header of each message, left out of the count


class MaskedSystem:
    """One network under the masked engine, weights at rank 0, images at rank 1.

    Args:
        network: with polynomial activations, in eval mode.
        x: the images; rank 0 uses only their shape.
        calibration: images from which the plan takes its bounds.
        control: the parties' connection for agreement.
        address, listen: where rank 1 reaches rank 0, and what rank 0 binds.
        check: largest error and agreement of the logits.
    """

    activation = engine = "masked"

    def __init__(
        self,
        network: torch.nn.Module,
        x: torch.Tensor,
        calibration: torch.Tensor,
        control: Control,
        *,
        address: str,
        listen: str,
        check: Callable[[torch.Tensor], tuple[float, float | None] | None],
    ) -> None:
        self._network, self._x, self._calibration = network, x, calibration
        self._control, self._check = control, check
        self._address, self._listen = address, listen
        self._batch = len(x)
        self._index = 0
        self._material: offline.Material | None = None

    def prepare(self) -> float:
        """Agree on a plan, connect, open the masked weights: once per model."""
        control, batch = self._control, self._batch
        weights = None
        if control.rank == 0:
            graph = crypten_espn.convert(self._network, self._calibration)
            self._plan = make_plan(graph, self._calibration)
            weights = quantise(self._plan, parameters_of(graph))
            self._dealer = offline.Dealer(self._plan, batch=batch)
            seed, other = self._dealer.seeds
            control.send([self._plan.to_json(), other.hex()])
            with Listener(f"{self._listen}:0") as listener:
                control.send(parse_address(listener.address)[1])
                self._channel = listener.accept(
                    timeout=120.0, peer_timeout=600.0, peer="rank 1"
                )
        else:
            text, own = control.receive()
            self._plan, seed = Plan.from_json(text), bytes.fromhex(own)
            where = f"{self._address}:{control.receive()}"
            self._channel = connect_channel(where, timeout=600.0, peer="rank 0")
        self._channel.pace()
        self._weights = weights
        opened = offline.opened_weights(
            self._plan,
            self._channel,
            seed=seed if control.rank == 0 else None,
            weights=weights,
        )
        self._preparation = offline.Preparation(
            self._plan,
            rank=control.rank,
            seed=seed,
            weights=weights,
            batch=batch,
            opened=opened,
        )
        return 0.0  # nothing was run

    def offline(self) -> int:
        """Deal and prepare one inference; bytes the dealer and rank 1 send."""
        plan, channel, batch = self._plan, self._channel, self._batch
        self._index += 1
        index = self._index

        def half(number: int) -> np.ndarray:
            segment = plan.segments[number]
            count = batch * segment.elements
            flat = channel.receive(count, bits=segment.ring, tag=index)
            return flat.reshape(batch, *segment.root.shape)

        def send(values: np.ndarray, bits: int) -> None:
            channel.send(values, bits=bits, tag=index)

        channel.reset_counters()
        if self._control.rank == 0:
            deal = self._dealer.deal(index)
            dealt = zip(deal.linear, deal.values, itertools.repeat(None))
            self._material = self._preparation.server(dealt, half, index)
        else:
            self._material = self._preparation.client(index, send)
        _, crossed = _payload(channel)
        return plan.dealer_bytes(batch=batch) + crossed

    def online(self) -> Callable[[], Result]:
        """One inference from the prepared material."""
        channel, material = self._channel, self._material
        assert material is not None
        channel.reset_counters()
        channel.pace()
        logits = None
        if self._control.rank == 0:
            assert self._weights is not None
            online.serve_one(
                self._plan, self._weights, channel, material, batch=self._batch
            )
        else:
            logits = self._plan.decode(
                online.query_one(
                    self._plan,
                    channel,
                    material,
                    self._plan.encode(self._x),
                    batch=self._batch,
                )
            )
        messages = channel.messages_sent + channel.messages_received
        # The parts of a large batch travel at once, between the input and the logits.
        rounds = 2 + (messages - 2) // len(online.pieces(self._batch))
        sent, _ = _payload(channel)
        self._material = None

        def finish() -> Result:
            checked = None if logits is None else self._check(logits)
            error, agreement = checked or (None, None)
            return Result(rounds, sent, error, agreement)

        return finish

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def _payload(channel: Channel) -> tuple[int, int]:
    """Payload bytes sent and received since the counters were reset."""
    return (
        channel.bytes_sent - FRAME_BYTES * channel.messages_sent,
        channel.bytes_received - FRAME_BYTES * channel.messages_received,
    )
