"""Masks from the keystream; tests/test_randomness.py carries out the attack."""

from __future__ import annotations

import crypten
import crypten.communicator as comm
import pytest
import torch
from crypten.common import rng

from crypten_espn.errors import RandomnessError
from crypten_espn.launch import run_parties

from .cases import without


def test_generator_reaches_every_module() -> None:
    from crypten.mpc.primitives import arithmetic, binary
    from crypten.mpc.provider import tfp_provider, ttp_provider

    ring = rng.generate_random_ring_element
    kbit = rng.generate_kbit_random_tensor
    for module in (arithmetic, tfp_provider, ttp_provider):
        assert module.generate_random_ring_element is ring
    for module in (binary, tfp_provider, ttp_provider):
        assert module.generate_kbit_random_tensor is kbit
    with without("generator"):
        for module in (arithmetic, tfp_provider, ttp_provider):
            stock = module.generate_random_ring_element
            assert stock is rng.generate_random_ring_element is not ring
            assert "randint" in stock.__code__.co_names
    assert rng.generate_random_ring_element is arithmetic.generate_random_ring_element


def test_plain_torch_generator_gives_what_it_gave() -> None:
    def draw() -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(5)
        return [
            rng.generate_random_ring_element((4,), generator=g),
            rng.generate_random_ring_element((4,), ring_size=1024, generator=g),
            rng.generate_kbit_random_tensor((4,), bitlength=3, generator=g),
        ]

    patched = draw()
    with without("generator"):
        stock = draw()
    assert all(torch.equal(a, b) for a, b in zip(patched, stock, strict=True))


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_generator_draws_from_a_keystream(provider: str, world_size: int) -> None:
    def run() -> list[object]:
        from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor
        from crypten.mpc.provider.ttp_provider import TTPClient

        found = [
            g for by_device in crypten.generators.values() for g in by_device.values()
        ]
        if crypten.mpc.ttp_required():
            found.append(TTPClient.get().generator)
        assert all(type(g).__name__ == "MaskGenerator" for g in found)
        zero = ArithmeticSharedTensor.PRZS((50,))
        even = BinarySharedTensor.PRZS((50,))
        own = rng.generate_random_ring_element((50,))
        shared = crypten.generators["global"][torch.device("cpu")].keystream.ring(3)
        x = crypten.cryptensor(torch.arange(4.0), src=0)
        y = crypten.cryptensor(torch.arange(4.0), src=world_size - 1)
        return [
            (zero.share, zero.reveal()),
            (even.share, even.reveal()),
            own,
            shared,
            ((x * y).get_plain_text(), (x > 1.5).get_plain_text()),
        ]

    with crypten.cfg.temp_override({"mpc.provider": provider}):
        views = run_parties(run, world_size=world_size)
    for zero, even, _, _, (product, greater) in views:
        assert zero[0].abs().min() > 0 and not zero[1].any()
        assert even[0].abs().min() > 0 and not even[1].any()
        assert (product - torch.tensor([0.0, 1, 4, 9])).abs().max() < 1e-3
        assert greater.tolist() == [0, 0, 1, 1]
    owns = torch.stack([view[2] for view in views])
    assert len(owns.unique()) == owns.numel()
    assert all(torch.equal(view[3], views[0][3]) for view in views)


def test_manual_seed_in_debug_mode_repeats_the_masks() -> None:
    def run() -> list[tuple[torch.Tensor, ...]]:
        rank = comm.get().get_rank()
        draws: list[tuple[torch.Tensor, ...]] = []
        for _ in range(2):
            crypten.manual_seed(2**62 + rank, -3 - rank, 7)
            own = crypten.generators["next"][torch.device("cpu")]
            assert own.initial_seed() == 2**62 + rank
            share = crypten.cryptensor(torch.zeros(4), src=0).share
            dropout = torch.rand(
                4, generator=crypten.generators["global"][torch.device("cpu")]
            )
            draws.append((share, rng.generate_random_ring_element((4,)), dropout))
        return draws

    with crypten.cfg.temp_override({"debug.debug_mode": True}):
        views = run_parties(run, world_size=2)
    for first, second in views:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(views[0][0][2], views[1][0][2])
    assert not torch.equal(views[0][0][1], views[1][0][1])


def test_seeds_ignore_torch_manual_seed() -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(0)
        crypten._setup_prng()
        return rng.generate_random_ring_element((4,))

    draws = [run_parties(run, world_size=1)[0] for _ in range(2)]
    assert not torch.equal(*draws)


def test_ring_sizes_of_mask_generators() -> None:
    def run() -> None:
        small = rng.generate_random_ring_element((1000,), ring_size=8)
        assert sorted(small.unique().tolist()) == list(range(-4, 4))
        bits = rng.generate_kbit_random_tensor((1000,), bitlength=1)
        assert sorted(bits.unique().tolist()) == [0, 1]
        assert rng.generate_kbit_random_tensor((9,)).abs().max() > 2**40
        with pytest.raises(RandomnessError, match="power of two"):
            rng.generate_random_ring_element((1,), ring_size=10)

    run_parties(run, world_size=1)
