"""A plan in Python integers: slow, and written from the plan's definitions alone.

Values are dictionaries from (row, column, channel) or (feature,) to an integer. Nothing
of the engine's kernels, layouts or evaluation is used.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

from crypten_espn.masked.linear import (
    Add,
    Concat,
    Conv,
    Flatten,
    Mix,
    Move,
    Pad,
    Pool,
    Read,
)
from crypten_espn.masked.products import Factors


def rounded(value: int, shift: int) -> int:
    """value / 2**shift to the nearest integer, half up."""
    return (Fraction(value, 1 << shift) + Fraction(1, 2)).__floor__()


def centred(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


def logits(model, parameters, image):
    """The output's integers for one image, (channels, height, width) of integers."""
    plan, how = model.plan, model.report.weights
    weights = [
        (
            _integers(_four(parameters[known.parameter]).tolist(), known.factor),
            _integers(parameters[known.bias].ravel().tolist(), known.bias_factor)
            if known.bias
            else None,
        )
        for known in how
    ]
    c, h, w = plan.input.shape
    places = itertools.product(range(h), range(w), range(c))
    sources = [{(i, j, k): int(image[k][i][j]) for i, j, k in places}]
    for step in plan.steps:
        if isinstance(step.root, Factors):
            sources.append(_product(step, sources, weights))
            continue
        z = _value(step.root, sources, weights)
        y = {at: _activate(step, centred(v, step.ring), at[-1]) for at, v in z.items()}
        if step.activation.pool is not None:
            y = _window_sums(y, step.activation.pool)
        sources.append({at: rounded(v, step.activation.drop) for at, v in y.items()})
    z = _value(plan.output.root, sources, weights)
    return {at: centred(v, plan.output.ring) for at, v in z.items()}


def _activate(step, z: int, channel: int) -> int:
    act = step.activation

    def own(columns):
        return columns[channel if len(columns) > 1 else 0]

    y = own(act.constant)
    if act.linear is not None:
        y += own(act.linear.coefficient) * rounded(z, act.linear.shift)
    for group in act.groups:
        x = rounded(z, group.shift)
        y += sum(a * x**k for k, a in enumerate(own(group.coeffs)))
    return y


def _window_sums(values, window):
    found: dict[tuple[int, int, int], int] = {}
    for (i, j, k), v in values.items():
        at = i // window[0], j // window[1], k
        found[at] = found.get(at, 0) + v
    return found


def _product(step, sources, weights):
    act = step.activation
    first, second = (
        {at: rounded(centred(v, step.ring), shift) for at, v in value.items()}
        for value, shift in zip(
            (_value(root, sources, weights) for root in step.root.inputs),
            act.dropped,
            strict=True,
        )
    )
    size = [1 + max(places) for places in zip(*second, strict=True)]
    lift = act.drop + act.frac_bits - 2 * step.frac_bits + sum(act.dropped)
    return {
        at: rounded(
            x * second[tuple(i % n for i, n in zip(at, size, strict=True))] << lift,
            act.drop,
        )
        for at, x in first.items()
    }


def _integers(real, factor: float):
    """Nested lists of numbers, each multiplied and rounded."""
    if isinstance(real, list):
        return [_integers(value, factor) for value in real]
    return round(real * factor)


def _four(array):
    return array if array.ndim == 4 else array[:, :, None, None]


def _value(node, sources, weights):
    if isinstance(node, Read):
        return {at: node.multiplier * v for at, v in sources[node.source].items()}
    if isinstance(node, Add):
        terms = [_value(term, sources, weights) for term in node.terms]
        return {at: sum(term[at] for term in terms) for at in terms[0]}
    if isinstance(node, Concat):
        found, start = {}, 0
        for part in node.parts:
            value = _value(part, sources, weights)
            found.update({(*at[:-1], at[-1] + start): v for at, v in value.items()})
            start += 1 + max(at[-1] for at in value)
        return found
    if isinstance(node, Move):
        return _moved(node, [_value(part, sources, weights) for part in node.parts])
    x = _value(node.x, sources, weights)
    size = [1 + max(places) for places in zip(*x, strict=True)]
    if isinstance(node, Flatten):
        h, w, c = size
        order = itertools.product(range(c), range(h), range(w))
        return {(n,): x[i, j, k] for n, (k, i, j) in enumerate(order)}
    if isinstance(node, Conv) and len(size) == 1:
        weight, bias = weights[node.weight]
        return {
            (o,): sum(weight[o][i][0][0] * x[i,] for i in range(size[0]))
            + (bias[o] if bias else 0)
            for o in range(node.filters)
        }
    if isinstance(node, Mix):
        return {
            (i, j, k): sum(
                a * b * x[top + m, left + n, k]
                for m, a in enumerate(down)
                for n, b in enumerate(across)
            )
            for i, (top, down) in enumerate(node.rows)
            for j, (left, across) in enumerate(node.columns)
            for k in range(size[2])
        }
    top, left, bottom, right = node.pads
    h, w, c = size
    if isinstance(node, Pad):
        places = itertools.product(range(h + top + bottom), range(w + left + right))
        return {
            (i, j, k): x.get((i - top, j - left, k), 0)
            for i, j in places
            for k in range(c)
        }
    assert isinstance(node, Conv | Pool)
    down, across = node.dilation if isinstance(node, Conv) else (1, 1)
    kernel, stride = node.kernel, node.stride
    rows = (h + top + bottom - down * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (w + left + right - across * (kernel[1] - 1) - 1) // stride[1] + 1
    taps = list(itertools.product(range(kernel[0]), range(kernel[1])))
    found = {}
    for i, j in itertools.product(range(rows), range(columns)):

        def read(a, b, k, i=i, j=j):
            row = i * stride[0] + a * down - top
            return x.get((row, j * stride[1] + b * across - left, k), 0)

        if isinstance(node, Pool):
            for k in range(c):
                found[i, j, k] = sum(read(a, b, k) for a, b in taps)
            continue
        weight, bias = weights[node.weight]
        depth, each = c // node.groups, node.filters // node.groups
        for o in range(node.filters):
            first = o // each * depth
            found[i, j, o] = sum(
                weight[o][k][a][b] * read(a, b, first + k)
                for a, b in taps
                for k in range(depth)
            ) + (bias[o] if bias else 0)
    return found


def _moved(node, values):
    flat = [[value[at] for at in sorted(value)] for value in values]
    places = list(itertools.product(*map(range, node.shape)))
    found = dict.fromkeys(places, 0)
    for box in node.boxes:
        for steps in itertools.product(*(range(size) for size, _, _ in box.axes)):
            axes = list(zip(steps, box.axes, strict=True))
            source = box.source + sum(i * step for i, (_, step, _) in axes)
            target = box.target + sum(i * step for i, (_, _, step) in axes)
            found[places[target]] += flat[box.part][source]
    return found
