"""A real session on this machine: dealer, server and client as three processes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from ..cost import Cost, SessionCost
from ..launch import run_parties
from ..masked.drivers import TOLD_BYTES
from ..masked.inference import message_sizes
from ..masked.messages import SERVER, Party
from ..masked.model import MaskedModel
from ..masked.plan import Plan
from ..wire.frames import HEADER_BYTES
from .client import connect
from .dealer import DealerServer
from .link import TIMEOUT_S
from .server import ModelServer

_CLIENT_RANK, _DEALER_RANK = 1, 2


def run_session(
    model: MaskedModel,
    batches: Sequence[torch.Tensor],
    *,
    timeout: float = TIMEOUT_S,
    force: bool = False,
    corrections: Party = SERVER,
) -> list[tuple[torch.Tensor, SessionCost]]:
    """Prepare and do one inference for each batch, over TCP between three processes.

    Args:
        model: a planned network.
        batches: each (batch, *input_shape); all are checked before a process starts.
        timeout: seconds without progress before a dead process is an error.
        force: as `Client.predict`.
        corrections: who receives the dealer's.

    Returns: the logits and the cost of each, in order.

    Raises: ShapeError, RangeError before anything starts; PeerError if a process dies.
    """
    for x in batches:
        model.plan.encode(x, force=force)
    args = model, batches, timeout, force, corrections
    results = run_parties(_party, world_size=3, args=args)
    plan = model.plan
    return [
        (
            logits,
            _cost(
                plan,
                len(x),
                online,
                offline,
                first=number == 0,
                corrections=corrections,
            ),
        )
        for number, (x, (logits, online, offline)) in enumerate(
            zip(batches, results[_CLIENT_RANK], strict=True)
        )
    ]


def _party(
    model: MaskedModel,
    batches: Sequence[torch.Tensor],
    timeout: float,
    force: bool,
    corrections: Party,
) -> list[tuple[torch.Tensor, Cost, Cost]] | None:
    """One of the three; the addresses and the end are told over CrypTen's channel."""
    import crypten.communicator as comm

    party = comm.get()
    rank = party.get_rank()
    dealer: DealerServer | None = None
    server: ModelServer | None = None
    if rank == _DEALER_RANK:
        dealer = DealerServer("127.0.0.1:0", timeout=timeout)
    dealing = party.broadcast_obj(dealer and dealer.address, _DEALER_RANK)
    if rank == 0:
        server = ModelServer(model, "127.0.0.1:0", dealer=dealing, timeout=timeout)
    address = party.broadcast_obj(server and server.address, 0)
    host = dealer or server
    if host is not None:
        threading.Thread(target=host.run, daemon=True).start()
        party.barrier()
        host.close()
        return None
    found = []
    try:
        with connect(
            address, dealer=dealing, timeout=timeout, corrections=corrections
        ) as client:
            for x in batches:
                client.online = client.offline = Cost()
                client.prepare(1, batch=len(x))
                logits = client.predict(x, force=force)
                found.append((logits, client.online, client.offline))
    finally:
        party.barrier()
    return found


def _cost(
    plan: Plan,
    batch: int,
    online: Cost,
    offline: Cost,
    *,
    first: bool,
    corrections: Party,
) -> SessionCost:
    """The client measured its own; what the others sent follows from the plan."""
    sent = [size for who, size in message_sizes(plan, batch=batch) if who == SERVER]
    frames = HEADER_BYTES * (len(sent) + 1)
    messages = plan.dealer_messages(batch=batch)
    dealt = sum(messages) + HEADER_BYTES * len(messages)
    opened = plan.weight_bytes + HEADER_BYTES * len(plan.weights)
    return SessionCost(
        online.rounds,
        online.bytes_sent,
        dealt // 8,
        online.seconds,
        sum(sent) + frames + TOLD_BYTES,
        offline,
        opened if first else 0,
        dealt,
        corrections,
    )
