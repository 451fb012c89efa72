"""Requests and answers of the protocol as bytes; nothing is sent anywhere."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import numpy as np
import pytest
import torch

from crypten_espn.bundle import Description
from crypten_espn.errors import DataError, LimitError, ShapeError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.sidecar.tensors import HEADER_BYTES, Model, Names

from .conftest import NAMES

SHAPE = (2, 3, 8, 8)
X = np.random.default_rng(0).normal(size=SHAPE)


@pytest.fixture(scope="module")
def tensors(guarded: MaskedModel) -> Model:
    return Model(guarded.plan, Description(classes=NAMES), batch=4)


def request(**changes: Any) -> dict[str, Any]:
    given = {"name": "input", "datatype": "FP32", "shape": SHAPE, **changes}
    return {"inputs": [given]}


def text(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
@pytest.mark.parametrize("form", ["flat", "nested", "binary"])
def test_a_tensor_is_read_in_every_form(
    tensors: Model, datatype: str, form: str
) -> None:
    dtype = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}[datatype]
    x = X.astype(dtype)
    if form == "binary":
        size = {"binary_data_size": x.nbytes}
        head = text(request(datatype=datatype, parameters=size))
        found = tensors.read(head + x.tobytes(), len(head))
    else:
        data = (x if form == "nested" else x.reshape(-1)).tolist()
        found = tensors.read(text(request(datatype=datatype, data=data)))
    assert found.x.dtype == np.dtype(dtype) and np.array_equal(found.x, x)
    assert (found.id, found.binary, found.classes) == ("", False, None)


def test_whole_numbers_are_numbers(tensors: Model) -> None:
    data = list(range(X.size))
    assert tensors.read(text(request(data=data))).x.ravel().tolist() == data


FLAT = X.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("changed", "kind", "named"),
    [
        ({"data": FLAT[:-1]}, DataError, "has 383 numbers; its shape"),
        ({"data": [*FLAT, 1.0]}, DataError, "has 385 numbers; its shape"),
        ({"data": []}, DataError, "has 1 numbers; its shape"),
        ({"data": [*FLAT[:-1], "1"]}, DataError, "got `str`"),
        ({"data": [*FLAT[:-1], None]}, DataError, "got `null`"),
        ({"data": [*FLAT[:-1], True]}, DataError, "got `bool`"),
        ({"data": [*FLAT[:-1], [1.0]]}, DataError, "got `array`"),
        ({"data": "," * 383}, DataError, "lists 0 deep"),
        ({"data": [[*FLAT]]}, DataError, "lists 2 deep"),
        ({"data": X.swapaxes(1, 2).tolist()}, DataError, r"of shape \[2, 8, 3, 8\]"),
        ({"data": [[[[*FLAT]]]]}, DataError, r"of shape \[1, 1, 1, 384\]"),
        (
            {"data": [*X[:1].tolist(), [[*X[1].reshape(2, -1).tolist()]]]},
            DataError,
            "other data than numbers in that shape",
        ),
        ({}, DataError, "needs its numbers once"),
        ({"data": FLAT, "datatype": "FP33"}, DataError, "'FP33'; give FP32"),
        ({"data": FLAT, "datatype": "UINT8"}, DataError, "'UINT8'; give FP32"),
        ({"data": FLAT, "datatype": "BYTES"}, DataError, "'BYTES'; give FP32"),
        ({"data": FLAT, "shape": [2, 3, 64]}, ShapeError, r"\[batch, 3, 8, 8\]"),
        ({"data": FLAT, "shape": [3, 8, 8]}, ShapeError, r"\[batch, 3, 8, 8\]"),
        ({"data": FLAT, "shape": [0, 3, 8, 8]}, ShapeError, r"\[batch, 3, 8, 8\]"),
        ({"data": FLAT, "shape": [2, 8, 8, 3]}, ShapeError, r"\[batch, 3, 8, 8\]"),
        ({"data": FLAT, "shape": []}, ShapeError, r"\[batch, 3, 8, 8\]"),
        ({"data": FLAT, "shape": [-2, 3, 8, 8]}, DataError, ">= 0"),
        ({"data": FLAT, "shape": [2.5, 3, 8, 8]}, DataError, "got `float`"),
        ({"data": FLAT, "shape": [1] * 9}, DataError, "length <= 8"),
        ({"data": FLAT, "shape": [1 << 41, 3, 8, 8]}, DataError, "<="),
        ({"data": FLAT, "shape": [5, 3, 8, 8]}, LimitError, "at most 4 are answered"),
        ({"data": FLAT, "name": "x"}, DataError, "'x' were given.*'input'"),
        ({"data": FLAT, "name": 3}, DataError, "got `int`"),
        ({"data": FLAT, "more": 1}, DataError, "unknown field `more`"),
        (
            {"data": FLAT, "parameters": {"shared_memory_region": "r"}},
            DataError,
            "unknown field `shared_memory_region`",
        ),
        ({"data": FLAT, "parameters": {"binary_data_size": 4}}, DataError, "once"),
        ({"parameters": {"binary_data_size": -1}}, DataError, ">= 0"),
        ({"parameters": {"binary_data_size": 1536}}, DataError, "takes 1536 bytes"),
    ],
)
def test_a_tensor_that_is_none_is_refused_by_name(
    tensors: Model, changed: dict[str, Any], kind: type[Exception], named: str
) -> None:
    with pytest.raises(kind, match=named):
        tensors.read(text(request(**changed)))


@pytest.mark.parametrize(
    ("whole", "named"),
    [
        ({}, "required field `inputs`"),
        ({"inputs": []}, "none were given"),
        ({"inputs": 2 * request(data=FLAT)["inputs"]}, "'input', 'input' were given"),
        ({**request(data=FLAT), "id": 5}, "got `int`"),
        ({**request(data=FLAT), "id": "x" * 1025}, "length <= 1024"),
        ({**request(data=FLAT), "outputs": [{"name": "o"}]}, "'o' were asked for|'o'"),
        ({**request(data=FLAT), "outputs": 2 * [{"name": "logits"}]}, "'logits'"),
        (
            {
                **request(data=FLAT),
                "outputs": [{"name": "logits", "parameters": {"classification": 0}}],
            },
            ">= 1",
        ),
        ({**request(data=FLAT), "parameters": {"sequence_id": 1}}, "sequence_id"),
        ([], "got `array`"),
    ],
)
def test_a_request_that_is_none_is_refused_by_name(
    tensors: Model, whole: object, named: str
) -> None:
    with pytest.raises(DataError, match=named):
        tensors.read(text(whole))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b'{"inputs": [NaN]}', b"[" * 100_000]
)
def test_what_is_no_json_is_refused(tensors: Model, body: bytes) -> None:
    with pytest.raises(DataError, match="no inference request"):
        tensors.read(body)


@pytest.mark.parametrize(
    ("size", "behind", "header", "named"),
    [
        (1536, 1535, 0, "1535 stand behind"),
        (1536, 1537, 0, "1537 stand behind"),
        (1535, 1535, 0, "takes 1536 bytes"),
        (1536, 1536, -1, "no inference request"),
        (1536, 1536, 10_000, "give the length of the JSON"),
    ],
)
def test_bytes_behind_the_json_that_do_not_fit_are_refused(
    tensors: Model, size: int, behind: int, header: int, named: str
) -> None:
    head = text(request(parameters={"binary_data_size": size}))
    with pytest.raises(DataError, match=named):
        tensors.read(head + bytes(behind), len(head) + header)


def test_bytes_behind_a_request_in_json_are_refused(tensors: Model) -> None:
    head = text(request(data=FLAT))
    with pytest.raises(DataError, match="no input says"):
        tensors.read(head + b"1234", len(head))


@pytest.mark.parametrize("form", ["json", "binary"])
def test_a_changed_request_is_read_or_refused_and_nothing_else(
    tensors: Model, form: str
) -> None:
    draws = random.Random(0)
    x = X.astype("<f4")
    if form == "binary":
        head = text(request(parameters={"binary_data_size": x.nbytes}))
        body, length = head + x.tobytes(), len(head)
    else:
        head = body = text({**request(data=[1] * X.size), "id": "a"})
        length = len(body)
    read = 0
    for _ in range(3000):
        changed = bytearray(body)
        for _ in range(draws.randint(1, 3)):
            place = draws.randrange(len(head))
            change = draws.randrange(3)
            if change == 0:
                changed[place : place + 1] = bytes([draws.randrange(256)])
            elif change == 1:
                del changed[place : place + draws.randint(1, 9)]
            else:
                changed[place:place] = draws.choice(
                    [b"[", b"]", b",", b"9" * 30, b"-", b'"', b"null", b"1e999"]
                )
        try:
            found = tensors.read(bytes(changed), length if form == "binary" else None)
        except (DataError, ShapeError, LimitError):
            continue
        read += 1
        assert found.x.shape[1:] == SHAPE[1:] and 1 <= len(found.x) <= 4
    assert read < 3000


def test_a_request_as_large_as_it_may_be_fits_the_body(tensors: Model) -> None:
    x = np.full((4, 3, 8, 8), -1.2345678901234567e-300)
    body = text(request(shape=x.shape, datatype="FP64", data=x.tolist()))
    assert len(body) < tensors.body_bytes < HEADER_BYTES + 40 * x.size


LOGITS = torch.tensor([[0.5, -1.0, 3.25, 0.0, 1.0], [2.0, 1.0, 0.0, -1.0, -2.0]])


def answered(tensors: Model, **parameters: object) -> tuple[dict[str, Any], bytes]:
    """An answer's JSON, and the bytes behind it."""
    outputs = [{"name": "logits", "parameters": parameters}]
    whole = {**request(data=FLAT), "outputs": outputs, "id": "seven"}
    body, length = tensors.write(tensors.read(text(whole)), LOGITS)
    length = len(body) if length is None else length
    return json.loads(body[:length]), body[length:]


