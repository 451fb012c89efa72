"""ESPN: a polynomial of an additively shared value in one round, two parties.

Source: Diaa, Fenaux, Humphries et al., USENIX Security 2024, section 4 and appendix E.
There every term of the binomial expansion is Beaver-multiplied; here the terms are
grouped by the power of party 1's share, so degree n takes n - 1 products.
"""

from __future__ import annotations

import math

import crypten.communicator as comm
import torch

from ..correlated import one_sided_products
from ..cost import RING_BYTES, Cost
from ..polynomial import Form
from .protocol import Protocol


def evaluate(x: torch.Tensor, p: torch.Tensor, form: Form) -> torch.Tensor:
    """Share of c_0 + c_1 X + sum_{k>=2} c_k P^k modulo 2^64.

    With P = p_0 + p_1, the k-th power is sum_j C(k,j) p_0^(k-j) p_1^j, so

        sum_{k>=2} c_k P^k = sum_{k>=2} c_k p_0^k + sum_{k>=2} c_k p_1^k
                             + sum_{j=1}^{n-1} u_j v_j,
        u_j = sum_{i>=1, i+j>=2} c_(i+j) C(i+j,j) p_0^i     known to party 0,
        v_j = p_1^j                                         known to party 1.

    The matrix of the c_(i+j) C(i+j,j) is anti-triangular with a non-zero diagonal, so
    no fewer products than n - 1 give the sum, whichever coefficients vanish.

    1. Obtain masks A_j (party 0), B_j (party 1) and [C] = [sum_j A_j B_j].
    2. Party 0 sends alpha_j = u_j - A_j, party 1 sends beta_j = v_j - B_j, at once.
    3. Party 0 keeps sum_j u_j beta_j + C_0, party 1 keeps sum_j alpha_j B_j + C_1.
    4. Each adds its own powers and its part of the linear term; party 0 adds c_0.

    Args:
        x: int64 share of X at scale 2**form.frac_bits; any shape that the form's
            `check` takes.
        p: int64 share of P, same shape.
        form: the polynomial's integers.

    Returns:
        int64 share of the result at scale 2**form.out_bits, same shape.

    Cost: 1 round and 8 (n - 1) bytes per element and party for n >= 2, else nothing;
    offline 1 correction per element.

    Error: exact modulo 2^64.
    """
    rank = comm.get().get_rank()
    n = form.degree
    result = form.linear_share(x, rank)
    if n < 2:
        return result

    own = [p]
    for _ in range(n - 1):
        own.append(own[-1] * p)
    for k in range(2, n + 1):
        c = form.multiple(k, 1, p)
        if c is not None:
            result += own[k - 1] * c

    if rank == 0:
        values = torch.stack([_cofactor(own, form, j) for j in range(1, n)])
    else:
        values = torch.stack(own[: n - 1])
    mask, product = one_sided_products(x.size(), n - 1)
    sent = values - mask.to(values.device)
    # One all_reduce is one exchange: what the other sent is the sum less our own.
    received: torch.Tensor = comm.get().all_reduce(sent) - sent
    factor = values if rank == 0 else mask.to(values.device)
    return result + (factor * received).sum(0) + product.to(values.device)


def _cofactor(own: list[torch.Tensor], form: Form, j: int) -> torch.Tensor:
    """u_j: what multiplies the j-th power of party 1's share."""
    u = torch.zeros_like(own[0])
    for i in range(1, form.degree - j + 1):
        c = form.multiple(i + j, math.comb(i + j, j), u)
        if i + j >= 2 and c is not None:
            u += own[i - 1] * c
    return u


def cost(form: Form, elements: int) -> Cost:
    """Declared cost of `evaluate` for one party."""
    if form.degree < 2:
        return Cost()
    return Cost(1, RING_BYTES * (form.degree - 1) * elements, elements)


def _stored_words(degree: int) -> int:
    """n - 1 masks and a share of the sum of products."""
    return degree if degree >= 2 else 0


ESPN = Protocol("espn", evaluate, cost, _stored_words, most_parties=2)
