"""Words side by side: a type of compiled kernels for LANES integers modulo 2**64.

LLVM makes vectors of a loop over elements only if it is the innermost and writes one or
two arrays. A pass over polynomials is neither: within an element it goes over groups
and powers, and it reads a line for each of the dealer's words. So those kernels say
themselves what a vector is: `load` one, compute with + - * & << >> (a scalar stands for
every lane; >> brings in zeros), `store` it. What they name stays in registers.

A vector is LANES neighbours along the last axis of a contiguous array. Elements that
fill none are padded to one (`padded`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.base import BaseContext
from numba.core.typing.context import BaseContext as Context
from numba.core.typing.templates import Signature
from numba.extending import intrinsic, models, overload, register_model

from .tiles import VECTOR

# Two registers: what is done once for a vector, addresses above all, weighs half.
LANES = 2 * VECTOR // 8
_WORD = ir.IntType(64)
_LINE = ir.VectorType(_WORD, LANES)
_INDEX = ir.IntType(32)

Typed = tuple[Signature, Callable[..., ir.Value]]
# Code for values of the given types.
Emit = Callable[
    [BaseContext, ir.IRBuilder, Sequence[types.Type], Sequence[ir.Value]], ir.Value
]


class Words(types.Type):
    """LANES integers modulo 2**64."""

    def __init__(self) -> None:
        super().__init__("Words")


WORDS = Words()


@register_model(Words)
class _Model(models.PrimitiveModel):
    """In LLVM they are one value, which it spreads over registers."""

    def __init__(self, manager: object, kind: types.Type) -> None:
        super().__init__(manager, kind, _LINE)


def _typed(signature: Signature, emit: Emit) -> Typed:
    def code(
        context: BaseContext,
        builder: ir.IRBuilder,
        signature: Signature,
        values: Sequence[ir.Value],
    ) -> ir.Value:
        return emit(context, builder, signature.args, values)

    return signature, code


def _line_of(
    context: BaseContext,
    builder: ir.IRBuilder,
    kind: types.Array,
    value: ir.Value,
    index: ir.Value,
) -> ir.Value:
    """A pointer to the vector of an array's elements that starts at an index."""
    array = context.make_array(kind)(context, builder, value)
    places = cgutils.unpack_tuple(builder, index)
    if config.BOUNDSCHECK:
        sizes = cgutils.unpack_tuple(builder, array.shape)
        last = builder.add(places[-1], ir.Constant(_WORD, LANES - 1))
        pairs = zip([*places, last], [*sizes, sizes[-1]], strict=True)
        for axis, (place, size) in enumerate(pairs):
            cgutils.do_boundscheck(context, builder, place, size, axis)
    first = cgutils.get_item_pointer(context, builder, kind, array, places)
    line = ir.VectorType(ir.IntType(kind.dtype.bitwidth), LANES)
    return builder.bitcast(first, line.as_pointer())


@intrinsic
def _load(typing: Context, array: types.Array, index: types.Type) -> Typed:
    bits = array.dtype.bitwidth

    def emit(
        context: BaseContext,
        builder: ir.IRBuilder,
        kinds: Sequence[types.Type],
        values: Sequence[ir.Value],
    ) -> ir.Value:
        line = builder.load(_line_of(context, builder, kinds[0], *values))
        line.align = bits // 8
        return line if bits == 64 else builder.zext(line, _LINE)

    return _typed(WORDS(array, index), emit)


@intrinsic
def _store(
    typing: Context, array: types.Array, index: types.Type, words: types.Type
) -> Typed:
    def emit(
        context: BaseContext,
        builder: ir.IRBuilder,
        kinds: Sequence[types.Type],
        values: Sequence[ir.Value],
    ) -> ir.Value:
        *where, line = values
        place = _line_of(context, builder, kinds[0], *where)
        builder.store(line, place).align = 8
        return context.get_dummy_value()

    return _typed(types.void(array, index, WORDS), emit)


@intrinsic
def _negative(typing: Context, words: types.Type) -> Typed:
    def emit(
        context: BaseContext,
        builder: ir.IRBuilder,
        kinds: Sequence[types.Type],
        values: Sequence[ir.Value],
    ) -> ir.Value:
        zeros = ir.Constant(_LINE, [0] * LANES)
        return builder.sext(builder.icmp_signed("<", values[0], zeros), _LINE)

    return _typed(WORDS(WORDS), emit)


def _spread(builder: ir.IRBuilder, kind: types.Type, value: ir.Value) -> ir.Value:
    """Words as they are; one word in every lane."""
    if kind == WORDS:
        return value
    nothing = ir.Constant(_LINE, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(_INDEX, 0))
    everywhere = ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES)
    return builder.shuffle_vector(one, nothing, everywhere)


def _operator(name: str, *symbols: Callable[..., object]) -> None:
    """Give Words an operator: LLVM's instruction of that name."""

    @intrinsic
    def combine(typing: Context, a: types.Type, b: types.Type) -> Typed:
        def emit(
            context: BaseContext,
            builder: ir.IRBuilder,
            kinds: Sequence[types.Type],
            values: Sequence[ir.Value],
        ) -> ir.Value:
            pair = map(_spread, (builder, builder), kinds, values)
            return getattr(builder, name)(*pair)

        a, b = (kind if kind == WORDS else types.int64 for kind in (a, b))
        return _typed(WORDS(a, b), emit)

    # numba compares both functions' parameters, annotations too: lambdas have none.
    for symbol in symbols:
        overload(symbol)(
            lambda a, b: (lambda a, b: combine(a, b)) if WORDS in (a, b) else None
        )


_operator("add", operator.add, operator.iadd)
_operator("sub", operator.sub, operator.isub)
_operator("mul", operator.mul)
_operator("and_", operator.and_)
_operator("shl", operator.lshift)
_operator("lshr", operator.rshift)

#: load(array, index): LANES elements from an index on; of 32 bits, without sign.
load = cast(Callable[[np.ndarray, tuple[int, ...]], np.ndarray], _load)
#: store(array, index, words): overwrite LANES elements of 64 bits.
store = cast(Callable[[np.ndarray, tuple[int, ...], np.ndarray], None], _store)
#: negative(words): all ones where a word's top bit is 1, 0 elsewhere.
negative = cast(Callable[[np.ndarray], np.ndarray], _negative)


def padded(array: np.ndarray, start: int) -> np.ndarray:
    """A vector of the elements from `start` on, zeros after them; a copy."""
    rest = array[..., start:]
    out = np.zeros((*rest.shape[:-1], LANES), dtype=array.dtype)
    out[..., : rest.shape[-1]] = rest
    return out


def repeated(columns: np.ndarray) -> np.ndarray:
    """Coefficients by channel, the last axis, so often that vectors read no gap.

    From any of a period's channels LANES columns can be read; the period, which is the
    last axis but LANES, is a multiple of the channels and at least LANES.
    """
    channels = columns.shape[-1]
    count = -(-LANES // channels) * channels + LANES
    # An array with gaps would be another type; numpy.tile takes longer than a pass.
    found: np.ndarray = columns.take(np.arange(count) % channels, axis=-1)
    return found
