"""The server's process: owns the weights, prepares with clients and answers them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..bundle import Bundle
from ..convert import PrivateNetwork
from ..errors import EspnError, MaterialError, PeerError
from ..masked.drivers import over
from ..masked.inference import server as inference
from ..masked.material import Pairing, ServerMaterial
from ..masked.model import MaskedModel
from ..masked.planning import masked_model
from ..masked.store_writer import remove_used_up
from ..pillar.guarding import in_words
from ..wire.channel import Channel
from ..wire.tls import TLS
from .boundary import session_tag, telling
from .host import Connection, Host
from .link import Limits, Link, one_link
from .messages import (
    GREETING,
    MESSAGE_BYTES,
    Accepted,
    Goodbye,
    Hello,
    Prepare,
    Prepared,
    Welcome,
    hear,
    send_description,
    send_plan,
    tell,
)
from .preparing import ServerDealing
from .stock import Stock, material_bytes

log = logging.getLogger(__name__)

# Beside a session's material: digest of the certificate its client showed.
_OWNER = "client.sha256"


class _Session:
    """What the server holds for one client, over all of its connections.

    Attributes:
        name: as both parties and the dealer call it; empty before anything is prepared.
        owner: digest of the client's certificate; empty without TLS.
        users: its connections.
    """

    def __init__(self, model: MaskedModel, owner: str) -> None:
        self.name = ""
        self.owner = owner
        self.users = 0
        self.stock = Stock(ServerMaterial, "server", model.plan, model.weights.digest)
        self.dealing: ServerDealing | None = None
        self.following = 0
        self.preparing = threading.Lock()

    def close(self) -> None:
        if self.dealing is not None:
            self.dealing.close()


class ModelServer(Host):
    """Answers clients, one thread each; see `serve`.

    Attributes:
        description: what clients are told beside the plan; empty for a bare model.
    """

    def __init__(
        self,
        model: MaskedModel | Bundle,
        address: str,
        *,
        link: Link | None = None,
        dealer: str | None = None,
        directory: str | os.PathLike[str] | None = None,
        tls: TLS | None = None,
        timeout: float | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(
            address,
            role="server",
            peer_roles=("client",),
            link=one_link(link, dealer, directory, tls, timeout, insecure),
            limits=Limits() if limits is None else limits,
            log=log,
        )
        bundle = model if isinstance(model, Bundle) else Bundle(model)
        self.model, self.description = bundle.model, bundle.description
        folder = self._link.directory
        self._directory = None if folder is None else Path(folder)
        self._sessions: dict[str, _Session] = {}
        self._sessions_lock = threading.RLock()

    def answer(self, connection: Connection) -> None:
        """Greet a client, then answer it until it leaves."""
        channel = connection.channel
        channel.handshake(digest=GREETING)
        hello = hear(channel, Hello)
        self.greeted(connection)
        channel.pace()
        with self._using(hello, channel) as session:
            described = self.description.digest.hex()
            tell(
                channel,
                Welcome(next_index=session.stock.next_index, description=described),
            )
            send_plan(channel, self.model.plan)
            send_description(channel, self.description)
            channel.handshake(digest=self.model.plan.digest)
            while self._answer_one(session, channel):
                pass

    # -- sessions

    @contextmanager
    def _using(self, hello: Hello, channel: Channel) -> Iterator[_Session]:
        """The client's session; it is forgotten when its last connection ends."""
        with self._sessions_lock:
            session = self._enter(hello, channel.fingerprint)
            session.users += 1
        try:
            yield session
        finally:
            with self._sessions_lock:
                session.users -= 1
                last = session.users == 0
                if last and self._sessions.get(session.name) is session:
                    del self._sessions[session.name]
            if last:
                session.close()
                self._tidy(session)

    def _enter(self, hello: Hello, owner: str) -> _Session:
        """The session that a client names: one in use, one on disk, or a new one."""
        if hello.session is None:
            return _Session(self.model, owner)
        session = self._sessions.get(hello.session)
        if session is None:
            session = self._stored(hello.session, hello.next_index)
            self._sessions[hello.session] = session
        if session.owner != owner:
            if session.users == 0:
                del self._sessions[hello.session]
            raise PeerError(
                "This session belongs to another certificate than the one that was "
                "shown. Prepare material again."
            )
        return session

    def _stored(self, name: str, client_next: int) -> _Session:
        if self._directory is None or not (self._directory / name).is_dir():
            kept = "" if self._directory else ", and keeps none without a folder for it"
            raise MaterialError(
                f"The server has no material of the session that the client names{kept}"
                ". Delete the client's and prepare material together again."
            )
        folder = self._directory / name
        session = _Session(self.model, _read_owner(folder))
        session.name = name
        session.stock.open(folder, session=name, floor=client_next)
        session.stock.compare(client_next)
        return session

    def _tidy(self, session: _Session) -> None:
        """Remove the folder of a session that is used up."""
        if self._directory is None or not session.name:
            return
        folder = self._directory / session.name
        try:
            if folder.is_dir() and session.stock.remaining == 0:
                (folder / _OWNER).unlink(missing_ok=True)
                remove_used_up(folder)
        except (EspnError, OSError) as error:
            log.warning(
                "session %s: its folder stays: %s",
                session_tag(session.name),
                type(error).__name__,
            )

    # -- requests

    def _answer_one(self, session: _Session, channel: Channel) -> bool:
        """One request: an inference, a preparation, or goodbye (False)."""
        session.stock.read_ahead()
        header = channel.wait(
            timeout=self.limits.idle_s,
            rings=session.stock.input_sizes,
            limit=MESSAGE_BYTES,
        )
        if header.is_ring:
            self._infer(session.stock.take(header.tag), channel, header.tag)
            return True
        order = hear(channel, Prepare, Goodbye)
        if isinstance(order, Goodbye):
            return False
        with session.preparing:
            self._prepare(session, channel, order)
        return True

    def _infer(self, material: ServerMaterial, channel: Channel, index: int) -> None:
        start = time.perf_counter()
        channel.pace()
        part = inference(self.model.plan, self.model.weights, material)
        over(part, {"client": channel}, tag=index)
        log.debug("inference %d took %.3f s", index, time.perf_counter() - start)

    def _prepare(self, session: _Session, channel: Channel, order: Prepare) -> None:
        """Check everything, then prepare; what is refused costs the client nothing."""
        start, count, batch = order.start, order.count, order.batch
        folder = None if self._directory is None else self._directory / order.session
        fresh = self._check(session, order)
        pairing = Pairing(bytes.fromhex(order.session), start, batch)
        with session.stock.adding(pairing, count=count, folder=folder) as adding:
            if fresh:
                plan, weights = self.model.plan, self.model.weights
                session.dealing = ServerDealing(
                    self._link, order.session, plan, weights, channel
                )
            dealing = session.dealing
            assert dealing is not None
            session.following = start + count
            with telling(dealing.channel):
                tell(channel, Accepted())
                if fresh:
                    dealing.open_weights(channel)
                made = dealing.prepare(channel, start=start, count=count, batch=batch)
                for material in made:
                    adding.add(material)
        if fresh and folder is not None:
            _write_owner(folder, session.owner)
        log.info(
            "session %s: prepared %d inferences of batch %d",
            session_tag(order.session),
            count,
            batch,
        )
        tell(channel, Prepared())

    def _check(self, session: _Session, order: Prepare) -> bool:
        """Check a preparation; whether a dealing begins with it.

        Raises:
            MaterialError: an inference would be prepared twice, or material is left.
            PeerError: it exceeds a limit, or names a session that is not the client's.
        """
        # Limits of one order and of one session.
        limits, count, batch = self.limits, order.count, order.batch
        limits.check_order(start=order.start, count=count, batch=batch)
        left = session.stock.remaining
        if left + count > limits.prepared:
            raise PeerError(
                f"{count} inferences were asked for beside {left} that are prepared; "
                f"at most {limits.prepared} of a session may be."
            )
        each = material_bytes(self.model.plan, "server", batch)
        fresh = session.dealing is None
        with self._sessions_lock:
            # Memory holds all sessions' material; a folder is as large as its disk.
            if self._directory is None:
                others = {id(s): s for s in self._sessions.values()}.values()
                limits.check_bytes(count * each, held=sum(s.stock.held for s in others))
            else:
                limits.check_bytes(each)
            # Within a dealing: only forwards.
            if not fresh:
                if order.session != session.name:
                    raise PeerError("A preparation names another session than its own.")
                if order.start < session.following:
                    raise MaterialError(
                        f"Inference {order.start} was prepared before, and a mask is "
                        f"used once; go on from {session.following}, or start a new "
                        "session."
                    )
                return False
            # A new dealing: everything of the one before is used up, the name is free.
            if self._link.dealer is None:
                raise MaterialError(
                    "The server knows no dealer; start it with dealer=."
                )
            if left:
                raise MaterialError(
                    f"Material for {left} inferences is left; use it up before a new "
                    "session is prepared."
                )
            taken = order.session in self._sessions or (
                self._directory is not None
                and (self._directory / order.session).exists()
            )
            if taken:
                raise PeerError("A new session has a name that is already taken.")
            if self._sessions.get(session.name) is session:
                del self._sessions[session.name]
            self._tidy(session)
            session.name = order.session
            self._sessions[order.session] = session
        return True


