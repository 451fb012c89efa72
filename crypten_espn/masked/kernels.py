"""Integer kernels of the masked engine: convolution, polynomial passes, rescaling.

Every kernel is exact modulo 2**32 (int32 arrays) or 2**64 (int64 arrays). Tensors are
channels-last: (batch, height, width, channels), so the inner loops run over output
channels with unit stride. Kernels run on one thread and release the GIL.
"""

from __future__ import annotations

import numpy as np

from ..channel import compiled

BLOCK = 1024  # elements a polynomial pass keeps in the first-level cache
_TILE = 1 << 15  # bytes of output a convolution keeps in the first-level cache


def ring_dtype(bits: int) -> type[np.signedinteger]:
    """int32 for rings of at most 32 bits, int64 for wider ones."""
    return np.int32 if bits <= 32 else np.int64


def ring_mask(bits: int) -> int:
    """2**bits - 1 as the int64 with the same 64 bits."""
    return -1 if bits == 64 else (1 << bits) - 1


def reduce_ring(values: np.ndarray, bits: int) -> np.ndarray:
    """Representatives in [0, 2**bits), or the type's own wrap for 32 and 64 bits."""
    if bits in (32, 64) and values.dtype == ring_dtype(bits):
        return values
    if bits == 32:
        return values.astype(np.int32)
    return (values & ring_mask(bits)).astype(ring_dtype(bits))


def centred(values: np.ndarray, bits: int) -> np.ndarray:
    """Representatives in [-2**(bits-1), 2**(bits-1)) as int64."""
    if bits == 64:
        return values.astype(np.int64)
    shift = 64 - bits
    return (values.astype(np.int64) << shift) >> shift


# ---------------------------------------------------------------- convolution


@compiled
def _convolve(x, weight, out, stride, dilation, tile):
    """out += conv(x, weight); x is padded, weight (groups, kh, kw, c, o)."""
    batch, height, width, _ = out.shape
    groups, kernel_h, kernel_w, depth, filters = weight.shape
    pixels = batch * height * width
    plane = height * width
    whole = depth - depth % 8
    for group in range(groups):
        c_start = group * depth
        o_start = group * filters
        for start in range(0, pixels, tile):
            stop = min(pixels, start + tile)
            for i in range(kernel_h):
                for j in range(kernel_w):
                    for c in range(0, whole, 8):
                        w0 = weight[group, i, j, c]
                        w1 = weight[group, i, j, c + 1]
                        w2 = weight[group, i, j, c + 2]
                        w3 = weight[group, i, j, c + 3]
                        w4 = weight[group, i, j, c + 4]
                        w5 = weight[group, i, j, c + 5]
                        w6 = weight[group, i, j, c + 6]
                        w7 = weight[group, i, j, c + 7]
                        k = c_start + c
                        p = start
                        # Two pixels share each load of the weights.
                        while p + 1 < stop:
                            n = p // plane
                            h = (p - n * plane) // width
                            w = p - n * plane - h * width
                            q = p + 1
                            n2 = q // plane
                            h2 = (q - n2 * plane) // width
                            v2 = q - n2 * plane - h2 * width
                            a = x[
                                n,
                                h * stride[0] + i * dilation[0],
                                w * stride[1] + j * dilation[1],
                            ]
                            b = x[
                                n2,
                                h2 * stride[0] + i * dilation[0],
                                v2 * stride[1] + j * dilation[1],
                            ]
                            a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
                            a4, a5, a6, a7 = a[k + 4], a[k + 5], a[k + 6], a[k + 7]
                            b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
                            b4, b5, b6, b7 = b[k + 4], b[k + 5], b[k + 6], b[k + 7]
                            y = out[n, h, w, o_start : o_start + filters]
                            z = out[n2, h2, v2, o_start : o_start + filters]
                            for o in range(filters):
                                y[o] += (
                                    a0 * w0[o]
                                    + a1 * w1[o]
                                    + a2 * w2[o]
                                    + a3 * w3[o]
                                    + a4 * w4[o]
                                    + a5 * w5[o]
                                    + a6 * w6[o]
                                    + a7 * w7[o]
                                )
                                z[o] += (
                                    b0 * w0[o]
                                    + b1 * w1[o]
                                    + b2 * w2[o]
                                    + b3 * w3[o]
                                    + b4 * w4[o]
                                    + b5 * w5[o]
                                    + b6 * w6[o]
                                    + b7 * w7[o]
                                )
                            p += 2
                        while p < stop:
                            n = p // plane
                            h = (p - n * plane) // width
                            w = p - n * plane - h * width
                            a = x[
                                n,
                                h * stride[0] + i * dilation[0],
                                w * stride[1] + j * dilation[1],
                            ]
                            a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
                            a4, a5, a6, a7 = a[k + 4], a[k + 5], a[k + 6], a[k + 7]
                            y = out[n, h, w, o_start : o_start + filters]
                            for o in range(filters):
                                y[o] += (
                                    a0 * w0[o]
                                    + a1 * w1[o]
                                    + a2 * w2[o]
                                    + a3 * w3[o]
                                    + a4 * w4[o]
                                    + a5 * w5[o]
                                    + a6 * w6[o]
                                    + a7 * w7[o]
                                )
                            p += 1
                    for c in range(whole, depth):
                        w0 = weight[group, i, j, c]
                        for p in range(start, stop):
                            n = p // plane
                            h = (p - n * plane) // width
                            w = p - n * plane - h * width
                            a0 = x[
                                n,
                                h * stride[0] + i * dilation[0],
                                w * stride[1] + j * dilation[1],
                                c_start + c,
                            ]
                            y = out[n, h, w, o_start : o_start + filters]
                            for o in range(filters):
                                y[o] += a0 * w0[o]


