"""Moves of elements as a plan writes them: strided boxes, copied one after another.

A slice, a permutation of axes or a reshape is one box, whatever its size; shuffles and
concatenations are a few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.lib.stride_tricks import as_strided

from ..errors import PlanError

_Place = Annotated[int, Meta(ge=0, le=1 << 26)]
_Count = Annotated[int, Meta(ge=2, le=1 << 26)]
_Step = Annotated[int, Meta(ge=-(1 << 26), le=1 << 26)]
# Elements, and how far apart they are in the source and in the result.
Axis = tuple[_Count, _Step, Annotated[int, Meta(ge=1, le=1 << 26)]]


class Box(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Elements of one value, at even distances along some axes, and where they go.

    Args:
        part: number of the value.
        source, target: the first element's place in it, and in the result; both are
            counted through, channels last, without the batch.
        axes: of the box; its elements go to different places of the result.
    """

    part: Annotated[int, Meta(ge=0, le=1 << 10)]
    source: _Place
    target: _Place
    axes: Annotated[tuple[Axis, ...], Meta(max_length=12)]

    @property
    def elements(self) -> int:
        return math.prod(size for size, _, _ in self.axes)

    def check(self, sizes: Sequence[int], size: int) -> None:
        """Refuse a box that leaves its value or the result, or meets itself there.

        Args:
            sizes: elements of the values; size: of the result.

        Raises: PlanError.
        """
        if self.part >= len(sizes):
            raise PlanError(f"A move reads value {self.part} of {len(sizes)}.")
        low = self.source + sum(min(s, 0) * (n - 1) for n, s, _ in self.axes)
        high = self.source + sum(max(s, 0) * (n - 1) for n, s, _ in self.axes)
        if low < 0 or high >= sizes[self.part]:
            raise PlanError(
                f"A move reads elements {low} to {high} of {sizes[self.part]}."
            )
        reach = 0
        for n, _, step in sorted(self.axes, key=lambda axis: axis[2]):
            if step <= reach:
                raise PlanError("A move puts two elements into one place.")
            reach += step * (n - 1)
        if self.target + reach >= size:
            raise PlanError(f"A move writes element {self.target + reach} of {size}.")

    def add_to(self, out: np.ndarray, value: np.ndarray) -> None:
        """Add its elements to a result; both (batch, elements), contiguous."""
        shape = (len(out), *(size for size, _, _ in self.axes))
        step = out.itemsize
        into = as_strided(
            out[:, self.target :],
            shape,
            (out.strides[0], *(t * step for _, _, t in self.axes)),
        )
        into += as_strided(
            value[:, self.source :],
            shape,
            (value.strides[0], *(s * step for _, s, _ in self.axes)),
            writeable=False,
        )


def add_boxes(
    boxes: Sequence[Box], out: np.ndarray, values: Sequence[np.ndarray]
) -> None:
    """Add what boxes move to a result; arrays are (batch, ...)."""
    given = [np.ascontiguousarray(v).reshape(len(v), -1) for v in values]
    flat = np.ascontiguousarray(out).reshape(len(out), -1)
    for box in boxes:
        box.add_to(flat, given[box.part])
    if not np.shares_memory(flat, out):
        out[...] = flat.reshape(out.shape)


# ---------------------------------------------------------------- from an index


def boxes(index: np.ndarray, sizes: Sequence[int], *, most: int) -> tuple[Box, ...]:
    """The boxes of an index map.

    Args:
        index: of the result's shape; elements of the values counted through, one value
            after the other, -1 for zeros.
        sizes: elements of each value.
        most: boxes that are allowed.

    Raises: PlanError where the map needs more.
    """
    found: list[Box] = []
    start = 0
    for part, size in enumerate(sizes):
        here = (index >= start) & (index < start + size)
        if here.any():
            grids = _grids(index - start, here, most)
            if grids is None or len(found) + len(grids) > most:
                raise PlanError(
                    f"elements are moved to so many different places that more than "
                    f"{most:,} pieces are needed; move whole rows or channels."
                )
            found += [Box(part, s, t, _joined(axes)) for t, s, axes in grids]
        start += size
    return tuple(found)


# Target, source and axes of a box.
_Axes = tuple[tuple[int, int, int], ...]
_Grid = tuple[int, int, _Axes]


def _grids(index: np.ndarray, here: np.ndarray, most: int) -> list[_Grid] | None:
    """Axis by axis where the axes have nothing to do with each other."""
    kept = [
        np.flatnonzero(here.any(tuple(a for a in range(here.ndim) if a != axis)))
        for axis in range(here.ndim)
    ]
    picked = index[np.ix_(*kept)]
    if bool(here[np.ix_(*kept)].all()):
        first = int(picked.reshape(-1)[0])
        own = [
            picked[tuple(slice(None) if a == axis else 0 for a in range(here.ndim))]
            - first
            for axis in range(here.ndim)
        ]
        total = np.full(picked.shape, first)
        for axis, values in enumerate(own):
            total += values.reshape([-1 if a == axis else 1 for a in range(here.ndim)])
        if np.array_equal(total, picked):
            grids: list[_Grid] = [(0, first, ())]
            steps = np.cumprod([1, *here.shape[:0:-1]])[::-1].tolist()
            for places, values, step in zip(kept, own, steps, strict=True):
                along = _runs(places * step, values)
                if len(grids) * len(along) > most:
                    return None
                grids = [
                    (t + dt, s + ds, (*axes, *more))
                    for t, s, axes in grids
                    for dt, ds, more in along
                ]
            return grids
    found = _runs(np.flatnonzero(here), index[here])
    return found if len(found) <= most else None


def _runs(targets: np.ndarray, sources: np.ndarray) -> list[_Grid]:
    """Even runs, runs of runs that look alike, and so on."""
    targets, sources = np.asarray(targets), np.asarray(sources)
    kinds = np.zeros(len(targets), np.int64)
    axes: list[_Axes] = [()]
    while True:
        change = np.stack([np.diff(targets), np.diff(sources)])
        alike = kinds[1:] == kinds[:-1]
        same = (change[:, 1:] == change[:, :-1]).all(0) & alike[1:] & alike[:-1]
        ends = np.flatnonzero(~same) + 1  # the last gap that a run has
        starts: list[int] = []
        counts: list[int] = []
        at, last = 0, len(targets) - 1
        while at <= last:
            stop = at
            if at < last and alike[at]:
                place = int(np.searchsorted(ends, at + 1))
                stop = int(ends[place]) if place < len(ends) else last
            starts.append(at)
            counts.append(stop - at + 1)
            at = stop + 1
        if len(starts) == len(targets):
            break
        known: dict[_Axes, int] = {}
        numbers = []
        for begin, count in zip(starts, counts, strict=True):
            inner = axes[kinds[begin]]
            if count > 1:
                step = (count, int(change[1, begin]), int(change[0, begin]))
                inner = (step, *inner)
            numbers.append(known.setdefault(inner, len(known)))
        targets, sources = targets[starts], sources[starts]
        kinds, axes = np.array(numbers), list(known)
    return [
        (int(t), int(s), axes[k])
        for t, s, k in zip(targets, sources, kinds, strict=True)
    ]


def _joined(axes: _Axes) -> _Axes:
    """Neighbouring axes that are one in the source and in the result."""
    found: list[tuple[int, int, int]] = []
    for size, source, target in axes:
        if found:
            n, s, t = found[-1]
            if s == size * source and t == size * target:
                found[-1] = (n * size, source, target)
                continue
        found.append((size, source, target))
    return tuple(found)
