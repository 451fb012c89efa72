"""Sessions: serve a model, connect to one, deal for both, or simulate all three here.

    simulate(private, x)                    both parties and the dealer on this machine
    serve(private, "0.0.0.0:29500", dealer="dealer:29501")     rank 0, owns the weights
    connect("server:29500", dealer="dealer:29501").predict(x)  rank 1, owns the input
    deal("0.0.0.0:29501")                   the dealer, on a third party's host

The client receives the plan (architecture, shapes, polynomials, scales; no weight),
checks its digest with the server, and both prepare inferences with the dealer before
they are needed. Each request is then 2 messages per layer of activations.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cost import Cost
from .errors import (
    EspnError,
    MaterialError,
    PeerError,
    PlanError,
    ProtocolError,
)
from .launch import run_parties
from .masked.material import MaterialStore, MaterialWriter, material_info
from .masked.offline import (
    Dealer,
    Material,
    Preparation,
    opened_weights,
    receive_deal,
    share_weights,
)
from .masked.online import pieces, query_one, run_shared, serve_one
from .masked.plan import Plan, Weights, quantise
from .masked.planning.builder import HEADROOM, make_plan, parameters_of
from .randomness import new_seed
from .wire.channel import Channel
from .wire.connect import Incoming, Listener, connect_channel
from .wire.tls import TLS

TIMEOUT_S = 30.0
_GREETING = bytes(32)
_PLAN_BYTES = 1 << 26


@dataclass(frozen=True)
class MaskedModel:
    """A network ready for the masked engine: its public plan and secret integers."""

    plan: Plan
    weights: Weights

    def __str__(self) -> str:
        return str(self.plan)


@dataclass(frozen=True)
class SessionCost(Cost):
    """What an inference cost; the fields of Cost are rank 1's online phase.

    Args:
        peer_bytes_sent: online bytes rank 0 sends.
        offline: rank 1's part of the offline phase.
        peer_offline_bytes_sent: bytes rank 0 sends offline, weights once included.
        dealer_bytes_sent: bytes the dealer sends offline.
    """

    peer_bytes_sent: int = 0
    offline: Cost = field(default_factory=Cost)
    peer_offline_bytes_sent: int = 0
    dealer_bytes_sent: int = 0


def masked_model(
    private: Any,
    example: torch.Tensor | None = None,
    *,
    precision: str | int = "fast",
    headroom: float = HEADROOM,
    mode: str = "owner",
) -> MaskedModel:
    """Plan a converted network for the masked engine.

    Args:
        private: what `convert` returned, not encrypted; or a MaskedModel, returned as
            it is.
        example: (batch, *input_shape) calibration inputs; those of the conversion if
            None.
        precision, headroom, mode: as `masked.planning.builder.make_plan`.

    Raises: PlanError naming the layer, or if there is nothing to calibrate with.
    """
    if isinstance(private, MaskedModel):
        return private
    if example is None:
        example = getattr(private, "example", None)
    if example is None:
        raise PlanError(
            "The masked engine bounds every layer by calibration inputs; give example=."
        )
    plan = make_plan(
        private, example, precision=precision, headroom=headroom, mode=mode
    )
    return MaskedModel(plan, quantise(plan, parameters_of(private)))


# ---------------------------------------------------------------- messages


def _tell(channel: Channel, message: dict[str, Any]) -> None:
    channel.send_bytes(json.dumps(message, sort_keys=True).encode())


def _hear(channel: Channel, *fields: str) -> dict[str, Any]:
    try:
        message = json.loads(channel.receive_bytes(limit=_PLAN_BYTES))
        return {field: message[field] for field in fields}
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(
            f"{channel.peer} sent a message this version does not know ({error})."
        ) from None


def _check_session(name: str) -> None:
    """A session is 32 hex digits: it names a folder, and nothing else may."""
    if len(name) != 32 or not set(name) <= set("0123456789abcdef"):
        raise PeerError("Rank 1 named a session that is none.")


@contextlib.contextmanager
def _telling(*channels: Channel | None) -> Iterator[None]:
    """Pass an error of ours on to the peers before it is raised here."""
    try:
        yield
    except EspnError as error:
        for channel in channels:
            if channel is not None:
                channel.abort(f"{type(error).__name__}: {error}")
        raise


class _Reserved:
    """Which inferences of a session were dealt: from one seed, each only once."""

    def __init__(self) -> None:
        self._following = 0

    def add(self, start: int, count: int) -> None:
        """Reserve `count` inferences from number `start` on.

        Raises: MaterialError if one of them was reserved before.
        """
        if start < self._following:
            raise MaterialError(
                f"Inference {start} was prepared before, and a mask is used once; go "
                f"on from {self._following}, or start a new session."
            )
        self._following = start + count


# ---------------------------------------------------------------- the dealer


class DealerServer:
    """Deals correlated randomness to pairs of parties; see `deal`.

    Args:
        address: "host:port" to listen on.
        tls: mutual TLS certificates, or None.
        timeout: seconds a party may be silent while something is under way.
    """

    def __init__(
        self, address: str, *, tls: TLS | None = None, timeout: float = TIMEOUT_S
    ) -> None:
        self._listener = Listener(address, role="dealer", tls=tls)
        self.address = self._listener.address
        self._timeout = timeout
        self._waiting: dict[str, tuple[dict[str, Any], Channel]] = {}
        self._closed = False

    def run(self) -> None:
        """Accept parties until `close` is called."""
        while not self._closed:
            try:
                incoming = self._listener.accept()
            except PeerError:
                continue
            threading.Thread(target=self._greet, args=(incoming,), daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        for _, channel in list(self._waiting.values()):
            channel.close()

    def _greet(self, incoming: Incoming) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(EspnError))
            channel = incoming.open(
                peer_roles=("server", "client"), timeout=self._timeout
            )
            stack.enter_context(_telling(channel))
            role = channel.handshake(digest=_GREETING)
            channel.peer = f"the {role}"
            hello = _hear(channel, "session", "rank", "digest", "plan")
            if hello["rank"] != ("server", "client").index(role):
                raise PeerError(f"A {role} has not rank {hello['rank']!r}.")
            other = self._waiting.pop(hello["session"], None)
            if other is None:
                self._waiting[hello["session"]] = (hello, channel)
                return
            if {other[0]["rank"], hello["rank"]} != {0, 1}:
                error = PeerError("Both parties gave the dealer the same rank.")
                other[1].abort(str(error))
                raise error
            pair = {other[0]["rank"]: other, hello["rank"]: (hello, channel)}
            self._deal(pair)

    def _deal(self, pair: dict[int, tuple[dict[str, Any], Channel]]) -> None:
        (first, down), (second, up) = pair[0], pair[1]
        with contextlib.closing(down), contextlib.closing(up), _telling(down, up):
            plan = Plan.from_json(first["plan"])
            if not plan.digest.hex() == first["digest"] == second["digest"]:
                raise PlanError(
                    f"The parties' plans differ: rank 0 {first['digest'][:16]}, rank 1 "
                    f"{second['digest'][:16]}."
                )
            dealer = Dealer(plan)
            for rank, channel in ((0, down), (1, up)):
                _tell(channel, {"seed": dealer.seeds[rank].hex()})
            reserved = _Reserved()
            while True:
                down.wait(timeout=None, limit=_PLAN_BYTES)
                order = _hear(down, "start", "count", "batch")
                reserved.add(int(order["start"]), int(order["count"]))
                dealer.batch = int(order["batch"])
                for index in range(order["start"], order["start"] + order["count"]):
                    dealer.send(down, index)


def deal(address: str, *, tls: TLS | None = None, timeout: float = TIMEOUT_S) -> None:
    """Be the dealer for any number of pairs until interrupted.

    The dealer sees plans, and neither weights nor data. It must not collude with
    either party: with one of them it could undo the other's masks.

    Args:
        address: "host:port" to listen on.
        tls: mutual TLS certificates; without, its seeds travel in the clear.
        timeout: seconds a party may be silent while something is under way.
    """
    server = DealerServer(address, tls=tls, timeout=timeout)
    try:
        server.run()
    finally:
        server.close()


# ---------------------------------------------------------------- both parties


class _Party:
    """What server and client share: material by index, and how it is prepared."""

    def __init__(
        self,
        plan: Plan,
        *,
        rank: int,
        weights: Weights | None,
        dealer: str | None,
        directory: Path | None,
        tls: TLS | None,
        timeout: float,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.weights = weights
        self.dealer = dealer
        self.directory = directory
        self.session = ""
        self.next_index = 0
        self.batches: dict[int, int] = {}
        self.users = 0
        self._tls, self._timeout = tls, timeout
        self._ready: dict[int, Material] = {}
        self._store: MaterialStore | None = None
        self._dealing: tuple[Channel, Preparation] | None = None
        self.reserved = _Reserved()
        self._lock = threading.Lock()

    @property
    def _model(self) -> bytes:
        return b"" if self.weights is None or self.rank else self.weights.digest

    def open_store(self, session: str | None) -> None:
        """Use material on disk, if there is some left for this session.

        Raises: MaterialError if it belongs to another plan, model or session.
        """
        if self.directory is None or not (self.directory / "material.espn").exists():
            return
        store = MaterialStore(
            self.directory, plan=self.plan, rank=self.rank, model=self._model
        )
        if session is not None and store.session.hex() != session:
            raise MaterialError(
                f"{self.directory} belongs to session {store.session.hex()[:16]}, the "
                f"peer's to {session[:16]}. Prepare material together again."
            )
        self._store = store
        self.session = store.session.hex()
        self.next_index = store.next_index

    @property
    def remaining(self) -> int:
        """Prepared inferences that were not used."""
        stored = 0 if self._store is None else self._store.remaining
        return stored + len(self._ready)

    def start_dealing(self, peer: Channel, session: str) -> None:
        """Connect to the dealer, get this party's seed, and open W - B."""
        if self.dealer is None:
            raise MaterialError(
                f"Rank {self.rank} has no material left and knows no dealer; give "
                "dealer=."
            )
        channel = connect_channel(
            self.dealer,
            role=("server", "client")[self.rank],
            peer_role="dealer",
            timeout=self._timeout,
            tls=self._tls,
        )
        with _telling(channel):
            channel.handshake(digest=_GREETING)
            _tell(
                channel,
                {
                    "session": session,
                    "rank": self.rank,
                    "digest": self.plan.digest.hex(),
                    "plan": self.plan.to_json() if self.rank == 0 else "",
                },
            )
            mine = bytes.fromhex(_hear(channel, "seed")["seed"])
            if self.plan.mode == "shared":
                self._share(peer)
            owner = self.plan.mode == "owner"
            opened = opened_weights(
                self.plan,
                peer,
                seed=None if owner and self.rank else mine,
                weights=self.weights,
            )
        preparation = Preparation(
            self.plan,
            rank=self.rank,
            seed=mine,
            weights=self.weights,
            batch=1,
            opened=opened,
        )
        self._dealing = (channel, preparation)
        self.session = session

    def _share(self, peer: Channel) -> None:
        """Rank 0 splits the weights and sends rank 1 its share."""
        if self.rank == 0:
            assert self.weights is not None
            self.weights, theirs = share_weights(self.plan, self.weights, new_seed())
            for spec, array, bias in zip(
                self.plan.weights, theirs.integers, theirs.biases, strict=True
            ):
                peer.send(array, bits=spec.ring)
                if bias is not None:
                    peer.send(bias, bits=spec.ring)
            return
        arrays: list[np.ndarray] = []
        biases: list[np.ndarray | None] = []
        for spec in self.plan.weights:
            flat = peer.receive(int(np.prod(spec.kernel_shape)), bits=spec.ring)
            arrays.append(flat.reshape(spec.kernel_shape))
            has_bias = bool(spec.bias)
            drawn = peer.receive(spec.shape[0], bits=spec.ring) if has_bias else None
            biases.append(drawn)
        self.weights = Weights(tuple(arrays), tuple(biases))

    def prepare(self, peer: Channel, *, start: int, count: int, batch: int) -> None:
        """Make material for `count` inferences, in memory or on disk."""
        assert self._dealing is not None
        channel, preparation = self._dealing
        preparation.batch = batch
        writer = None
        if self.directory is not None:
            writer = MaterialWriter(
                self.directory,
                plan=self.plan,
                rank=self.rank,
                batch=batch,
                count=count,
                session=bytes.fromhex(self.session),
                seed=preparation.seed,
                model=self._model,
                first=start,
            )
        try:
            if self.rank == 0:
                _tell(channel, {"start": start, "count": count, "batch": batch})
            for index in range(start, start + count):
                material = self._prepare_one(peer, channel, preparation, index)
                if writer is None:
                    self._ready[index] = material
                else:
                    writer.add(material)
                self.batches[index] = batch
        except BaseException:
            if writer is not None:
                writer.discard()
            raise
        if writer is not None:
            writer.close()
            self._store = MaterialStore(
                writer.directory, plan=self.plan, rank=self.rank, model=self._model
            )
        self.next_index = start if writer is not None else self.next_index

    def _prepare_one(
        self, peer: Channel, dealer: Channel, preparation: Preparation, index: int
    ) -> Material:
        if self.rank == 1:
            return preparation.client(
                index, lambda half, bits: peer.send(half, bits=bits, tag=index)
            )
        given = receive_deal(self.plan, dealer, index, batch=preparation.batch)

        def half(number: int) -> np.ndarray:
            segment = self.plan.segments[number]
            count = preparation.batch * segment.elements
            flat = peer.receive(count, bits=segment.ring, tag=index)
            return flat.reshape(preparation.batch, *segment.root.shape)

        return preparation.server(given, half, index)

    def load_ahead(self) -> None:
        """Have the next stored record in memory before it is asked for."""
        with self._lock:
            if not self._ready and self._store is not None and self._store.remaining:
                self._claim()

    def _claim(self, *, at_least: int = 0) -> None:
        assert self._store is not None
        material = self._store.take(at_least=at_least)
        self._ready[material.index] = material
        self.batches[material.index] = self._store.batch

    def take(self, index: int) -> Material:
        """Material number `index`, once.

        Raises: MaterialError if it was used, or was never prepared.
        """
        with self._lock:
            while index not in self._ready and self._store is not None:
                if index < self._store.next_index:
                    break
                self._claim()
            if index not in self._ready:
                raise MaterialError(
                    f"Inference {index} has no unused material at rank {self.rank}; "
                    "nothing was sent."
                )
            return self._ready.pop(index)

    def close(self) -> None:
        if self._dealing is not None:
            self._dealing[0].close()
            self._dealing = None


