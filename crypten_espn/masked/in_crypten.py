"""The masked engine between CrypTen tensors: shares in, shares out.

A network converted for the masked engine can stand between other CrypTen computations:
its input is an MPCTensor that neither party knows, and so is its output. Rank 0 owns
the weights, as everywhere in owner mode.

1. Rescale the input's shares to the plan's input scale, exactly.
2. Rank 1 sends its share less its mask t; rank 0 adds its own: D, as in `online`.
3. Run the layers; do not open the output.
4. Lift the output's shares from its narrow ring to 64 bits, rescaling exactly.

The messages go through CrypTen's communicator, the randomness comes from its provider:
under TTP the dealer process prepares it, under TFP rank 0 does and so could unmask
everything: for tests and benchmarks only.
"""

from __future__ import annotations

from typing import Any, cast

import crypten
import crypten.communicator as comm
import numpy as np
import torch
from crypten.common import rng
from crypten.mpc import MPCTensor
from crypten.mpc import provider as crypten_provider
from crypten.mpc.primitives import ArithmeticSharedTensor
from crypten.mpc.provider.ttp_provider import TTPClient

from ..correlated import Dealer as TupleDealer
from ..errors import MaterialError, RandomnessError, WorldSizeError
from ..protocols.truncation import exact
from ..randomness import new_seed
from ..wire.packing import pack, packed_bytes, unpack
from . import kernels
from .offline import (
    Dealer,
    Material,
    Preparation,
    opened_weights,
    receive_deal,
)
from .online import query_layers, serve_layers
from .plan import INPUT, Plan, Weights, channels_last


class _Tape:
    """What a dealer sends, kept in order, then read as rank 0 would receive it."""

    def __init__(self, words: torch.Tensor | None = None) -> None:
        self._parts: list[bytes] = []
        self._data = b"" if words is None else words.numpy().tobytes()
        self._position = 0

    def send(self, values: np.ndarray, *, bits: int, tag: int = 0) -> None:
        self._parts.append(bytes(pack(values, bits=bits)))

    def receive(self, count: int, *, bits: int, tag: int = 0) -> np.ndarray:
        start = self._position
        self._position += packed_bytes(count, bits)
        return unpack(self._data[start : self._position], count, bits=bits).copy()

    def words(self) -> torch.Tensor:
        """Everything sent, padded to whole ring elements of 64 bits."""
        return _to_words(b"".join(self._parts))


