"""The masked engine as a system beside CrypTen's: a real session, phase by phase.

Rank 0 starts what a company runs, a dealer and a server of the model, each a process of
its own; rank 1 is the client. Offline is `Client.prepare` of one inference, dealer and
all, online is `Client.predict`. The dealer stands on the server's side of the path.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import crypten_espn
from crypten_espn.masked.messages import CLIENT, SERVER
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.planning import masked_model
from crypten_espn.serving.client import Client

from . import hosts
from .hosts import Hosts
from .party import Control, Result
from .rows import COMPACT, MASKED


class MaskedSystem:
    """One network under the masked engine, weights at rank 0, images at rank 1.

    Args:
        network: with polynomial activations, in eval mode.
        x: the images; rank 0 uses only their number.
        calibration: images from which the plan takes its bounds.
        control: the parties' connection for agreement.
        address, listen: where rank 1 reaches rank 0, and what rank 0 binds.
        threads: of each process.
        activation: MASKED, or COMPACT for that precision.
        check: largest error and agreement of the logits.
    """

    engine = "masked"

    def __init__(
        self,
        network: torch.nn.Module,
        x: torch.Tensor,
        calibration: torch.Tensor,
        control: Control,
        *,
        address: str,
        listen: str,
        threads: int,
        activation: str = MASKED,
        check: Callable[[torch.Tensor], tuple[float, float | None] | None],
    ) -> None:
        self.activation = activation
        self._network, self._x, self._calibration = network, x, calibration
        self._control, self._check = control, check
        self._address, self._listen, self._threads = address, listen, threads
        self._side: _Company | _User | None = None

    def prepare(self) -> float:
        """Plan, start the processes, connect; a first inference opens the weights.

        Returns: the seconds that inference took, the weights' opening among them.
        """
        control, batch = self._control, len(self._x)
        if control.rank == 0:
            graph = crypten_espn.convert(self._network, self._calibration)
            precision = "compact" if self.activation == COMPACT else "fast"
            model = masked_model(graph, self._calibration, precision=precision)
            served = Hosts(model, host=self._listen, threads=self._threads)
            self._side = _Company(served, model.plan, batch, control)
            control.send([hosts.port(served.server), hosts.port(served.dealer)])
        else:
            client = hosts.reach(self._address, control.receive())
            self._side = _User(client, self._x, control, self._check)
        began = time.monotonic()
        self._side.offline()
        self._side.online()()
        return time.monotonic() - began

    def offline(self) -> int:
        """Prepare one inference; bytes the dealer and rank 1 send for it."""
        assert self._side is not None
        return self._side.offline()

    def online(self) -> Callable[[], Result]:
        """One inference from the prepared material."""
        assert self._side is not None
        return self._side.online()

    def close(self) -> None:
        """End the session and its processes."""
        if self._side is not None:
            self._side.close()


class _Company:
    """Rank 0, whose processes do what is to be done; it looks at their logs."""

    def __init__(self, served: Hosts, plan: Plan, batch: int, control: Control) -> None:
        self._served, self._plan, self._batch = served, plan, batch
        self._control, self._count = control, 0

    def offline(self) -> int:
        return 0  # rank 1's figure counts

    def online(self) -> Callable[[], Result]:
        self._count += 1
        return self._finish

    def _finish(self) -> Result:
        """Once rank 1 has its logits: what server and dealer say that they sent."""
        self._control.receive()
        served, plan, batch = self._served, self._plan, self._batch
        dealt = served.events(served.dealer, "dealt", self._count)[-1]
        prepared = served.events(served.server, "prepared", self._count)[-1]
        hosts.check_offline(
            plan, dealt=dealt["sent"], received=prepared["received"], batch=batch
        )
        answered = served.events(served.server, "inference", self._count)[-1]
        sent = hosts.online_payload(plan, SERVER, answered["sent"], batch=batch)
        return Result(plan.messages, sent, None, None)

    def close(self) -> None:
        self._served.close()


class _User:
    """Rank 1: a client of the server."""

    def __init__(
        self,
        client: Client,
        x: torch.Tensor,
        control: Control,
        check: Callable[[torch.Tensor], tuple[float, float | None] | None],
    ) -> None:
        self._client, self._x, self._control, self._check = client, x, control, check

    def offline(self) -> int:
        plan, batch = self._client.plan, len(self._x)
        self._client.prepare(1, batch=batch)
        # Rank 0 compares it with what was sent.
        return plan.dealer_bytes(batch=batch) + plan.client_bytes(batch=batch)

    def online(self) -> Callable[[], Result]:
        answer = self._client.ask(self._x)

        def finish() -> Result:
            self._control.send(None)
            plan, batch = self._client.plan, len(self._x)
            sent = hosts.online_payload(plan, CLIENT, answer.sent, batch=batch)
            error, agreement = self._check(answer.logits) or (None, None)
            return Result(plan.messages, sent, error, agreement)

        return finish

    def close(self) -> None:
        self._client.close()
