"""The client: owns the input, prepares with a server and learns the logits."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence, Sized
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..bundle import Description, inputs_of
from ..compiled import heat
from ..cost import Cost
from ..errors import (
    EspnError,
    IdleError,
    MaterialError,
    PeerError,
    PlanMismatchError,
    QuotaError,
    RevokedError,
)
from ..masked.checks import PLAN_BYTES
from ..masked.drivers import over
from ..masked.evaluation import chunks
from ..masked.inference import client as inference
from ..masked.inference import masked_input
from ..masked.material import ClientMaterial, Pairing
from ..masked.messages import SERVER, Party
from ..masked.plan import Plan
from ..wire.channel import Channel
from ..wire.tls import TLS
from .answer import Answer
from .boundary import FINAL, session_tag, telling, told
from .dealers import trusted
from .events import InferenceBegun, Reconnected, report
from .events import Prepared as PreparedEvent
from .link import Link, one_link
from .messages import (
    GREETING,
    Accepted,
    Goodbye,
    Hello,
    Prepare,
    Prepared,
    Welcome,
    hear,
    receive_description,
    receive_plan,
    tell,
)
from .preparing import ClientDealing, reach
from .reporting import reported
from .stock import WINDOW, Stock, stored_session

log = logging.getLogger(__name__)


class Client:
    """A connection to a served model; see `connect`.

    A connection that was lost while nothing was under way is made again when it is
    needed. Material in memory is lost with it, that in a folder is gone on with.

    Args:
        address: "host:port" of the server.
        link: how to reach it and the dealer, and where material is kept.
        plan: the plan the server must have; None accepts the one it sends, and after a
            lost connection another one of the same shapes.

    Attributes:
        plan: the public plan, received from the server.
        description: what the server says of images and classes.
        session: as both parties and the dealer call it, None before anything was
            prepared; whoever knows it can take part in it.
        online, offline: this side's cost so far.
    """

    def __init__(self, address: str, link: Link, *, plan: Plan | None = None) -> None:
        self.online = self.offline = Cost()
        self._address, self._link = address, link
        self._corrections: Party = link.corrections or SERVER
        self._folder = None if link.directory is None else Path(link.directory)
        self._pinned = plan
        self._others: list[Channel] = []
        self._lock = threading.Lock()
        self._dealing: ClientDealing | None = None
        self._following = 0
        # Its session first: the server must have the same one.
        self.session: str | None = None
        if self._folder is not None:
            self.session, self._following = self._stored(self._folder)
        # Inputs that the server still answers today; None for any number.
        self._allowed: int | None = None
        # As the server calls them, in the order in which it wants them tried.
        self._dealers: tuple[str, ...] = ()
        # Whether it keeps material when this client leaves.
        self._kept = False
        heat()  # before anyone's time-out runs
        self._channel = reach(address, link, role="client", peer_role="server")
        with telling(self._channel):
            self.plan, self.description, following = self._greet(self._channel, plan)
            self._stock = self._open_stock(following)

    def _stored(self, folder: Path) -> tuple[str | None, int]:
        """Whose unused material a folder holds, dealt as this client asks for."""
        return stored_session(folder, self._corrections)

    def _open_stock(self, following: int) -> Stock[ClientMaterial]:
        """What the folder holds, which must fit the server's next index."""
        stock = Stock(ClientMaterial, "client", self.plan, b"", self._corrections)
        if self._folder is not None and self.session is not None:
            stock.open(self._folder, session=self.session)
            stock.compare(following)
        return stock

    def _greet(
        self, channel: Channel, plan: Plan | None
    ) -> tuple[Plan, Description, int]:
        """Say who this is; the server's plan, its description, and its next index."""
        channel.pace()
        channel.handshake(digest=GREETING)
        hello = Hello(
            session=self.session,
            next_index=self._following,
            corrections=self._corrections,
        )
        tell(channel, hello)
        welcome = hear(channel, Welcome)
        theirs = receive_plan(channel, limit=PLAN_BYTES)
        described = receive_description(
            channel, digest=welcome.description, plan=theirs
        )
        channel.handshake(digest=(plan or theirs).digest)
        with self._lock:
            self._allowed, self._dealers = welcome.quota, welcome.dealers
            self._kept = welcome.keeps
        return theirs, described, welcome.next_index

    @property
    def remaining(self) -> int:
        """Inferences prepared and not used."""
        return self._stock.remaining

    @property
    def next_batch(self) -> int | None:
        """Inputs that the next prepared inference is for; None if none is prepared."""
        return self._stock.next_batch

    def read_images(self, *paths: str | os.PathLike[str]) -> torch.Tensor:
        """Image files as inputs, resized, cut and normalised as the server says.

        Args:
            paths: JPEG or PNG files.

        Returns: float32 (len(paths), *input_shape), for `predict`.

        Cost: nothing is sent.

        Raises:
            DataError: a file is no image that can be used, or the server does not say
                how images become inputs.
        """
        return inputs_of(paths, self.description, self.plan)

    def prepare(self, count: int = 1, *, batch: int = 1) -> None:
        """Prepare inferences with the server and the dealer, before inputs exist.

        Args:
            count: how many inferences.
            batch: inputs in each.

        Cost: offline, this side sends m bits per activation and inference, and receives
            one ring element per weight, once a session, and the dealer's corrections
            if they were asked for.

        Raises:
            MaterialError: a side knows no dealer, unused material is in the way, or
                this side keeps material in a folder and the server does not.
            PeerError: a side is gone, or refuses so many.
        """
        self._reach_again()
        self.check_kept()
        self._prepare(count, batch=batch)

    def check_kept(self) -> None:
        """Refuse a folder of which the server would not have the other half later.

        Raises:
            MaterialError: this side has a folder for material, the server has none.
        """
        if self._folder is not None and not self._kept:
            raise MaterialError(
                f"The server keeps no material once a client leaves, so what is "
                f"prepared into {self._folder} could not be used later. Start it with "
                "--material (directory=), or prepare without a folder."
            )

    def _prepare(self, count: int, *, batch: int) -> None:
        """Over the connection there is."""
        dealers = trusted(self._link.dealers, self._dealers)
        self._leave_lost_dealer()
        channel, began = self._channel, time.perf_counter()
        fresh = self._dealing is None
        name = secrets.token_hex(16) if self._dealing is None else self._dealing.session
        start = 0 if fresh else self._following
        sent, received = channel.bytes_sent, channel.bytes_received
        pairing = Pairing(bytes.fromhex(name), start, batch, self._corrections)
        adding = self._stock.adding(pairing, count=count, folder=self._folder)
        with telling(channel), adding as added:
            if self._dealing is None:
                # The dealer is shown the certificate that the server was shown.
                link = replace(self._link, tls=channel.tls)
                self._dealing = ClientDealing(
                    dealers, link, name, self.plan, self._corrections
                )
            dealing = self._dealing
            order = Prepare(
                session=name,
                start=start,
                count=count,
                batch=batch,
                dealer=dealing.dealer,
            )
            with telling(dealing.channel):
                tell(channel, order)
                hear(channel, Accepted)
                if fresh:
                    dealing.begin(channel)
                made = dealing.prepare(channel, start=start, count=count, batch=batch)
                for material in made:
                    added.add(material)
                hear(channel, Prepared)
        self.session, self._following = name, start + count
        seconds, sent = time.perf_counter() - began, channel.bytes_sent - sent
        self.offline += Cost(rounds=0, bytes_sent=sent, seconds=seconds)
        event = PreparedEvent(
            "",
            session_tag(name),
            start,
            count,
            batch,
            seconds=seconds,
            sent=sent,
            received=channel.bytes_received - received,
            left=self.remaining,
        )
        report(log, event)

    def _leave_lost_dealer(self) -> None:
        """Where the session's dealer is gone, the next preparation begins a session.

        Raises:
            MaterialError: it is gone, and material of the session is left.
        """
        lost = None if self._dealing is None else self._dealing.channel.lost()
        if self._dealing is None or lost is None:
            return
        if self.remaining:
            raise MaterialError(
                f"The dealer of this session is gone ({lost}); use up the "
                f"{self.remaining} prepared inference(s) before more are prepared."
            )
        self._dealing.close()
        self._dealing = None

    def predict(self, x: object, *, force: bool = False) -> torch.Tensor:
        """Logits of a batch; the server learns neither input nor logits.

        The network's guard is asked first, here and in the clear: a refused input
        costs no material, the server learns nothing of it, and the session goes on.

        Args:
            x: (batch, *input_shape), real numbers of any kind that `inputs` takes.
            force: send what the guard refuses. Its values may leave the polynomials'
                intervals, where they grow without bound, and wrap around in a ring: the
                logits may be any numbers, and nothing tells.

        Returns: float32 (batch, *output_shape).

        Cost: 1 message sent per layer of activations and 1 for the input; as many
            received. Without prepared material the offline phase runs first.

        Error: as the plan's table says; no truncation ever fails.

        Raises:
            DataError, ShapeError, RangeError: it is no input, or one that the guard
                refuses, before anything is sent; NaN and infinity with `force` too.
            MaterialError: as `prepare`, or the next material is for another batch.
            PeerError: the server is gone or silent. Where nothing of the inference was
                sent, it is connected to again first.
            QuotaError: the server answers this client no more today; nothing was used.
        """
        return self.ask(x, force=force).logits

    def ask(self, x: object, *, force: bool = False, show: bool = False) -> Answer:
        """`predict`, and what it took.

        Args:
            x, force: as `predict`.
            show: keep what the server received of the input.

        Cost, Error, Raises: as `predict`.
        """
        plan = self.plan
        encoded = plan.encode(x, force=force)
        self._prepare_for(len(encoded))
        if self.plan is not plan:  # the server had another one when it was back
            encoded = self.plan.encode(x, force=force)
        return self._predict(self._channel, encoded, show=show)

    def keep(self) -> None:
        """Connect again if the connection was lost; nothing else is sent.

        Raises:
            PeerError: the server cannot be reached, or does not want this client.
        """
        self._reach_again()

    def _prepare_for(self, batch: int) -> None:
        """Be connected to a server that answers so many inputs, with material."""
        end = time.monotonic() + self._link.timeout
        self._reach_again(inputs=batch)
        if self.remaining:
            return
        try:
            self._prepare(1, batch=batch)
        except PeerError as error:
            # Whoever went in the middle of it may be back, and one that had just
            # found this side idle takes it again.
            final = isinstance(error, FINAL) and not isinstance(error, IdleError)
            if final or time.monotonic() > end:
                raise
            self._reach_again()
            self._prepare(1, batch=batch)

    def predict_many(
        self, inputs: Sequence[Sized], *, in_flight: int = 8, force: bool = False
    ) -> list[torch.Tensor]:
        """`predict` for each input, several at once over as many connections.

        A waiting link then does not idle either processor. Where the server lets fewer
        connections in, those are used.

        Args:
            inputs: each (batch, *input_shape), the same batch.
            in_flight: how many inferences at once, 1 to 64.
            force: as `predict`.

        Returns: the logits in the order of the inputs.

        Cost, Error, Raises: as `predict`, for each; nothing is sent unless every input
            is valid.
        """
        if not 1 <= in_flight <= WINDOW:
            raise ValueError(
                f"in_flight={in_flight} was given; allowed are 1 to {WINDOW}"
            )
        for x in inputs:  # all of them; kept, they would take twice their memory
            self.plan.encode(x, force=force)
        if not inputs:
            return []
        self._reach_again(inputs=sum(map(len, inputs)))
        missing = len(inputs) - self.remaining
        if missing > 0:
            self._prepare(missing, batch=len(inputs[0]))
        try:
            while len(self._others) < min(in_flight, len(inputs)) - 1:
                self._others.append(self._another())
        except PeerError as error:
            # All are taken, or a balancer leads elsewhere: those there are will do.
            if isinstance(error, QuotaError | RevokedError):
                raise
            log.warning("no further connection to %s: %s", self._address, error)
        return self._over(inputs, [self._channel, *self._others][:in_flight], force)

    def _over(
        self, inputs: Sequence[object], channels: Sequence[Channel], force: bool
    ) -> list[torch.Tensor]:
        """The logits of every input; a channel that is free takes the next one."""
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
                    encoded = self.plan.encode(inputs[number], force=force)
                    results[number] = self._predict(channel, encoded).logits
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

    def _another(self) -> Channel:
        """One more connection to this session."""
        # By the certificate that the session began with.
        link = replace(self._link, tls=self._channel.tls)
        channel = reach(self._address, link, role="client", peer_role="server")
        with telling(channel):
            self._greet(channel, self.plan)
        return channel

    def _reach_again(self, *, inputs: int = 0) -> None:
        """Connect anew where a connection was lost; nothing is under way.

        Args:
            inputs: how many the server must still answer today.

        Raises:
            QuotaError: it does not.
            RevokedError: the server's certificate was revoked meanwhile, or this one.
            PeerError: it cannot be reached.
        """
        self._channel.check_revoked()
        for channel in [c for c in self._others if c.lost() is not None]:
            self._others.remove(channel)
            channel.close()
        lost = self._channel.lost()
        if isinstance(lost, (QuotaError, RevokedError)):
            raise lost
        if lost is not None:
            self._begin_again(lost)
        if self._allowed is not None and inputs > self._allowed:
            # It may be another day: ask, before anything is given up.
            channel, old = self._another(), self._channel
            self._channel = channel
            old.close()
        if self._allowed is not None and inputs > self._allowed:
            raise QuotaError(
                f"{inputs} input(s) were given, and the server answers this client "
                f"{self._allowed} more today; nothing was used."
            )

    def _begin_again(self, lost: PeerError) -> None:
        """Connect to the server once more, and go on with what the folder holds."""
        self.close()
        if self._folder is None:
            self.session, self._following = None, 0
            self._stock = self._open_stock(0)
        else:
            self.session, self._following = self._stored(self._folder)
        try:
            channel = reach(
                self._address, self._link, role="client", peer_role="server"
            )
        except PeerError as error:
            raise type(error)(f"{error} The last connection was lost: {lost}") from None
        with telling(channel):
            plan, described, following = self._greet(channel, self._pinned)
            old = self.plan.input.shape, self.plan.logits_shape
            if (plan.input.shape, plan.logits_shape) != old:
                raise PlanMismatchError(
                    "The server has another network by now, of other shapes: "
                    f"{plan.input.shape} to {plan.logits_shape}, before it was "
                    f"{old[0]} to {old[1]}. Connect anew."
                )
            self.plan = plan
            stock = self._open_stock(following)
        self._channel, self._stock = channel, stock
        self.description = described
        tag = "" if self.session is None else session_tag(self.session)
        report(log, Reconnected(tag, told(lost)))

    def _predict(
        self, channel: Channel, encoded: np.ndarray, *, show: bool = False
    ) -> Answer:
        batch, start = len(encoded), time.perf_counter()
        material = self._stock.take_next(batch=batch)
        index, tag = material.pairing.index, session_tag(material.pairing.session.hex())
        masked = masked_input(self.plan, material, encoded) if show else None
        begun = InferenceBegun("", tag, index, batch)
        with reported(
            begun,
            partial(report, log),
            channel,
            since=start,
            left=lambda: self.remaining,
        ):
            sent, messages = channel.bytes_sent, channel.messages_sent
            received, heard = channel.bytes_received, channel.messages_received
            began = time.perf_counter()
            with self._lock:
                if self._allowed is not None:
                    self._allowed -= batch
            with telling(channel):
                channel.pace()
                part = inference(self.plan, material, encoded)
                z = over(part, {"server": channel}, tag=index)
            seconds = time.perf_counter() - began
        # Each way one message beside the layers', the input or the logits, and one to
        # compare what was used. The chunks of a large batch travel at once.
        layers = channel.messages_sent - messages + channel.messages_received - heard
        rounds = 2 + (layers - 4) // len(chunks(batch))
        sent, received = channel.bytes_sent - sent, channel.bytes_received - received
        with self._lock:
            self.online += Cost(rounds, sent, 0, seconds)
        return Answer(self.plan.decode(z), seconds, sent, received, masked)

    def close(self) -> None:
        """Say goodbye and disconnect."""
        for channel in (*self._others, self._channel):
            with suppress(EspnError):
                tell(channel, Goodbye())
            channel.close()
        self._others.clear()
        if self._dealing is not None:
            self._dealing.close()
            self._dealing = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect(
    address: str,
    *,
    plan: Plan | None = None,
    link: Link | None = None,
    dealer: str | Sequence[str] | None = None,
    directory: str | os.PathLike[str] | None = None,
    tls: TLS | None = None,
    timeout: float | None = None,
    insecure: bool = False,
    corrections: Party | None = None,
) -> Client:
    """Connect to a served model.

    Args:
        address: "host:port" of the server.
        plan: the plan the server must have; None accepts the one it sends, and after a
            lost connection another one of the same shapes.
        link: the next six as one object, instead of them.
        dealer: "host:port" of the dealer, or of several that are trusted.
        directory: where to keep material; in memory if None.
        tls: mutual TLS certificates, or None.
        timeout: seconds the server may be silent.
        insecure: allow addresses that others reach without TLS.
        corrections: who receives the dealer's, "server" (as with None) or "client". To
            the client, this side downloads and keeps them, tens of bytes an
            activation, and the server's line carries many more clients.

    Raises:
        PeerError: the server cannot be reached.
        LimitError: it does not offer corrections to this party.
        PlanMismatchError: on both sides, if it holds another plan.
        MaterialError: stored material is not for it.
    """
    return Client(
        address,
        one_link(link, dealer, directory, tls, timeout, insecure, corrections),
        plan=plan,
    )
