"""The keystream, and the attack that made it necessary."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import crypten
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.cmac import CMAC
from hypothesis import given, settings
from hypothesis import strategies as st

from crypten_espn import patches
from crypten_espn.errors import RandomnessError
from crypten_espn.randomness import MAX_SKIP, Keystream, Ratchet, new_seed

from .mt19937 import ELEMENTS, Clone

SEED = bytes(range(16))


# The keystream.


def counter_blocks(first: int, count: int = 5) -> bytes:
    """Blocks of SEED's stream: AES of a counter, under a derived key."""
    mac = CMAC(algorithms.AES(SEED))
    mac.update(b"stream")
    block = Cipher(algorithms.AES(mac.finalize()), modes.ECB()).encryptor()
    counters = (first + i for i in range(count))
    return b"".join(block.update(number.to_bytes(16, "big")) for number in counters)


def test_stream_is_aes_in_counter_mode_under_a_derived_key() -> None:
    expected = counter_blocks(0)
    assert Keystream(SEED).bytes(80) == expected
    words = Keystream(SEED).ring(10)
    assert words.numpy().tobytes() == expected


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.integers(1, 64)),
        max_size=5,
    )
)
@settings(deadline=None, max_examples=50)
def test_two_holders_draw_the_same(calls: list[tuple[list[int], int]]) -> None:
    one, two = Keystream(SEED), Keystream(SEED)
    for size, bits in calls:
        drawn = one.ring(size, bits=bits)
        assert torch.equal(drawn, two.ring(size, bits=bits))
        assert drawn.shape == torch.Size(size) and drawn.dtype == torch.int64
        if bits < 64 and drawn.numel():
            assert drawn.min().item() >= 0 and drawn.max().item() < 2**bits


