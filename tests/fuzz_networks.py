"""Mutated network files: each is refused by name, or holds a network that computes.

python -m tests.fuzz_networks SEED FIRST COUNT < files.json
"""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from . import fuzzing
from .fuzzing import EDGES, Outcome, damaged, mutate

MEMORY = 1 << 30  # of a child's address space, beyond what importing takes
MAX_INPUT = 1 << 16  # elements; networks of larger inputs are loaded, not run
LOADED, LARGE, REFUSED = "loaded", "too large to run", "refused"

_FIELDS = ("architecture", "polynomials", "normalization", "notes")
_TYPES = (
    torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
_NUMBERS = (float("nan"), float("inf"), -float("inf"), 3e38, -1.0, -1e-30, 0.0)
_DEEP = 100_000


def files() -> list[bytes]:
    """Small files of both forms of network, with and without what is optional."""
    import crypten_espn as espn
    from crypten_espn.pillar.data import Normalization
    from crypten_espn.pillar.networks import convnet, fashion_resnet
    from crypten_espn.pillar.storage import save_network
    from crypten_espn.pillar.surgery import replace_activations

    torch.manual_seed(1)
    quartic = espn.Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))
    square = espn.Polynomial((0, 0, 1), 0, (-2.0, 2.0))
    residual = fashion_resnet(classes=3, in_channels=2, size=9)
    replace_activations(residual, {"relu": square, torch.nn.ReLU: quartic})
    made = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        save_network(
            residual,
            path,
            normalization=Normalization((0.1, 0.2), (0.3, 0.4)),
            notes={"seed": 3, "recipe": {"epochs": [1, 2]}, "accuracy": 0.5},
        )
        made.append(path.read_bytes())
        save_network(convnet(classes=2, in_channels=1, size=4), path)
        made.append(path.read_bytes())
    return made


# ---------------------------------------------------------------- mutations


def mutant(given: Sequence[bytes], seed: int, number: int) -> bytes:
    """The file of mutant `number`, the same for the same seed."""
    toss = random.Random(f"{seed} {number}")
    data = toss.choice(given)
    kind = toss.choice(
        ("bytes", "header", "words", "words", "words", "tensors", "tensors", "both")
    )
    if kind == "bytes":
        return damaged(data, toss, within=8 + _header_length(data))
    if kind == "header":
        return _header_changed(data, toss)
    metadata = _header(data)["__metadata__"]
    tensors = load(data)
    if kind in ("words", "both"):
        for _ in range(toss.choice((1, 1, 2, 3))):
            _words(metadata, toss)
    if kind in ("tensors", "both"):
        for _ in range(toss.choice((1, 1, 2, 3))):
            _tensors(tensors, toss)
    return save(tensors, {str(k): str(v) for k, v in metadata.items()})


def _header_length(data: bytes) -> int:
    return int(struct.unpack_from("<Q", data)[0])


def _header(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + _header_length(data)])
    return header


def _header_changed(data: bytes, toss: random.Random) -> bytes:
    """Another header before the same tensors: shapes, types, offsets, its length."""
    header, rest = _header(data), data[8 + _header_length(data) :]
    if toss.random() < 0.1:
        return struct.pack("<Q", toss.choice(EDGES) % (1 << 64)) + data[8:]
    for _ in range(toss.choice((1, 1, 2, 3))):
        mutate(header, toss)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _words(metadata: dict[str, str], toss: random.Random) -> None:
    """What one text of the metadata says."""
    name = toss.choice((*_FIELDS, *_FIELDS, "format"))
    kind = toss.choice(("value", "value", "value", "value", "text", "deep", "field"))
    text = metadata.get(name, "null")
    if kind == "field":
        mutate(metadata, toss)
        for key, value in metadata.items():
            metadata[key] = str(value)
    elif kind == "deep":
        opening, closing = toss.choice((("[", "]"), ('{"a":', "}")))
        depth = toss.choice((50, 2000, _DEEP))
        metadata[name] = opening * depth + "1" + closing * depth
    elif kind == "text":
        found = damaged(text.encode(), toss)
        metadata[name] = found.decode(errors="replace")
    else:
        try:
            holder = [json.loads(text)]
        except (ValueError, RecursionError):
            return
        mutate(holder, toss, {"number": _odd_number, "key": _odd_key})
        if holder:
            metadata[name] = json.dumps(holder[0])


