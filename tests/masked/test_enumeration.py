"""Both openings in tiny rings, every mask listed, computed by the engine's own kernels.

For a fixed secret value the joint distribution of everything the client sees or drew
and of the truncated value must be a product: then no average over repeated queries
tells the client how its values were rounded. What the server sees must be uniform. The
forms that leak are run too, and must be found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pytest

from crypten_espn.masked import kernels


def ids(*columns: np.ndarray) -> np.ndarray:
    """One number for each distinct row of the columns."""
    code = np.zeros(columns[0].shape, dtype=np.int64)
    for column in columns:
        code = code * (int(np.ptp(column)) + 1) + (column - column.min())
    return np.unique(code, return_inverse=True)[1]


def is_product(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a and b are independent when every row is equally likely."""
    joint = np.zeros((a.max() + 1, b.max() + 1), dtype=np.int64)
    np.add.at(joint, (a, b), 1)
    return bool((joint * len(a) == np.outer(joint.sum(1), joint.sum(0))).all())


def is_uniform(view: np.ndarray, size: int) -> bool:
    """Whether each of `size` possible views comes equally often."""
    counts = np.bincount(view)
    return len(counts) == size and bool((counts == counts[0]).all())


def listed(*sizes: int) -> list[np.ndarray]:
    """Every combination of numbers below the sizes, as columns."""
    columns = np.array(list(itertools.product(*map(range, sizes))), dtype=np.int64)
    return list(columns.T)


def inner(m: int) -> Iterable[int]:
    return range(-(1 << (m - 2)) + 1, 1 << (m - 2))


def quadratic(m, shift, squares, slopes, zeros):
    """a x**2 + b z by channel, x being z without `shift` bits."""
    coeffs = np.zeros((1, 3, len(squares)), dtype=np.int64)
    coeffs[0, 2] = squares
    return kernels.Polynomial(
        bits=m,
        shifts=np.array([shift]),
        degrees=np.array([2]),
        coeffs=coeffs,
        linear=np.array(slopes),
        linear_shift=0,
        zeros=zeros,
    )


def mask_value(r: np.ndarray, shift: int, m: int, top: np.ndarray) -> np.ndarray:
    """t: what the dealer knows of a truncation in both cases, selected by a bit."""
    signed = r - ((r >> (m - 1)) << m)
    return np.where(top == 1, -(r >> shift), -(signed >> shift))


def first_opening(z: int, m: int, shifts: tuple[int, ...]):
    """c, the client's view of every group by the kernel, and the truths x_k."""
    r, *deltas = listed(*[1 << m] * len(shifts))
    c = z + (1 << (m - 2)) + r
    shifted = np.empty((len(shifts), len(r)), dtype=np.int64)
    kernels.shifted_openings(
        c,
        np.array(deltas, dtype=np.int64).reshape(len(shifts) - 1, len(r)),
        bits=m,
        shifts=np.array(shifts),
        out=shifted,
    )
    xs = []
    for k, shift in enumerate(shifts):
        own = r if k == 0 else (r + deltas[k - 1]) % (1 << m)
        width = m - shift
        top = shifted[k] >> (width - 1)
        t = mask_value(own, shift, m, top)
        xs.append(shifted[k] - (1 << (width - 2)) + t)
        assert (xs[-1] == (z + (own & ((1 << shift) - 1))) >> shift).all()
    return c % (1 << m), r, deltas, shifted, xs


@pytest.mark.parametrize(
    "m, shifts", [(6, (2,)), (6, (1, 3)), (5, (2, 2)), (4, (1, 2, 2))]
)
def test_what_the_client_receives_of_an_opening_says_nothing_of_its_rounding(m, shifts):
    for z in inner(m):
        c, _, deltas, shifted, xs = first_opening(z, m, shifts)
        view = ids(*shifted)
        assert is_product(view, ids(*xs))
        assert is_uniform(view, int(np.prod([1 << (m - s) for s in shifts])))
        # The server holds all of c and delta.
        assert is_uniform(ids(c, *deltas), (1 << m) ** len(shifts))
        for shift, x in zip(shifts, xs, strict=True):
            assert x.sum() * (1 << shift) == z * len(x)  # unbiased