@compiled
def _convolve_depthwise(x, weight, out, stride, dilation):
    """out += one filter per channel; weight (kh, kw, channels)."""
    batch, height, width, channels = out.shape
    for n in range(batch):
        for h in range(height):
            for w in range(width):
                y = out[n, h, w]
                for i in range(weight.shape[0]):
                    for j in range(weight.shape[1]):
                        a = x[
                            n,
                            h * stride[0] + i * dilation[0],
                            w * stride[1] + j * dilation[1],
                        ]
                        b = weight[i, j]
                        for c in range(channels):
                            y[c] += a[c] * b[c]


@compiled
def _pool_sum(x, kernel, stride, out):
    """out += sums over windows; x is padded."""
    batch, height, width, channels = out.shape
    for n in range(batch):
        for h in range(height):
            for w in range(width):
                y = out[n, h, w]
                for i in range(kernel[0]):
                    for j in range(kernel[1]):
                        a = x[n, h * stride[0] + i, w * stride[1] + j]
                        for c in range(channels):
                            y[c] += a[c]


def pad(x: np.ndarray, pads: tuple[int, int, int, int]) -> np.ndarray:
    """Zeros around (batch, height, width, channels): top, left, bottom, right."""
    top, left, bottom, right = pads
    if not any(pads):
        return np.ascontiguousarray(x)
    n, h, w, c = x.shape
    out = np.zeros((n, h + top + bottom, w + left + right, c), dtype=x.dtype)
    out[:, top : top + h, left : left + w] = x
    return out


