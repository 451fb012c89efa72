"""The masked engine between CrypTen tensors: shares in, shares out.

A network converted for the masked engine can stand between other CrypTen computations:
its input is an MPCTensor that neither party knows, and so is its output. Rank 0 owns
the weights, as everywhere.

1. Rescale the input's shares to the plan's input scale, exactly.
2. Rank 1 sends its share less its mask t; rank 0 adds its own: D, as in `inference`.
3. Run the layers; do not open the output.
4. Lift the output's shares from its narrow ring to 64 bits, rescaling exactly.

The messages go through CrypTen's communicator, the randomness comes from its provider:
under TTP the dealer process prepares it, under TFP rank 0 does and so could unmask
everything: for tests and benchmarks only.

What this composition does not hide: the exact rescalings of steps 1 and 4 open values
whose low bits both parties see, and rank 0 knows its part of every rounding coin. A
party that learns the result of many calls on one input can average over them. Reveal
results to rank 1 alone, and few of them.
"""

from __future__ import annotations

import secrets
from typing import Any, TypeVar, cast

import crypten
import crypten.communicator as comm
import numpy as np
import torch
from crypten.common import rng
from crypten.mpc import MPCTensor
from crypten.mpc import provider as crypten_provider
from crypten.mpc.provider.ttp_provider import TTPClient

from ..correlated import Dealer as TupleDealer
from ..errors import MaterialError, RandomnessError, WorldSizeError
from ..protocols.shares import shared
from ..protocols.truncation import exact
from ..randomness import new_seed
from ..wire.packing import pack, packed_bytes, unpack_parts
from . import kernels
from .dealing import Dealing
from .inference import client_layers, server_layers
from .material import ClientMaterial, Pairing, ServerMaterial
from .messages import DEALER, Protocol, Receive, Send, receive, send
from .plan import INPUT, Plan, channels_last
from .preparing import ClientPreparation, ServerPreparation
from .weights import Weights

T = TypeVar("T")


class _Deal:
    """What the dealer sent for one inference, read in its order."""

    def __init__(self, words: torch.Tensor) -> None:
        self._data = words.numpy().tobytes()
        self._position = 0

    def read(self, event: Receive) -> list[np.ndarray]:
        found = []
        for count, bits in event.parts:
            start = self._position
            self._position += packed_bytes(count, bits)
            found.append(memoryview(bytearray(self._data[start : self._position])))
        return unpack_parts(found, event.parts, event.out)


def _packed(parts: tuple[tuple[np.ndarray, int], ...]) -> bytes:
    return b"".join(bytes(pack(array, bits=bits)) for array, bits in parts)


def _to_words(data: bytes) -> torch.Tensor:
    """Bytes padded to whole ring elements of 64 bits."""
    padded = data + bytes(-len(data) % 8)
    return torch.frombuffer(bytearray(padded), dtype=torch.long)


