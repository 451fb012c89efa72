"""Integer kernels: exact against torch's int64 convolution and Python integers."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crypten_espn.compiled import heat, variants
from crypten_espn.errors import PlanError
from crypten_espn.masked import kernels
from crypten_espn.masked.evaluation import polynomial
from crypten_espn.masked.kernels import activation, halves
from crypten_espn.masked.kernels.tiles import FEATURES
from crypten_espn.masked.kernels.winograd import LANES
from crypten_espn.masked.plan import WeightShape
from crypten_espn.masked.steps import Activation, Group, Linear


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("bits", [32, 64])
def test_convolution_is_exact_in_its_ring(bits, data):
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depth, filters = draw(st.integers(1, 18)), draw(st.integers(1, 9))
    filters = draw(st.sampled_from([filters, LANES]))
    if draw(st.booleans()) and groups > 1:
        depth = filters = 1  # one filter per channel
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    stride = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(4))
    size = (draw(st.integers(5, 9)), draw(st.integers(5, 9)))
    batch = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    check_convolution(
        rng, bits, groups, depth, filters, kernel, stride, dilation, pads, size, batch
    )


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("filters", [1, 4, 17, 48, 71])
def test_convolution_is_exact_at_every_width_of_a_tile(bits, filters):
    """Full vectors, pairs, quadruples and what is left over, at tiles' edges."""
    rng = np.random.default_rng(filters)
    one = (1, 1)
    check_convolution(
        rng, bits, 1, 66, filters, one, one, one, (0, 0, 0, 0), (10, 11), 1
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_fast_convolution_is_exact_modulo_2_30(data):
    """Odd and even images, several strips of tiles, tiles of 1, 2, 4 vectors."""
    draw, lanes = data.draw, LANES
    depth, filters = (lanes * draw(st.sampled_from([1, 2, 3, 7])) for _ in range(2))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(4))
    size = (draw(st.integers(3, 17)), draw(st.integers(3, 17)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    one, batch = (1, 1), draw(st.integers(1, 3))
    check_convolution(
        rng, 32, 1, depth, filters, (3, 3), one, one, pads, size, batch, fast=True
    )


@pytest.mark.parametrize(
    "ring, stride, size, shape, paid",
    [
        (30, (1, 1), (8, 8), (1, 3, 3, 64, 64), True),
        (31, (1, 1), (8, 8), (1, 3, 3, 64, 64), False),
        (30, (2, 2), (8, 8), (1, 3, 3, 64, 64), False),
        (30, (1, 1), (2, 2), (1, 3, 3, 64, 64), False),
        (30, (1, 1), (8, 8), (2, 3, 3, 64, 64), False),
        (30, (1, 1), (8, 8), (1, 3, 1, 64, 64), False),
        (30, (1, 1), (8, 8), (1, 3, 3, 65, 64), False),
        (30, (1, 1), (8, 8), (3, 3, 64), False),
    ],
)
def test_layers_are_computed_fast_where_that_is_exact(ring, stride, size, shape, paid):
    found = kernels.pays(shape, ring, stride=stride, dilation=(1, 1), size=size)
    assert found is paid


def check_convolution(
    rng, bits, groups, depth, filters, kernel, stride, dilation, pads, size, batch,
    *, fast=False,
):  # fmt: skip
    """Weights of 16 bits and wider ones, by every way to multiply."""
    x = rng.integers(-(2**63), 2**63 - 1, (batch, *size, depth * groups))
    x[..., :2] = rng.choice([-1, 2**15, 2**31 - 2**15, -(2**31)], x[..., :2].shape)
    top, left, bottom, right = pads
    for width in (16, 41):
        limit = 2 ** (width - 1) // (9 if fast and width == 16 else 1)
        w = rng.integers(-limit, limit, (filters * groups, depth, *kernel))
        w[0, 0, 0, 0], w[-1, -1, -1, -1] = -limit, limit - 1
        expected = torch.nn.functional.conv2d(
            torch.nn.functional.pad(
                torch.from_numpy(x).permute(0, 3, 1, 2), (left, right, top, bottom)
            ),
            torch.from_numpy(w),
            stride=stride,
            dilation=dilation,
            groups=groups,
        ).permute(0, 2, 3, 1)
        shape = WeightShape(w.shape, groups, bits)
        dtype = kernels.ring_dtype(bits)
        arranged = shape.arrange(w).astype(dtype)
        assert arranged.shape == shape.kernel_layout
        start = rng.integers(-(2**63), 2**63 - 1, tuple(expected.shape))
        wanted = (expected.numpy() + start).astype(dtype)
        ring = 30 if fast else bits
        for filters_made in ways(arranged, fast=fast):
            out = start.astype(dtype)
            kernels.convolve(
                x.astype(dtype),
                filters_made,
                out,
                stride=stride,
                dilation=dilation,
                pads=pads,
            )
            assert np.array_equal(
                kernels.reduce_ring(out, ring), kernels.reduce_ring(wanted, ring)
            )


def ways(weight, *, fast=False):
    """The filters as each kind of processor has them that this one can stand for."""
    for halved in (False, True) if "avx2" in FEATURES else (False,):
        with patch.multiple(halves, SHORT=halved, LONG=halved):
            yield kernels.Filters(weight, fast=fast)


@pytest.mark.skipif("avx2" not in FEATURES, reason="multiplies no halves")
@pytest.mark.parametrize("fast", [False, True])
def test_weights_of_16_bits_take_two_phases_and_wider_ones_three(fast):
    # Winograd's weights are up to 9 times as large.
    within = np.full((1, 3, 3, LANES, LANES), 2**15 // 9 if fast else 2**15 - 1)
    found = []
    for weight in (within, within + 1, -within - 1, -within - 2):
        *_, last = ways(weight.astype(np.int32), fast=fast)
        found.append(len(last.phases))
    assert found == ([2, 3, 3, 3] if fast else [2, 3, 2, 3])
    assert [len(one.phases) for one in ways(within)] == [1, 1]  # int64


def test_a_convolution_into_part_of_an_array_touches_nothing_else():
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (2, 4, 4, 3))
    weight = rng.integers(-9, 9, (1, 1, 1, 3, 16))
    whole = np.zeros((2, 4, 4, 20), dtype=np.int64)
    options: dict[str, Any] = {"stride": (1, 1), "dilation": (1, 1), "pads": (0,) * 4}
    kernels.convolve(x, kernels.Filters(weight), whole[..., 2:18], **options)
    assert np.array_equal(whole[..., 2:18], x @ weight[0, 0, 0])
    assert not whole[..., :2].any() and not whole[..., 18:].any()


def test_pool_sum_is_exact():
    x = np.arange(2 * 6 * 6 * 3).reshape(2, 6, 6, 3).astype(np.int32) * 12345677
    out = np.zeros((2, 3, 3, 3), dtype=np.int32)
    kernels.pool_sum(x, out, kernel=(3, 2), stride=(2, 2), pads=(1, 0, 0, 0))
    padded = np.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))
    for i in range(3):
        for j in range(3):
            window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 2]
            assert np.array_equal(out[:, i, j], window.sum((1, 2), dtype=np.int32))