def _odd_number(value: Any, toss: random.Random) -> None:
    numbers = [(c, k) for c, k in fuzzing.places(value) if type(c[k]) in (int, float)]
    if numbers:
        container, key = toss.choice(numbers)
        container[key] = toss.choice((*_NUMBERS, 10**400, -(10**400), 7.5, "7"))


def _odd_key(value: Any, toss: random.Random) -> None:
    objects = [c for c, _ in fuzzing.places(value) if isinstance(c, dict)]
    if objects:
        chosen = toss.choice(objects)
        key = toss.choice(("more", "*", "relu*", "[a-", "", "conv1", "fc", "a" * 5000))
        chosen[key] = toss.choice([*chosen.values(), 1])


def _tensors(tensors: dict[str, torch.Tensor], toss: random.Random) -> None:
    """One tensor's values, type, shape or name."""
    if not tensors:
        return
    name = toss.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = toss.choice(("value", "value", "type", "shape", "name", "delete", "more"))
    if kind == "value" and tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[toss.randrange(tensor.numel())] = toss.choice(_NUMBERS)
        tensors[name] = tensor
    elif kind == "type":
        tensors[name] = tensor.to(toss.choice(_TYPES))
    elif kind == "shape":
        shapes = ((-1,), (1, *tensor.shape), (*tensor.shape, 1), (0, 7))
        shape = toss.choice(shapes)
        tensors[name] = torch.zeros(0, 7) if 0 in shape else tensor.reshape(shape)
    elif kind == "name":
        tensors[toss.choice((name + "x", "fc", "", "é" * 99))] = tensors.pop(name)
    elif kind == "delete":
        del tensors[name]
    elif kind == "more":
        tensors[f"more {toss.randrange(9)}"] = torch.ones(toss.choice((0, 1, 5000)))


# ---------------------------------------------------------------- trying one


def attempt(data: bytes, path: Path) -> str:
    """Read a file as a network, and compute with it where it is accepted."""
    from crypten_espn.errors import CheckpointError, EspnError
    from crypten_espn.pillar.networks import convnet
    from crypten_espn.pillar.storage import (
        describes_itself,
        load_network,
        load_weights,
    )

    path.write_bytes(data)
    describes_itself(path)
    other = convnet(classes=2, in_channels=1, size=4)
    try:
        load_weights(other, path)
    except CheckpointError as error:
        no_memory(error)
    else:
        assert all(bool(torch.isfinite(t).all()) for t in other.state_dict().values())
    try:
        network = load_network(path)
    except EspnError as error:
        no_memory(error)
        return REFUSED
    channels, height, width = network.input_shape
    assert all(bool(torch.isfinite(t).all()) for t in network.state_dict().values())
    assert network.notes is not None
    if channels * height * width > MAX_INPUT:
        return LARGE
    x = torch.zeros(1, channels, height, width)
    if network.normalization is not None:
        x = network.normalization(x.to(torch.uint8))
        assert bool(torch.isfinite(x).all())
    with torch.no_grad():
        logits = network(x)
    assert logits.shape == (1, network.architecture.classes)
    return LOADED


def no_memory(error: BaseException) -> None:
    """Raise what an error comes from, if that is a lack of memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate" in str(cause):
            raise AssertionError("memory was asked for before a check") from error
        cause = cause.__cause__ or cause.__context__


def run(given: Sequence[bytes], *, seed: int, count: int) -> Outcome:
    """Try `count` mutants in child processes, one after the other."""
    return fuzzing.run(__name__, given, seed=seed, count=count)


def main() -> None:
    """Try a range of mutants of the files on standard input."""
    given, seed = fuzzing.taken()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"

        def tried(number: int) -> str:
            return attempt(mutant(given, seed, number), path)

        fuzzing.serve(tried, memory=MEMORY)


if __name__ == "__main__":
    main()