class _Link:
    """A channel's sending and receiving, through CrypTen's communicator."""

    def __init__(self, peer: int) -> None:
        self._peer = peer

    def send(self, values: np.ndarray, *, bits: int, tag: int = 0) -> None:
        comm.get().send(_to_words(bytes(pack(values, bits=bits))), self._peer)

    def receive(self, count: int, *, bits: int, tag: int = 0) -> np.ndarray:
        size = packed_bytes(count, bits)
        empty = torch.empty((size + 7) // 8, dtype=torch.long)
        words = comm.get().recv(empty, src=self._peer)
        return unpack(words.numpy().tobytes()[:size], count, bits=bits).copy()


def _to_words(data: bytes) -> torch.Tensor:
    padded = data + bytes(-len(data) % 8)
    return torch.frombuffer(bytearray(padded), dtype=torch.long)


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
        text = "" if plan is None else plan.to_json()
        self.plan = Plan.from_json(comm.get().broadcast_obj(text, 0))
        self._weights = weights
        self._link = cast(Any, _Link(1 - self.rank))
        provider = _ProcessDeals if crypten.mpc.ttp_required() else _RankZeroDeals
        self._provider = provider(self.plan, self.rank)
        self._opened = opened_weights(
            self.plan,
            self._link,
            seed=self._provider.seed if self.rank == 0 else None,
            weights=weights,
        )
        self._ready: dict[int, list[Material]] = {}
        self._index = 0

    def prepare(self, count: int, *, batch: int) -> None:
        """Make material for `count` inferences of `batch` inputs: the offline phase.

        Cost: the dealer's corrections to rank 0, rank 1's halves to rank 0.
        """
        preparation = Preparation(
            self.plan,
            rank=self.rank,
            seed=self._provider.seed,
            weights=self._weights,
            batch=batch,
            opened=self._opened,
        )
        for _ in range(count):
            index, self._index = self._index, self._index + 1
            dealt = self._provider.deal(index, batch)
            if dealt is None:
                material = preparation.client(
                    index, lambda half, bits: self._link.send(half, bits=bits)
                )
            else:
                tape: Any = _Tape(dealt)
                given = receive_deal(self.plan, tape, index, batch=batch)
                material = preparation.server(given, self._half(batch), index)
            self._ready.setdefault(batch, []).append(material)

    def _half(self, batch: int) -> Any:
        def half(number: int) -> np.ndarray:
            segment = self.plan.segments[number]
            flat = self._link.receive(batch * segment.elements, bits=segment.ring)
            return flat.reshape(batch, *segment.root.shape)

        return half

    def __call__(self, x: MPCTensor) -> MPCTensor:
        """[logits] of a shared input; see the module's steps.

        Args:
            x: arithmetic sharing of (batch, *input_shape).

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
        first, last = plan.sources[INPUT], plan.segments[-1]

        share = exact(x.share, max(frac_bits - first.frac_bits, 0))
        share = share << max(first.frac_bits - frac_bits, 0)
        own = channels_last(share.numpy()).astype(kernels.ring_dtype(first.ring))
        if self.rank == 1:
            self._link.send(own - material.masks[INPUT], bits=first.ring)
            result = query_layers(plan, self._link, material, batch=batch)
        else:
            assert self._weights is not None
            flat = self._link.receive(batch * first.elements, bits=first.ring)
            data = own + flat.reshape(own.shape)
            result = serve_layers(
                plan, self._weights, self._link, material, data, batch=batch
            )
        if result.ndim == 4:
            result = result.transpose(0, 3, 1, 2)
        output = torch.from_numpy(np.ascontiguousarray(result).astype(np.int64))
        drop = last.scale - frac_bits
        lifted = exact(output, max(drop, 0), ring_bits=last.ring) << max(-drop, 0)
        answer = MPCTensor([])
        answer._tensor = ArithmeticSharedTensor.from_shares(
            lifted.reshape(batch, *plan.output_shape), precision=frac_bits
        )
        answer.ptype = x.ptype
        return answer


def _seed_from(generator: torch.Generator) -> bytes:
    words = rng.generate_random_ring_element((2,), generator=generator)
    return words.numpy().tobytes()


class _RankZeroDeals:
    """TFP: rank 0 deals to itself and knows rank 1's seed, but not the reverse."""

    def __init__(self, plan: Plan, rank: int) -> None:
        known_to_both = crypten.generators["global"][torch.device("cpu")]
        client_seed = _seed_from(known_to_both)
        self.seed = client_seed if rank == 1 else new_seed()
        self._dealers = _Dealers(plan, (self.seed, client_seed)) if rank == 0 else None

    def deal(self, index: int, batch: int) -> torch.Tensor | None:
        return None if self._dealers is None else self._dealers.deal(index, batch)


class _ProcessDeals:
    """TTP: rank 0 asks the dealer process, which shares a generator with each party."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._rank = rank
        self.seed = _seed_from(TTPClient.get().get_generator())
        if rank == 0:
            TTPClient.get().ttp_request("masked_plan", None, plan.to_json())

    def deal(self, index: int, batch: int) -> torch.Tensor | None:
        if self._rank == 1:
            return None
        return TTPClient.get().ttp_request("masked_deal", None, index, batch)


class _Dealers:
    """One dealer for each batch size, all with the parties' seeds."""

    def __init__(self, plan: Plan, seeds: tuple[bytes, bytes]) -> None:
        self._plan, self._seeds = plan, seeds
        self._by_batch: dict[int, Dealer] = {}

    def deal(self, index: int, batch: int) -> torch.Tensor:
        """What rank 0 gets for one inference, packed into ring elements."""
        if batch not in self._by_batch:
            self._by_batch[batch] = Dealer(self._plan, batch=batch, seeds=self._seeds)
        tape: Any = _Tape()
        self._by_batch[batch].send(tape, index)
        return tape.words()


class MaskedDealer(TupleDealer):
    """CrypTen's trusted third party, also for the masked engine."""

    _masked: _Dealers | None = None

    def masked_plan(self, text: str) -> torch.Tensor:
        """Note the parties' plan and draw their seeds; replies with one zero."""
        first, second = self._get_generators(device="cpu")
        seeds = _seed_from(first), _seed_from(second)
        self._masked = _Dealers(Plan.from_json(text), seeds)
        return torch.zeros(1, dtype=torch.long)

    def masked_deal(self, index: int, batch: int) -> torch.Tensor:
        """What rank 0 gets for one inference.

        Raises:
            MaterialError: no plan was given before.
        """
        if self._masked is None:
            raise MaterialError("the dealer was asked for material before a plan")
        return self._masked.deal(index, batch)


crypten_provider.TTPServer = MaskedDealer