def channels(count, degree, seed=0):
    """Rows of any integers, and one of none."""
    rows = np.random.default_rng(seed).integers(-(2**50), 2**50, (count, degree + 1))
    rows[:, 0] = rows[-1] = 0
    return tuple(map(tuple, rows.tolist()))


# The last has channels that fill a block, others that divide it or leave a rest.
POLYNOMIALS = [
    (Linear(0, (5 << 30,)), ()),
    (Linear(9, (7,)), (Group(9, ((0, 0, -11),)), Group(15, ((0, 0, 0, 3, 1),)))),
    (None, (Group(4, ((0, 1, -2, 3, -4, 5, -6),)),)),
    (Linear(3, (-9,)), (Group(12, ((0, 0, 5),)),)),
    (Linear(9, (7, -8, 9)), (Group(9, channels(3, 2)), Group(15, channels(3, 4)))),
    (Linear(2, (1,)), (Group(4, ((0, 0, 4),)), Group(9, channels(1500, 3)))),
    (None, (Group(4, channels(50, 3)), Group(9, channels(50, 10)))),
]


def of_channel(columns, i):
    """What element i reads, channels last."""
    return columns[i % len(columns)]


@pytest.mark.parametrize("bits", [24, 32, 33, 56])
@pytest.mark.parametrize("linear, groups", POLYNOMIALS)
def test_polynomial_of_an_opening_is_exact(bits, linear, groups):
    """dealer + both parties = p of the floor-or-floor-plus-one, modulo 2**64."""
    check_polynomial(bits, linear, groups, 3001)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 511, 529])