def _read_owner(folder: Path) -> str:
    try:
        return (folder / _OWNER).read_text(encoding="ascii")
    except FileNotFoundError:
        return ""


def _write_owner(folder: Path, owner: str) -> None:
    if owner:
        (folder / _OWNER).write_text(owner, encoding="ascii")


def serve(
    private: PrivateNetwork | MaskedModel | Bundle,
    address: str,
    *,
    example: torch.Tensor | None = None,
    precision: str | int | None = None,
    headroom: float | None = None,
    link: Link | None = None,
    dealer: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    tls: TLS | None = None,
    timeout: float | None = None,
    insecure: bool = False,
    limits: Limits | None = None,
) -> None:
    """Own the weights and answer clients until interrupted.

    Args:
        private: a converted network, a MaskedModel, or what `load` returned.
        address: "host:port" to listen on.
        example: calibration inputs, as in `masked_model`; a bundle has its plan.
        precision, headroom: as `masked_model`.
        link: the next five as one object, instead of them.
        dealer: "host:port" of the dealer.
        directory: where to keep material, one folder per session; in memory if None.
        tls: mutual TLS certificates, or None.
        timeout: seconds a client may be silent while an inference is under way.
        insecure: allow addresses that others reach without TLS; masked values and seeds
            then travel in the clear.
        limits: what it puts up with; the defaults of `Limits` if None.

    Raises:
        PlanError: a layer has no plan; it is named.
        PeerError: the address cannot be used.
    """
    if not isinstance(private, Bundle):
        private = masked_model(private, example, precision=precision, headroom=headroom)
    model = private.model if isinstance(private, Bundle) else private
    if model.plan.guard is None:
        log.warning(in_words(None))
    with ModelServer(
        private,
        address,
        link=one_link(link, dealer, directory, tls, timeout, insecure),
        limits=limits,
    ) as server:
        server.run()