# ---------------------------------------------------------------- rank 0


class ModelServer:
    """Rank 0: answers clients, one thread each; see `serve`."""

    def __init__(
        self,
        model: MaskedModel,
        address: str,
        *,
        dealer: str | None = None,
        directory: str | os.PathLike[str] | None = None,
        tls: TLS | None = None,
        timeout: float = TIMEOUT_S,
    ) -> None:
        self.model = model
        self.served = 0
        self.last_seconds = 0.0
        self._dealer = dealer
        self._directory = None if directory is None else Path(directory)
        self._tls = tls
        self._timeout = timeout
        self._listener = Listener(address, role="server", tls=tls)
        self.address = self._listener.address
        self._sessions: dict[str, _Party] = {}
        self._channels: list[Channel] = []
        self._closed = False

    def run(self) -> None:
        """Accept clients until `close` is called."""
        while not self._closed:
            try:
                incoming = self._listener.accept()
            except PeerError:
                continue
            threading.Thread(target=self._answer, args=(incoming,), daemon=True).start()

    def close(self) -> None:
        """Stop accepting and drop every client."""
        self._closed = True
        self._listener.close()
        for channel in self._channels:
            channel.close()

    def _answer(self, incoming: Incoming) -> None:
        with (
            contextlib.suppress(EspnError),
            incoming.open(peer_roles=("client",), timeout=self._timeout) as channel,
        ):
            channel.pace()
            self._channels.append(channel)
            with _telling(channel):
                self.answer(channel)

    def _party(self, session: str) -> _Party:
        """The session's state: what other connections use, or on disk, or new."""
        if session in self._sessions:
            return self._sessions[session]
        folder = None
        if self._directory is not None and session:
            folder = self._directory / session
        party = _Party(
            self.model.plan,
            rank=0,
            weights=self.model.weights,
            dealer=self._dealer,
            directory=folder,
            tls=self._tls,
            timeout=self._timeout,
        )
        if session:
            party.open_store(session)
            if party._store is None:
                raise MaterialError(
                    f"Rank 1's material is of session {session[:16]}, for which rank 0 "
                    "has none. Prepare material together again."
                )
            self._sessions[session] = party
        return party

    def answer(self, channel: Channel) -> None:
        """Serve one connected client until it leaves.

        Raises: PeerError when it is gone or misbehaves; MaterialError, PlanError as in
            `serve`.
        """
        plan = self.model.plan
        channel.handshake(digest=_GREETING)
        session = str(_hear(channel, "session")["session"])
        if session:
            _check_session(session)
        party = self._party(session)
        with self._using(party):
            _tell(channel, {"plan": plan.to_json(), "next": party.next_index})
            channel.handshake(digest=plan.digest)
            while self._answer_one(party, channel):
                pass

    @contextlib.contextmanager
    def _using(self, party: _Party) -> Iterator[None]:
        """Forget a session when its last connection ends; its directory stays."""
        party.users += 1
        try:
            yield
        finally:
            party.users -= 1
            if party.users == 0:
                party.close()
                self._sessions.pop(party.session, None)

    def _answer_one(self, party: _Party, channel: Channel) -> bool:
        """One request: an inference, a preparation, or goodbye (False)."""
        party.load_ahead()
        header = channel.wait(timeout=None, rings=range(1 << 40), limit=_PLAN_BYTES)
        if header.is_ring:
            tag = header.tag
            material = party.take(tag)
            batch = party.batches.pop(tag)
            start = time.perf_counter()
            self._infer(party, channel, material, batch)
            self.last_seconds = time.perf_counter() - start
            self.served += 1
            party.next_index = max(party.next_index, tag + 1)
            return True
        order = _hear(channel, "do", "session", "start", "count", "batch")
        if order["do"] == "close":
            return False
        if order["do"] != "prepare" or min(order["count"], order["batch"]) < 1:
            raise PeerError("Rank 1 asked for something unknown.")
        self._prepare(party, channel, order)
        return True

    def _prepare(self, party: _Party, channel: Channel, order: dict[str, Any]) -> None:
        name = str(order["session"])
        _check_session(name)
        fresh = party._dealing is None
        if fresh and self._directory is not None:
            party.directory = self._directory / name
        # Refuse before the client starts to compute.
        if fresh and party.dealer is None:
            raise MaterialError("Rank 0 knows no dealer; start it with dealer=.")
        start, count = int(order["start"]), int(order["count"])
        party.reserved.add(start, count)
        _tell(channel, {"ok": True})
        if fresh:
            party.start_dealing(channel, name)
            self._sessions[name] = party
        party.prepare(channel, start=start, count=count, batch=int(order["batch"]))
        _tell(channel, {"ready": True})

    def _infer(
        self, party: _Party, channel: Channel, material: Material, batch: int
    ) -> None:
        plan = self.model.plan
        assert party.weights is not None
        if plan.mode == "owner":
            channel.pace()
            serve_one(plan, party.weights, channel, material, batch=batch)
        else:
            run_shared(
                plan, party.weights, channel, material, None, rank=0, batch=batch
            )


