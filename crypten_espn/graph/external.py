"""Weights that an ONNX file keeps in files beside it.

A file names these places itself, so it could name any place of the machine: only
regular files inside its own folder are read, links not followed, and no more bytes than
the tensor's shape asks for and the files hold.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from ..errors import ConversionError

# Bytes of one element, for types whose elements are not packed.
_BYTES = {
    TensorProto.BOOL: 1,
    TensorProto.INT8: 1,
    TensorProto.UINT8: 1,
    TensorProto.INT16: 2,
    TensorProto.UINT16: 2,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
    TensorProto.INT32: 4,
    TensorProto.UINT32: 4,
    TensorProto.FLOAT: 4,
    TensorProto.INT64: 8,
    TensorProto.UINT64: 8,
    TensorProto.DOUBLE: 8,
}


def load_external(model: ModelProto, folder: Path | None) -> None:
    """Read the tensors that lie in other files, in place.

    Args:
        model: read without them.
        folder: where the model's file lies; None for bytes, which have no folder.

    Raises:
        ConversionError: a tensor lies outside the folder, in no regular file, or in
            fewer bytes than its shape takes; before anything is read.
    """
    found = [tensor for tensor in _tensors(model) if _is_external(tensor)]
    if not found:
        return
    if folder is None:
        raise ConversionError(
            f"the bytes keep {len(found)} weights in other files; give the path of the "
            "file, or save it with its weights inside"
        )
    root = folder.resolve()
    pieces = [_Piece(tensor, root) for tensor in found]
    held = {piece.path: piece.held for piece in pieces}
    if sum(piece.length for piece in pieces) > sum(held.values()):
        raise ConversionError(
            "the weights in other files overlap: together they are larger than these "
            "files; save the network again"
        )
    for piece in pieces:
        piece.read()


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL or tensor.external_data)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from _of_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _of_node(node)


def _of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        sparse = (attribute.sparse_tensor, *attribute.sparse_tensors)
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _of_graph(graph)


class _Piece:
    """Where one tensor lies: a part of a file, checked."""

    def __init__(self, tensor: TensorProto, root: Path) -> None:
        self.tensor = tensor
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        place = PurePosixPath(location)
        self.path = root / place
        try:
            inside = (
                bool(location)
                and not place.is_absolute()
                and ".." not in place.parts
                and self.path.resolve() == self.path
            )
            status = os.lstat(self.path) if inside else None
        except (OSError, ValueError, RuntimeError):
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise self._refused(
                f"lies in {location[:80]!r}; only files inside the network's own "
                "folder are read, no links"
            )
        self.held = status.st_size
        size = _BYTES.get(tensor.data_type)
        if size is None or any(d < 0 for d in tensor.dims):
            raise self._refused("has a type or a shape that is not read from files")
        self.length = size * math.prod(tensor.dims)
        self.offset = self._number(entries.get("offset", "0"))
        stated = self._number(entries.get("length", str(self.length)))
        if stated != self.length or self.offset + self.length > self.held:
            raise self._refused(
                f"takes {self.length} bytes by its shape, of {self.held} in "
                f"{location[:80]!r}, from {self.offset}"
            )

    def read(self) -> None:
        """Put the bytes into the tensor."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) != self.length:
            raise self._refused("was cut while it was read")
        self.tensor.ClearField("external_data")
        self.tensor.data_location = onnx.TensorProto.DEFAULT
        self.tensor.raw_data = data

    def _number(self, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise self._refused(f"has the offset or length {text[:40]!r}")
        return int(text)

    def _refused(self, what: str) -> ConversionError:
        return ConversionError(
            f"the weight {self.tensor.name[:80]!r} {what}. Save the network again, "
            "with onnx.save"
        )
