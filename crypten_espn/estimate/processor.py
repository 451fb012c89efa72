"""What one core of this machine does in a second, for projections.

Each rate is measured on the package's own kernels, or on the torch operation that
CrypTen spends its time in, at the sizes of a residual network.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch

from ..errors import EspnError
from ..masked import kernels
from ..randomness import Keystream
from ..wire.channel import Channel
from ..wire.connect import Listener, connect_channel


@dataclass(frozen=True)
class Processor:
    """What one core does in a second.

    Args:
        macs32: multiply-accumulates of the masked engine's convolution.
        macs64: of CrypTen's, 64-bit integers in torch.
        values: dealer words combined in the masked engine's polynomials.
        dealt: 8-byte words of correlated randomness drawn and completed.
        words: 8-byte words masked, opened and combined by CrypTen.
        stream: bytes through a local socket.
        messages: messages between waiting threads.
        calls: torch operations on a few elements, from Python.
    """

    macs32: float
    macs64: float
    values: float
    dealt: float
    words: float
    stream: float
    messages: float
    calls: float

    def scaled(self, macs32: float) -> Processor:
        """A processor of the same proportions with this many `macs32`.

        Raises:
            EspnError: not a positive number.
        """
        if not 0 < macs32 < math.inf:
            raise EspnError(
                f"{macs32:g} multiply-accumulates a second: give a positive number, "
                "about 4e10 for a core with 512-bit vectors, or let it be measured"
            )
        factor = macs32 / self.macs32
        rates = {f.name: factor * getattr(self, f.name) for f in fields(self)}
        return Processor(**rates)


# Rounded from `calibrate` on one core of an AMD EPYC of the Zen 4 generation; `values`
# and `dealt` when an activation of degree 4 took 12 words, of which half were read.
REFERENCE = Processor(
    macs32=40e9,
    macs64=7.6e9,
    values=1.1e9,
    dealt=3.7e8,
    words=1e8,
    stream=4.5e9,
    messages=5e4,
    calls=8.3e5,
)


def calibrate(*, seconds: float = 0.1) -> Processor:
    """Measure this processor on one thread: each rate in about `seconds`, best kept.

    Kernels by processor time, so that other work on the machine counts little;
    messages by the clock.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _connected() as (left, right):
            return Processor(
                macs32=_fastest(_convolutions(torch.int32), seconds),
                macs64=_fastest(_convolutions(torch.int64), seconds),
                values=_fastest(_polynomials(), seconds),
                dealt=_fastest(_deals(), seconds),
                words=_fastest(_openings(), seconds),
                stream=_fastest(_copies(left, right), seconds, time.perf_counter),
                messages=_fastest(_exchanges(left, right), seconds, time.perf_counter),
                calls=_fastest(_calls(), seconds),
            )
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _connected() -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a connection over loopback."""
    with (
        Listener("127.0.0.1:0", role="server") as listener,
        connect_channel(listener.address, role="client", peer_role="server") as right,
        listener.accept(timeout=30.0).open(peer_roles=("client",)) as left,
    ):
        yield left, right


# A task and how many units of work one call of it does.
_Task = tuple[Callable[[], object], int]


def _fastest(
    task: _Task, seconds: float, clock: Callable[[], float] = time.thread_time
) -> float:
    """Units a second of the fastest run, by this thread's processor time."""
    run, units = task
    run()
    best, start = math.inf, time.perf_counter()
    while True:
        before = clock()
        run()
        best = min(best, clock() - before)
        if time.perf_counter() - start > seconds:
            return units / best


def _convolutions(dtype: torch.dtype) -> _Task:
    """One 3x3 layer each of a residual network's first, second and last stage."""
    layers = []
    for side, channels in ((32, 64), (16, 128), (4, 512)):
        x = torch.ones(1, side, side, channels, dtype=dtype)
        weight = torch.ones(1, 3, 3, channels, channels, dtype=dtype)
        layers.append((x, weight))
    units = sum(x.numel() * 9 * x.shape[-1] for x, _ in layers)
    if dtype == torch.int64:
        images = [
            (x.permute(0, 3, 1, 2).contiguous(), w[0].permute(3, 2, 0, 1).contiguous())
            for x, w in layers
        ]
        return lambda: [torch.conv2d(x, w, padding=1) for x, w in images], units
    arrays = [
        (x.numpy(), kernels.Filters(w.numpy()), np.zeros_like(x.numpy()))
        for x, w in layers
    ]

    def run() -> None:
        for x, weight, out in arrays:
            kernels.convolve(
                x, weight, out, stride=(1, 1), dilation=(1, 1), pads=(1, 1, 1, 1)
            )

    return run, units