def serve(
    private: Any,
    address: str,
    *,
    example: torch.Tensor | None = None,
    precision: str | int = "fast",
    headroom: float = HEADROOM,
    mode: str = "owner",
    dealer: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    tls: TLS | None = None,
    timeout: float = TIMEOUT_S,
) -> None:
    """Be rank 0: own the weights and answer clients until interrupted.

    Args:
        private: a converted network, or a MaskedModel.
        address: "host:port" to listen on.
        example: calibration inputs, as in `masked_model`.
        precision, headroom, mode: as `masked.planning.builder.make_plan`.
        dealer: "host:port" of the dealer.
        directory: where to keep material, one folder per session; in memory if None.
        tls: mutual TLS certificates, or None.
        timeout: seconds a client may be silent while an inference is under way.

    Raises: PlanError naming the layer that has no plan; PeerError if the address cannot
        be used.
    """
    model = masked_model(
        private, example, precision=precision, headroom=headroom, mode=mode
    )
    server = ModelServer(
        model, address, dealer=dealer, directory=directory, tls=tls, timeout=timeout
    )
    try:
        server.run()
    finally:
        server.close()


# ---------------------------------------------------------------- rank 1


class Client:
    """Rank 1: a connection to a served model; see `connect`.

    Attributes:
        plan: the public plan, received from the server.
        online, offline: this side's cost so far.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        address: str,
        digest: bytes | None,
        dealer: str | None,
        directory: str | os.PathLike[str] | None,
        tls: TLS | None,
        timeout: float,
    ) -> None:
        self._channel = channel
        self._address, self._tls, self._timeout = address, tls, timeout
        self._others: list[Channel] = []
        self._lock = threading.Lock()
        self.online = self.offline = Cost()
        folder = None if directory is None else Path(directory)
        session = ""
        if folder is not None and (folder / "material.espn").exists():
            # Its session first: the server must have the same one.
            info = material_info(folder)
            session = info.session if info.remaining else ""
        with _telling(channel):
            channel.handshake(digest=_GREETING)
            _tell(channel, {"session": session})
            greeting = _hear(channel, "plan", "next")
            self.plan = Plan.from_json(greeting["plan"])
            channel.handshake(digest=digest or self.plan.digest)
            self._party = _Party(
                self.plan,
                rank=1,
                weights=None,
                dealer=dealer,
                directory=folder,
                tls=tls,
                timeout=timeout,
            )
            if session:
                self._party.open_store(session)
            self._next = max(self._party.next_index, int(greeting["next"]))

    @property
    def remaining(self) -> int:
        """Inferences prepared and not used."""
        return self._party.remaining

    def prepare(self, count: int = 1, *, batch: int = 1) -> None:
        """Prepare inferences with the server and the dealer, before inputs exist.

        Args:
            count: how many inferences.
            batch: inputs in each.

        Cost: offline, this side sends m bits per activation and inference (owner mode)
            and receives one ring element per weight, once.

        Raises: MaterialError if a side knows no dealer; PeerError if one is gone.
        """
        party, channel = self._party, self._channel
        start_time = time.perf_counter()
        before = channel.bytes_sent
        name = party.session if party._dealing else secrets.token_hex(16)
        start = self._first_free()
        with _telling(channel):
            if party._dealing is None and party.dealer is None:
                raise MaterialError("No material is left and no dealer is known.")
            _tell(
                channel,
                {
                    "do": "prepare",
                    "session": name,
                    "start": start,
                    "count": count,
                    "batch": batch,
                },
            )
            _hear(channel, "ok")
            if party._dealing is None:
                party.start_dealing(channel, name)
            party.prepare(channel, start=start, count=count, batch=batch)
            _hear(channel, "ready")
        self.offline += Cost(
            rounds=0,
            bytes_sent=channel.bytes_sent - before,
            seconds=time.perf_counter() - start_time,
        )

    def _first_free(self) -> int:
        known = [*self._party.batches, self._next - 1]
        return max(known) + 1

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch; the server learns neither input nor logits.

        Args:
            x: (batch, *input_shape), real numbers.

        Returns: float32 (batch, *output_shape).

        Cost: 1 message sent per layer of activations and 1 for the input; as many
            received. Without prepared material the offline phase runs first.

        Error: as the plan's table says; no truncation ever fails.

        Raises: ShapeError, RangeError before anything is sent; MaterialError; PeerError
            if the server is gone or silent.
        """
        return self._predict(self._channel, x)

    def predict_many(
        self, inputs: Sequence[torch.Tensor], *, in_flight: int = 8
    ) -> list[torch.Tensor]:
        """`predict` for each input, several at once over as many connections.

        A waiting link then does not idle either processor.

        Args:
            inputs: each (batch, *input_shape), the same batch.
            in_flight: how many inferences at once.

        Returns: the logits in the order of the inputs.

        Cost, Error, Raises: as `predict`, for each; nothing is sent unless every input
            is valid.
        """
        for x in inputs:
            self.plan.encode(x)
        if not inputs:
            return []
        missing = len(inputs) - self.remaining
        if missing > 0:
            self.prepare(missing, batch=len(inputs[0]))
        while len(self._others) < min(in_flight, len(inputs)) - 1:
            self._others.append(self._join())
        channels = [self._channel, *self._others][:in_flight]
        results: list[torch.Tensor | None] = [None] * len(inputs)
        failures: list[BaseException] = []
        waiting = iter(range(len(inputs)))

        def work(channel: Channel) -> None:
            try:
                while not failures:
                    with self._lock:
                        number = next(waiting, None)
                    if number is None:
                        return
                    results[number] = self._predict(channel, inputs[number])
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=work, args=(channel,)) for channel in channels
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [logits for logits in results if logits is not None]

    def _join(self) -> Channel:
        """One more connection to this session."""
        channel = connect_channel(
            self._address,
            role="client",
            peer_role="server",
            timeout=self._timeout,
            tls=self._tls,
        )
        with _telling(channel):
            channel.handshake(digest=_GREETING)
            _tell(channel, {"session": self._party.session})
            _hear(channel, "plan", "next")
            channel.handshake(digest=self.plan.digest)
        return channel

    def _predict(self, channel: Channel, x: torch.Tensor) -> torch.Tensor:
        encoded = self.plan.encode(x)
        batch = len(x)
        if self._party.remaining == 0:
            self.prepare(1, batch=batch)
        with self._lock:
            material = self._material(batch)
        party = self._party
        sent, messages = channel.bytes_sent, channel.messages_sent
        received = channel.messages_received
        start = time.perf_counter()
        with _telling(channel):
            z: np.ndarray | None
            if self.plan.mode == "owner":
                channel.pace()
                z = query_one(self.plan, channel, material, encoded, batch=batch)
            else:
                assert party.weights is not None
                z = run_shared(
                    self.plan,
                    party.weights,
                    channel,
                    material,
                    encoded,
                    rank=1,
                    batch=batch,
                )
        assert z is not None
        seconds = time.perf_counter() - start
        there = channel.messages_sent - messages
        back = channel.messages_received - received
        # In shared mode both directions of an opening travel at once; in owner mode the
        # parts of a large batch do, between the input and the logits.
        rounds = there + 1
        if self.plan.mode == "owner":
            rounds = 2 + (there + back - 2) // len(pieces(batch))
        with self._lock:
            self.online += Cost(rounds, channel.bytes_sent - sent, 0, seconds)
        return self.plan.decode(z)

    def _material(self, batch: int) -> Material:
        party = self._party
        if party._store is not None and not party._ready:
            party._claim(at_least=self._next)
        index = min(party._ready)
        if party.batches[index] != batch:
            raise MaterialError(
                f"The next material is for batches of {party.batches[index]}, the "
                f"input has {batch}. Split or pad the input, or prepare for {batch}."
            )
        self._next = index + 1
        del party.batches[index]
        return party.take(index)

    def close(self) -> None:
        """Say goodbye and disconnect."""
        goodbye = {"do": "close", "session": "", "start": 0, "count": 1, "batch": 1}
        for channel in (*self._others, self._channel):
            with contextlib.suppress(EspnError):
                _tell(channel, goodbye)
            channel.close()
        self._party.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect(
    address: str,
    *,
    plan: Plan | None = None,
    dealer: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    tls: TLS | None = None,
    timeout: float = TIMEOUT_S,
) -> Client:
    """Be rank 1: connect to a served model.

    Args:
        address: "host:port" of the server.
        plan: the plan the server must have; None accepts the one it sends.
        dealer: "host:port" of the dealer.
        directory: where to keep material; in memory if None.
        tls: mutual TLS certificates, or None.
        timeout: seconds the server may be silent.

    Raises: PeerError if the server cannot be reached; PlanMismatchError on both sides
        if it holds another plan; MaterialError if stored material is not for it.
    """
    channel = connect_channel(
        address, role="client", peer_role="server", timeout=timeout, tls=tls
    )
    channel.pace()
    try:
        return Client(
            channel,
            address=address,
            digest=None if plan is None else plan.digest,
            dealer=dealer,
            directory=directory,
            tls=tls,
            timeout=timeout,
        )
    except BaseException:
        channel.close()
        raise


