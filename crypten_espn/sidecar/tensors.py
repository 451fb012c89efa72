"""Requests and answers of the Open Inference Protocol v2: bytes to tensors and back.

    {"inputs": [{"name": "input", "shape": [1, 3, 224, 224], "datatype": "FP32",
                 "data": [...]}]}

With the extension "binary tensor data" a request is this JSON without `data`, and the
tensor's bytes behind it; `Inference-Header-Content-Length` says where they begin. With
"classification" an output is the likeliest classes, as texts "value:index:name".

A request is checked completely before a tensor is made of it: its fields are typed, its
shape gives the number of values, and text with another number of commas is not decoded.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import torch
from msgspec import Meta, Raw

from ..bundle import Description
from ..errors import DataError, LimitError, ShapeError
from ..masked.plan import Plan

VERSION = "1"
BINARY = "binary_tensor_data"
EXTENSIONS = (BINARY, "classification")
HEADER_BYTES = 1 << 16  # of a request's JSON, the data in it apart
_NUMBER_BYTES = 32  # a number as text, with its comma and some blanks
_TYPES = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}

_Count = Annotated[int, Meta(ge=0, lt=1 << 40)]
_Text = Annotated[str, Meta(max_length=1 << 10)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _InputParameters(_Strict, frozen=True):
    binary_data_size: _Count | None = None


class _Input(_Strict, frozen=True):
    name: _Text
    shape: Annotated[tuple[_Count, ...], Meta(max_length=8)]
    datatype: _Text
    parameters: _InputParameters = _InputParameters()
    data: Raw = Raw()


class _OutputParameters(_Strict, frozen=True):
    binary_data: bool | None = None
    classification: Annotated[int, Meta(ge=1, lt=1 << 16)] | None = None


class _Output(_Strict, frozen=True):
    name: _Text
    parameters: _OutputParameters = _OutputParameters()


class _Parameters(_Strict, frozen=True):
    binary_data_output: bool = False


class _Request(_Strict, frozen=True):
    inputs: Annotated[tuple[_Input, ...], Meta(max_length=64)]
    id: _Text = ""
    outputs: Annotated[tuple[_Output, ...], Meta(max_length=64)] = ()
    parameters: _Parameters = _Parameters()


class Asked(NamedTuple):
    """A request that was read.

    Args:
        x: (batch, *input_shape), of its own floating type; it may hold NaN.
        id: echoed in the answer.
        binary: whether the output's bytes stand behind the answer's JSON.
        classes: how many of the likeliest to name; None for the logits.
    """

    x: np.ndarray
    id: str
    binary: bool
    classes: int | None


@dataclass(frozen=True)
class Names:
    """How the protocol calls the model and its two tensors."""

    model: str = "model"
    input: str = "input"
    output: str = "logits"


@dataclass(frozen=True)
class Model:
    """The one model that is served.

    Args:
        plan, description: the server's.
        names: of it and its tensors.
        batch: inputs of a request, at most.
    """

    plan: Plan
    description: Description
    names: Names = Names()
    batch: int = 16

    @property
    def body_bytes(self) -> int:
        """What a request may have at most, as text or as bytes."""
        return HEADER_BYTES + self.batch * _NUMBER_BYTES * math.prod(self._shape)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.plan.input.shape

    def metadata(self) -> dict[str, object]:
        """What `/v2/models/NAME` answers; -1 stands for the batch."""
        names, plan = self.names, self.plan
        tensors = (names.input, self._shape), (names.output, plan.output_shape)
        inputs, outputs = (
            [{"name": name, "datatype": "FP32", "shape": [-1, *shape]}]
            for name, shape in tensors
        )
        return {
            "name": self.names.model,
            "versions": [VERSION],
            "platform": "crypten_espn_masked",
            "inputs": inputs,
            "outputs": outputs,
        }

    def read(self, body: bytes, header: int | None = None) -> Asked:
        """A request's body, checked.

        Args:
            body: as received.
            header: bytes of its JSON, where binary data follow.

        Raises:
            DataError: it is no request of the protocol, or asks for what is not known
                here; its field is named.
            ShapeError: the input has another shape than the model's.
            LimitError: it has more inputs than are answered at once.
        """
        length = len(body) if header is None else header
        if length > len(body):
            raise DataError(
                f"Inference-Header-Content-Length is {length}, the body has "
                f"{len(body)} bytes; give the length of the JSON in it"
            )
        view = memoryview(body)
        try:
            request = _REQUEST.decode(view[:length])
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise DataError(
                f"this is no inference request: {_shown(error)}; see the Open "
                "Inference Protocol v2"
            ) from None
        _check_names([one.name for one in request.inputs], self.names.input, "input")
        (given,) = request.inputs
        self._check_shape(given)
        if given.datatype not in _TYPES:
            raise DataError(
                f"input {given.name!r} is of datatype {given.datatype[:40]!r}; give "
                f"FP32, or {' or '.join(t for t in _TYPES if t != 'FP32')}"
            )
        binary, classes = self._wanted(request)
        x = _values(given, view[length:])
        return Asked(x, request.id, binary, classes)

    def write(self, asked: Asked, logits: torch.Tensor) -> tuple[bytes, int | None]:
        """An answer's body, and the bytes of its JSON where binary data follow.

        Args:
            asked: what it answers.
            logits: float32 (batch, *output_shape).
        """
        data: bytes
        values: list[str] | list[float]
        output: dict[str, object] = {"name": self.names.output}
        if asked.classes is None:
            array = np.ascontiguousarray(logits.numpy(), dtype="<f4")
            output |= {"datatype": "FP32", "shape": list(array.shape)}
            data, values = array.tobytes(), array.reshape(-1).tolist()
        else:
            rows = [self._classes(row, asked.classes) for row in logits]
            values = [text for row in rows for text in row]
            encoded = [text.encode() for text in values]
            data = b"".join(struct.pack("<I", len(e)) + e for e in encoded)
            output |= {"datatype": "BYTES", "shape": [len(rows), len(rows[0])]}
        if asked.binary:
            output["parameters"] = {"binary_data_size": len(data)}
        else:
            output["data"] = values
        answer: dict[str, object] = {
            "model_name": self.names.model,
            "model_version": VERSION,
            "outputs": [output],
        }
        if asked.id:
            answer["id"] = asked.id
        text = msgspec.json.encode(answer)
        return (text + data, len(text)) if asked.binary else (text, None)

    def _classes(self, row: torch.Tensor, count: int) -> list[str]:
        """The likeliest classes of one input, "value:index:name"."""
        names = self.description.classes
        flat = row.reshape(-1)
        values, places = flat.topk(min(count, len(flat)))
        return [
            f"{value:f}:{i}" + (f":{names[i]}" if names else "")
            for value, i in zip(values.tolist(), places.tolist(), strict=True)
        ]

    def _check_shape(self, given: _Input) -> None:
        shape = given.shape
        if shape[1:] != self._shape or shape[0] < 1:
            wanted = ", ".join(map(str, self._shape))
            raise ShapeError(
                f"input {given.name!r} has shape {list(shape)}; give [batch, {wanted}]"
            )
        if shape[0] > self.batch:
            raise LimitError(
                f"{shape[0]} inputs were given; at most {self.batch} are answered at "
                "once: send them in several requests",
                "batch",
            )

    def _wanted(self, request: _Request) -> tuple[bool, int | None]:
        """Whether the output is binary, and how many classes are named."""
        binary = request.parameters.binary_data_output
        if not request.outputs:
            return binary, None
        _check_names([one.name for one in request.outputs], self.names.output, "output")
        parameters = request.outputs[0].parameters
        if parameters.binary_data is not None:
            binary = parameters.binary_data
        return binary, parameters.classification


def _check_names(given: list[str], name: str, what: str) -> None:
    if given != [name]:
        names = ", ".join(ascii(one)[:80] for one in given[:4]) or "none"
        raise DataError(f"the {what}s {names} were given; this model has one, {name!r}")


def _values(given: _Input, behind: memoryview) -> np.ndarray:
    """The numbers of an input, from the JSON or from the bytes behind it.

    Raises:
        DataError: too few or too many, in both places or in none; no numbers.
    """
    dtype, count = np.dtype(_TYPES[given.datatype]), math.prod(given.shape)
    size, text = given.parameters.binary_data_size, memoryview(given.data)
    if (size is None) == (len(text) == 0):
        raise DataError(
            f"input {given.name!r} needs its numbers once: as data, or as the "
            "binary_data_size of the bytes behind the JSON"
        )
    if size is None:
        if len(behind):
            raise DataError(
                f"{len(behind)} bytes stand behind the JSON, and no input says that "
                "they are its own"
            )
        with np.errstate(over="ignore"):  # infinity is refused with NaN
            return _numbers(given, bytes(text), count).astype(dtype)
    if not size == len(behind) == count * dtype.itemsize:
        raise DataError(
            f"input {given.name!r} of {count} {given.datatype} takes "
            f"{count * dtype.itemsize} bytes; binary_data_size is {size}, and "
            f"{len(behind)} stand behind the JSON"
        )
    return np.frombuffer(behind, dtype=dtype).reshape(given.shape)


def _numbers(given: _Input, text: bytes, count: int) -> np.ndarray:
    """Numbers in JSON, flat or nested as the shape says: float64 of that shape."""
    # A number has no comma, so this bounds the list before it is made.
    if text.count(b",") != count - 1:
        raise DataError(
            f"input {given.name!r} has {text.count(b',') + 1} numbers; its shape "
            f"{list(given.shape)} takes {count}"
        )
    blanks, depth = b" \t\r\n", 0
    for byte in text[:256]:
        if byte == ord("["):
            depth += 1
        elif byte not in blanks:
            break
    if depth not in (1, len(given.shape)):
        raise DataError(
            f"input {given.name!r} has lists {depth} deep; give its numbers in one "
            f"list, or in lists {len(given.shape)} deep"
        )
    try:
        found = _NUMBERS[depth - 1].decode(text)
        values = np.array(found, dtype=np.float64)
        if depth > 1 and values.shape != given.shape:
            raise ValueError(f"lists of shape {list(values.shape)}")
        return values.reshape(given.shape)
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise DataError(
            f"input {given.name!r} of shape {list(given.shape)} has other data than "
            f"numbers in that shape: {_shown(error)}"
        ) from None


def _shown(error: Exception) -> str:
    """A decoder may quote what was received."""
    return ascii(str(error))[1:-1][:200]


def _nested(depth: int) -> msgspec.json.Decoder[list[object]]:
    kind: object = float
    for _ in range(depth):
        kind = list[kind]  # type: ignore[valid-type]
    return msgspec.json.Decoder(kind)


# Made here once: two threads that decode a type for the first time crash msgspec.
_REQUEST = msgspec.json.Decoder(_Request)
_NUMBERS = [_nested(depth) for depth in range(1, 6)]