def _run(part: Protocol[T], deal: _Deal | None = None) -> T:
    """Run one party's part of a protocol through CrypTen's communicator."""
    peer = 1 - comm.get().get_rank()
    answer: list[np.ndarray] | None = None
    try:
        while True:
            event = part.send(answer)
            answer = None
            if isinstance(event, Send):
                comm.get().send(_to_words(_packed(event.parts)), peer)
            elif isinstance(event, Receive) and event.of == DEALER:
                assert deal is not None
                answer = deal.read(event)
            elif isinstance(event, Receive):
                size = sum(packed_bytes(count, bits) for count, bits in event.parts)
                empty = torch.empty((size + 7) // 8, dtype=torch.long)
                answer = _Deal(comm.get().recv(empty, src=peer)).read(event)
    except StopIteration as end:
        return cast(T, end.value)


class ComposedEngine:
    """One party of a masked network inside a CrypTen computation of two parties.

    Args:
        plan: rank 0's; rank 1 gives None and receives it.
        weights: rank 0's; None for rank 1.

    Cost: one broadcast of the plan, and W - B from rank 0, once.

    Raises:
        WorldSizeError: CrypTen does not run with two parties.
        RandomnessError: the provider prepares no material for this engine.
        Both before anything is sent.
    """

    def __init__(self, plan: Plan | None, weights: Weights | None) -> None:
        world_size = comm.get().get_world_size()
        if world_size != 2:
            raise WorldSizeError(
                f"the masked engine was started with {world_size} parties and runs "
                "with exactly 2"
            )
        if crypten.cfg.mpc.provider not in ("TFP", "TTP"):
            raise RandomnessError(
                f"provider {crypten.cfg.mpc.provider!r} prepares nothing for the "
                "masked engine; set crypten.cfg.mpc.provider to 'TTP', or 'TFP' for "
                "tests"
            )
        self.rank = comm.get().get_rank()
        greeting = "" if plan is None else secrets.token_hex(16) + plan.to_json()
        greeting = comm.get().broadcast_obj(greeting, 0)
        self._session, text = bytes.fromhex(greeting[:32]), greeting[32:]
        self.plan = Plan.from_json(text)
        self._weights = weights
        provider = _ProcessDeals if crypten.mpc.ttp_required() else _RankZeroDeals
        self._provider = provider(self.plan, self._session, self.rank)
        self._preparation: ServerPreparation | ClientPreparation
        if weights is None:
            self._preparation = ClientPreparation(self.plan, self._provider.seed)
        else:
            self._preparation = ServerPreparation(
                self.plan, weights, self._provider.seed
            )
        _run(self._preparation.open_weights())
        self._ready: dict[int, list[Any]] = {}
        self._index = 0

    def prepare(self, count: int, *, batch: int) -> None:
        """Make material for `count` inferences of `batch` inputs: the offline phase.

        Cost: the dealer's corrections to rank 0, rank 1's halves to rank 0.
        """
        for _ in range(count):
            pairing = Pairing(self._session, self._index, batch)
            self._index += 1
            dealt = self._provider.deal(pairing)
            material = _run(
                self._preparation.prepare(pairing),
                None if dealt is None else _Deal(dealt),
            )
            self._ready.setdefault(batch, []).append(material)

    def __call__(self, x: MPCTensor) -> MPCTensor:
        """[logits] of a shared input; see the module's steps.

        Args:
            x: arithmetic sharing of (batch, *input.shape).

        Returns:
            MPCTensor (batch, *output_shape) at the scale of x.

        Cost: 2 rounds and the plan's messages less one; material is prepared first if
            none is left for this batch size.

        Error: the plan's, and less than one unit of the input scale and of the
            output's; no truncation fails while values stay in the plan's bounds.

        """
        batch = x.size(0)
        if not self._ready.get(batch):
            self.prepare(1, batch=batch)
        material = self._ready[batch].pop(0)
        plan, frac_bits = self.plan, x.encoder._precision_bits
        share = exact(x.share, max(frac_bits - plan.input.frac_bits, 0))
        share = share << max(plan.input.frac_bits - frac_bits, 0)
        own = channels_last(share.numpy()).astype(kernels.ring_dtype(plan.input.ring))
        result = _run(self._layers(material, own))
        result = np.moveaxis(result, -1, 1)
        output = torch.from_numpy(np.ascontiguousarray(result).astype(np.int64))
        drop = plan.output.frac_bits - frac_bits
        lifted = exact(output, max(drop, 0), ring_bits=plan.output.ring)
        lifted = (lifted << max(-drop, 0)).reshape(batch, *plan.output_shape)
        return shared(lifted, frac_bits=frac_bits)

    def _layers(
        self, material: ServerMaterial | ClientMaterial, own: np.ndarray
    ) -> Protocol[np.ndarray]:
        """From this party's share of the input to its share of the output."""
        first = self.plan.sources[INPUT]
        if isinstance(material, ClientMaterial):
            mask = material.draws(self.plan).input_mask
            yield send("server", own - mask, first.ring)
            return (yield from client_layers(self.plan, material))
        assert self._weights is not None
        (theirs,) = yield receive("client", own.size, first.ring)
        data = own + theirs.reshape(own.shape)
        return (yield from server_layers(self.plan, self._weights, material, data))


def _seed_from(generator: torch.Generator) -> bytes:
    words: torch.Tensor = rng.generate_random_ring_element((2,), generator=generator)
    return words.numpy().tobytes()


def _dealt(dealing: Dealing, pairing: Pairing) -> torch.Tensor:
    """What rank 0 gets for one inference, packed into ring elements."""
    data = []
    for event in dealing.deal(pairing.index, pairing.batch):
        assert isinstance(event, Send)
        data.append(_packed(event.parts))
    return _to_words(b"".join(data))


class _RankZeroDeals:
    """TFP: rank 0 deals to itself and knows rank 1's seed, but not the reverse."""

    def __init__(self, plan: Plan, session: bytes, rank: int) -> None:
        known_to_both = crypten.generators["global"][torch.device("cpu")]
        client_seed = _seed_from(known_to_both)
        self.seed = client_seed if rank == 1 else new_seed()
        self._dealing: Dealing | None = None
        if rank == 0:
            self._dealing = Dealing(plan, seeds=(self.seed, client_seed))

    def deal(self, pairing: Pairing) -> torch.Tensor | None:
        return None if self._dealing is None else _dealt(self._dealing, pairing)


class _ProcessDeals:
    """TTP: rank 0 asks the dealer process, which shares a generator with each party."""

    def __init__(self, plan: Plan, session: bytes, rank: int) -> None:
        self._rank = rank
        self.seed = _seed_from(TTPClient.get().get_generator())
        if rank == 0:
            TTPClient.get().ttp_request(
                "masked_plan", None, session.hex(), plan.to_json()
            )

    def deal(self, pairing: Pairing) -> torch.Tensor | None:
        if self._rank == 1:
            return None
        dealt: torch.Tensor = TTPClient.get().ttp_request(
            "masked_deal", None, pairing.session.hex(), pairing.index, pairing.batch
        )
        return dealt


class MaskedDealer(TupleDealer):
    """CrypTen's trusted third party, also for the masked engine.

    Every network has a dealing of its own, named by its session: two of them in one
    CrypTen session share no seed.
    """

    requests = TupleDealer.requests | {"masked_plan", "masked_deal"}

    _dealings: dict[str, Dealing]

    def masked_plan(self, session: str, text: str) -> torch.Tensor:
        """Note a network's plan and draw its seeds; replies with one zero.

        Raises:
            MaterialError: the session has a plan already.
            PlanError: the text is no plan.
        """
        known = self.__dict__.setdefault("_dealings", {})
        if session in known:
            raise MaterialError(f"session {session[:8]} already has a plan")
        plan = Plan.from_json(text)
        first, second = self._get_generators(device="cpu")
        seeds = _seed_from(first), _seed_from(second)
        known[session] = Dealing(plan, seeds=seeds)
        return torch.zeros(1, dtype=torch.long)

    def masked_deal(self, session: str, index: int, batch: int) -> torch.Tensor:
        """What rank 0 gets for one inference.

        Raises:
            MaterialError: no plan was given before for this session.
        """
        dealing = self.__dict__.get("_dealings", {}).get(session)
        if dealing is None:
            raise MaterialError(
                f"the dealer was asked for material of session {session[:8]}, for "
                "which it has no plan"
            )
        return _dealt(dealing, Pairing(bytes.fromhex(session), index, batch))


crypten_provider.TTPServer = MaskedDealer
