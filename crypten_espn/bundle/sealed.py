"""A bundle as one file: safetensors, with the public texts in its metadata and a seal.

One file is replaced in one step and never half of two: a server that starts while a
bundle is exchanged reads the old or the new one, and no plan meets another's weights.
Only its owner may read it, for the weights are in it; the public part needs no file of
its own, since the server tells it to every client.

The seal is the SHA-256 of the whole file with 64 zeros in its place, so that no byte
can change alone. It is no signature: who can write the file can seal it anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as unpack
from safetensors.numpy import save as pack

from ..errors import CheckpointError
from ..masked.private_files import replace_file

FORMAT = "crypten-espn bundle"
VERSION = 1
# A plan's longest text thrice, for JSON within JSON; integers of the largest plan.
_HEADER_BYTES = 3 << 24
_FILE_BYTES = _HEADER_BYTES + (9 << 28)
_SEAL = "seal"
_ZEROS = "0" * 64


def is_bundle(path: Path) -> bool:
    """Whether a file says that it is a bundle, of whatever version."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = min(int.from_bytes(start, "little"), _HEADER_BYTES)
            return _metadata(_header(start + file.read(length))) is not None
    except (OSError, ValueError):
        return False


def write(
    path: Path, texts: Mapping[str, str], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a bundle, or replace one in one step; for its owner's eyes only.

    Args:
        path: the file.
        texts: its metadata.
        arrays: its tensors, int32 or int64.

    Raises:
        CheckpointError: the file cannot be written.
    """
    metadata = {"format": f"{FORMAT} {VERSION}", **texts, _SEAL: _ZEROS}
    data = pack(dict(arrays), metadata=metadata)
    head = 8 + len(_header(data))
    seal = _entry(_digest(data, _ZEROS))
    sealed = data[:head].replace(_entry(_ZEROS), seal, 1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (sealed, memoryview(data)[head:]))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder of "
            "yours"
        ) from None


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The texts and arrays of a bundle whose seal holds.

    Raises:
        CheckpointError: no such file, no bundle, one of a later version, or changed.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _FILE_BYTES:
                raise CheckpointError(
                    f"{path} has {size:,} bytes; no bundle has more than "
                    f"{_FILE_BYTES:,}"
                )
            data = file.read(size)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); `crypten-espn bundle` or "
            "PrivateNetwork.save writes a bundle"
        ) from None
    try:
        texts = _metadata(_header(data))
    except ValueError:
        texts = None
    if texts is None:
        raise CheckpointError(
            f"{path} is no bundle; `crypten-espn bundle` or PrivateNetwork.save writes "
            "one"
        )
    _check_version(texts.pop("format"), path)
    seal = texts.pop(_SEAL, "")
    if _digest(data, seal) != seal:
        raise CheckpointError(
            f"{path} was changed or is damaged: its bytes are not those that it was "
            "sealed with; copy it again, or make it again"
        )
    try:
        return texts, unpack(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged ({str(error)[:200]}); make it again"
        ) from None


def _check_version(form: str, path: Path) -> None:
    """Refuse a bundle of another version than this one writes.

    Raises:
        CheckpointError: with what to do.
    """
    number = form.removeprefix(FORMAT).strip()
    if number == str(VERSION):
        return
    if number.isdecimal() and len(number) < 10 and int(number) > VERSION:
        raise CheckpointError(
            f"{path} is a bundle of version {int(number)}, and this crypten-espn reads "
            f"version {VERSION}; install a later crypten-espn, or make the bundle with "
            "this one"
        )
    raise CheckpointError(
        f"{path} is a bundle of version {number[:20]!r}, which is none; make it again"
    )


def _header(data: bytes) -> bytes:
    """The JSON text at a file's beginning.

    Raises:
        ValueError: there is none.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length or length > _HEADER_BYTES:
        raise ValueError("no header")
    return data[8 : 8 + length]


class _Header(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name="__metadata__")


def _metadata(header: bytes) -> dict[str, str] | None:
    """What a bundle's header says; None if it is not a bundle's."""
    try:
        texts = _DECODER.decode(header).metadata
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    return texts if texts.get("format", "").startswith(FORMAT) else None


def _entry(seal: str) -> bytes:
    """A seal as it stands in the header; inside a text its quotes would be escaped."""
    return f'"{_SEAL}":"{seal}"'.encode()


def _digest(data: bytes, seal: str) -> str:
    """SHA-256 of a file with zeros in the place of its seal, in hex."""
    head = 8 + len(_header(data))
    digest = hashlib.sha256(data[:head].replace(_entry(seal), _entry(_ZEROS), 1))
    digest.update(memoryview(data)[head:])
    return digest.hexdigest()


# Made here once: two threads that decode a type for the first time crash msgspec.
_DECODER = msgspec.json.Decoder(_Header)
