"""CrypTen's own protocols over a direct channel."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from crypten import communicator as comm
from crypten.communicator.communicator import _logging
from crypten.communicator.distributed_communicator import DistributedCommunicator
from crypten.cuda import CUDALongTensor
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from ..errors import EspnError, PeerError
from .channel import Channel
from .connect import Listener, connect_channel, host_port, parse_address
from .tls import TLS


class DirectCommunicator(DistributedCommunicator):
    """CrypTen's two-party communicator with its collectives over a channel.

    Everything between the two parties goes through the channel; the group that holds
    the trusted third party keeps gloo. Openings merge: a batched all_reduce is one
    message.

    Args:
        channel: connected to the other party.
        base: CrypTen's initialised DistributedCommunicator.
    """

    def __init__(self, channel: Channel, base: DistributedCommunicator) -> None:
        self.__dict__.update(base.__dict__)
        self.channel = channel
        self._base = base

    # -- raw transfers

    def _swap(self, tensors: list[Tensor]) -> list[Tensor]:
        mine = [_to_array(tensor) for tensor in tensors]
        data = np.concatenate(mine) if len(mine) != 1 else mine[0]
        return _split(self.channel.exchange_packed(data.data), tensors)

    def _push(self, tensors: list[Tensor]) -> None:
        data = np.concatenate([_to_array(tensor) for tensor in tensors])
        self.channel.send_packed(data.data)

    def _pull(self, like: list[Tensor]) -> list[Tensor]:
        size = sum(tensor.numel() * tensor.element_size() for tensor in like)
        return _split(self.channel.receive_packed(size), like)

    # -- CrypTen's interface

    @_logging
    def send(self, tensor: Tensor, dst: int) -> None:
        self._push([tensor.data])

    @_logging
    def recv(self, tensor: Tensor, src: int | None = None) -> Tensor:
        return _as(tensor, self._pull([tensor.data])[0])

    @_logging
    def isend(self, tensor: Tensor, dst: int) -> _Done:
        self._push([tensor.data])
        return _Done()

    @_logging
    def irecv(self, tensor: Tensor, src: int | None = None) -> _Done:
        tensor.data.copy_(self._pull([tensor.data])[0])
        return _Done()

    @_logging
    def scatter(
        self,
        scatter_list: list[Tensor],
        src: int,
        size: torch.Size | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        if src == self.get_rank():
            self._push([scatter_list[1 - src].data])
            return scatter_list[src].data
        if size is None:
            size = scatter_list[self.get_rank()].size()
        like = torch.empty(size, dtype=torch.long, device=device)
        return self._pull([like])[0]

    @_logging
    def reduce(
        self,
        input: Tensor | list[Tensor],
        dst: int,
        op: object = ReduceOp.SUM,
        batched: bool = False,
    ) -> Tensor | list[Tensor] | None:
        inputs = _data(input)
        if dst != self.get_rank():
            self._push(inputs)
            return None
        return _combined(input, inputs, self._pull(inputs), op)

    @_logging
    def all_reduce(
        self,
        input: Tensor | list[Tensor],
        op: object = ReduceOp.SUM,
        batched: bool = False,
    ) -> Tensor | list[Tensor]:
        inputs = _data(input)
        return _combined(input, inputs, self._swap(inputs), op)

    @_logging
    def gather(self, tensor: Tensor, dst: int) -> list[Tensor] | list[None]:
        if self.get_rank() != dst:
            self._push([tensor.data])
            return [None]
        result = [tensor.data.clone(), self._pull([tensor.data])[0]]
        return result if dst == 0 else result[::-1]

    @_logging
    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        result = [tensor.data.clone(), self._swap([tensor.data])[0]]
        return result if self.get_rank() == 0 else result[::-1]

    @_logging
    def broadcast(
        self,
        input: Tensor | list[Tensor],
        src: int,
        group: ProcessGroup | None = None,
        batched: bool = False,
    ) -> Tensor | list[Tensor]:
        if group is not None and group is not self.main_group:
            self._base.broadcast(input, src, group=group, batched=batched)
            return input
        inputs = _data(input)
        if self.get_rank() == src:
            self._push(inputs)
        else:
            for target, value in zip(inputs, self._pull(inputs), strict=True):
                target.copy_(value)
        return input

    @_logging
    def barrier(self) -> None:
        self._swap([torch.zeros(1, dtype=torch.uint8)])


class _Done:
    """What CrypTen waits for after a transfer that is already over."""

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _data(input: Tensor | list[Tensor]) -> list[Tensor]:
    """One tensor, or the several of a batched call."""
    return [x.data for x in input] if isinstance(input, list) else [input.data]


def _to_array(tensor: Tensor) -> np.ndarray:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().view(np.uint8)


def _split(raw: memoryview, like: list[Tensor]) -> list[Tensor]:
    """The bytes as tensors of the types, shapes and devices of `like`."""
    result, start = [], 0
    array = np.frombuffer(raw, dtype=np.uint8)
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        part = torch.from_numpy(array[start : start + size].copy())
        part = part.view(tensor.dtype).reshape(tensor.shape)
        result.append(part.to(tensor.device))
        start += size
    return result


def _as(given: Tensor, value: Tensor) -> Tensor:
    """A value in the wrapper that CrypTen has around integers of a GPU, if any."""
    return CUDALongTensor(value) if isinstance(given, CUDALongTensor) else value


def _combined(
    given: Tensor | list[Tensor], mine: list[Tensor], theirs: list[Tensor], op: object
) -> Tensor | list[Tensor]:
    """What a collective makes of both parties' tensors, in the form it was given."""
    results = [_combine(a, b, op) for a, b in zip(mine, theirs, strict=True)]
    if not isinstance(given, list):
        return _as(given, results[0])
    return [_as(x, result) for x, result in zip(given, results, strict=True)]


