"""What a server says of its network beside the plan: how images enter, what comes out.

A description is public and travels with the plan. Nothing of one is believed: its
numbers, its texts and what they have to do with the plan are checked whenever one is
made, our own and a received one.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta

from ..errors import DataError, ShapeError
from ..masked.plan import Plan

DESCRIPTION_BYTES = 1 << 20
MAX_SIDE = 1 << 14
_MAX_NAME, _MAX_CLASSES = 200, 1 << 16

Scored = tuple[str, float]
Name = Annotated[str, Meta(min_length=1, max_length=_MAX_NAME)]
Mean = Annotated[float, Meta(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Meta(ge=1e-6, le=1e6)]
Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes an input: (image / 255 - mean) / std at the plan's size.

    Args:
        mean, std: one number a channel; of grey (one channel) or red, green and blue.
        resize: pixels that the shorter side gets before the middle is cut out; None
            for as few as the cut needs.
        fit: "crop" keeps an image's proportions, "stretch" resizes both sides apart.

    Raises:
        DataError: another number of means than of deviations, or than 1 or 3; a number
            that is no mean, deviation or size; a resize that is not used.
    """

    mean: tuple[Mean, ...]
    std: tuple[Deviation, ...]
    resize: Side | None = None
    fit: Literal["crop", "stretch"] = "crop"

    def __post_init__(self) -> None:
        _strict(self)
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise DataError(
                f"{len(self.mean)} means and {len(self.std)} deviations were given; "
                "images have 1 channel or 3, each with one of both"
            )
        if self.fit == "stretch" and self.resize is not None:
            raise DataError(
                f"resize={self.resize} was given with fit='stretch', which resizes to "
                "the network's size alone; give one of them"
            )

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse what does not give inputs of this shape.

        Args:
            shape: of one input, (channels, height, width).

        Raises:
            ShapeError: it has other channels, or cuts out more than it resizes to.
        """
        if len(shape) != 3 or shape[0] != len(self.mean):
            raise ShapeError(
                f"images of {len(self.mean)} channels are described, the network takes "
                f"({', '.join(map(str, shape))}); give a mean and a deviation for each "
                "of its channels, or nothing of images"
            )
        if self.resize is not None and self.resize < max(shape[1:]):
            raise ShapeError(
                f"images are resized to {self.resize} pixels and {shape[1]}x{shape[2]} "
                f"are cut out; resize to {max(shape[1:])} at least"
            )


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """What is public of a served network beside its plan.

    Args:
        images: how image files become inputs; None if inputs are no images.
        classes: the logits' names in their order; empty if they have none.

    Raises:
        DataError: as `Preprocessing`; a name that is empty, too long, given twice or
            not printable; more than `DESCRIPTION_BYTES` in all.
    """

    images: Preprocessing | None = None
    classes: Annotated[tuple[Name, ...], Meta(max_length=_MAX_CLASSES)] = ()

    def __post_init__(self) -> None:
        _strict(self)
        seen: set[str] = set()
        for number, name in enumerate(self.classes):
            # What a terminal obeys, and what only looks like another name.
            if not name.isprintable() or name != name.strip():
                raise DataError(
                    f"the name of class {number}, {ascii(name)[:80]}, has control "
                    "characters, or spaces around it; leave them out"
                )
            if name in seen:
                raise DataError(
                    f"the name of class {number}, {name[:80]!r}, is given twice; an "
                    "answer could not tell which is meant"
                )
            seen.add(name)
        if len(self.text) > DESCRIPTION_BYTES:
            raise DataError(
                f"the description takes {len(self.text):,} bytes; "
                f"{DESCRIPTION_BYTES:,} are the most: shorten the classes' names"
            )

    def check(self, plan: Plan) -> None:
        """Refuse what does not belong to this plan.

        Raises:
            ShapeError: other channels, sizes or as many names as it has no logits.
        """
        if self.images is not None:
            self.images.check(plan.input.shape)
        if self.classes and plan.output_shape != (len(self.classes),):
            logits = "x".join(map(str, plan.output_shape))
            raise ShapeError(
                f"{len(self.classes)} class names were given, the network has {logits} "
                "logits; give a name for each, in their order"
            )

    @cached_property
    def text(self) -> bytes:
        """The canonical text."""
        return msgspec.json.encode(self)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical text."""
        return hashlib.sha256(self.text).digest()

    @staticmethod
    def from_text(text: bytes) -> Description:
        """Read and check a description received from elsewhere.

        Raises:
            DataError: the text is none of this version, or says what it may not.
        """
        if len(text) > DESCRIPTION_BYTES:
            raise DataError(
                f"a description of {len(text):,} bytes was given; "
                f"{DESCRIPTION_BYTES:,} are the most"
            )
        try:
            return _DECODER.decode(text)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            said = ascii(str(error))[1:-1][:200]
            raise DataError(
                f"this is no description of this version ({said}); use the same "
                "crypten-espn on both sides"
            ) from None

    def ranked(
        self, logits: torch.Tensor, *, top: int
    ) -> list[list[tuple[str, float]]]:
        """Each input's likeliest classes with their scores, the likeliest first.

        Args:
            logits: (batch, classes), as `Client.predict` returns them.
            top: how many, at least 1; all if there are fewer.

        Returns: for each input, (name, score); scores are the softmax of its logits.

        Raises:
            DataError: the classes have no names.
            ShapeError: the logits are not one a class.
        """
        if not self.classes:
            raise DataError("this network's classes have no names; read its logits")
        if logits.dim() != 2 or logits.shape[1] != len(self.classes):
            raise ShapeError(
                f"logits of shape {tuple(logits.shape)} were given, "
                f"{len(self.classes)} classes are named: give (batch, classes)"
            )
        scores = logits.double().softmax(1).topk(min(top, len(self.classes)), dim=1)
        return [
            [(self.classes[i], score) for i, score in zip(which, values, strict=True)]
            for which, values in zip(
                scores.indices.tolist(), scores.values.tolist(), strict=True
            )
        ]


def _strict(made: Preprocessing | Description) -> None:
    """Hold what was made in Python to what decoding would accept, and to its types.

    Raises:
        DataError: a number or a text is of another type, or out of range.
    """
    try:
        for field in msgspec.structs.fields(type(made)):
            value = getattr(made, field.name)
            whole = msgspec.convert(value, type=field.type, strict=True)
            # A whole number or a list would give another text, and so another digest.
            msgspec.structs.force_setattr(made, field.name, whole)
    except msgspec.ValidationError as error:
        raise DataError(f"{type(made).__name__}: {error}") from None


# Made here once: two threads that decode a type for the first time crash msgspec.
_DECODER = msgspec.json.Decoder(Description)
