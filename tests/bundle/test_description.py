"""What a server says of its network: strict, bounded, and fit to be printed."""

from __future__ import annotations

import json

import pytest
import torch

from crypten_espn.bundle import Bundle, Description, Preprocessing
from crypten_espn.bundle.description import DESCRIPTION_BYTES
from crypten_espn.errors import DataError, ShapeError


def test_a_description_is_what_its_text_says(bundle: Bundle) -> None:
    described = bundle.description
    read = Description.from_text(described.text)
    assert read == described and read.digest == described.digest


def test_numbers_of_another_type_give_the_same_digest() -> None:
    whole = Description(Preprocessing([0], [1]), ["a"])  # type: ignore[arg-type]
    assert whole.digest == Description(Preprocessing((0.0,), (1.0,)), ("a",)).digest
    assert Description.from_text(whole.text).digest == whole.digest


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 4000,
        b'{"version": 1}',
        b'{"classes": [""]}',
        b'{"classes": ["a", "a"]}',
        b'{"classes": [" a"]}',
        b'{"classes": ["a\\nb"]}',
        b'{"classes": ["a\\u202eb"]}',
        json.dumps({"classes": ["a" * 201]}).encode(),
        json.dumps({"classes": [str(i) for i in range(70_000)]}).encode(),
        json.dumps({"classes": [f"{i:0190}" for i in range(7_000)]}).encode(),
        b" " * DESCRIPTION_BYTES + b"{}",
        b'{"images": {"mean": [0.5], "std": [0]}}',
        b'{"images": {"mean": [0.5], "std": [-1]}}',
        b'{"images": {"mean": [1e300], "std": [1]}}',
        b'{"images": {"mean": [NaN], "std": [1]}}',
        b'{"images": {"mean": ["0"], "std": [1]}}',
        b'{"images": {"mean": [0.5, 0.5], "std": [1, 1]}}',
        b'{"images": {"mean": [0.5, 0.5, 0.5], "std": [1]}}',
        b'{"images": {"mean": [0.5], "std": [1], "resize": 0}}',
        b'{"images": {"mean": [0.5], "std": [1], "resize": 100000}}',
        b'{"images": {"mean": [0.5], "std": [1], "fit": "tile"}}',
        b'{"images": {"mean": [0.5], "std": [1], "resize": 9, "fit": "stretch"}}',
    ],
    ids=lambda text: text[:40].decode(errors="replace"),
)
def test_what_is_no_description_is_refused(text: bytes) -> None:
    with pytest.raises(DataError):
        Description.from_text(text)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.0,)), ((float("nan"),), (1.0,)), ((), ()), (("a",), (1.0,))],
)
def test_what_would_not_be_read_is_not_made(mean: object, std: object) -> None:
    with pytest.raises(DataError):
        Preprocessing(mean, std)  # type: ignore[arg-type]


def test_scores_are_the_softmax_and_the_likeliest_comes_first() -> None:
    described = Description(classes=("a", "b", "c"))
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    scores = logits.double().softmax(1)
    first, second = described.ranked(logits, top=2)
    assert [name for name, _ in first] == ["b", "c"] and second[0][0] == "a"
    assert first[0][1] == pytest.approx(float(scores[0, 1]))
    assert len(described.ranked(logits, top=9)[0]) == 3


def test_large_logits_have_scores_too() -> None:
    ((name, score), _) = Description(classes=("a", "b")).ranked(
        torch.tensor([[1e6, -1e6]]), top=2
    )[0]
    assert (name, score) == ("a", 1.0)


def test_logits_that_are_not_one_a_class_are_refused() -> None:
    with pytest.raises(ShapeError, match="2 classes are named"):
        Description(classes=("a", "b")).ranked(torch.zeros(1, 3), top=1)
    with pytest.raises(DataError, match="no names"):
        Description().ranked(torch.zeros(1, 3), top=1)