def test_chunks_do_not_show() -> None:
    n = (1 << 16) + 17  # more than two chunks
    whole = Keystream(SEED).ring(n)
    parts = Keystream(SEED)
    pieces = [parts.ring(k) for k in (1, 1000, n - 1001)]
    assert torch.equal(whole, torch.cat(pieces))
    out = torch.empty((2, n // 2), dtype=torch.int64)
    Keystream(SEED).fill(out.numpy())
    assert torch.equal(out.flatten(), whole[: out.numel()])


@pytest.mark.parametrize("bits", [1, 5, 8, 9, 20, 40, 63, 64])
def test_every_bit_is_balanced(bits: int) -> None:
    n = 200_000
    values = Keystream(SEED).ring(n, bits=bits)
    for bit in range(bits):
        ones = ((values >> bit) & 1).sum().item()
        assert abs(ones - n / 2) < 6 * (n / 4) ** 0.5
    if bits == 64:
        assert len(values.unique()) == n


def test_fresh_seeds_and_forks_differ() -> None:
    base = Keystream(SEED)
    streams = [
        base,
        Keystream(),
        Keystream(new_seed()),
        base.fork(0),
        base.fork(1),
        base.fork(256),
        base.fork(b""),
        base.fork(b"\x01"),
        base.fork(1).fork(1),
        base.fork(b"stream"),
    ]
    assert len({stream.bytes(16) for stream in streams}) == len(streams)


def test_lanes_are_parts_of_one_counters_range() -> None:
    """Lane 0 moves on; lane n begins at block n * 2**64, at every call."""
    stream = Keystream(SEED)
    first, second = np.empty(5, dtype=np.int64), np.empty(5, dtype=np.int64)
    stream.fill(first)
    for lane in (1, 2, 1 << 40, (1 << 64) - 1):
        for _ in range(2):
            out = np.empty(10, dtype=np.int64)
            stream.fill(out, lane=lane)
            assert out.tobytes() == counter_blocks(lane << 64)
    stream.fill(second)
    assert first.tobytes() + second.tobytes() == counter_blocks(0)
    for lane in (-1, 1 << 64):
        with pytest.raises(RandomnessError, match="allowed are 0 to 2"):
            stream.fill(first, lane=lane)


def test_threads_that_fill_from_lanes_do_not_mix_them() -> None:
    """They share a cipher context."""
    stream, lanes = Keystream(SEED), range(1, 5)
    size = 1 << 20
    outs = {lane: np.empty(size, dtype=np.uint8) for lane in lanes}

    def fill(lane: int) -> None:
        for _ in range(8):
            outs[lane][:] = 0
            stream.fill(outs[lane], lane=lane)

    threads = [threading.Thread(target=fill, args=(lane,)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lane in lanes:
        assert outs[lane].tobytes() == counter_blocks(lane << 64, size // 16)


def test_fork_depends_on_seed_and_label_only() -> None:
    drawn = Keystream(SEED)
    drawn.ring(100)
    assert drawn.fork(7).bytes(32) == Keystream(SEED).fork(7).bytes(32)
    assert drawn.fork(7).bytes(32) != Keystream(new_seed()).fork(7).bytes(32)


def test_new_seed_comes_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def urandom(n: int) -> bytes:
        asked.append(n)
        return bytes(n)

    monkeypatch.setattr(os, "urandom", urandom)
    assert new_seed() == bytes(16)
    Keystream()
    assert asked == [16, 16]


def test_the_seed_stays_hidden() -> None:
    stream = Keystream(SEED)
    assert SEED.hex() not in repr(stream) and repr(SEED) not in repr(stream)
    with pytest.raises(TypeError):
        pickle.dumps(stream)


@pytest.mark.parametrize(
    "misuse, message",
    [
        (lambda: Keystream(b"short"), "5 bytes was given; it must have 16"),
        (lambda: Keystream(SEED).ring(3, bits=65), "bits=65"),
        (lambda: Keystream(SEED).ring(3, bits=0), "bits=0"),
        (lambda: Keystream(SEED).fork(-1), "-1"),
        (lambda: Keystream(SEED).fill(np.zeros(3, dtype=np.float32)), "float32"),
        (
            lambda: Keystream(SEED).fill(np.zeros((3, 4), dtype=np.int64).T),
            "contiguous",
        ),
    ],
)
def test_misuse_is_named(misuse: Any, message: str) -> None:
    with pytest.raises(RandomnessError, match=message):
        misuse()


# Copies that a fork leaves.


def outcome_in_a_fork(action: Callable[[], object]) -> str:
    """What a forked child says: the error's text, or that there was none."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            text = "no error"
        except RandomnessError as error:
            text = str(error)
        except BaseException as error:
            text = repr(error)
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "draw",
    [
        lambda stream: stream.bytes(16),
        lambda stream: stream.ring(3),
        lambda stream: stream.ring(1 << 14),
        lambda stream: stream.fill(np.empty(3, dtype=np.int64)),
        lambda stream: stream.fork(b"label"),
    ],
)
def test_a_forked_child_draws_nothing_from_its_parents_keystream(draw: Any) -> None:
    stream = Keystream(SEED)
    draw(stream)
    text = outcome_in_a_fork(lambda: draw(stream))
    assert "keystream was made before os.fork" in text
    assert outcome_in_a_fork(lambda: draw(Keystream(SEED))) == "no error"
    draw(stream)  # the parent's own goes on


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_takes_no_seed_from_its_parents_ratchet() -> None:
    ratchet = Ratchet(SEED)
    text = outcome_in_a_fork(lambda: ratchet.take(0))
    assert "ratchet was made before os.fork" in text
    ratchet.take(0)


# One seed an inference.


def test_a_ratchet_chains_cmacs_of_next_and_gives_cmacs_of_use() -> None:
    from cryptography.hazmat.primitives.ciphers import algorithms
    from cryptography.hazmat.primitives.cmac import CMAC

    def prf(key: bytes, word: bytes) -> bytes:
        mac = CMAC(algorithms.AES(key))
        mac.update(word)
        return mac.finalize()

    state, expected = SEED, []
    for _ in range(6):
        expected.append(prf(state, b"use"))
        state = prf(state, b"next")
    ratchet = Ratchet(SEED)
    assert [ratchet.take(index) for index in range(6)] == expected
    skipping = Ratchet(SEED)
    assert [skipping.take(index) for index in (1, 2, 5)] == [
        expected[index] for index in (1, 2, 5)
    ]


def test_a_seed_that_was_given_or_passed_over_never_comes_again() -> None:
    ratchet = Ratchet(SEED)
    ratchet.take(3)
    for index in (-1, 0, 2, 3):
        with pytest.raises(RandomnessError, match=f"inference {index} was asked for"):
            ratchet.take(index)
    assert ratchet.next_index == 4
    assert ratchet.take(4) != ratchet.take(5)


def test_a_spent_state_is_nowhere_in_the_ratchet() -> None:
    ratchet = Ratchet(SEED)
    ratchet.take(0)
    held = [bytes(v) for v in vars(ratchet).values() if isinstance(v, bytearray)]
    assert len(held) == 1 and held[0] != SEED


def test_an_index_far_ahead_is_refused_before_any_work() -> None:
    ratchet = Ratchet(SEED)
    for index in (MAX_SKIP + 1, 2**63, 10**30):
        with pytest.raises(RandomnessError, match=f"at most {MAX_SKIP} may be passed"):
            ratchet.take(index)
    assert ratchet.next_index == 0
    assert ratchet.take(0) == Ratchet(SEED).take(0)


def test_a_ratchet_is_neither_printed_nor_copied() -> None:
    ratchet = Ratchet(SEED)
    assert SEED.hex() not in repr(ratchet) and repr(SEED) not in repr(ratchet)
    for make in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(RandomnessError, match="same seeds out again"):
            make(ratchet)
    with pytest.raises(RandomnessError, match="5 bytes was given; it must have 16"):
        Ratchet(b"short")


# The attack. A party knows its own view: its data, its shares and what is opened to it.

INPUTS, OUTPUTS = 400, 10


def stock_elements(count: int, generator: torch.Generator) -> list[int]:
    low, high = -(2**63), (2**64 - 1) // 2
    return torch.randint(low, high, (count,), generator=generator).tolist()


@pytest.mark.parametrize("skipped", [0, 1, 311, 1000])
def test_312_elements_give_all_later_ones(skipped: int) -> None:
    generator = torch.Generator().manual_seed(2**40 + skipped)
    stock_elements(skipped, generator)
    clone = Clone(stock_elements(ELEMENTS, generator))
    assert clone.ring(2000) == stock_elements(2000, generator)


def test_312_elements_of_a_keystream_give_nothing() -> None:
    stream = Keystream()
    clone = Clone(stream.ring(ELEMENTS).tolist())
    assert not set(clone.ring(2000)) & set(stream.ring(2000).tolist())


@dataclass(frozen=True)
class View:
    """What the input's owner sees of one private x @ W."""

    x: torch.Tensor  # its own input, encoded
    shares: tuple[torch.Tensor, ...]  # its shares of the masks a and b
    opened: tuple[torch.Tensor, ...]  # x - a and W - b


def recovered_weights(view: View, *, provider: str) -> torch.Tensor:
    """The attack: what the input's owner believes the encoded weights to be.

    1. a = x - (x - a): every mask of its own input, INPUTS elements in a row.
    2. Under TFP they are party 0's raw output. Under TTP party 0's share of a is.
    3. Its generator's state follows, and with it what party 0 drew next: b.
    4. W = (W - b) + b.
    """
    opened_x, opened_weights = view.opened
    mine_a, mine_b = view.shares
    a = view.x - opened_x
    if provider == "TTP":
        a = a - mine_a
    clone = Clone(a.flatten().tolist())
    b = torch.tensor(clone.ring(INPUTS * OUTPUTS)).view(INPUTS, OUTPUTS)
    if provider == "TTP":
        b = b + mine_b
    return opened_weights + b


def _take_part(
    rank: int, folder: str, provider: str, patched: bool, reply: Connection
) -> None:
    """One party (0 owns W, 1 owns x) or, as rank 2, the dealer."""
    torch.set_num_threads(1)
    if not patched:
        patches.get("generator").revert()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        RENDEZVOUS=f"file://{folder}/rendezvous",
        DISTRIBUTED_BACKEND="gloo",
    )
    crypten.cfg.mpc.provider = provider
    if rank == 2:
        crypten.mpc.provider.TTPServer()
        crypten.uninit()
        return
    crypten.init()
    if rank == 0:
        torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
        secret = torch.randn(INPUTS, OUTPUTS)
        weights = crypten.cryptensor(secret, src=0)
        x = crypten.cryptensor(torch.zeros(1, INPUTS), src=1)
        x @ weights
        reply.send_bytes(pickle.dumps(weights.encoder.encode(secret).numpy()))
    else:
        from crypten.mpc.primitives import ArithmeticSharedTensor

        own = torch.randn(1, INPUTS)
        weights = crypten.cryptensor(torch.zeros(INPUTS, OUTPUTS), src=0)
        x = crypten.cryptensor(own, src=1)
        seen: dict[str, Any] = {}
        dealer = type(crypten.mpc.get_default_provider())
        generate = dealer.generate_additive_triple
        reveal = ArithmeticSharedTensor.reveal_batch

        def note_shares(*args: Any, **kwargs: Any) -> Any:
            a, b, c = generate(*args, **kwargs)
            seen["shares"] = (a.share.clone(), b.share.clone())
            return a, b, c

        def note_opened(*args: Any, **kwargs: Any) -> Any:
            seen["opened"] = reveal(*args, **kwargs)
            return seen["opened"]

        dealer.generate_additive_triple = note_shares
        ArithmeticSharedTensor.reveal_batch = staticmethod(note_opened)
        x @ weights
        view = (x.encoder.encode(own), *seen["shares"], *seen["opened"])
        reply.send_bytes(pickle.dumps([t.numpy() for t in view]))
    crypten.uninit()


def one_private_product(*, provider: str, patched: bool) -> tuple[View, torch.Tensor]:
    """Run x @ W between two parties: the input owner's view, and the truth."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crypten_espn"])
    replies, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(3 if provider == "TTP" else 2):
                near, far = context.Pipe(duplex=False)
                process = context.Process(
                    target=_take_part, args=(rank, folder, provider, patched, far)
                )
                process.start()
                far.close()
                replies.append(near)
                processes.append(process)
            secret, view = (pickle.loads(near.recv_bytes()) for near in replies[:2])
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()
                process.join()
    x, a, b, opened_x, opened_weights = map(torch.from_numpy, view)
    return View(x, (a, b), (opened_x, opened_weights)), torch.from_numpy(secret)


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
def test_stock_crypten_gives_the_whole_weight_matrix_away(provider: str) -> None:
    view, secret = one_private_product(provider=provider, patched=False)
    assert torch.equal(recovered_weights(view, provider=provider), secret)


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
def test_the_same_attack_recovers_nothing_once_patched(provider: str) -> None:
    view, secret = one_private_product(provider=provider, patched=True)
    guess = recovered_weights(view, provider=provider)
    assert not (guess == secret).any()
    # Not even roughly: the guesses fill the ring, where the weights are near zero.
    assert guess.abs().double().median() > 2**60 > 2**20 > secret.abs().max()
