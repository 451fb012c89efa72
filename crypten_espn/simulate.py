"""Run a network's parties and its dealer on this machine."""

from __future__ import annotations

import secrets
import time

import torch

from .convert import PrivateNetwork
from .cost import Cost, SessionCost
from .engines import CrypTen
from .errors import ProtocolError
from .inputs import real_tensor
from .launch import run_parties
from .masked.dealing import Dealing
from .masked.drivers import Transcript, together
from .masked.inference import client, server
from .masked.material import Pairing
from .masked.messages import CLIENT, DEALER, SERVER
from .masked.model import MaskedModel
from .masked.planning import masked_model
from .masked.preparing import ClientPreparation, ServerPreparation
from .serving.link import TIMEOUT_S
from .serving.local import run_session


def simulate(
    private: PrivateNetwork | MaskedModel,
    x: object,
    *,
    example: torch.Tensor | None = None,
    precision: str | int | None = None,
    headroom: float | None = None,
    processes: bool = False,
    force: bool = False,
    timeout: float = TIMEOUT_S,
) -> tuple[torch.Tensor, Cost]:
    """Run both parties and the dealer on this machine.

    1. Plan the network, calibrated on `example`, else on the conversion's own example;
       check `x` before anything is computed.
    2. The server gets the weights, the client the input; the dealer gets neither.
    3. Prepare one inference, then do it, all in this process: every message is packed
       and unpacked as on a wire, so that bytes and messages are those of two hosts.

    Args:
        private: what `convert` returned, or a MaskedModel. A network converted for
            another protocol than "masked" runs on CrypTen with that protocol, in two
            processes.
        x: (batch, *input_shape), of any kind that `inputs` takes.
        example: calibration inputs.
        precision, headroom: as `masked.planning.make_plan`; those of the conversion's
            engine if None.
        processes: whether dealer, server and client are three processes joined by TCP,
            which takes longer and gives each one's true seconds.
        force: take what the network's guard refuses. The private result may then be
            any number, and nothing tells.
        timeout: seconds without progress before a dead process is an error.

    Returns: logits (batch, *output_shape) and the cost: the client's online phase, with
        the server's bytes and the offline phase beside it. Its seconds are those of all
        parties in turn.

    Raises: PlanError, DataError, ShapeError, RangeError before anything starts, the
        last for what the guard refuses too; PeerError if a process dies.
    """
    if not isinstance(private, PrivateNetwork | MaskedModel):
        raise ProtocolError(
            f"{type(private).__name__} cannot be simulated; give what convert() made."
        )
    if isinstance(private, PrivateNetwork) and isinstance(private.engine, CrypTen):
        numbers = private.checked(x, force=force)
        return _simulate_crypten(private, numbers, timeout)
    model = masked_model(private, example, precision=precision, headroom=headroom)
    if processes:
        batches = [real_tensor(x)]
        return run_session(model, batches, timeout=timeout, force=force)[0]
    return simulate_model(model, x, force=force)


def simulate_model(
    model: MaskedModel, x: object, *, force: bool = False
) -> tuple[torch.Tensor, SessionCost]:
    """`simulate` a planned model."""
    plan = model.plan
    encoded = plan.encode(x, force=force)
    start = time.perf_counter()
    pairing = Pairing(secrets.token_bytes(16), 0, len(encoded))
    dealing = Dealing(plan)
    ours = ServerPreparation(plan, model.weights, dealing.seeds[0])
    theirs = ClientPreparation(plan, dealing.seeds[1])
    _, opening = together({SERVER: ours.open_weights(), CLIENT: theirs.open_weights()})
    ready, offline = together(
        {
            DEALER: dealing.deal(pairing.index, pairing.batch),
            SERVER: ours.prepare(pairing),
            CLIENT: theirs.prepare(pairing),
        }
    )
    middle = time.perf_counter()
    results, online = together(
        {
            SERVER: server(plan, model.weights, ready[SERVER]),
            CLIENT: client(plan, ready[CLIENT], encoded),
        }
    )
    end = time.perf_counter()
    cost = SessionCost(
        plan.messages,
        online.bytes_sent(CLIENT),
        offline.bytes_sent(DEALER) // 8,
        end - middle,
        online.bytes_sent(SERVER),
        Cost(0, _sent(CLIENT, opening, offline), 0, middle - start),
        _sent(SERVER, opening, offline),
        _sent(DEALER, opening, offline),
    )
    return plan.decode(results[CLIENT]), cost


def _sent(party: str, *transcripts: Transcript) -> int:
    return sum(transcript.bytes_sent(party) for transcript in transcripts)


def _simulate_crypten(
    private: PrivateNetwork, x: torch.Tensor, timeout: float
) -> tuple[torch.Tensor, Cost]:
    """Two CrypTen parties with the protocol the network was converted for."""

    def party() -> tuple[torch.Tensor | None, Cost]:
        import crypten

        from crypten_espn.cost import measure

        network = private.encrypt(src=0)
        data = crypten.cryptensor(x, src=1)
        with measure() as measured, crypten.no_grad():
            logits = network(data).get_plain_text(dst=1)
        return logits, measured.cost

    result: tuple[torch.Tensor, Cost]
    _, result = run_parties(party, world_size=2, timeout=max(timeout, 600.0))
    return result
