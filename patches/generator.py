"""CrypTen's masks are raw Mersenne Twister words: 312 known ones give all others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from crypten_espn.errors import RandomnessError
from crypten_espn.randomness import SEED_BYTES, Keystream, new_seed

from .patch import Patch, replace, together

RING_SIZE = 2**64


class MaskGenerator(torch.Generator):
    """A torch generator that carries the keystream masks are drawn from.

    Args:
        keystream: shared by the generators of one role on all devices, so that no
            device repeats another's masks and parties on different devices agree.
        device: where the masks are wanted.
    """

    keystream: Keystream

    def __new__(cls, keystream: Keystream, device: torch.device) -> MaskGenerator:
        result = super().__new__(cls, device=device)  # type: ignore[call-arg]
        result.keystream = keystream
        # For what is no mask: dropout passes CrypTen's generators to torch.rand.
        word = keystream.fork(b"torch").bytes(8)
        torch.Generator.manual_seed(result, int.from_bytes(word, "little"))
        return result

    def __init__(self, keystream: Keystream, device: torch.device) -> None:
        pass

    def manual_seed(self, seed: int) -> MaskGenerator:
        """Start over from a seed that an int can hold: for reproducible tests only."""
        self.keystream = Keystream(_widened(seed))
        super().manual_seed(seed)
        return self


def _widened(seed: bytes | int | torch.Tensor) -> bytes:
    """A 128-bit seed as it is; CrypTen's 64-bit ones, for tests, sign-extended."""
    if isinstance(seed, bytes):
        return seed
    return int(seed).to_bytes(SEED_BYTES, "little", signed=True)


def _to_words(seed: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(seed), dtype=torch.int64)


def _from_words(words: torch.Tensor) -> bytes:
    return words.numpy().tobytes()


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device("cpu" if device is None else device)


def _devices() -> list[torch.device]:
    names = ["cpu"]
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [torch.device(name) for name in names]


def _draw(
    keystream: Keystream, size: Sequence[int], bits: int, device: torch.device
) -> Any:
    from crypten.cuda import CUDALongTensor

    result = keystream.ring(size, bits=bits)
    return result if device.type == "cpu" else CUDALongTensor(result.to(device))


def _generator(generator: torch.Generator | None, device: torch.device) -> Any:
    import crypten

    return crypten.generators["local"][device] if generator is None else generator


def _setup_prng() -> None:
    """Agree on fresh 128-bit seeds: with each neighbour, with all, and one alone."""
    _exchange(new_seed(), new_seed(), new_seed())


def _sync_seeds(next_seed: Any, local_seed: Any, global_seed: Any) -> None:
    """The same from given seeds; crypten.manual_seed comes here in debug mode."""
    import crypten

    seeds = _exchange(_widened(next_seed), _widened(local_seed), _widened(global_seed))
    for role, seed in seeds.items():
        for generator in crypten.generators[role].values():
            # Only what generator.initial_seed() says and torch.rand draws from it.
            torch.Generator.manual_seed(
                generator, int.from_bytes(seed, "little", signed=True)
            )