# ---------------------------------------------------------------- all on this machine


def _save(path: Path, weights: Weights) -> None:
    arrays = {f"w{i}": a for i, a in enumerate(weights.integers)}
    arrays |= {f"b{i}": b for i, b in enumerate(weights.biases) if b is not None}
    with open(path, "xb", opener=_privately) as file:
        np.savez(file, allow_pickle=False, **arrays)


def _privately(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _load(path: Path) -> Weights:
    with np.load(path, allow_pickle=False) as stored:
        count = sum(name[0] == "w" for name in stored.files)
        return Weights(
            tuple(stored[f"w{i}"] for i in range(count)),
            tuple(
                stored[f"b{i}"] if f"b{i}" in stored.files else None
                for i in range(count)
            ),
        )


def _publish(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(path)


def _await(path: Path, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise PeerError(f"Another process of the simulation gave no {path.name}.")
        time.sleep(0.005)
    return path.read_text()


def _simulated_party(folder: str, x: torch.Tensor, repeat: int, timeout: float) -> Any:
    """One of the three processes of `simulate`."""
    rank = int(os.environ["RANK"])
    place = Path(folder)
    torch.set_num_threads(1)
    if rank == 2:
        dealer = DealerServer("127.0.0.1:0", timeout=timeout)
        _publish(place / "dealer", dealer.address)
        return _until_done(dealer, place / "done")
    if rank == 0:
        plan = Plan.from_json((place / "plan").read_text())
        server = ModelServer(
            MaskedModel(plan, _load(place / "weights.npz")),
            "127.0.0.1:0",
            dealer=_await(place / "dealer", timeout),
            timeout=timeout,
        )
        _publish(place / "server", server.address)
        return _until_done(server, place / "done")
    try:
        with connect(
            _await(place / "server", timeout),
            dealer=_await(place / "dealer", timeout),
            timeout=timeout,
        ) as client:
            results = []
            for _ in range(repeat):
                client.online = client.offline = Cost()
                client.prepare(1, batch=len(x))
                logits = client.predict(x)
                results.append((client.online, client.offline))
            return logits, results
    finally:
        _publish(place / "done", "")


def _until_done(server: DealerServer | ModelServer, done: Path) -> Any:
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not done.exists():
        time.sleep(0.02)
    server.close()
    thread.join(5)
    return [
        (channel.bytes_sent, channel.messages_sent)
        for channel in getattr(server, "_channels", [])
    ]


def simulate(
    private: Any,
    x: torch.Tensor,
    *,
    example: torch.Tensor | None = None,
    precision: str | int = "fast",
    headroom: float = HEADROOM,
    mode: str = "owner",
    timeout: float = TIMEOUT_S,
) -> tuple[torch.Tensor, Cost]:
    """Run both parties and the dealer on this machine, as three processes.

    1. Plan the network, calibrated on `example`, else on the conversion's own example,
       else on `x`; check `x` before any process starts.
    2. Rank 0 gets the weights, rank 1 the input; the dealer gets neither.
    3. Prepare one inference, then do it; both over TCP on this machine.

    Args:
        private: what `convert` returned, or a MaskedModel. A network converted for
            another protocol than "masked" runs on CrypTen with that protocol.
        x: (batch, *input_shape).
        example: calibration inputs.
        precision, headroom, mode: as `masked.planning.builder.make_plan`.
        timeout: seconds without progress before a dead process is an error.

    Returns: logits (batch, *output_shape) and the cost: rank 1's online phase, with
        rank 0's bytes and the offline phase beside it.

    Raises: PlanError, ShapeError, RangeError before anything starts; PeerError if a
        process dies.
    """
    if not isinstance(private, MaskedModel) and getattr(
        private, "protocol", "masked"
    ) not in (None, "masked"):
        return _simulate_crypten(private, x, timeout)
    if example is None:
        example = getattr(private, "example", None)
    model = masked_model(
        private,
        x if example is None else example,
        precision=precision,
        headroom=headroom,
        mode=mode,
    )
    return simulate_many(model, x, repeat=1, timeout=timeout)[0]


def simulate_many(
    model: MaskedModel, x: torch.Tensor, *, repeat: int, timeout: float = TIMEOUT_S
) -> list[tuple[torch.Tensor, SessionCost]]:
    """`simulate` a planned model several times in the same processes.

    Args:
        model: as `masked_model` returned it.
        x: (batch, *input_shape).
        repeat: how often; each time with fresh material.

    Returns: the logits and costs, in order.
    """
    model.plan.encode(x)
    with tempfile.TemporaryDirectory(prefix="crypten-espn-") as folder:
        place = Path(folder)
        (place / "plan").write_text(model.plan.to_json())
        _save(place / "weights.npz", model.weights)
        results = run_parties(
            _simulated_party,
            world_size=3,
            args=(folder, x, repeat, timeout),
        )
    logits, costs = results[1]
    down, _ = model.plan.online_bytes(batch=len(x))
    activations = len(model.plan.segments) - 1
    frame = 20 * (1 + activations * len(pieces(len(x))))
    dealt = model.plan.dealer_bytes(batch=len(x))
    return [
        (
            logits,
            SessionCost(
                online.rounds,
                online.bytes_sent,
                dealt // 8,
                online.seconds,
                down + frame,
                offline,
                _opened_bytes(model.plan) if number == 0 else 0,
                dealt,
            ),
        )
        for number, (online, offline) in enumerate(costs)
    ]


def _opened_bytes(plan: Plan) -> int:
    return sum(int(np.prod(s.shape)) * s.ring // 8 for s in plan.weights)


def _simulate_crypten(
    private: Any, x: torch.Tensor, timeout: float
) -> tuple[torch.Tensor, Cost]:
    """Two CrypTen parties with the protocol the network was converted for."""
    if not callable(getattr(private, "encrypt", None)):
        raise ProtocolError(
            f"{type(private).__name__} cannot be simulated; give what convert() made."
        )

    def party() -> tuple[torch.Tensor | None, Cost]:
        import crypten

        from crypten_espn.cost import measure

        network = private.encrypt(src=0)
        data = crypten.cryptensor(x, src=1)
        with measure() as measured, crypten.no_grad():
            logits = network(data).get_plain_text(dst=1)
        return logits, measured.cost

    results = run_parties(party, world_size=2, timeout=max(timeout, 600.0))
    return results[1]