def test_logits_are_written_in_json_and_in_bytes(tensors: Model) -> None:
    answer, behind = answered(tensors)
    assert not behind and answer["id"] == "seven"
    assert answer["outputs"] == [
        {
            "name": "logits",
            "datatype": "FP32",
            "shape": [2, 5],
            "data": LOGITS.flatten().tolist(),
        }
    ]
    answer, behind = answered(tensors, binary_data=True)
    (output,) = answer["outputs"]
    assert output["parameters"] == {"binary_data_size": len(behind)}
    assert np.array_equal(np.frombuffer(behind, "<f4").reshape(2, 5), LOGITS.numpy())


def test_the_likeliest_classes_are_written_in_json_and_in_bytes(tensors: Model) -> None:
    wanted = ["3.250000:2:class 2", "1.000000:4:class 4"]
    wanted += ["2.000000:0:class 0", "1.000000:1:class 1"]
    answer, _ = answered(tensors, classification=2)
    (output,) = answer["outputs"]
    assert output["data"] == wanted
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    _, behind = answered(tensors, classification=2, binary_data=True)
    assert behind == b"".join(struct.pack("<I", len(w)) + w.encode() for w in wanted)
    answer, _ = answered(tensors, classification=9)
    assert answer["outputs"][0]["shape"] == [2, 5]


def test_metadata_name_the_tensors(guarded: MaskedModel) -> None:
    names = Names("resnet", "pixels", "scores")
    model = Model(guarded.plan, Description(), names)
    about = model.metadata()
    assert about["name"] == "resnet" and about["versions"] == ["1"]
    assert about["inputs"] == [
        {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 8, 8]}
    ]
    assert about["outputs"] == [
        {"name": "scores", "datatype": "FP32", "shape": [-1, 5]}
    ]
