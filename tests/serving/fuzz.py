"""Messages that nearly are some, from a seed; the benchmarks use them too."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from crypten_espn.serving import messages
from crypten_espn.serving.messages import Message, encode

NAME, DIGEST = "0123456789abcdef" * 2, "0123456789abcdef" * 4
EXAMPLES: tuple[Message, ...] = (
    messages.Hello(session=None, next_index=0),
    messages.Hello(session=NAME, next_index=7, corrections="client"),
    messages.Welcome(next_index=3, description=DIGEST, keeps=True),
    messages.Prepare(session=NAME, start=0, count=4, batch=2),
    messages.Accepted(),
    messages.Prepared(),
    messages.Goodbye(),
    messages.Join(session=NAME, digest=DIGEST, corrections="client"),
    messages.Joined(),
    messages.Paired(),
    messages.Seed(seed=NAME, partner=""),
    messages.Seed(seed=NAME, partner=DIGEST),
    messages.Order(start=5, count=1, batch=1),
)
_VALUES: tuple[object, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 10**30, -(10**30)),
    *(0.5, 5.0, 1e300, "", "5", "a" * 32, "A" * 32, NAME + "\n", "../" * 11, "\x1b[2J"),
    *([], [1], {}, {"message": "order"}, "é" * 16),
)


def mutated(count: int, *, seed: int) -> Iterator[bytes]:
    """`count` byte strings, each made from a message by one to three changes."""
    draws = random.Random(seed)
    texts = [encode(message) for message in EXAMPLES]
    for _ in range(count):
        data = draws.choice(texts)
        for _ in range(draws.randint(1, 3)):
            data = draws.choice((_flipped, _cut, _repeated, _changed, _deep))(
                data, draws
            )
        yield data


def _flipped(data: bytes, draws: random.Random) -> bytes:
    if not data:
        return data
    place = draws.randrange(len(data))
    return data[:place] + bytes([draws.randrange(256)]) + data[place + 1 :]


def _cut(data: bytes, draws: random.Random) -> bytes:
    return data[: draws.randint(0, len(data))]


def _repeated(data: bytes, draws: random.Random) -> bytes:
    start = draws.randint(0, len(data))
    end = draws.randint(start, min(len(data), start + 40))
    return data[:end] + data[start:end] * draws.randint(1, 20) + data[end:]


def _changed(data: bytes, draws: random.Random) -> bytes:
    """Another value of a field, a field less, or a field more."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(fields, dict):
        return json.dumps([fields]).encode()
    names = [*fields, "more"]
    name = draws.choice(names)
    if draws.random() < 0.2:
        fields.pop(name, None)
    else:
        fields[name] = draws.choice(_VALUES)
    return json.dumps(fields).encode()


def _deep(data: bytes, draws: random.Random) -> bytes:
    depth = draws.choice((1, 50, 2000))
    opening, closing = draws.choice(((b"[", b"]"), (b'{"message":', b"}")))
    return opening * depth + data + closing * draws.randint(0, depth)