def test_a_polynomial_of_few_elements_is_exact(count):
    """Those that fill no vector, no block, or just more than one."""
    for bits in (32, 33):
        check_polynomial(bits, *POLYNOMIALS[4], count, every=1)


def check_polynomial(bits, linear, groups, count, *, every=7):
    rng = np.random.default_rng(3)
    count_of = [len(group.coeffs) for group in groups]
    constant = tuple(987654321 + c for c in range(max([1, *count_of])))
    # With so few bits to drop the client sends all, and nothing is left out of a word.
    act = Activation(16, 11, linear=linear, groups=groups, constant=constant)
    of, dtype = polynomial(act, bits, act.zeros(bits)), kernels.ring_dtype(bits)
    bound = 2 ** (bits - 2) - 1
    z = rng.integers(-bound, bound + 1, count)
    z[:4] = [-bound, bound, 0, -1][:count]
    r = rng.integers(0, 2**bits, (act.masks, count))
    edges = [0, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1]
    r[0, 4:8] = edges[: max(0, count - 4)]
    coins = rng.integers(0, 2**32, count)
    taken = rng.integers(-(2**63), 2**63 - 1, (act.words, count))
    given = taken.copy()
    of.deal(kernels.reduce_ring(r, bits), coins, given, out=given)
    c = kernels.reduce_ring(z + 2 ** (bits - 2) + r[0], bits)
    opened = np.empty((act.masks, count), dtype=dtype)
    kernels.shifted_openings(
        c,
        kernels.reduce_ring(r[1:] - r[0], bits).astype(dtype),
        bits=bits,
        shifts=of.shifts,
        out=opened,
    )
    for row, mask, shift in zip(opened, r, of.shifts, strict=True):
        expected = ((z + 2 ** (bits - 2) + mask) % 2**bits) >> shift
        assert np.array_equal(
            row.astype(np.int64) & (2 ** (bits - shift) - 1), expected
        )
    shares = []
    for values in (given, taken):
        out = np.empty(count, dtype=np.int64)
        of.share(opened, values, c=c if values is given else None, step=0, out=out)
        shares.append(out)
    for i in range(0, count, every):
        expected = of_channel(act.constant, i) + int(coins[i])
        if linear is not None:
            x = (int(z[i]) + int(r[0, i]) % 2**linear.shift) >> linear.shift
            expected += of_channel(linear.coefficient, i) * x
        for g, group in enumerate(groups):
            s = group.shift
            x = (int(z[i]) + int(r[g, i]) % 2**s) >> s
            assert x in (int(z[i]) >> s, (int(z[i]) >> s) + 1)
            row = of_channel(group.coeffs, i)
            expected += sum(a * x**k for k, a in enumerate(row))
        got = int(shares[0][i]) + int(shares[1][i])
        assert (got - expected) % 2**64 == 0


