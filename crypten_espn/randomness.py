"""The generator behind every mask: an AES-128 keystream with seeds from the OS."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.cmac import CMAC

from .errors import RandomnessError

SEED_BYTES = 16

# Encrypting zeros yields the keystream; a chunk this small stays in the cache.
_ZEROS = memoryview(bytes(1 << 18))

# Bytes up to which the cost of a call outweighs that of a copy.
_SMALL = 1 << 13

# Narrowest word for 1 to 8, 9 to 16, ... bits.
_WORDS = (torch.uint8, torch.int16, *2 * (torch.int32,), *4 * (torch.int64,))


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

    Two holders of one seed who make the same calls draw the same values. Every call
    moves on: no bit is given out twice. Draws happen on the CPU; for another device
    copy the result, so that parties on different devices agree.

    Args:
        seed: 16 bytes; from the operating system if None.

    Raises:
        RandomnessError: the seed does not have 16 bytes.

    Source: NIST SP 800-38A (counter mode), SP 800-38B (CMAC), SP 800-108 (derivation).
    """

    def __init__(self, seed: bytes | None = None) -> None:
        seed = new_seed() if seed is None else seed
        if len(seed) != SEED_BYTES:
            raise RandomnessError(
                f"a seed of {len(seed)} bytes was given; it must have {SEED_BYTES}: "
                "use new_seed()"
            )
        self._seed = bytes(seed)
        key = algorithms.AES(_derive(self._seed, b"stream"))
        self._stream = Cipher(key, modes.CTR(bytes(SEED_BYTES))).encryptor()

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

    def fill(self, out: torch.Tensor) -> None:
        """Overwrite a tensor with uniform 64-bit ring elements.

        Args:
            out: contiguous int64 tensor on the CPU, any shape.

        Raises:
            RandomnessError: out has another type, layout or device.
        """
        if (
            out.dtype != torch.int64
            or out.device.type != "cpu"
            or not out.is_contiguous()
        ):
            raise RandomnessError(
                f"a {out.dtype} tensor with strides {out.stride()} on {out.device} was "
                "given; fill needs a contiguous int64 tensor on the CPU"
            )
        self._fill(out)

    def fork(self, label: bytes | int) -> Keystream:
        """An independent stream, the same for every holder of this seed.

        It depends on the seed and the label only, not on what was drawn before.

        Args:
            label: names the stream; an int and bytes never name the same one.

        Raises:
            RandomnessError: the label is a negative int.
        """
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
        count = math.prod(shape) * dtype.itemsize
        if 0 < count <= _SMALL:
            data = bytearray(self._stream.update(_ZEROS[:count]))
            return torch.frombuffer(data, dtype=dtype).view(shape)
        out = torch.empty(shape, dtype=dtype)
        self._fill(out)
        return out

    def _fill(self, out: torch.Tensor) -> None:
        if out.numel() == 0:
            return
        # One word order for all machines would cost a pass; all of torch's are
        # little-endian.
        target = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(target), len(_ZEROS)):
            part = target[start : start + len(_ZEROS)]
            self._stream.update_into(_ZEROS[: len(part)], part)

    def bytes(self, count: int) -> bytes:
        """The next bytes of the stream.

        Args:
            count: how many, zero or more.
        """
        return self._stream.update(bytes(count))


def _derive(seed: bytes, label: bytes) -> bytes:
    mac = CMAC(algorithms.AES(seed))
    mac.update(label)
    return mac.finalize()