def convolve(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    *,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    """Add the convolution of `x` with `weight` to `out`, exactly in its ring.

    Args:
        x: (batch, height, width, channels), ring elements of any scale.
        weight: (groups, kh, kw, channels / groups, filters / groups), or (kh, kw,
            channels) for one filter per channel.
        out: (batch, oh, ow, filters), accumulated in place; same dtype as both.
        stride, dilation: (vertical, horizontal).
        pads: zeros at top, left, bottom, right.
    """
    padded = pad(x, pads)
    if weight.ndim == 3:
        _convolve_depthwise(padded, weight, out, stride, dilation)
        return
    row = weight.shape[-1] * out.dtype.itemsize
    tile = max(2, _TILE // row)
    _convolve(padded, weight, out, stride, dilation, tile)


def pool_sum(
    x: np.ndarray,
    out: np.ndarray,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    """Add the sums over pooling windows to `out`, in its ring."""
    _pool_sum(pad(x, pads), kernel, stride, out)


# ---------------------------------------------------------------- polynomial passes


@compiled
def _polynomial_share(c, bits, values, shifts, degrees, public, constant, out):
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    opened = np.empty(BLOCK, np.int64)
    reduced = np.empty(BLOCK, np.int64)
    top = np.empty(BLOCK, np.int64)
    acc = np.empty(BLOCK, np.int64)
    total = out.shape[0]
    for start in range(0, total, BLOCK):
        size = min(BLOCK, total - start)
        for i in range(size):
            u = np.int64(c[start + i]) & mask
            opened[i] = u
            # All ones where the top bit is set: the logical case, values[0].
            top[i] = -((u >> (bits - 1)) & 1)
        first = values[0, 0, start : start + size]
        second = values[1, 0, start : start + size]
        result = out[start : start + size]
        for i in range(size):
            result[i] = second[i] ^ ((first[i] ^ second[i]) & top[i])
            result[i] += constant
        index = 1
        for g in range(shifts.shape[0]):
            shift = shifts[g]
            offset = np.int64(1) << (bits - 2 - shift)
            degree = degrees[g]
            lead = public[g, degree]
            for i in range(size):
                reduced[i] = (opened[i] >> shift) - offset
                acc[i] = lead
            # Horner in the opened value; values hold the rising powers 1, 2, ...
            for j in range(degree - 1, 0, -1):
                coefficient = public[g, j]
                first = values[0, index + j - 1, start : start + size]
                second = values[1, index + j - 1, start : start + size]
                for i in range(size):
                    v = second[i] ^ ((first[i] ^ second[i]) & top[i])
                    acc[i] = acc[i] * reduced[i] + coefficient + v
            index += degree - 1
            for i in range(size):
                result[i] += acc[i] * reduced[i]


@compiled
def _deal_polynomial(r, bits, shifts, degrees, table, mine, values):
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    sign = 64 - bits
    limit = table.shape[1]
    powers = np.empty((limit + 1, BLOCK), np.int64)
    acc = np.empty(BLOCK, np.int64)
    constant = np.empty(BLOCK, np.int64)
    total = r.shape[0]
    for start in range(0, total, BLOCK):
        size = min(BLOCK, total - start)
        for case in range(2):
            for i in range(size):
                constant[i] = 0
            index = 1
            for g in range(shifts.shape[0]):
                shift = shifts[g]
                degree = degrees[g]
                base = powers[1]
                if case == 0:
                    for i in range(size):
                        base[i] = -((np.int64(r[start + i]) & mask) >> shift)
                else:
                    for i in range(size):
                        base[i] = -(((np.int64(r[start + i]) << sign) >> sign) >> shift)
                for k in range(2, degree + 1):
                    low = powers[k - 1]
                    high = powers[k]
                    for i in range(size):
                        high[i] = low[i] * base[i]
                for k in range(1, degree + 1):
                    weight = table[g, 0, k]
                    power = powers[k]
                    for i in range(size):
                        constant[i] += weight * power[i]
                for j in range(1, degree):
                    for i in range(size):
                        acc[i] = 0
                    for k in range(1, degree - j + 1):
                        weight = table[g, j, k]
                        power = powers[k]
                        for i in range(size):
                            acc[i] += weight * power[i]
                    taken = mine[case, index + j - 1, start : start + size]
                    given = values[case, index + j - 1, start : start + size]
                    for i in range(size):
                        given[i] = acc[i] - taken[i]
                index += degree - 1
            taken = mine[case, 0, start : start + size]
            given = values[case, 0, start : start + size]
            for i in range(size):
                given[i] = constant[i] - taken[i]


@compiled
def _rescale(mine, theirs, bits, drop, out):
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    offset = np.int64(1) << (bits - 2)
    keep = (np.int64(1) << (bits - drop)) - 1
    reduced = np.int64(1) << (bits - 2 - drop)
    for i in range(out.shape[0]):
        c = (mine[i] + theirs[i] + offset) & mask
        # The shift is logical: the bits an arithmetic one would smear are masked.
        out[i] = ((c >> drop) & keep) - reduced


@compiled
def _mask_shift(r, bits, drop, out):
    mask = np.int64(-1) if bits == 64 else (np.int64(1) << bits) - 1
    keep = (np.int64(1) << (bits - drop)) - 1
    for i in range(out.shape[0]):
        out[i] = -(((r[i] & mask) >> drop) & keep)


def polynomial_share(
    opened: np.ndarray,
    values: np.ndarray,
    *,
    bits: int,
    shifts: np.ndarray,
    degrees: np.ndarray,
    public: np.ndarray,
    constant: int,
    out: np.ndarray,
) -> None:
    """One party's share of p(x) from the opened c, reading each operand once.

    With D_g = (c >> shift_g) - 2**(bits-2-shift_g), writes the selected values[., 0]
    plus, for each group g, sum_j D_g**j * (public[g, j] + selected values[., g_j]).

    Args:
        opened: (n,) c modulo 2**bits, int32 or int64.
        values: (2, V, n) this party's shares of the dealer's values; [0] where the top
            bit of c is 1, [1] where it is 0.
        shifts, degrees: (groups,) int64; a group of degree d uses d - 1 values.
        public: (groups, max degree + 1) integer coefficients; zero for rank 1.
        constant: added to every element; zero for rank 1.
        out: (n,) int64, the share modulo 2**64.
    """
    _polynomial_share(
        opened, bits, values, shifts, degrees, public, np.int64(constant), out
    )


def deal_polynomial(
    r: np.ndarray,
    taken: np.ndarray,
    *,
    bits: int,
    shifts: np.ndarray,
    degrees: np.ndarray,
    table: np.ndarray,
    out: np.ndarray,
) -> None:
    """The dealer's values for both possible masks, less the shares already taken.

    Args:
        r: (n,) uniform masks modulo 2**bits.
        taken: (2, V, n) the other party's shares, uniform modulo 2**64.
        table: (groups, K, K+1): table[g, j, k] multiplies t**k in the value that
            belongs to D**j; K is the largest degree.
        out: (2, V, n) what this party gets.
    """
    _deal_polynomial(r, bits, shifts, degrees, table, taken, out)


def rescale(
    mine: np.ndarray, theirs: np.ndarray, *, bits: int, drop: int, out: np.ndarray
) -> None:
    """D = (c >> drop) - 2**(bits-2-drop) with c = mine + theirs + 2**(bits-2)."""
    _rescale(mine, theirs, bits, drop, out)


def mask_shift(r: np.ndarray, *, bits: int, drop: int, out: np.ndarray) -> None:
    """t = -(r >> drop), a logical shift of r modulo 2**bits."""
    _mask_shift(r, bits, drop, out)
