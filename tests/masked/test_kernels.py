"""Integer kernels: exact against torch's int64 convolution and Python integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crypten_espn.masked import kernels
from crypten_espn.masked.plan import Activation, Group, WeightSpec


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("bits", [32, 64])
def test_convolution_is_exact_in_its_ring(bits, data):
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depth, filters = draw(st.integers(1, 18)), draw(st.integers(1, 9))
    if draw(st.booleans()) and groups > 1:
        depth = filters = 1  # one filter per channel
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    stride = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(4))
    size = (draw(st.integers(5, 9)), draw(st.integers(5, 9)))
    batch = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    x = rng.integers(-(2**63), 2**63 - 1, (batch, *size, depth * groups))
    w = rng.integers(-(2**40), 2**40, (filters * groups, depth, *kernel))
    top, left, bottom, right = pads
    expected = torch.nn.functional.conv2d(
        torch.nn.functional.pad(
            torch.from_numpy(x).permute(0, 3, 1, 2), (left, right, top, bottom)
        ),
        torch.from_numpy(w),
        stride=stride,
        dilation=dilation,
        groups=groups,
    ).permute(0, 2, 3, 1)
    spec = WeightSpec("layer", "", "", w.shape, groups, 1.0, 1.0, bits)
    dtype = kernels.ring_dtype(bits)
    start = rng.integers(-(2**63), 2**63 - 1, tuple(expected.shape))
    out = start.astype(dtype)
    kernels.convolve(
        x.astype(dtype),
        spec.arrange(w).astype(dtype),
        out,
        stride=stride,
        dilation=dilation,
        pads=pads,
    )
    assert np.array_equal(out, (expected.numpy() + start).astype(dtype))


def test_pool_sum_is_exact():
    x = np.arange(2 * 6 * 6 * 3).reshape(2, 6, 6, 3).astype(np.int32) * 12345677
    out = np.zeros((2, 3, 3, 3), dtype=np.int32)
    kernels.pool_sum(x, out, kernel=(3, 2), stride=(2, 2), pads=(1, 0, 0, 0))
    padded = np.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))
    for i in range(3):
        for j in range(3):
            window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 2]
            assert np.array_equal(out[:, i, j], window.sum((1, 2), dtype=np.int32))


def activation(bits, groups, drop=32):
    return Activation("a", 20, groups, 987654321, 64, 43, drop, 11)


GROUPS = [
    (Group(0, (0, 5 << 30)),),
    (Group(0, (0, 7)), Group(9, (0, 0, -11)), Group(15, (0, 0, 0, 3, 1))),
    (Group(4, (0, 1, -2, 3, -4, 5, -6)),),
]


@pytest.mark.parametrize("bits", [24, 32, 33, 40])
@pytest.mark.parametrize("groups", GROUPS)
def test_polynomial_of_an_opening_is_exact(bits, groups):
    """dealer + both parties = p of the floor-or-floor-plus-one, modulo 2**64."""
    rng = np.random.default_rng(3)
    count = 3000
    act = activation(bits, groups)
    bound = 2 ** (bits - 2) - 1
    z = rng.integers(-bound, bound + 1, count)
    z[:4] = [-bound, bound, 0, -1]
    r = rng.integers(0, 2**bits, count)
    r[4:8] = [0, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1]
    taken = rng.integers(-(2**63), 2**63 - 1, (2, act.values, count))
    given = np.empty_like(taken)
    kernels.deal_polynomial(
        r,
        taken,
        bits=bits,
        shifts=act.shifts,
        degrees=act.degrees,
        table=act.table,
        out=given,
    )
    c = (z + 2 ** (bits - 2) + r) % 2**bits
    opened = c.astype(np.uint32).view(np.int32) if bits == 32 else c
    shares = []
    for rank, values in enumerate((given, taken)):
        out = np.empty(count, dtype=np.int64)
        kernels.polynomial_share(
            opened,
            values,
            bits=bits,
            shifts=act.shifts,
            degrees=act.degrees,
            public=act.public if rank == 0 else np.zeros_like(act.public),
            constant=act.constant if rank == 0 else 0,
            out=out,
        )
        shares.append(out)
    for i in range(0, count, 7):
        expected = act.constant
        for group in groups:
            s = group.shift
            x = (int(z[i]) + int(r[i]) % 2**s) >> s
            assert x in (int(z[i]) >> s, (int(z[i]) >> s) + 1)
            expected += sum(a * x**k for k, a in enumerate(group.coeffs))
        got = int(shares[0][i]) + int(shares[1][i])
        assert (got - expected) % 2**64 == 0


@pytest.mark.parametrize("bits, drop", [(64, 32), (64, 24), (56, 24), (64, 31)])
def test_rescaling_is_floor_or_floor_plus_one(bits, drop):
    rng = np.random.default_rng(4)
    count = 20000
    bound = 2 ** (bits - 2) - 1
    y = rng.integers(-bound, bound + 1, count)
    y[:4] = [-bound, bound, 0, -1]
    r = rng.integers(-(2**63), 2**63 - 1, count)
    r[4:7] = [0, -1, -(2**63)]
    share = rng.integers(-(2**63), 2**63 - 1, count)
    ring = bits - drop
    dtype = kernels.ring_dtype(ring)
    d, t = np.empty(count, dtype), np.empty(count, dtype)
    kernels.rescale(share, y + r - share, bits=bits, drop=drop, out=d)
    kernels.mask_shift(r, bits=bits, drop=drop, out=t)
    x = kernels.centred(d + t, ring)
    for i in range(0, count, 17):
        low = int(r[i]) % 2**drop
        assert int(x[i]) == (int(y[i]) + low) >> drop
    rounding = x - (y >> drop)
    assert rounding.min() >= 0 and rounding.max() <= 1
    # Unbiased: the mean error is that of a fair carry.
    error = rounding.mean() - ((y & (2**drop - 1)) / 2**drop).mean()
    assert abs(error) < 6 * math.sqrt(0.25 / count)


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
