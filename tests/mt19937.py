"""The attack on masks that are raw Mersenne Twister output.

Torch makes a 64-bit ring element of two 32-bit words. A word is one of the generator's
624 state words after an invertible tempering, so 312 consecutive elements are the whole
state, and every later element follows from them.

Source: Matsumoto and Nishimura, "Mersenne Twister", TOMACS 1998.
"""

from __future__ import annotations

from collections.abc import Sequence

WORDS = 624
ELEMENTS = WORDS // 2
MASK = 2**32 - 1


class Clone:
    """Continues the stream of another generator from what it put out.

    Args:
        elements: consecutive outputs of torch.randint over the whole signed ring; the
            last 312 are used.
    """

    def __init__(self, elements: Sequence[int]) -> None:
        if len(elements) < ELEMENTS:
            raise ValueError(f"{len(elements)} elements; {ELEMENTS} are needed")
        self._state = [
            _untemper(word)
            for element in elements[-ELEMENTS:]
            for word in _words(element)
        ]
        self._used = WORDS

    def ring(self, count: int) -> list[int]:
        """The next ring elements, as signed 64-bit integers."""
        return [_element(self._word(), self._word()) for _ in range(count)]

    def _word(self) -> int:
        if self._used == WORDS:
            self._twist()
        word = self._state[self._used]
        self._used += 1
        return _temper(word)

    def _twist(self) -> None:
        state = self._state
        for i in range(WORDS):
            joined = (state[i] & 0x80000000) | (state[(i + 1) % WORDS] & 0x7FFFFFFF)
            odd = 0x9908B0DF if joined & 1 else 0
            state[i] = state[(i + 397) % WORDS] ^ (joined >> 1) ^ odd
        self._used = 0


def _words(element: int) -> tuple[int, int]:
    # randint takes the raw 64 bits modulo 2**64 - 1 and adds the lower end.
    raw = element + 2**63
    return raw >> 32, raw & MASK


def _element(high: int, low: int) -> int:
    return ((high << 32) | low) % (2**64 - 1) - 2**63


def _temper(word: int) -> int:
    word ^= word >> 11
    word ^= (word << 7) & 0x9D2C5680
    word ^= (word << 15) & 0xEFC60000
    return word ^ (word >> 18)


def _untemper(word: int) -> int:
    word ^= word >> 18
    word ^= (word << 15) & 0xEFC60000
    result = word
    for _ in range(5):  # seven more bits are right after each pass
        result = word ^ ((result << 7) & 0x9D2C5680)
    word = result & MASK
    result = word
    for _ in range(3):
        result = word ^ (result >> 11)
    return result
