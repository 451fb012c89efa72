"""Whole sessions: server, client and dealer as processes, over a path.

What `offline` and `growth` run: for each point a dealer and a server process are
started, a client process connects, prepares and predicts through the public API, and
each is asked what it sent and what it held. The dealer is on the server's side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from . import link
from .networks import image_size
from .rows import Spread

_PIXELS = 64 * 32 * 32  # of all images that are prepared at once, by default


@dataclasses.dataclass(frozen=True)
class Point:
    """What a session is asked to do.

    Args:
        model: one of networks.MODELS.
        size: height and width of its images.
        batch: images in each inference.
        count: inferences in the larger preparation.
    """

    model: str
    size: int
    batch: int
    count: int

    @classmethod
    def of(
        cls,
        model: str,
        *,
        batch: int = 1,
        size: int | None = None,
        count: int | None = None,
    ) -> Point:
        """With the network's own images, and 2 to 8 inferences at once."""
        size = image_size(model) if size is None else size
        fitting = max(2, min(8, _PIXELS // (batch * size**2)))
        return cls(model, size, batch, fitting if count is None else count)


@dataclasses.dataclass(frozen=True)
class Session:
    """What a session took. Seconds are for one image, seen from the client.

    Args:
        model, size, batch, count: as `Point`.
        network, rtt_ms, mbit: the path between client and server.
        threads: of each process.
        corrections: who receives the dealer's.
        precision: of the plan.
        activations, macs: of one image: values opened, and the plan's multiplications.
        one_s: `prepare(1)`, per image.
        many_s: `prepare(count)`, per image.
        online_s: `predict`, per image.
        dealer_bytes: from the dealer for an inference, frames and all.
        client_bytes: from the client to the server to prepare one, frames and all.
        online_bytes: of an inference, by the server and by the client.
        opened_bytes: from the server to the client once a session.
        idle_bytes, peak_bytes: in memory of server, client and dealer, once connected
            and at most.
    """

    model: str
    size: int
    batch: int
    count: int
    network: str
    rtt_ms: float
    mbit: float | None
    threads: int
    corrections: str
    precision: str
    activations: int
    macs: int
    one_s: Spread
    many_s: Spread
    online_s: Spread
    dealer_bytes: int
    client_bytes: int
    online_bytes: tuple[int, int]
    opened_bytes: int
    idle_bytes: tuple[int, int, int]
    peak_bytes: tuple[int, int, int]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Session:
        """The inverse of `dataclasses.asdict`, as read from JSON."""
        fields = dict(values)
        for name in ("one_s", "many_s", "online_s"):
            fields[name] = Spread.from_dict(fields[name])
        for name in ("online_bytes", "idle_bytes", "peak_bytes"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


# ----------------------------------------------------------------------- in the parent


def measure(
    point: Point,
    network: str,
    *,
    repeat: int,
    threads: int,
    timeout_s: float,
    corrections: str = "server",
    precision: str = "fast",
    idle_restart: bool = True,
) -> Session:
    """Run one session.

    Args:
        network: a profile of `link`, by name or by numbers.
        repeat: preparations of each kind.
        threads: of each process.
        timeout_s: after which it is given up.
        corrections: who receives the dealer's, "server" or "client".
        precision: as `masked_model` takes it.
        idle_restart: whether TCP starts slowly after silence.

    Raises: PathError, PartyError among them.
    """
    profile = link.Profile.parse(network)
    with link.Path(profile, idle_restart=idle_restart) as path:
        task = {
            **dataclasses.asdict(point),
            "repeat": repeat,
            "corrections": corrections,
            "precision": precision,
            "threads": threads,
            "address": path.addresses[0],
            "port": link.free_port(),
        }
        commands = [
            [sys.executable, "-m", __name__, json.dumps({**task, "rank": rank})]
            for rank in (0, 1)
        ]
        parties = path.run(
            commands,
            timeout=timeout_s,
            environment={"OMP_NUM_THREADS": str(threads)},
        )
        label = path.label
    company, user = (json.loads(one.stdout.splitlines()[-1]) for one in parties)
    (server_idle, dealer_idle), client_idle = company.pop("idle"), user.pop("idle")
    (server_peak, dealer_peak), client_peak = company.pop("peak"), user.pop("peak")
    return Session(
        **dataclasses.asdict(point),
        network=label,
        rtt_ms=profile.rtt_ms,
        mbit=profile.mbit,
        threads=threads,
        corrections=corrections,
        precision=precision,
        one_s=Spread.of(user.pop("one_s")),
        many_s=Spread.of(user.pop("many_s")),
        online_s=Spread.of(user.pop("online_s")),
        online_bytes=tuple(user.pop("online_bytes")),
        idle_bytes=(server_idle, client_idle, dealer_idle),
        peak_bytes=(server_peak, client_peak, dealer_peak),
        **company,
        **user,
    )


# ---------------------------------------------------------------------- in the parties


def _company(task: Mapping[str, Any], control: Any) -> dict[str, Any]:
    """Rank 0: serve, and afterwards say what dealer and server sent and held."""
    from . import hosts
    from .networks import planned
    from .processes import Usage

    size = task["size"]
    own = size == image_size(task["model"])
    model = planned(task["model"], None if own else size, precision=task["precision"])
    plan = model.plan
    with hosts.Hosts(model, host=task["address"], threads=task["threads"]) as served:
        processes = (served.server, served.dealer)
        control.send([hosts.port(process) for process in processes])
        control.receive()  # the client is connected
        idle = [Usage.of(process.pid).memory for process in processes]
        orders = control.receive()  # it has done everything
        dealt = served.events(served.dealer, "dealt", orders)
        prepared = served.events(served.server, "prepared", orders)
        single = [event for event in dealt if event["count"] == 1][-1]["sent"]
        half = [event for event in prepared if event["count"] == 1][-1]["received"]
        hosts.check_offline(plan, dealt=single, received=half, batch=task["batch"])
        return {
            "idle": idle,
            "peak": served.peaks,
            "dealer_bytes": single,
            "client_bytes": half,
            "opened_bytes": prepared[0]["sent"],
            "activations": sum(plan.elements(n) for n in range(len(plan.steps))),
            "macs": plan.work,
        }


def _user(task: Mapping[str, Any], control: Any) -> dict[str, Any]:
    """Rank 1: prepare one and many, use them up, again and again."""
    import torch

    from . import hosts
    from .processes import Usage, peak_memory

    torch.set_num_threads(task["threads"])
    batch, count = task["batch"], task["count"]
    taken: dict[str, list[float]] = {"one_s": [], "many_s": [], "online_s": []}

    def timed(name: str, images: int, since: float) -> None:
        taken[name].append((time.perf_counter() - since) / images)

    ports, corrections = control.receive(), task["corrections"]
    with hosts.reach(task["address"], ports, corrections=corrections) as client:
        plan = client.plan
        x = torch.randn(
            batch, *plan.input.shape, generator=torch.Generator().manual_seed(11)
        )
        idle = Usage.of("self").memory
        control.send(None)
        client.prepare(1, batch=batch)  # opens the weights
        client.predict(x)
        for _ in range(task["repeat"]):
            for name, several in (("one_s", 1), ("many_s", count)):
                since = time.perf_counter()
                client.prepare(several, batch=batch)
                timed(name, several * batch, since)
                for _ in range(several):
                    since = time.perf_counter()
                    answer = client.ask(x)
                    timed("online_s", batch, since)
        control.send(1 + 2 * task["repeat"])
        return {
            **taken,
            "idle": idle,
            "peak": peak_memory(),
            "online_bytes": [answer.received, answer.sent],
        }


def main(arguments: Sequence[str]) -> None:
    """One of the two parties; told what to do by one JSON object."""
    from . import party

    task = json.loads(arguments[0])
    control = party.Control(task["rank"], task["address"], task["port"])
    with contextlib.closing(control):
        found = (_user if task["rank"] else _company)(task, control)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