_ELEMENTS = 1 << 17
_MANY = 1 << 19  # the dealer's values then come from memory, as in an inference
# Degree 4 as the planner groups it: x at the server alone, x^2, and x^3 with x^4.
_SHIFTS, _DEGREES = np.array([7, 18]), np.array([2, 4])
_RING, _DROP, _STEP = 32, 32, 16
_WORDS = kernels.words_of(_DEGREES)


def _polynomial() -> kernels.Polynomial:
    coeffs = np.ones((2, 5, 1), dtype=np.int64)
    return kernels.Polynomial(
        bits=_RING, shifts=_SHIFTS, degrees=_DEGREES, coeffs=coeffs,
        linear=coeffs[0, 1], linear_shift=0, zeros=np.zeros(_WORDS, dtype=np.int64),
    )  # fmt: skip


def _polynomials() -> _Task:
    """The server's share of one activation layer, and the next opening."""
    c = np.arange(_MANY, dtype=np.int32)
    deltas = np.ones((1, _MANY), dtype=np.int32)
    openings = np.empty((2, _MANY), dtype=np.int32)
    words = np.ones((_WORDS, _MANY), dtype=np.int64)
    polynomial = _polynomial()
    out = np.empty(_MANY, dtype=np.int64)
    following = np.empty(_MANY, dtype=np.int32)

    def run() -> None:
        kernels.shifted_openings(c, deltas, bits=_RING, shifts=_SHIFTS, out=openings)
        polynomial.share(openings, words, c=c, step=0, out=out)
        kernels.truncate(out, out, bits=64, drop=_DROP, step=_STEP, out=following)

    return run, _WORDS * _MANY


def _deals() -> _Task:
    """What the dealer does for one activation layer."""
    stream = Keystream()
    masks = np.ones((2, _ELEMENTS), dtype=np.int32)
    rounding = np.ones(_ELEMENTS, dtype=np.int64)
    polynomial = _polynomial()

    def run() -> None:
        taken = np.empty((_WORDS, _ELEMENTS), dtype=np.int64)
        stream.fill(taken)
        polynomial.deal(masks, rounding, taken, out=np.empty_like(taken))

    return run, _WORDS * _ELEMENTS


def _openings() -> _Task:
    """A level of CrypTen's 64-bit adder without the messages: four words an element."""
    pairs, a, b, c = (torch.ones(2, _MANY, dtype=torch.int64) for _ in range(4))

    def run() -> torch.Tensor:
        first = (pairs[1] & 3).expand(2, -1)
        second = (pairs & 5) * 6
        sent = torch.stack([first ^ a, second ^ b])
        epsilon, delta = sent ^ sent.clone()
        update: torch.Tensor = (b & epsilon) ^ (a & delta) ^ (epsilon & delta) ^ c
        return pairs ^ update

    return run, 4 * _MANY


def _copies(left: Channel, right: Channel) -> _Task:
    """Four megabytes from one thread to another."""
    values = np.ones(1 << 19, dtype=np.int64)

    def send() -> None:
        left.send(values, bits=64)

    def run() -> None:
        sender = threading.Thread(target=send)
        sender.start()
        right.receive(values.size, bits=64)
        sender.join()

    return run, values.nbytes


def _exchanges(left: Channel, right: Channel) -> _Task:
    """Small messages there and back between two threads."""
    one, count = np.ones(1, dtype=np.int64), 100

    def answer() -> None:
        for _ in range(count):
            right.send(right.receive(1, bits=64), bits=64)

    def run() -> None:
        thread = threading.Thread(target=answer)
        thread.start()
        for _ in range(count):
            left.send(one, bits=64)
            left.receive(1, bits=64)
        thread.join()

    return run, 2 * count


def _calls() -> _Task:
    """Additions of sixteen numbers."""
    x, y, count = torch.ones(16), torch.ones(16), 1000

    def run() -> None:
        for _ in range(count):
            torch.add(x, y)

    return run, count