def _exchange(
    next_seed: bytes, local_seed: bytes, global_seed: bytes
) -> dict[str, bytes]:
    import crypten
    import crypten.communicator as comm

    party = comm.get()
    world_size, rank = party.get_world_size(), party.get_rank()
    prev_seed = next_seed
    if world_size > 1:
        words = torch.zeros(SEED_BYTES // 8, dtype=torch.int64)
        sent = party.isend(_to_words(next_seed), (rank + 1) % world_size)
        party.irecv(words, src=(rank - 1) % world_size).wait()
        sent.wait()
        prev_seed = _from_words(words)
    global_seed = _from_words(party.broadcast(_to_words(global_seed), 0))
    seeds = {
        "prev": prev_seed,
        "next": next_seed,
        "local": local_seed,
        "global": global_seed,
    }
    for role, seed in seeds.items():
        keystream = Keystream(seed)
        for device in _devices():
            crypten.generators[role][device] = MaskGenerator(keystream, device)
    return seeds


def _setup_client(self: Any) -> None:
    """Receive the seed this party shares with the dealer."""
    import crypten.communicator as comm
    import torch.distributed as dist

    words = torch.zeros(SEED_BYTES // 8, dtype=torch.int64)
    dist.recv(words, src=comm.get().get_ttp_rank(), group=self.ttp_group)
    dist.barrier(group=self.ttp_group)
    keystream = Keystream(_from_words(words))
    self.generator = MaskGenerator(keystream, torch.device("cpu"))
    self.generator_cuda = None
    if torch.cuda.is_available():
        self.generator_cuda = MaskGenerator(keystream, torch.device("cuda"))


def _setup_server(self: Any) -> None:
    """Send each party a fresh 128-bit seed, as the dealer."""
    import crypten.communicator as comm
    import torch.distributed as dist

    seeds = [new_seed() for _ in range(comm.get().get_world_size())]
    for rank, seed in enumerate(seeds):
        dist.send(_to_words(seed), dst=rank, group=self.ttp_group)
    dist.barrier(group=self.ttp_group)
    keystreams = [Keystream(seed) for seed in seeds]
    self.generators = [MaskGenerator(k, torch.device("cpu")) for k in keystreams]
    self.generators_cuda = [
        MaskGenerator(k, torch.device("cuda")) if torch.cuda.is_available() else None
        for k in keystreams
    ]


def _probe() -> bool:
    import crypten

    # Masks from another generator than torch's would need no MaskGenerator.
    names = crypten.common.rng.generate_random_ring_element.__code__.co_names
    return "randint" in names


def _install() -> Callable[[], None]:
    import crypten
    from crypten.common import rng
    from crypten.mpc.provider import ttp_provider

    stock_ring = rng.generate_random_ring_element
    stock_kbit = rng.generate_kbit_random_tensor

    def generate_random_ring_element(
        size: Sequence[int],
        ring_size: int = RING_SIZE,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """Uniform elements of the signed ring of ring_size, a power of two.

        Args:
            size: shape of the result.
            ring_size: number of values, centred on zero.
            generator: one of CrypTen's; this party's own if None. A plain
                torch.Generator gives what CrypTen gave for it.
            device: where the result lives; it is drawn on the CPU.
        """
        where = _device(device)
        source = _generator(generator, where)
        if not isinstance(source, MaskGenerator):
            return stock_ring(size, ring_size, source, device=where)
        bits = ring_size.bit_length() - 1
        if ring_size != 1 << bits:
            raise RandomnessError(
                f"ring_size={ring_size} was given; use a power of two"
            )
        if bits == 64:
            return _draw(source.keystream, size, bits, where)
        return _draw(source.keystream, size, bits, where) - ring_size // 2

    def generate_kbit_random_tensor(
        size: Sequence[int],
        bitlength: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """Uniform values of bitlength bits: in [0, 2**bitlength), all of int64 for 64.

        Args:
            size: shape of the result.
            bitlength: 64 if None.
            generator, device: as for `generate_random_ring_element`.
        """
        where = _device(device)
        source = _generator(generator, where)
        bits = 64 if bitlength is None else bitlength
        if not isinstance(source, MaskGenerator):
            return stock_kbit(size, bits, source, device=where)
        return _draw(source.keystream, size, bits, where)

    undos = [
        replace(crypten, "_setup_prng", _setup_prng),
        replace(crypten, "_sync_seeds", _sync_seeds),
        replace(
            ttp_provider.TTPClient._TTPClient__TTPClient,
            "_setup_generators",
            _setup_client,
        ),
        replace(ttp_provider.TTPServer, "_setup_generators", _setup_server),
    ]
    # The functions were imported by name, into modules we may not know of.
    substitutes = {
        "generate_random_ring_element": (stock_ring, generate_random_ring_element),
        "generate_kbit_random_tensor": (stock_kbit, generate_kbit_random_tensor),
    }
    for module in list(sys.modules.values()):
        for name, (stock, substitute) in substitutes.items():
            if getattr(module, "__dict__", {}).get(name) is stock:
                undos.append(replace(module, name, substitute))
    return together(*undos)


PATCH = Patch(
    name="generator",
    broke="masks are Mersenne Twister output from 64-bit seeds of which torch uses 32 "
    "bits: a party recovers the other's secrets from its own view",
    seen_on="crypten 0.4.1, any torch",
    delete_when="CrypTen draws its masks from a cryptographic generator",
    probe=_probe,
    install=_install,
)