def test_the_forms_that_leak_are_found():
    """All of c at the client; one mask above the smallest shift; tops in common."""
    m, shifts = 6, (1, 3)
    everything = smallest = shared_top = 0
    for z in inner(m):
        r = np.arange(1 << m)
        c = (z + (1 << (m - 2)) + r) % (1 << m)
        xs = [(z + (r & ((1 << s) - 1))) >> s for s in shifts]
        everything += not is_product(ids(c), ids(*xs))
        smallest += not is_product(ids(c >> min(shifts)), ids(*xs))
        # A further mask from few random bits: its opening shows z beside the first.
        r, d = listed(1 << m, 1 << shifts[1])
        c = (z + (1 << (m - 2)) + r) % (1 << m)
        second, own = (c + d) % (1 << m), (r + d) % (1 << m)
        x = (z + (own & ((1 << shifts[1]) - 1))) >> shifts[1]
        shared_top += not is_product(ids(c >> shifts[0], second >> shifts[1]), ids(x))
    assert min(everything, smallest, shared_top) > 0


def test_masks_with_a_common_top_bit_show_the_value():
    m = 6
    half = 1 << (m - 1)
    seen = set()
    for z in inner(m):
        b, p, q = listed(2, half, half)
        one, two = ((z + (1 << (m - 2)) + b * half + x) % (1 << m) for x in (p, q))
        seen.add(int((one >> (m - 1) != two >> (m - 1)).sum()))
    assert len(seen) > 1


def second_opening(y: int, v: int, s: int, k: int):
    """The next x, the client's share and mask, and what it sent, by the kernel."""
    share, hidden, rho = listed(1 << v, 1 << (v - s), 1 << s)
    step = s - k
    mine = y + rho - share
    sent = ((share + (hidden << s)) % (1 << v)) >> step
    opened = np.empty_like(share)
    kernels.truncate(mine, sent, bits=v, drop=s, step=step, out=opened)
    x = (opened - hidden) % (1 << (v - s))
    return x, share, hidden, rho, mine % (1 << v), sent


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_the_second_opening_hides_its_coins_but_for_what_the_client_drops(k):
    v, s = 9, 4
    for y in (-(1 << (v - 2)), -37, -1, 0, 3, (1 << (v - 2)) - 1):
        x, share, hidden, rho, mine, sent = second_opening(y, v, s, k)
        dropped = share & ((1 << (s - k)) - 1)
        truth = (y + rho - dropped) >> s
        assert (x == truth % (1 << (v - s))).all()
        # Known to the client: what it drops. Everything else it holds says nothing.
        for d in np.unique(dropped):
            here = dropped == d
            assert is_product(ids(share[here], hidden[here]), ids(truth[here]))
            assert truth[here].mean() == pytest.approx((y - d) / (1 << s))
        assert is_product(ids(dropped), ids(truth)) == (k == s or y % 16 == -1)
        assert is_uniform(ids(mine, sent), 1 << (v + (v - s) + k))


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_a_pooled_second_opening_hides_its_one_coin(k):
    """Shares of two values are summed first; mask and coin are the sum's."""
    v, s = 5, 2
    step = s - k
    share, other, hidden, rho = listed(1 << v, 1 << v, 1 << (v - s), 1 << s)
    for y, z in ((0, 0), (3, -2), (-4, -3), (1, 5)):
        mine = (y - share) + (z - other) + rho
        sent = ((share + other + (hidden << s)) % (1 << v)) >> step
        opened = np.empty_like(share)
        kernels.truncate(mine, sent, bits=v, drop=s, step=step, out=opened)
        dropped = (share + other) % (1 << step)
        truth = (y + z + rho - dropped) >> s
        assert ((opened - hidden - truth) % (1 << (v - s)) == 0).all()
        for d in np.unique(dropped):
            here = dropped == d
            view = ids(share[here], other[here], hidden[here])
            assert is_product(view, ids(truth[here]))
            assert truth[here].mean() == pytest.approx((y + z - d) / (1 << s))
        assert is_uniform(ids(mine % (1 << v), sent), 1 << (v + (v - s) + k))


