"""The server's process: owns the weights, prepares with clients and answers them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..bundle import Bundle
from ..convert import PrivateNetwork
from ..errors import EspnError, LimitError, MaterialError, PeerError
from ..masked.drivers import over
from ..masked.inference import server as inference
from ..masked.material import Pairing
from ..masked.messages import Party
from ..masked.model import MaskedModel
from ..masked.planning import masked_model
from ..pillar.guarding import in_words
from ..wire.tls import TLS
from .boundary import telling
from .connection import Connection
from .dealers import Dealers
from .events import InferenceBegun, Replaced, SessionOpened
from .events import Prepared as PreparedEvent
from .host import Host
from .link import Limits, Link, one_link
from .messages import (
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
from .quota import Quota
from .reporting import reported
from .session import Session, write_owner
from .sessions import Sessions
from .share import Share

log = logging.getLogger(__name__)


class ModelServer(Host):
    """Answers clients, one thread each; see `serve`.

    Args:
        again: reads what is served once more, for `reload`.
    """

    def __init__(
        self,
        model: MaskedModel | Bundle,
        address: str,
        *,
        link: Link | None = None,
        dealer: str | Sequence[str] | None = None,
        directory: str | os.PathLike[str] | None = None,
        tls: TLS | None = None,
        timeout: float | None = None,
        insecure: bool = False,
        corrections: Party | None = None,
        limits: Limits | None = None,
        quota: Quota | None = None,
        share: Share | None = None,
        again: Callable[[], Bundle] | None = None,
    ) -> None:
        bundle = model if isinstance(model, Bundle) else Bundle(model)
        super().__init__(
            address,
            role="server",
            peer_roles=("client",),
            link=one_link(link, dealer, directory, tls, timeout, insecure, corrections),
            limits=Limits() if limits is None else limits,
            log=log,
            share=share,
        )
        self._again = again
        folder = self._link.directory
        self._directory = None if folder is None else Path(folder)
        self._sessions = Sessions(
            bundle, self._directory, report=self.report, places=self._places
        )
        self._quota = quota
        self._dealers = Dealers(self._link.dealers)
        self.metrics.gauge(
            "sessions_open", "Sessions in use", lambda: self._sessions.count
        )
        self.metrics.gauge(
            "material_left",
            "Inferences prepared, of sessions in use",
            lambda: self._sessions.left,
        )

    @property
    def bundle(self) -> Bundle:
        """What new sessions are served."""
        return self._sessions.bundle

    def read_again(self) -> None:
        """Read certificates again, and what is served, if this host knows how.

        Sessions in use go on with what they began with.
        """
        super().read_again()
        if self._again is not None:
            threading.Thread(target=self._replace, daemon=True).start()

    def _replace(self) -> None:
        assert self._again is not None
        try:
            bundle = self._again()
        except (EspnError, OSError) as error:
            log.warning("what is served stays as it is: %s", error)
            return
        self._sessions.bundle = bundle
        self.report(Replaced(bundle.model.plan.digest.hex()[:16]))

    def answer(self, connection: Connection) -> None:
        """Greet a client, then answer it until it leaves."""
        channel = connection.channel
        hello = self.first(connection, Hello)
        if hello.session and self.is_elsewhere(hello.session, hello, connection):
            return
        self.greeted(connection)
        self._check_corrections(hello.corrections)
        channel.pace()
        quota = None if self._quota is None else self._quota.check(connection.client)
        with self._sessions.using(hello, channel.peer_name) as session:
            following = session.stock.next_index
            bundle = session.bundle
            described = bundle.description.digest.hex()
            tell(
                channel,
                Welcome(
                    next_index=following,
                    description=described,
                    keeps=self._directory is not None,
                    quota=quota,
                    dealers=self._dealers.named(),
                ),
            )
            send_plan(channel, bundle.model.plan)
            send_description(channel, bundle.description)
            channel.handshake(digest=bundle.model.plan.digest)
            number, client = connection.number, connection.client
            left = session.stock.remaining
            self.report(SessionOpened(number, client, session.tag, left))
            while self._answer_one(session, connection):
                pass

    def _check_corrections(self, wanted: Party) -> None:
        """Refuse what this server does not offer.

        Raises:
            LimitError: it names what is offered.
        """
        only = self._link.corrections
        if only not in (None, wanted):
            raise LimitError(
                f"Corrections to the {wanted} were asked for; this server offers those "
                f"to the {only} alone (corrections=, --corrections).",
                "corrections",
            )

    # -- requests

    def _answer_one(self, session: Session, connection: Connection) -> bool:
        """One request: an inference, a preparation, or goodbye (False)."""
        channel = connection.channel
        session.stock.read_ahead()
        header = channel.wait(
            timeout=self.limits.idle_s,
            rings=session.stock.input_sizes,
            limit=self.limits.message_bytes,
        )
        if not header.is_ring:
            order = hear(channel, Prepare, Goodbye, limit=self.limits.message_bytes)
            if isinstance(order, Goodbye):
                return False
            with self.under_way(connection), session.preparing:
                self._prepare(session, connection, order)
            return True
        with self.under_way(connection):
            self._infer(session, connection, header.tag)
        return True

    def _infer(self, session: Session, connection: Connection, index: int) -> None:
        """Answer an inference; its material counts as used, whatever happens."""
        channel, client = connection.channel, connection.client
        start = time.perf_counter()
        batch = session.stock.batch_of(index)
        if self._quota is not None:
            self._quota.charge(client, batch)
        material = session.stock.take(index)
        begun = InferenceBegun(client, session.tag, index, batch)
        with reported(
            begun,
            self.report,
            channel,
            since=start,
            left=lambda: session.stock.remaining,
        ):
            channel.pace()
            model = session.bundle.model
            part = inference(model.plan, model.weights, material)
            over(part, {"client": channel}, tag=index)

    def _prepare(
        self, session: Session, connection: Connection, order: Prepare
    ) -> None:
        """Check everything, then prepare; what is refused costs the client nothing."""
        channel, began = connection.channel, time.perf_counter()
        sent, received = channel.bytes_sent, channel.bytes_received
        start, count, batch = order.start, order.count, order.batch
        folder = None if self._directory is None else self._directory / order.session
        fresh = self._check(session, order)
        name, to = bytes.fromhex(order.session), session.corrections
        pairing = Pairing(name, start, batch, to)
        with session.stock.adding(pairing, count=count, folder=folder) as adding:
            if fresh:
                # The dealer is shown the certificate that the client was shown.
                link = replace(self._link, tls=channel.tls)
                dealer = self._dealers.chosen(order.dealer)
                try:
                    session.dealing = ServerDealing(
                        dealer,
                        link,
                        order.session,
                        session.bundle.model,
                        channel,
                        to,
                    )
                except PeerError:
                    self._dealers.failed(dealer)
                    raise
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
            write_owner(folder, session.owner)
        tell(channel, Prepared())
        self.report(
            PreparedEvent(
                connection.client,
                session.tag,
                start,
                count,
                batch,
                seconds=time.perf_counter() - began,
                sent=channel.bytes_sent - sent,
                received=channel.bytes_received - received,
                left=session.stock.remaining,
            )
        )

    def _check(self, session: Session, order: Prepare) -> bool:
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
            raise LimitError(
                f"{count} inferences were asked for beside {left} that are prepared; "
                f"at most {limits.prepared} of a session may be.",
                "prepared",
            )
        each = session.stock.bytes_of(batch)
        fresh = session.dealing is None or order.session != session.name
        # Memory holds all sessions' material; a folder is as large as its disk.
        held = 0 if self._directory else self._sessions.held
        limits.check_bytes(each if self._directory else count * each, held=held)
        # Within a dealing: only forwards.
        if not fresh:
            if order.start < session.following:
                raise MaterialError(
                    f"Inference {order.start} was prepared before, and a mask is used "
                    f"once; go on from {session.following}, or start a new session."
                )
            return False
        # A new dealing: everything of the one before is used up, the name is free.
        self._dealers.chosen(order.dealer)
        if left:
            raise MaterialError(
                f"Material for {left} inferences is left; use it up before a new "
                "session is prepared."
            )
        self._sessions.rename(session, order.session)
        return True


def serve(
    private: PrivateNetwork | MaskedModel | Bundle,
    address: str,
    *,
    example: torch.Tensor | None = None,
    precision: str | int | None = None,
    headroom: float | None = None,
    link: Link | None = None,
    dealer: str | Sequence[str] | None = None,
    directory: str | os.PathLike[str] | None = None,
    tls: TLS | None = None,
    timeout: float | None = None,
    insecure: bool = False,
    corrections: Party | None = None,
    limits: Limits | None = None,
    quota: Quota | None = None,
) -> None:
    """Own the weights and answer clients until interrupted.

    Args:
        private: a converted network, a MaskedModel, or what `load` returned.
        address: "host:port" to listen on.
        example: calibration inputs, as in `masked_model`; a bundle has its plan.
        precision, headroom: as `masked_model`.
        link: the next six as one object, instead of them.
        dealer: "host:port" of the dealer, or of several.
        directory: where to keep material, one folder per session; in memory if None.
        tls: mutual TLS certificates, or None.
        timeout: seconds a client may be silent while an inference is under way.
        insecure: allow addresses that others reach without TLS; masked values and seeds
            then travel in the clear.
        corrections: who alone may receive the dealer's, "server" or "client"; None
            takes what each client asks for. To the client, this side receives a
            twentieth offline and keeps a tenth.
        limits: what it puts up with; the defaults of `Limits` if None.
        quota: what a client may have answered in a day; all it likes if None.

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
        link=one_link(link, dealer, directory, tls, timeout, insecure, corrections),
        limits=limits,
        quota=quota,
    ) as server:
        server.run()
