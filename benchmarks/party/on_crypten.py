"""CrypTen in a party: its channels, its dealer, a computation as a system."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

import crypten_espn.correlated  # repairs CrypTen before it is imported, below
import crypten_espn.wire.crypten

from .measuring import Result


@contextlib.contextmanager
def crypten_channels(
    address: str, *, threads: int, provider: str, listen: str | None = None
) -> Iterator[dict[str, Any]]:
    """CrypTen started in this party, over gloo and over the direct channel.

    Args:
        address: where rank 1 reaches rank 0.
        threads: of torch, in this party.
        provider: "TFP" (the first party deals) or "TTP" (a third process does).
        listen: the address rank 0 binds, if not that one.
    Returns: CrypTen's communicators by channel name, to be given to `use_channel`.
    """
    os.environ.update(RENDEZVOUS="env://", DISTRIBUTED_BACKEND="gloo", WORLD_SIZE="2")
    import crypten
    import crypten.communicator as comm

    torch.set_num_threads(threads)
    crypten.cfg.mpc.provider = provider
    crypten.cfg.communicator.verbose = True  # count; it sends as much as it receives
    crypten.init()
    try:
        base = comm.get()
        with crypten_espn.wire.crypten.use_direct_channel(
            host=address, listen=listen or address, timeout=600.0, insecure=True
        ):
            direct = comm.get()
            try:
                yield {"gloo": base, "direct": direct}
            finally:
                use_channel(direct)
    finally:
        crypten.uninit()


def use_channel(communicator: Any) -> None:
    """Have CrypTen talk over this one of the channels from now on."""
    from crypten.communicator.distributed_communicator import DistributedCommunicator

    DistributedCommunicator.instance = communicator


def deal() -> None:
    """Body of the third process under provider TTP: CrypTen's dealer."""
    os.environ.update(RENDEZVOUS="env://", DISTRIBUTED_BACKEND="gloo", WORLD_SIZE="2")
    import crypten

    crypten.cfg.mpc.provider = "TTP"
    torch.set_num_threads(1)
    crypten_espn.correlated.Dealer()


class CryptenSystem:
    """A computation on CrypTen tensors, its correlated randomness traced once.

    Args:
        activation: name of the row.
        channel: "gloo" or "direct", with its communicator.
        compute: the online phase; returns an encrypted or a plain tensor.
        check: largest error and agreement of the result; None at a party that does
            not see it.
        traces: what runs of each activation ask for, and the seconds the traced run
            took; the same over every channel, so the first system traces for all.
        reveal: whether to open the result, for `check`, after the clock has stopped.
        select: sets what the computation reads from crypten.cfg, before the clock.
        settle: the first run does more than the others (CrypTen's batch-norm then
            keeps its inverse variance), so the second is traced.
    """

    def __init__(
        self,
        activation: str,
        channel: str,
        communicator: Any,
        compute: Callable[[], Any],
        check: Callable[[torch.Tensor], tuple[float, float | None] | None],
        *,
        traces: dict[str, tuple[list[Any], float]],
        reveal: bool,
        select: Callable[[], None] = lambda: None,
        settle: bool = False,
    ) -> None:
        import crypten

        self.activation = activation
        self.engine = f"crypten+{channel}"
        self._communicator = communicator
        self._compute = compute
        self._check = check
        self._traces = traces
        self._reveal = reveal
        self._select = select
        self._settle = settle
        self._provider = crypten.mpc.get_default_provider()
        self._requests: list[Any] = []
        self._offline_bytes = 0

    def prepare(self) -> float:
        """Run once to see which correlated randomness the computation asks for."""
        if self.activation not in self._traces:
            self._traces[self.activation] = self._trace()
        self._requests, seconds = self._traces[self.activation]
        self._offline_bytes = 8 * sum(
            corrections(function, args, kwargs)
            for function, args, kwargs in self._requests
        )
        return seconds

    def _trace(self) -> tuple[list[Any], float]:
        use_channel(self._communicator)
        self._select()
        provider = self._provider
        provider.request_cache, provider.tuple_cache = [], {}
        if self._settle:
            self._compute()
        start = time.monotonic()
        provider.trace()
        try:
            self._compute()
        finally:
            provider.trace(False)
            requests, provider.request_cache = provider.request_cache, []
        return requests, time.monotonic() - start

    def offline(self) -> int:
        """Make the tuples of one run; bytes a dealer has to send for them."""
        use_channel(self._communicator)
        self._select()
        provider = self._provider
        provider.request_cache, provider.tuple_cache = self._requests, {}
        provider.fill_cache()
        provider.request_cache = []
        return self._offline_bytes

    def online(self) -> Callable[[], Result]:
        """Compute from the tuples made offline."""
        communicator = self._communicator
        communicator.reset_communication_stats()
        output = self._compute()
        rounds, both_ways = communicator.comm_rounds, communicator.comm_bytes
        left = sum(map(len, self._provider.tuple_cache.values()))
        self._provider.tuple_cache = {}

        def finish() -> Result:
            if left:
                raise RuntimeError(
                    f"{self.activation} over {self.engine}: {left} tuples made offline "
                    "were not used online"
                )
            plain = output.get_plain_text() if self._reveal else output
            error, agreement = self._check(plain) or (None, None)
            return Result(rounds, round(both_ways / 2), error, agreement)

        return finish

    def close(self) -> None:
        """Forget the tuples; the channels are the caller's."""
        self._requests = []
        self._provider.tuple_cache = {}


def corrections(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Ring elements a dealer sends for one of CrypTen's requests.

    Under provider TTP everything else expands from seeds. Under TFP nothing is sent at
    all, since the first party knows every mask: no deployment may do that, so the
    dealer's figure is given for both.
    """
    if function == "generate_additive_triple":
        first, second, op = args[:3]
        left = torch.empty(first, device="meta")
        right = torch.empty(second, device="meta")
        options = {k: _untuple(v) for k, v in kwargs.items() if k != "device"}
        return getattr(torch, op)(left, right, *args[4:], **options).numel()
    if function == "generate_binary_triple":
        return torch.broadcast_shapes(*map(tuple, args[:2])).numel()
    size = torch.Size(args[0]).numel()
    factor = {"powers": lambda: args[1] - 1, "rescaling": lambda: 2}
    return size * factor.get(function, lambda: 1)()


def _untuple(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def leave() -> None:
    """End a party that has printed everything.

    At once: gloo's threads now and then abort a process that tears down in order.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