def test_a_coin_for_every_value_of_a_pool_would_be_biased():
    first, second = listed(1 << 3, 1 << 3)
    for y in range(-9, 9):
        one = (y + first) >> 3
        two = (y + first + second) >> 3
        assert one.mean() == y / 8
        assert two.mean() == pytest.approx(y / 8 + 7 / 16)


def test_a_client_that_draws_its_own_coins_knows_them():
    share, r = listed(1 << 6, 1 << 8)
    x = (21 + (r & 7)) >> 3
    assert not is_product(ids(r & 7), ids(x)) and share.size == x.size


@pytest.mark.slow
@pytest.mark.parametrize(
    "corrected, squares, slopes",
    [("server", [1], [1]), ("client", [1], [1]), ("server", [3, 2], [1, 3])],
)
def test_a_whole_activation_is_exact_and_hides_all_its_coins(
    corrected, squares, slopes
):
    """y = a x**2 + b z through dealing, both shares and the second opening.

    Every mask is listed in every channel; the last is looked at. Of the words that the
    parties hold, two are changes that count where the top bit of c is set.
    """
    m, shift, v, a, b = 3, 1, 4, squares[-1], slopes[-1]
    s, channels, width = v - m, len(squares), m - shift
    zeros = np.array([0, 0, width, width])
    sizes = [1 << (v - low) for low in zeros.tolist()]
    all_masks = listed(1 << m, *sizes, 1 << s, 1 << m)
    r, *pads, rho, hidden = (np.repeat(x, channels) for x in all_masks)
    last = slice(channels - 1, None, channels)
    taken = np.stack(pads)
    given = np.empty_like(taken)
    of = quadratic(m, shift, squares, slopes, zeros)
    of.deal(r[None], rho, taken, out=given)
    server_words, client_words = (
        (given, taken) if corrected == "server" else (taken, given)
    )
    client_words = client_words.copy()
    client_words[0] += hidden << s
    for z in inner(m):
        c = (z + (1 << (m - 2)) + r) % (1 << m)
        shifted = (c >> shift)[None]
        shares = []
        for words, own in ((server_words, c), (client_words, None)):
            out = np.empty_like(r)
            of.share(shifted, words, c=own, step=0, out=out)
            shares.append(out)
        sent = shares[1] % (1 << v)
        opened = np.empty_like(r)
        kernels.truncate(shares[0], sent, bits=v, drop=s, step=0, out=opened)
        x = (opened - hidden) % (1 << m)
        rounded = (z + (r & ((1 << shift) - 1))) >> shift
        y = a * rounded * rounded + b * z
        assert (x == ((y + rho) >> s) % (1 << m))[last].all()
        theirs = client_words - np.outer([1, 0, 0, 0], hidden << s)
        held = [
            [line[last] % size for line, size in zip(words, sizes, strict=True)]
            for words in (theirs, server_words)
        ]
        view = ids((c >> shift)[last], *held[0], hidden[last])
        assert is_product(view, ids(((y + rho) >> s)[last]))
        # As many rows as views: uniform means that no view comes twice.
        assert len(np.unique(ids(c[last], *held[1], sent[last]))) == len(r[last])


def test_a_corrected_clients_message_is_uniform_to_a_server_that_knows_its_own_words():
    """The client drops low bits, and the dealer leaves out what they cover.

    For any words that the server drew, every mask and coin is listed.
    """
    m, shift, s, unsent = 3, 1, 3, 2
    v, width = m + s, m - shift
    zeros = np.array([unsent, 0, width, width])
    r, rho, hidden = listed(1 << m, 1 << s, 1 << m)
    of = quadratic(m, shift, [3], [1], zeros)
    draws = np.random.default_rng(0)
    for _ in range(32):
        drawn = draws.integers(0, 1 << v, 4)
        taken = np.repeat(drawn[:, None], len(r), axis=1)
        words = np.empty_like(taken)
        of.deal(r[None], rho, taken, out=words)
        words[0] += hidden << (s - unsent)
        for z in inner(m):
            c = (z + (1 << (m - 2)) + r) % (1 << m)
            share = np.empty_like(r)
            of.share((c >> shift)[None], words, c=None, step=unsent, out=share)
            sent = share % (1 << (v - unsent))
            assert is_uniform(ids(c, sent), 1 << (m + v - unsent))


