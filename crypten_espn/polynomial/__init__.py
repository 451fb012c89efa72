"""Polynomials with integer coefficients: fit, evaluate in float and in the ring.

A `Polynomial` has coefficients ``numerators[k] / 2**frac_bits``, constant included.
`Polynomial.fit` finds the integers of least squared error to a function, exactly.
`ChannelPolynomials` has one for each channel. A `Form` holds either as the integers
that two parties multiply with shares modulo 2**64, together with the derived error
bound and the headroom.
"""

from .channels import AnyPolynomial, ChannelPolynomials, polynomial_from_json
from .fit import FLOOR
from .interval import GRID_POINTS
from .ring import RING_BITS, ChannelForm, Form, RingForm, across, as_int64
from .value import FRAC_BITS, MAX_DEGREE, SPARE_BITS, Polynomial

__all__ = [
    "FLOOR",
    "FRAC_BITS",
    "GRID_POINTS",
    "MAX_DEGREE",
    "RING_BITS",
    "SPARE_BITS",
    "AnyPolynomial",
    "ChannelForm",
    "ChannelPolynomials",
    "Form",
    "Polynomial",
    "RingForm",
    "across",
    "as_int64",
    "polynomial_from_json",
]
