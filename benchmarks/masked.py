"""The masked engine as a system beside CrypTen's, phase by phase.

Offline, as under CrypTen's provider TFP, the first party's process plays the dealer:
the dealer's work is timed, what it would send is counted from the plan, and what rank
1 sends rank 0 crosses the network. Online both parties run as they would in a session,
over a connection of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import crypten_espn
from crypten_espn.masked.dealing import Dealing
from crypten_espn.masked.drivers import TOLD_BYTES, over
from crypten_espn.masked.inference import client, server
from crypten_espn.masked.material import ClientMaterial, Pairing, ServerMaterial
from crypten_espn.masked.messages import DEALER, Protocol, Receive, Send
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.preparing import ClientPreparation, ServerPreparation
from crypten_espn.wire.channel import Channel
from crypten_espn.wire.connect import Listener, connect_channel, parse_address
from crypten_espn.wire.frames import HEADER_BYTES

from .party import Control, Result

_SESSION = bytes(16)


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
        self._index = 0
        self._side: _Server | _Client | None = None

    def prepare(self) -> float:
        """Agree on a plan, connect, open the masked weights: once per model."""
        control = self._control
        if control.rank == 0:
            graph = crypten_espn.convert(self._network, self._calibration)
            model = masked_model(graph, self._calibration)
            dealing = Dealing(model.plan)
            control.send([model.plan.to_json(), dealing.seeds[1].hex()])
            with Listener(
                f"{self._listen}:0", role="server", insecure=True
            ) as listener:
                control.send(parse_address(listener.address)[1])
                incoming = listener.accept(timeout=120.0)
                channel = incoming.open(peer_roles=("client",), timeout=600.0)
            self._side = _Server(channel, model, dealing)
        else:
            text, seed = control.receive()
            where = f"{self._address}:{control.receive()}"
            channel = connect_channel(
                where, role="client", peer_role="server", timeout=600.0, insecure=True
            )
            plan = Plan.from_json(text)
            self._side = _Client(channel, plan, bytes.fromhex(seed), self._x)
        channel.pace()
        self._side.run(self._side.preparation.open_weights(), 0)
        return 0.0  # nothing was run

    def offline(self) -> int:
        """Deal and prepare one inference; bytes the dealer and rank 1 send."""
        assert self._side is not None
        self._index += 1
        pairing = Pairing(_SESSION, self._index, len(self._x))
        self._side.channel.reset_counters()
        self._side.prepare(pairing)
        _, crossed = _payload(self._side.channel)
        return self._side.plan.dealer_bytes(batch=len(self._x)) + crossed

    def online(self) -> Callable[[], Result]:
        """One inference from the prepared material."""
        side = self._side
        assert side is not None
        side.channel.reset_counters()
        side.channel.pace()
        logits = side.infer()
        sent, _ = _payload(side.channel)
        # Both sides also tell which material they used.
        sent -= TOLD_BYTES

        def finish() -> Result:
            checked = None if logits is None else self._check(logits)
            error, agreement = checked or (None, None)
            return Result(side.plan.messages, sent, error, agreement)

        return finish

    def close(self) -> None:
        """Close the connection."""
        if self._side is not None:
            self._side.channel.close()


class _Side:
    """One party's channel, plan, preparation and material."""

    peer: str
    preparation: ServerPreparation | ClientPreparation

    def __init__(self, channel: Channel, plan: Plan) -> None:
        self.channel, self.plan = channel, plan
        self._index = 0

    def run(self, part: Protocol[Any], index: int) -> Any:
        return over(part, {self.peer: self.channel}, tag=index)


class _Server(_Side):
    """Rank 0, which is its own dealer."""

    peer = "client"

    def __init__(self, channel: Channel, model: Any, dealing: Dealing) -> None:
        super().__init__(channel, model.plan)
        self._weights, self._dealing = model.weights, dealing
        self.preparation = ServerPreparation(
            model.plan, model.weights, dealing.seeds[0]
        )
        self._material: ServerMaterial | None = None

    def prepare(self, pairing: Pairing) -> None:
        self._index = pairing.index
        dealt = self._dealing.deal(pairing.index, pairing.batch)
        part = self.preparation.prepare(pairing)
        self._material = self.run(_dealt(part, dealt), pairing.index)

    def infer(self) -> None:
        assert self._material is not None
        material, self._material = self._material, None
        self.run(server(self.plan, self._weights, material), self._index)


def _dealt(part: Protocol[Any], dealt: Protocol[None]) -> Protocol[Any]:
    """A preparation that takes the dealer's messages from the dealer itself."""
    answer: Any = None
    try:
        while True:
            event = part.send(answer)
            if isinstance(event, Receive) and event.of == DEALER:
                message = next(dealt)
                assert isinstance(message, Send)
                answer = [array.reshape(-1) for array, _ in message.parts]
            else:
                answer = yield event
    except StopIteration as end:
        return end.value


class _Client(_Side):
    """Rank 1."""

    peer = "server"

    def __init__(
        self, channel: Channel, plan: Plan, seed: bytes, x: torch.Tensor
    ) -> None:
        super().__init__(channel, plan)
        self._x = x
        self.preparation = ClientPreparation(plan, seed)
        self._material: ClientMaterial | None = None

    def prepare(self, pairing: Pairing) -> None:
        self._index = pairing.index
        self._material = self.run(self.preparation.prepare(pairing), pairing.index)

    def infer(self) -> torch.Tensor:
        assert self._material is not None
        material, self._material = self._material, None
        part = client(self.plan, material, self.plan.encode(self._x))
        return self.plan.decode(self.run(part, self._index))


def _payload(channel: Channel) -> tuple[int, int]:
    """Payload bytes sent and received since the counters were reset."""
    return (
        channel.bytes_sent - HEADER_BYTES * channel.messages_sent,
        channel.bytes_received - HEADER_BYTES * channel.messages_received,
    )