def _combine(mine: Tensor, theirs: Tensor, op: object) -> Tensor:
    if op == ReduceOp.SUM:
        return mine + theirs
    if op == ReduceOp.BXOR:
        return mine ^ theirs
    if op == ReduceOp.MAX:
        return torch.maximum(mine, theirs)
    if op == ReduceOp.MIN:
        return torch.minimum(mine, theirs)
    if op == ReduceOp.PRODUCT:
        return mine * theirs
    if op == ReduceOp.BAND:
        return mine & theirs
    if op == ReduceOp.BOR:
        return mine | theirs
    raise ValueError(f"Reduction {op} is not supported over a direct channel.")


@contextlib.contextmanager
def use_direct_channel(
    *,
    host: str = "127.0.0.1",
    listen: str = "127.0.0.1",
    timeout: float = 30.0,
    tls: TLS | None = None,
    insecure: bool = False,
) -> Iterator[Channel]:
    """Run CrypTen's own two-party protocols over a direct channel inside the block.

    1. Rank 0 listens on a free port of `listen` and tells rank 1 the port over gloo.
    2. Rank 1 connects to `host` at that port.
    3. CrypTen's communicator is replaced until the block ends.

    Args:
        host: where rank 1 reaches rank 0.
        listen: the address rank 0 binds.
        timeout: seconds a peer may be silent before that is an error.
        tls: mutual TLS certificates, rank 0's of a server and rank 1's of a client;
            what CrypTen itself sends over gloo, a dealer's seeds included, stays in
            the clear.
        insecure: whether the two may talk without TLS beyond this host.

    Returns: the channel, with its counters.

    Cost: one gloo broadcast of 8 bytes to set up; an opening then takes one one-way
        delay instead of gloo's two round trips.

    Raises:
        PeerError: CrypTen is not initialised with two processes, or they do not find
            each other.
        TransportError: as `Listener` and `connect_channel`.
    """
    base = DistributedCommunicator.instance
    if not DistributedCommunicator.is_initialized() or comm.get() is not base:
        raise PeerError(
            "use_direct_channel() needs CrypTen initialised in two processes; call "
            "crypten.init() in each first."
        )
    if base.get_world_size() != 2:
        raise PeerError(
            f"A direct channel joins 2 parties; this world has {base.get_world_size()}."
        )
    port = torch.zeros(1, dtype=torch.long)
    if base.get_rank() == 0:
        try:
            listener = Listener(
                host_port(listen, 0), role="server", tls=tls, insecure=insecure
            )
        except EspnError:
            base.broadcast(port, 0)  # no port: rank 1 need not wait
            raise
        with listener:
            port[0] = parse_address(listener.address)[1]
            base.broadcast(port, 0)
            incoming = listener.accept(timeout=timeout)
            channel = incoming.open(peer_roles=("client",), timeout=timeout)
    else:
        base.broadcast(port, 0)
        if not int(port[0]):
            raise PeerError("Rank 0 cannot listen; it says why.")
        channel = connect_channel(
            host_port(host, int(port[0])),
            role="client",
            peer_role="server",
            timeout=timeout,
            tls=tls,
            insecure=insecure,
        )
    channel.peer = f"rank {1 - base.get_rank()}"
    digest = hashlib.sha256(b"crypten over a direct channel").digest()
    try:
        channel.handshake(digest=digest)
        channel.reset_counters()
        direct = DirectCommunicator(channel, base)
        DistributedCommunicator.instance = direct
        try:
            yield channel
        finally:
            base.comm_rounds = direct.comm_rounds
            base.comm_bytes = direct.comm_bytes
            base.comm_time = direct.comm_time
            DistributedCommunicator.instance = base
    finally:
        channel.close()