@pytest.mark.parametrize("corrections", ["server", "client"])
@pytest.mark.parametrize("weight, x", [(0, 1), (1, -1), (3, 1)])
def test_a_whole_linear_part_is_exact_and_uniform_for_both_parties(
    corrections, weight, x
):
    """From the dealer's B t + r - G to the opening: every t, B, r and G is listed.

    Beside these halves the parties hold those of the words, which draw masks of their
    own: the whole dealing is this part and the activation of the tests above.
    """
    m, shift = 3, 1
    size = 1 << m
    t, mask, r, drawn = listed(*[size] * 4)
    dealt = (mask * t + r - drawn) % size
    mine, theirs = (dealt, drawn) if corrections == "server" else (drawn, dealt)
    # The client adds (W - B) t, the server its half, W D and 2**(m-2).
    opened = (weight - mask) % size
    sent = (opened * t + theirs) % size
    d = (x - t) % size
    c = (mine + sent + weight * d + (1 << (m - 2))) % size
    assert (c == (weight * x + (1 << (m - 2)) + r) % size).all()
    # As many rows as views: uniform means that no view comes twice.
    server_view = ids(mask, mine, sent, d)
    assert is_uniform(server_view, size**4)
    client_view = ids(opened, t, theirs, c >> shift)
    assert is_uniform(client_view, size**3 << (m - shift))
    z = weight * x
    assert is_product(client_view, ids((z + (r & ((1 << shift) - 1))) >> shift))


@pytest.mark.parametrize("corrections", ["server", "client"])
def test_an_output_shows_the_client_its_value_and_the_server_nothing(corrections):
    """The last linear part has no r: the halves are the shares of its value."""
    m, weight, noise_bits = 3, 3, 1
    size = 1 << m
    t, mask, drawn, noise = listed(size, size, size, 1 << noise_bits)
    views = []
    for x in (-1, 0, 1):
        dealt = (mask * t - drawn) % size
        mine, theirs = (dealt, drawn) if corrections == "server" else (drawn, dealt)
        opened, d = (weight - mask) % size, (x - t) % size
        kept = (opened * t + theirs) % size
        sent = (mine + weight * d + noise) % size
        assert ((sent + kept) % size == (weight * x + noise) % size).all()
        assert is_uniform(ids(mask, mine, d, noise), size**3 << noise_bits)
        # Beside the logits nothing of what the client holds tells the noise.
        held = ids(opened, t, theirs)
        assert is_uniform(held, size**3) and is_product(held, noise)
        views.append(np.bincount(held * size + (sent + kept) % size))
    assert len({view.tobytes() for view in views}) > 1  # it learns the value


def test_halves_that_one_party_knew_both_of_would_be_found():
    """A dealer that sent G beside what it leaves, or used one G twice."""
    m = 3
    size = 1 << m
    t, mask, r, drawn = listed(*[size] * 4)
    dealt = (mask * t + r - drawn) % size
    weight = 2
    sent = ((weight - mask) * t + drawn) % size
    # The server would know the client's t where B is odd.
    assert not is_product(ids(mask, drawn, dealt, sent), t)
    again = (mask * t + (r + 1) * mask - drawn) % size
    assert not is_product(ids(mask, dealt, again), r)


# ---------------------------------------------------------------- products


def factor(z: int, r: np.ndarray, m: int, shift: int):
    """A factor's c >> s as the client gets it, and the truth x."""
    c = (z + (1 << (m - 2)) + r) % (1 << m)
    x = (z + (r & ((1 << shift) - 1))) >> shift
    return c, c >> shift, x