@pytest.mark.parametrize("count", [1, 7, 1200])
@pytest.mark.parametrize("rows, step", [(slice(0, 1), 0), (slice(1, 3), 16)])
def test_a_share_of_some_inputs_is_that_of_all(rows, step, count):
    rng = np.random.default_rng(5)
    elements = count * (1500 // count)
    opened = rng.integers(0, 2**20, (2, 3 * elements)).astype(np.int32)
    words = rng.integers(-(2**63), 2**63 - 1, (11, 3 * elements))
    c = rng.integers(0, 2**30, 3 * elements).astype(np.int32)
    of = kernels.Polynomial(
        bits=30,
        shifts=np.array([0, 10]),
        degrees=np.array([2, 4]),
        coeffs=rng.integers(-99, 99, (2, 5, count)),
        linear=rng.integers(-99, 99, count),
        linear_shift=3,
        zeros=np.array([16, 0, 30, 31, 3, 0, 0, 20, 20, 20, 22]),
    )
    found = []
    for part, drop in ((slice(0, 3), 0), (rows, step)):
        here = slice(part.start * elements, part.stop * elements)
        for own in (c[here], None):
            out = np.empty(here.stop - here.start, dtype=np.int64)
            given = np.ascontiguousarray(words[:, here])
            of.share(opened[:, here], given, c=own, step=drop, out=out)
            found.append(out.view(np.uint64))
    here = slice(rows.start * elements, rows.stop * elements)
    for whole, some in zip(found[:2], found[2:], strict=True):
        assert np.array_equal(some, whole[here] >> np.uint64(step))


@pytest.mark.parametrize("drop, kept", [(32, 16), (24, 16), (12, 12), (8, 8), (44, 16)])
def test_a_second_opening_drops_its_bits(drop, kept):
    """The next D is the opened value's high part, less the offset, by integers."""
    rng = np.random.default_rng(4)
    count, step = 5000, drop - kept
    mine = rng.integers(-(2**63), 2**63 - 1, count)
    theirs = rng.integers(-(2**63), 2**63 - 1, count) >> step
    ring = 64 - drop
    out = np.empty(count, kernels.ring_dtype(ring))
    kernels.truncate(mine, theirs, bits=64, drop=drop, step=step, out=out)
    for i in range(0, count, 7):
        c = (int(mine[i]) + (int(theirs[i]) << step) + 2**62) % 2**64
        expected = (c >> drop) - 2 ** (62 - drop)
        assert (int(out[i]) - expected) % 2**ring == 0


@pytest.mark.parametrize("bits", [32, 40])
def test_a_mask_joins_a_line_of_shares_above_the_bits_that_round(bits):
    rng = np.random.default_rng(6)
    line = rng.integers(-(2**63), 2**63 - 1, 100)
    mask = rng.integers(-(2**31), 2**31, 60).astype(kernels.ring_dtype(bits))
    sums = line.copy()
    kernels.hide(sums[:60], mask, kept=16)
    for before, after, one in zip(line, sums, mask, strict=False):
        assert (int(before) + (int(one) << 16) - int(after)) % 2**64 == 0
    assert np.array_equal(sums[60:], line[60:])


def test_dealing_in_place_gives_what_dealing_elsewhere_does():
    call = right_calls()["Polynomial.deal"]
    rng = np.random.default_rng(7)
    taken = rng.integers(-(2**63), 2**63 - 1, (11, 5))
    elsewhere = np.empty_like(taken)
    call(taken=taken, out=elsewhere)
    call(taken=taken, out=taken)
    assert np.array_equal(taken, elsewhere)


@pytest.mark.parametrize("name", ["Polynomial.share", "Polynomial.deal"])
def test_operands_with_gaps_are_read_as_those_without(name):
    call = right_calls()[name]
    rng = np.random.default_rng(8)
    count = 21
    close: dict[str, Any] = {}
    for key, value in call.given.items():
        if isinstance(value, np.ndarray) and value.shape[-1] == 5:
            shape = (*value.shape[:-1], count)
            close[key] = rng.integers(0, 2**31, shape).astype(value.dtype)
    apart = {
        key: np.repeat(value, 2, axis=-1)[..., ::2]
        for key, value in close.items()
        if key != "out"
    }
    call(**close)
    out = np.empty_like(close["out"])
    call(**apart, out=out)
    assert np.array_equal(out, close["out"])


def test_representatives():
    values = np.array([-1, 5, 2**31, -(2**31)], dtype=np.int64)
    assert kernels.reduce_ring(values, 32).tolist() == [-1, 5, -(2**31), -(2**31)]
    assert kernels.reduce_ring(values, 24).tolist() == [2**24 - 1, 5, 0, 0]
    assert kernels.reduce_ring(values, 40).tolist() == [
        2**40 - 1,
        5,
        2**31,
        2**40 - 2**31,
    ]
    assert kernels.centred(np.array([2**24 - 1, 2**23]), 24).tolist() == [-1, -(2**23)]


# ---------------------------------------------------------------- refusals


@dataclasses.dataclass
class Call:
    """A kernel with arguments that belong together."""

    kernel: Any
    given: dict[str, Any]

    def __call__(self, **other: Any) -> None:
        given = {**self.given, **other}
        positional = [given.pop(name) for name in self.positional]
        self.kernel(*positional, **given)

    @property
    def positional(self) -> list[str]:
        known = inspect.signature(self.kernel).parameters.values()
        return [one.name for one in known if one.kind is one.POSITIONAL_OR_KEYWORD]


def words(*shape, dtype=np.int64):
    return np.ones(shape, dtype=dtype)


def narrow(*shape):
    return words(*shape, dtype=np.int32)


def filters(*shape, fast=False):
    return kernels.Filters(narrow(*shape), fast=fast)


def right_calls():
    """Afresh for every test: one call of each public kernel that is right."""
    shifts = np.array([3, 9])
    given = {
        "bits": 32, "shifts": shifts, "degrees": np.array([2, 4]),
        "coeffs": words(2, 5, 3), "linear": words(3), "linear_shift": 2,
        "zeros": words(11),
    }  # fmt: skip
    of = kernels.Polynomial(**given)
    wide = kernels.Polynomial(**{**given, "bits": 40})
    return {
        "shifted_openings": Call(
            kernels.shifted_openings,
            {"c": narrow(5), "deltas": narrow(1, 5), "bits": 32, "shifts": shifts,
             "out": narrow(2, 5)},
        ),
        "Polynomial": Call(kernels.Polynomial, given),
        "Polynomial.share": Call(
            of.share,
            {"opened": narrow(2, 5), "values": words(11, 5), "c": narrow(5), "step": 16,
             "out": words(5)},
        ),
        "Polynomial.share wide": Call(
            wide.share,
            {"opened": words(2, 5), "values": words(11, 5), "c": words(5), "step": 16,
             "out": words(5)},
        ),
        "Polynomial.deal": Call(
            of.deal,
            {"masks": narrow(2, 5), "rounding": words(5), "taken": words(11, 5),
             "out": words(11, 5)},
        ),
        "hide": Call(kernels.hide, {"words": words(5), "mask": narrow(5), "kept": 16}),
        "truncate": Call(
            kernels.truncate,
            {"mine": words(5), "theirs": words(5), "bits": 64, "drop": 32, "step": 16,
             "out": narrow(5)},
        ),
        "convolve": Call(
            kernels.convolve,
            {"x": narrow(2, 6, 6, 4), "weight": filters(2, 3, 3, 2, 3),
             "out": narrow(2, 6, 6, 6), "stride": (1, 1), "dilation": (1, 1),
             "pads": (1, 1, 1, 1)},
        ),
        "convolve each channel": Call(
            kernels.convolve,
            {"x": narrow(2, 6, 6, 4), "weight": filters(3, 3, 4),
             "out": narrow(2, 4, 4, 4), "stride": (1, 1), "dilation": (1, 1),
             "pads": (0, 0, 0, 0)},
        ),
        "convolve fast": Call(
            kernels.convolve,
            {"x": narrow(2, 6, 6, LANES),
             "weight": filters(1, 3, 3, LANES, LANES, fast=True),
             "out": narrow(2, 6, 6, LANES), "stride": (1, 1), "dilation": (1, 1),
             "pads": (1, 1, 1, 1)},
        ),
        "Filters": Call(kernels.Filters, {"weight": narrow(2, 3, 3, 2, 3)}),
        "pool_sum": Call(
            kernels.pool_sum,
            {"x": narrow(2, 6, 6, 4), "out": narrow(2, 3, 3, 4), "kernel": (2, 2),
             "stride": (2, 2), "pads": (0, 0, 0, 0)},
        ),
        "pad": Call(kernels.pad, {"x": narrow(2, 6, 6, 4), "pads": (1, 0, 0, 1)}),
    }  # fmt: skip


WRONG = [
    ("shifted_openings", {"c": narrow(4)}),
    ("shifted_openings", {"c": narrow(5, 1)}),
    ("shifted_openings", {"c": words(5)}),
    ("shifted_openings", {"deltas": narrow(2, 5)}),
    ("shifted_openings", {"deltas": narrow(0, 5)}),
    ("shifted_openings", {"shifts": np.array([3])}),
    ("shifted_openings", {"shifts": np.array([3, 32])}),
    ("shifted_openings", {"shifts": np.array([-1, 3])}),
    ("shifted_openings", {"shifts": np.array([1.0, 3.0])}),
    ("shifted_openings", {"out": narrow(5)}),
    ("shifted_openings", {"out": narrow(1, 5)}),
    ("shifted_openings", {"bits": 65}),
    ("Polynomial.share", {"opened": narrow(1, 5)}),
    ("Polynomial.share", {"opened": narrow(5)}),
    ("Polynomial.share", {"opened": np.ones((2, 5))}),
    ("Polynomial.share", {"opened": words(2, 5)}),
    ("Polynomial.share", {"values": words(12, 5)}),
    ("Polynomial.share", {"values": words(11, 6)}),
    ("Polynomial.share", {"values": words(1, 11, 5)}),
    ("Polynomial.share", {"values": narrow(11, 5)}),
    ("Polynomial.share", {"c": narrow(4)}),
    ("Polynomial.share", {"c": words(5)}),
    ("Polynomial.share", {"c": narrow(5, 1)}),
    ("Polynomial.share", {"step": 64}),
    ("Polynomial.share", {"out": words(10)[::2]}),
    ("Polynomial.share", {"out": words(4)}),
    ("Polynomial.share", {"out": narrow(5)}),
    ("Polynomial.share wide", {"opened": narrow(2, 5), "c": narrow(5)}),
    ("Polynomial.share wide", {"opened": narrow(2, 5), "c": None}),
    ("hide", {"words": words(4)}),
    ("hide", {"words": narrow(5)}),
    ("hide", {"words": words(5, 1), "mask": narrow(5, 1)}),
    ("hide", {"mask": np.ones(5)}),
    ("hide", {"kept": 64}),
    ("hide", {"kept": -1}),
    ("Polynomial.deal", {"out": words(11, 10)[:, ::2]}),
    ("Polynomial.deal", {"masks": narrow(1, 5)}),
    ("Polynomial.deal", {"masks": narrow(2, 4)}),
    ("Polynomial.deal", {"masks": np.ones((2, 5))}),
    ("Polynomial.deal", {"rounding": words(4)}),
    ("Polynomial.deal", {"rounding": words(5, 1)}),
    ("Polynomial.deal", {"rounding": narrow(5)}),
    ("Polynomial.deal", {"taken": words(12, 5)}),
    ("Polynomial.deal", {"out": words(11, 4)}),
    ("Polynomial.deal", {"out": narrow(11, 5)}),
    ("Polynomial", {"bits": 64}),
    ("Polynomial", {"bits": 1}),
    ("Polynomial", {"degrees": np.array([6, 0])}),
    ("Polynomial", {"degrees": np.array([1, 5])}),
    ("Polynomial", {"degrees": np.array([-1, 7])}),
    ("Polynomial", {"degrees": np.array([6])}),
    ("Polynomial", {"degrees": np.array([2.0, 4.0])}),
    ("Polynomial", {"shifts": np.array([-1, 9])}),
    ("Polynomial", {"shifts": np.array([3])}),
    ("Polynomial", {"shifts": np.array([3, 32])}),
    ("Polynomial", {"shifts": np.array([3, 40])}),
    ("Polynomial", {"coeffs": words(2, 4, 3)}),
    ("Polynomial", {"coeffs": words(1, 5, 3)}),
    ("Polynomial", {"coeffs": words(3, 5, 3)}),
    ("Polynomial", {"coeffs": words(2, 5, 4)}),
    ("Polynomial", {"coeffs": words(2, 15)}),
    ("Polynomial", {"coeffs": np.ones((2, 5, 3))}),
    ("Polynomial", {"coeffs": narrow(2, 5, 3)}),
    ("Polynomial", {"coeffs": words(2, 5, 0), "linear": words(0)}),
    ("Polynomial", {"linear": words(1)}),
    ("Polynomial", {"linear": narrow(3)}),
    ("Polynomial", {"linear": words(1, 3)}),
    ("Polynomial", {"linear_shift": 31}),
    ("Polynomial", {"linear_shift": -1}),
    ("Polynomial", {"zeros": words(10)}),
    ("Polynomial", {"zeros": words(12)}),
    ("Polynomial", {"zeros": words(11) + 64}),
    ("Polynomial", {"zeros": -words(11)}),
    ("Polynomial", {"zeros": narrow(11)}),
    ("truncate", {"mine": words(4)}),
    ("truncate", {"theirs": narrow(5)}),
    ("truncate", {"out": np.ones(5)}),
    ("truncate", {"drop": 63}),
    ("truncate", {"drop": -1}),
    ("truncate", {"step": 64}),
    ("convolve", {"x": narrow(2, 6, 6, 3)}),
    ("convolve", {"x": words(2, 6, 6, 4)}),
    ("convolve", {"x": narrow(6, 6, 4)}),
    ("convolve", {"x": narrow(1, 6, 6, 4)}),
    ("convolve", {"weight": filters(2, 3, 3, 2, 4)}),
    ("convolve", {"weight": filters(3, 3, 4)}),
    ("convolve", {"weight": filters(1, 3, 3, 2, 3)}),
    ("convolve", {"weight": filters(2, 9, 9, 2, 3)}),
    ("convolve", {"weight": kernels.Filters(words(2, 3, 3, 2, 3))}),
    ("convolve", {"out": narrow(2, 5, 6, 6)}),
    ("convolve", {"out": narrow(2, 7, 6, 6)}),
    ("convolve", {"out": narrow(2, 6, 6, 5)}),
    ("convolve", {"stride": (1 << 36, 1)}),
    ("convolve", {"stride": (0, 1)}),
    ("convolve", {"stride": (-1, 1)}),
    ("convolve", {"dilation": (2, 1)}),
    ("convolve", {"dilation": (0, 1)}),
    ("convolve", {"pads": (-1, 3, 1, 1)}),
    ("convolve", {"x": np.ones((2, 6, 6, 4)), "out": np.ones((2, 6, 6, 6))}),
    ("convolve fast", {"stride": (2, 2), "out": narrow(2, 3, 3, LANES)}),
    ("convolve fast", {"dilation": (2, 2), "out": narrow(2, 4, 4, LANES)}),
    ("convolve fast", {"out": narrow(2, 7, 6, LANES)}),
    ("Filters", {"weight": narrow(2, 3, 3, 2)}),
    ("Filters", {"weight": np.ones((2, 3, 3, 2, 3))}),
    ("Filters", {"fast": True}),
    ("Filters", {"fast": True, "weight": words(1, 3, 3, LANES, LANES)}),
    ("Filters", {"fast": True, "weight": narrow(1, 3, 3, LANES, LANES + 1)}),
    ("convolve each channel", {"weight": filters(3, 3, 3)}),
    ("convolve each channel", {"out": narrow(2, 4, 4, 5)}),
    ("pool_sum", {"out": narrow(2, 3, 4, 4)}),
    ("pool_sum", {"out": words(2, 3, 3, 4)}),
    ("pool_sum", {"kernel": (0, 2)}),
    ("pool_sum", {"kernel": (8, 2)}),
    ("pool_sum", {"stride": (0, 2)}),
    ("pool_sum", {"pads": (-1, 0, 1, 0)}),
    ("pad", {"x": narrow(6, 6, 4)}),
    ("pad", {"pads": (-1, 0, 0, 0)}),
]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3, 16, 64, 100])
def test_after_heating_no_polynomial_of_channels_of_its_own_is_compiled(channels):
    heat()
    before = variants(activation.__name__)
    of = kernels.Polynomial(
        bits=30, shifts=np.array([2, 9]), degrees=np.array([2, 4]),
        coeffs=words(2, 5, channels), linear=words(channels), linear_shift=0,
        zeros=words(11),
    )  # fmt: skip
    values, out, opened = words(11, 200), words(200), narrow(2, 200)
    for c in (opened[1], None):
        of.share(opened, values, c=c, step=0, out=out)
    of.deal(opened, out, values, out=values)
    assert variants(activation.__name__) == before


