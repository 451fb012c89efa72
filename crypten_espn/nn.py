"""The activation as a crypten.nn module, its ONNX name, and `polyval` on MPCTensor."""

from __future__ import annotations

from typing import Any

import torch
from crypten import gradients
from crypten.cryptensor import AutogradContext
from crypten.mpc import MPCTensor
from crypten.nn import Module, onnx_converter

from .errors import ConversionError, PolynomialError, ProtocolError
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


class Scale(Module):
    """Multiply by public factors, broadcast over batch and channels.

    Average pools that count fewer elements at the border need it.

    Args:
        factor: float tensor of the image's shape (height, width).
    """

    SUPPORTS_PLAINTEXT_INPUTS = True

    def __init__(self, factor: torch.Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: MPCTensor | torch.Tensor) -> MPCTensor | torch.Tensor:
        """x times the factors; no communication, one local truncation if shared."""
        return x.mul(self.factor)


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