@pytest.mark.parametrize("m, dropped", [(4, (1, 2)), (5, (2, 0)), (4, (0, 1))])
def test_opened_factors_say_nothing_of_their_rounding(m, dropped):
    """Two elements share a gate, which has one mask and one coin."""
    sizes = [1 << m] * 3
    first, other, gate = listed(*sizes)
    for z in inner(m):
        values = [
            factor(z, first, m, dropped[0]),
            factor(1 - z, other, m, dropped[0]),
            factor(-z, gate, m, dropped[1]),
        ]
        view = ids(*(opened for _, opened, _ in values))
        assert is_product(view, ids(*(x for _, _, x in values)))
        widths = m - dropped[0], m - dropped[0], m - dropped[1]
        assert is_uniform(view, 1 << sum(widths))
        assert is_uniform(ids(*(c for c, _, _ in values)), 1 << 3 * m)


def test_the_forms_of_a_product_that_leak_are_found():
    """All of c at the client; one mask for both factors; a coin at the client."""
    m = 5
    everything, views = 0, set()
    for z in inner(m):
        r, s = listed(1 << m, 1 << m)
        c, _, x = factor(z, r, m, 2)
        _, gate, y = factor(1 - z, s, m, 1)
        everything += not is_product(ids(c, gate), ids(x, y))
        same = factor(1 - z, r, m, 1)[1]
        views.add(tuple(np.unique((same - (c >> 1)) % (1 << m - 1))))
        assert is_product(ids(s & 1), ids(y)) == (z % 2 == 1)
    assert everything > 0 and len(views) > 1


@pytest.mark.parametrize(
    "corrected, dropped",
    [("server", (1, 1)), ("client", (1, 1)), ("server", (0, 1)), ("server", (1, 0))],
)
def test_a_whole_product_is_exact_and_hides_all_its_coins(corrected, dropped):
    """x1 x2 through dealing, both shares and the second opening; every mask listed."""
    m, v, ring = 3, 3, 2
    s = v - ring
    r, q, *pads, rho, hidden = listed(
        1 << m, 1 << m, 1 << v, 1 << v, 1 << v, 1 << s, 1 << ring
    )
    count, places = len(r), np.zeros(1, np.int64)
    taken = np.empty((count, 8), dtype=np.int64)
    taken[:, :2], taken[:, 2:6], taken[:, 6:] = (pad[:, None] for pad in pads)
    given = np.empty_like(taken)
    kernels.deal_product(
        np.stack([r, q], 1),
        rho[:, None],
        taken,
        bits=m,
        dropped=np.array(dropped),
        places=places,
        lift=0,
        out=given,
    )
    mine, theirs = (given, taken) if corrected == "server" else (taken, given)
    theirs = theirs.copy()
    theirs[:, 2:6] += (hidden << s)[:, None]
    for z, gate in ((-1, 1), (1, 1), (0, -1), (-1, -1)):
        (c, opened, x), (d, beside, y) = (
            factor(value, mask, m, shift)
            for value, mask, shift in zip((z, gate), (r, q), dropped, strict=True)
        )
        shares = []
        for words, own in ((mine, True), (theirs, False)):
            out = np.empty((count, 1), dtype=np.int64)
            kernels.product_share(
                opened[:, None],
                beside[:, None],
                words,
                widths=m - np.array(dropped),
                places=places,
                lift=0,
                own=own,
                step=0,
                out=out,
            )
            shares.append(out[:, 0])
        sent = shares[1] % (1 << v)
        result = np.empty(count, dtype=np.int64)
        kernels.truncate(shares[0], sent, bits=v, drop=s, step=0, out=result)
        truth = (x * y + rho) >> s
        assert ((result - hidden - truth) % (1 << ring) == 0).all()
        rows, a, b = np.arange(count), 1 - (c >> (m - 1)), 1 - (d >> (m - 1))
        held = [
            [w[rows, a] % (1 << v), w[rows, 2 + 2 * a + b], w[rows, 6 + b] % (1 << v)]
            for w in (theirs, mine)
        ]
        held[0][1] = held[0][1] - (hidden << s)
        held = [[first, both % (1 << v), last] for first, both, last in held]
        view = ids(opened, beside, *held[0], hidden)
        assert is_product(view, ids(x, y, truth))
        # As many rows as views: uniform means that no view comes twice.
        assert len(np.unique(ids(c, d, *held[1], sent))) == count