@pytest.mark.parametrize("name", right_calls())
def test_arguments_that_belong_together_are_taken(name):
    right_calls()[name]()


@pytest.mark.parametrize("name, wrong", WRONG, ids=lambda v: str(v)[:40])
def test_arguments_that_do_not_belong_together_are_refused(name, wrong):
    call = right_calls()[name]
    given = {**call.given, **wrong}
    before = given["out"].copy() if "out" in given else None
    with pytest.raises(PlanError, match="do not belong together"):
        call(**wrong)
    if before is not None:
        assert np.array_equal(given["out"], before)


BOUNDS_CHECKED = """
import numpy as np
from crypten_espn.compiled import compiled
from crypten_espn.masked.kernels.vectors import LANES, load, store
from tests.masked import test_kernels as cases

@compiled
def beyond(array, index):
    return array[index]

@compiled
def vector_beyond(array, index):
    store(array, (0,), load(array, (index,)))

for kernel in (beyond, vector_beyond):
    try:
        kernel(np.zeros(LANES + 3, np.int64), LANES + 3 if kernel is beyond else 4)
    except IndexError:
        print("checked")
for name, call in cases.right_calls().items():
    call()
for bits in (32, 64):
    rng = np.random.default_rng(0)
    cases.check_convolution(
        rng, bits, 2, 3, 19, (3, 2), (2, 1), (1, 2), (1, 0, 2, 1), (7, 6), 2
    )
cases.check_convolution(
    rng, 32, 1, cases.LANES, 3 * cases.LANES, (3, 3), (1, 1), (1, 1), (1, 0, 1, 1),
    (7, 6), 2, fast=True,
)
for polynomial in cases.POLYNOMIALS:
    cases.test_polynomial_of_an_opening_is_exact(32, *polynomial)
for channels in (1, 7, 1200):
    cases.test_a_share_of_some_inputs_is_that_of_all(slice(1, 3), 16, channels)
print("all in bounds")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_stay_in_bounds(tmp_path):
    """The same calls with every index checked, compiled apart."""
    env = {
        **os.environ,
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "NUMBA_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", BOUNDS_CHECKED], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:3] == ["checked", "checked", "all in bounds"]


RESTRICTED = """
import numpy as np
from crypten_espn.masked.kernels.tiles import FEATURES, VECTOR
from tests.masked import test_kernels as cases

assert VECTOR == 32 and len(FEATURES) <= 1
rng, one, size = np.random.default_rng(0), (1, 1), (7, 6)
for filters in (cases.LANES, 2 * cases.LANES + 3):
    cases.check_convolution(
        rng, 32, 1, 5, filters, (3, 3), one, one, (1, 0, 2, 1), size, 2
    )
cases.check_convolution(
    rng, 32, 1, cases.LANES, cases.LANES, (3, 3), one, one, (1, 1, 1, 1), size, 1,
    fast=True,
)
cases.test_polynomial_of_an_opening_is_exact(32, *cases.POLYNOMIALS[1])
print("exact")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("features", ["", "+avx2"])
def test_kernels_are_exact_where_numba_may_use_less_of_a_processor(features, tmp_path):
    """As NUMBA_CPU_NAME=generic has it, or as on a processor with smaller vectors."""
    if not {features.strip("+")} <= {"", *FEATURES}:
        pytest.skip("this processor has none")
    env = {
        **os.environ,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", RESTRICTED], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "exact\n"
