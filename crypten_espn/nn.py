"""The activation as a crypten.nn module, its ONNX name, and `polyval` on MPCTensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import crypten
import torch
from crypten import gradients
from crypten.cryptensor import AutogradContext
from crypten.mpc import MPCTensor
from crypten.nn import Module, onnx_converter

from .errors import ConversionError, PolynomialError, ProtocolError
from .graph.index_map import IndexMap
from .graph.network import POLYNOMIAL_OP
from .polynomial import (
    AnyPolynomial,
    Polynomial,
    polynomial_from_json,
)
from .protocols import PROTOCOLS, TRUNCATIONS, polyval, settings


class PolynomialActivation(Module):
    """Element-wise public polynomial of a shared tensor; twin of the torch module.

    Args:
        polynomial: public, the same for every party; of ChannelPolynomials, row c
            applies to channel c, the second axis.
        protocol: as in `protocols.settings`; what `crypten.cfg.espn` says when None.
        truncation: likewise.
    """

    def __init__(
        self,
        polynomial: AnyPolynomial,
        *,
        protocol: str | None = None,
        truncation: str | None = None,
    ) -> None:
        super().__init__()
        if protocol is not None and protocol not in PROTOCOLS:
            raise ProtocolError(
                f"protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}"
            )
        if truncation is not None and truncation not in TRUNCATIONS:
            raise ProtocolError(
                f"truncation {truncation!r}: choose one of {', '.join(TRUNCATIONS)}"
            )
        self.polynomial = polynomial
        self.protocol = protocol
        self.truncation = truncation

    def forward(self, x: MPCTensor | torch.Tensor) -> MPCTensor | torch.Tensor:
        """p(x): encrypted for an MPCTensor (see `polyval`), plain for a tensor."""
        if torch.is_tensor(x):
            return self.polynomial(x)
        with settings(protocol=self.protocol, truncation=self.truncation):
            return x.polyval(self.polynomial)

    @staticmethod
    def from_onnx(attributes: dict[str, Any] | None = None) -> PolynomialActivation:
        """Build from the attributes of a PolynomialActivation node.

        Raises:
            ConversionError: an attribute is missing.
            PolynomialError: the attributes are no polynomial.
        """
        return PolynomialActivation(_polynomial_of(attributes or {}))


def _polynomial_of(given: dict[str, Any]) -> AnyPolynomial:
    """What a node's attributes say: one text, or fields of one shared polynomial."""
    if "polynomial" in given:
        others = sorted(given.keys() & {"numerators", "frac_bits", "interval"})
        if others:
            raise PolynomialError(
                f"a {POLYNOMIAL_OP} node has the attribute polynomial and also "
                f"{', '.join(others)}; export the network again"
            )
        text = given["polynomial"]
        try:
            text = text.decode() if isinstance(text, bytes) else str(text)
        except UnicodeDecodeError as error:
            raise PolynomialError(
                f"the attribute polynomial of a {POLYNOMIAL_OP} node is no text "
                f"({error}); export the network again"
            ) from error
        return polynomial_from_json(text)
    try:
        numerators, interval = tuple(given["numerators"]), tuple(given["interval"])
        numbers = given["frac_bits"], given.get("requested_degree", -1)
    except KeyError as missing:
        raise ConversionError(
            f"a {POLYNOMIAL_OP} node lacks the attribute {missing}; it needs "
            "polynomial, or numerators, frac_bits and interval. Export the network "
            "again"
        ) from None
    except TypeError as error:
        raise PolynomialError(
            f"an attribute of a {POLYNOMIAL_OP} node is no list ({error}); export the "
            "network again"
        ) from error
    if any(type(number) is not int for number in numbers):
        raise PolynomialError(
            f"frac_bits and requested_degree of a {POLYNOMIAL_OP} node are {numbers}; "
            "two whole numbers are needed. Export the network again"
        )
    return Polynomial(numerators, numbers[0], interval, numbers[1])


class Mix(Module):
    """rows @ x @ columns.T of each channel of an image, with public matrices.

    Resizes and average pools of windows that differ need it.

    Args:
        rows, columns: float tensors (out, in).
    """

    SUPPORTS_PLAINTEXT_INPUTS = True

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows.float()
        self.columns = columns.float()

    def forward(self, x: MPCTensor | torch.Tensor) -> MPCTensor | torch.Tensor:
        """The image; no communication, two local truncations if shared."""
        y = x.transpose(2, 3).matmul(self.rows.t()).transpose(2, 3)
        return y.matmul(self.columns.t())


class Move(Module):
    """Elements of values at public places.

    Args:
        given: which.
    """

    SUPPORTS_PLAINTEXT_INPUTS = True

    def __init__(self, given: IndexMap) -> None:
        super().__init__()
        self.given = given

    def forward(
        self, given: MPCTensor | torch.Tensor | Sequence[MPCTensor | torch.Tensor]
    ) -> MPCTensor | torch.Tensor:
        """What the map makes of a value, or of a list; no communication."""
        return moved(given if isinstance(given, (list, tuple)) else [given], self.given)


def moved(
    values: Sequence[MPCTensor | torch.Tensor], given: IndexMap
) -> MPCTensor | torch.Tensor:
    """What an index map makes of values (batch, ...), of any kind of tensor."""
    rows = [value.reshape(len(value), math.prod(value.shape[1:])) for value in values]
    if given.has_zeros:
        rows.append(rows[0][:, :1] * 0)
    flat = rows[0]
    if len(rows) > 1:
        joined = torch.cat if torch.is_tensor(flat) else crypten.cat
        flat = joined(rows, 1)
    index = torch.from_numpy(given.index.reshape(-1))
    return flat[:, index].reshape(len(flat), *given.shape)


@gradients.register_function("polyval")
class AutogradPolyval(gradients.AutogradFunction):
    """Gradient of `polyval`: the derivative is a polynomial, so it costs the same."""

    @staticmethod
    def forward(
        ctx: AutogradContext, input: MPCTensor, polynomial: AnyPolynomial
    ) -> MPCTensor:
        ctx.save_multiple_for_backward((input, polynomial))
        return input.polyval(polynomial)

    @staticmethod
    def backward(ctx: AutogradContext, grad_output: MPCTensor) -> MPCTensor:
        input, polynomial = ctx.saved_tensors
        return grad_output.mul(input.polyval(polynomial.derivative()))


MPCTensor.polyval = polyval
onnx_converter.ONNX_TO_CRYPTEN[POLYNOMIAL_OP] = PolynomialActivation
