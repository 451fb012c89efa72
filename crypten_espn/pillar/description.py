"""What a network's file says of its network, strictly read.

The words of a file are believed only where they have the fields, the types and the
sizes that `save_network` writes: nothing is built before that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

import msgspec
from torch import nn

from ..errors import CheckpointError
from ..polynomial import AnyPolynomial, polynomial_from_json
from .data import Normalization
from .guard import InputGuard
from .networks import Architecture

FORMAT = "crypten-espn network 1"

# Larger than any network of ours; an input of these sizes still fits a machine.
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]


class _Architecture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    classes: Count
    in_channels: Count
    size: Size


class _Normalization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mean: tuple[float, ...]
    std: tuple[Annotated[float, msgspec.Meta(gt=0)], ...]


@dataclass(frozen=True)
class Description:
    """A network without its tensors.

    Args:
        architecture: which network, with what arguments.
        polynomials: by dotted name, what its activations are replaced with: one for
            all, or one for each channel.
        normalization: of its inputs, one mean and deviation a channel.
        notes: plain values stored with it.
        guard: of its inputs, of as many channels.
    """

    architecture: Architecture
    polynomials: Mapping[str, AnyPolynomial]
    normalization: Normalization | None
    notes: dict[str, object]
    guard: InputGuard | None = None

    def to_metadata(self) -> dict[str, str]:
        """The texts a file keeps."""
        texts = {
            "format": FORMAT,
            "architecture": json.dumps(self.architecture.arguments()),
            "polynomials": json.dumps(
                {
                    name: json.loads(polynomial.to_json())
                    for name, polynomial in self.polynomials.items()
                }
            ),
            "normalization": json.dumps(
                self.normalization and asdict(self.normalization)
            ),
            "notes": json.dumps(self.notes),
        }
        # A file without a guard is one that earlier versions read too.
        if self.guard is not None:
            texts["guard"] = self.guard.to_json()
        return texts

    @staticmethod
    def from_metadata(metadata: Mapping[str, str]) -> Description:
        """The inverse of `to_metadata`.

        Raises:
            CheckpointError: a text is missing, or does not have the fields, types and
                sizes it must have.
        """
        try:
            built = _ARCHITECTURE.decode(metadata["architecture"])
            polynomials = _POLYNOMIALS.decode(metadata["polynomials"])
            given = _NORMALIZATION.decode(metadata["normalization"])
            notes = json.loads(metadata["notes"])
            if not isinstance(notes, dict):
                raise TypeError(f"the notes are a {type(notes).__name__}")
            if given and {len(given.mean), len(given.std)} != {built.in_channels}:
                raise ValueError(
                    f"{len(given.mean)} means and {len(given.std)} deviations for "
                    f"{built.in_channels} channels"
                )
            guard = None
            if "guard" in metadata:
                guard = InputGuard.from_json(metadata["guard"])
                if guard.channels != built.in_channels:
                    raise ValueError(
                        f"a guard of {guard.channels} channels for {built.in_channels}"
                    )
            return Description(
                Architecture(built.name, built.classes, built.in_channels, built.size),
                {
                    name: polynomial_from_json(bytes(text).decode())
                    for name, text in polynomials.items()
                },
                Normalization(given.mean, given.std) if given else None,
                notes,
                guard,
            )
        except (
            KeyError,
            TypeError,
            ValueError,
            RecursionError,
            msgspec.MsgspecError,
        ) as error:
            raise CheckpointError(
                f"has a damaged description ({str(error)[:200]})"
            ) from error

    def check_names(self, network: nn.Module) -> None:
        """Refuse a polynomial for what is no module of a network.

        Raises:
            CheckpointError: it names the polynomial.
        """
        known = {name for name, _ in network.named_modules()}
        for name in self.polynomials:
            if name not in known:
                raise CheckpointError(
                    f"has a polynomial for {name[:80]!r}; no activation is called that"
                )


# Made here once: two threads that decode a type for the first time crash msgspec.
_ARCHITECTURE = msgspec.json.Decoder(_Architecture)
_POLYNOMIALS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NORMALIZATION = msgspec.json.Decoder(_Normalization | None)
