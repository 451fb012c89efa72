"""The generator behind every mask: an AES-128 keystream with seeds from the OS.

A process made by os.fork holds copies of its parent's streams. Were both to draw, two
masks would be equal; so whatever was made before the fork refuses to draw in the child.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import (
    Cipher,
    CipherContext,
    algorithms,
    modes,
)
from cryptography.hazmat.primitives.cmac import CMAC

from .errors import RandomnessError

SEED_BYTES = 16

#: Inferences a ratchet may pass over in one step, which takes a second at most.
MAX_SKIP = 1 << 16

# Encrypting zeros yields the keystream; a chunk this small stays in the cache.
_ZEROS = memoryview(bytes(1 << 18))

# Bytes up to which the cost of a call outweighs that of a copy.
_SMALL = 1 << 13

# Narrowest word for 1 to 8, 9 to 16, ... bits.
_WORDS = (torch.uint8, torch.int16, *2 * (torch.int32,), *4 * (torch.int64,))

# How many forks lie between the first process and this one.
_generation = 0


def _count_fork() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_count_fork)


def new_seed() -> bytes:
    """A fresh 128-bit seed from the operating system.

    Returns:
        16 bytes.
    """
    return os.urandom(SEED_BYTES)


class Keystream:
    """A stream of pseudo-random bits that only the holders of its seed can predict.

    1. The seed keys AES-CMAC, a pseudo-random function, and nothing else.
    2. CMAC of the word "stream" keys AES-128 in counter mode; its output is the stream.
    3. CMAC of the word "fork" and a label is the seed of an independent stream.
    4. Lane n > 0 is the part of the counter's range that begins at block n * 2**64; the
       stream itself is lane 0. A lane costs a tenth of what a fork does.

    Two holders of one seed who make the same calls draw the same values. Every call
    moves on: no bit is given out twice, not even by the copy that os.fork leaves in a
    child, whose calls raise RandomnessError. Draws happen on the CPU; for another
    device copy the result, so that parties on different devices agree.

    Args:
        seed: 16 bytes; from the operating system if None.

    Raises:
        RandomnessError: the seed does not have 16 bytes.

    Source: NIST SP 800-38A (counter mode), SP 800-38B (CMAC), SP 800-108 (derivation).
    """

    def __init__(self, seed: bytes | None = None) -> None:
        seed = new_seed() if seed is None else seed
        self._seed = _checked(seed)
        self._generation = _generation
        self._key = algorithms.AES(_derive(self._seed, b"stream"))
        self._stream = self._counter()
        self._one_lane = threading.Lock()

    def __repr__(self) -> str:
        return "Keystream(seed=<hidden>)"

    def ring(self, size: int | Sequence[int], *, bits: int = 64) -> torch.Tensor:
        """Uniform ring elements.

        Args:
            size: shape of the result.
            bits: 64 for all of int64, less for values in [0, 2**bits).

        Returns:
            int64 tensor of shape size, on the CPU.

        Raises:
            RandomnessError: bits is not in 1..64.
        """
        if not 1 <= bits <= 64:
            raise RandomnessError(f"bits={bits} was given; allowed are 1 to 64")
        shape = (size,) if isinstance(size, int) else tuple(size)
        # The narrowest word that holds the bits: a byte an element for single bits.
        words = self._words(shape, _WORDS[(bits - 1) // 8])
        if bits == 64:
            return words
        return words.to(torch.int64).bitwise_and_((1 << bits) - 1)

    def _counter(self) -> CipherContext:
        return Cipher(self._key, modes.CTR(bytes(SEED_BYTES))).encryptor()

    @cached_property
    def _lanes(self) -> CipherContext:
        """One context for all: a new one takes as long as 30 kB of a stream."""
        return self._counter()

    def fill(self, out: np.ndarray, *, lane: int = 0) -> None:
        """Overwrite an array with uniform words of its type.

        Args:
            out: contiguous array of integers, any shape.
            lane: below 2**64. Each call gives the next words of lane 0, and the first
                of any other: like a fork, it gives the same when it is asked again.

        Raises:
            RandomnessError: out has another type or layout, or there is no such lane.
        """
        if out.dtype.kind not in "iu" or not out.flags.c_contiguous:
            raise RandomnessError(
                f"an array of {out.dtype} with strides {out.strides} was given; "
                "fill needs contiguous integers"
            )
        if not 0 <= lane < 1 << 64:
            raise RandomnessError(f"lane {lane} was given; allowed are 0 to 2**64 - 1")
        _refuse_after_fork("keystream", self._generation)
        # One word order for all machines would cost a pass; those that torch runs on
        # are little-endian.
        target = out.reshape(-1).view(np.uint8).data
        if not lane:
            _encrypt_zeros(self._stream, target)
        elif len(target):
            place = lane.to_bytes(SEED_BYTES // 2, "big") + bytes(SEED_BYTES // 2)
            with self._one_lane:
                self._lanes.reset_nonce(place)
                _encrypt_zeros(self._lanes, target)

    def fork(self, label: bytes | int) -> Keystream:
        """An independent stream, the same for every holder of this seed.

        It depends on the seed and the label only, not on what was drawn before.

        Args:
            label: names the stream; an int and bytes never name the same one.

        Raises:
            RandomnessError: the label is a negative int.
        """
        _refuse_after_fork("keystream", self._generation)
        if isinstance(label, int):
            if label < 0:
                raise RandomnessError(
                    f"label {label} was given; it must not be negative"
                )
            length = (label.bit_length() + 7) // 8
            return Keystream(
                _derive(self._seed, b"fork int " + label.to_bytes(length, "little"))
            )
        return Keystream(_derive(self._seed, b"fork bytes " + label))

    def _words(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        _refuse_after_fork("keystream", self._generation)
        count = math.prod(shape) * dtype.itemsize
        if 0 < count <= _SMALL:
            data = bytearray(self._stream.update(_ZEROS[:count]))
            return torch.frombuffer(data, dtype=dtype).view(shape)
        out = torch.empty(shape, dtype=dtype)
        self.fill(out.numpy())
        return out

    def bytes(self, count: int) -> bytes:
        """The next bytes of the stream.

        Args:
            count: how many, zero or more.
        """
        _refuse_after_fork("keystream", self._generation)
        return self._stream.update(bytes(count))


def _encrypt_zeros(stream: CipherContext, target: memoryview) -> None:
    for start in range(0, len(target), len(_ZEROS)):
        part = target[start : start + len(_ZEROS)]
        stream.update_into(_ZEROS[: len(part)], part)


class Ratchet:
    """One seed an inference, each derived from the last and then forgotten.

    1. State 0 is the seed. CMAC of the word "use" under state i is inference i's seed.
    2. CMAC of the word "next" under state i is state i + 1; it overwrites state i.

    Whoever reads this process's memory later derives the seeds of inferences to come,
    none of those given out: forward secrecy, as far as Python allows. The state lies in
    one buffer and is overwritten there; copies that the cipher makes are freed, not
    erased.

    Args:
        seed: 16 bytes; both holders of one seed get the same seed for an inference.

    Raises:
        RandomnessError: the seed does not have 16 bytes.

    Source: Bellare, Yee, "Forward-Security in Private-Key Cryptography", CT-RSA 2003;
        NIST SP 800-38B (CMAC).
    """

    def __init__(self, seed: bytes) -> None:
        self._state = bytearray(_checked(seed))
        self._next = 0
        self._generation = _generation
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Ratchet(state=<hidden>, next_index={self._next})"

    def __reduce__(self) -> NoReturn:
        raise RandomnessError(
            "a ratchet was to be copied; its copy would give the same seeds out again: "
            "pass the ratchet itself"
        )

    @property
    def next_index(self) -> int:
        """The lowest index that can still be taken."""
        return self._next

    def take(self, index: int) -> bytes:
        """The seed of an inference; neither it nor an earlier one comes again.

        Args:
            index: not below `next_index`; those between are passed over and lost.

        Returns:
            16 bytes.

        Cost: two CMACs for each index passed over.

        Raises:
            RandomnessError: index lies below next_index, or more than MAX_SKIP above
                it; nothing changes. Or the process is a fork of the ratchet's.
        """
        _refuse_after_fork("ratchet", self._generation)
        with self._lock:
            if index < self._next:
                raise RandomnessError(
                    f"the seed of inference {index} was asked for; those before "
                    f"{self._next} were given out or passed over, and cannot be "
                    f"derived again: use index {self._next} or a later one"
                )
            if index - self._next > MAX_SKIP:
                raise RandomnessError(
                    f"the seed of inference {index} was asked for; the next one is "
                    f"{self._next}, and at most {MAX_SKIP} may be passed over"
                )
            while self._next < index:
                self._advance()
            seed = _derive(self._state, b"use")
            self._advance()
        return seed

    def _advance(self) -> None:
        self._state[:] = _derive(self._state, b"next")
        self._next += 1


def _checked(seed: bytes) -> bytes:
    if len(seed) != SEED_BYTES:
        raise RandomnessError(
            f"a seed of {len(seed)} bytes was given; it must have {SEED_BYTES}: "
            "use new_seed()"
        )
    return bytes(seed)


def _refuse_after_fork(what: str, generation: int) -> None:
    if generation != _generation:
        raise RandomnessError(
            f"this {what} was made before os.fork and is used in the child, where it "
            "would repeat what its parent draws: make a new one after the fork, or "
            "start processes with multiprocessing's forkserver or spawn"
        )


def _derive(seed: bytes | bytearray, label: bytes) -> bytes:
    mac = CMAC(algorithms.AES(seed))
    mac.update(label)
    return mac.finalize()
