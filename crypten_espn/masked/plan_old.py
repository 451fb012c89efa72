"""A plan: which integers each party computes, at which scale, in which ring.

A plan is public. It holds the network's structure, shapes, polynomials, ring widths,
scales and shifts, and no weight. Both parties and the dealer hold the same plan and
compare its digest before anything else is sent.

The network is cut at its activations into linear segments. Every segment reads
sources (the input, or the result of an activation), which exist as x = D + t with D
opened and t a dealer-known mask, and ends in one value z that is opened again:

    z in R_m at scale g --open m bits--> polynomial y in R_v at scale F
    y --open v bits, drop s = F - f--> source x = D + t in R_(v-s), scale f

Here `ring` is m, `value_ring` is v, and scales are fractional bits. `planner` makes
plans from converted networks; `simulate` computes what the parties compute, in the
clear.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..channel import packed_bytes
from ..errors import PlanError, RangeError, ShapeError
from ..table import aligned
from . import kernels

RING_LIMITS = (20, 56)
INPUT = 0


@dataclass(frozen=True)
class Expression:
    """One public or weighted linear operation on channels-last integers.

    Args:
        op: source, conv, add, concat, pool, pad or flatten.
        inputs: the operations it reads.
        shape: its value's shape without the batch: (h, w, c), or (n,) once flat.
        name: the layer it comes from.
        source, multiplier: for `source`, which one, and the public integer factor that
            brings it to the scale wanted here.
        weight: for `conv`, index into the plan's weights.
        kernel, stride, dilation, pads, groups: geometry; pads are top, left, bottom,
            right.
    """

    op: str
    inputs: tuple[Expression, ...]
    shape: tuple[int, ...]
    name: str = ""
    source: int = -1
    multiplier: int = 1
    weight: int = -1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1

    def walk(self) -> Iterator[Expression]:
        """This operation and all below it."""
        yield self
        for child in self.inputs:
            yield from child.walk()

    @property
    def weighted(self) -> bool:
        """Whether a secret weight lies on some path to a source."""
        return any(node.op == "conv" for node in self.walk())


@dataclass(frozen=True)
class WeightSpec:
    """How one layer's real weights become integers.

    Args:
        name: the layer.
        parameter, bias: names of the parameters in the converted network; bias may be
            empty.
        shape: (filters, channels / groups, kh, kw), in torch's order.
        groups: convolution groups.
        factor, bias_factor: integers are round(real * factor).
        ring: modulo 2**ring.
    """

    name: str
    parameter: str
    bias: str
    shape: tuple[int, int, int, int]
    groups: int
    factor: float
    bias_factor: float
    ring: int

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the integers as the convolution kernels want them."""
        o, c, kh, kw = self.shape
        if self.groups > 1 and c == 1 and o == self.groups:
            return (kh, kw, o)
        return (self.groups, kh, kw, c, o // self.groups)

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """Bring (filters, channels, kh, kw) into `kernel_shape`."""
        o, c, kh, kw = self.shape
        if len(self.kernel_shape) == 3:
            return np.ascontiguousarray(array.reshape(o, kh, kw).transpose(1, 2, 0))
        grouped = array.reshape(self.groups, o // self.groups, c, kh, kw)
        return np.ascontiguousarray(grouped.transpose(0, 3, 4, 2, 1))


@dataclass(frozen=True)
class Group:
    """Powers of x that share one truncation: x_g = z >> shift, up to one unit.

    Args:
        shift: bits dropped.
        coeffs: integers; coeffs[k] multiplies x_g**k, coeffs[0] is 0.
    """

    shift: int
    coeffs: tuple[int, ...]

    @property
    def degree(self) -> int:
        return len(self.coeffs) - 1


@dataclass(frozen=True)
class Activation:
    """A polynomial between two openings.

    Args:
        name: the layer.
        scale: fractional bits g of the opened z.
        groups: the polynomial's powers, each at its own truncation.
        constant: integer constant term at scale F.
        value_ring: bits v of the second opening.
        value_scale: F.
        drop: s = F - f bits dropped by the second opening.
        frac_bits: f, of the resulting source.
    """

    name: str
    scale: int
    groups: tuple[Group, ...]
    constant: int
    value_ring: int
    value_scale: int
    drop: int
    frac_bits: int

    @property
    def values(self) -> int:
        """Dealer values per element for each of the two possible masks."""
        return 1 + sum(group.degree - 1 for group in self.groups)

    @cached_property
    def shifts(self) -> np.ndarray:
        return np.array([group.shift for group in self.groups], dtype=np.int64)

    @cached_property
    def degrees(self) -> np.ndarray:
        return np.array([group.degree for group in self.groups], dtype=np.int64)

    @cached_property
    def public(self) -> np.ndarray:
        """(groups, K + 1) coefficients of the opened value's own powers."""
        top = int(self.degrees.max())
        table = np.zeros((len(self.groups), top + 1), dtype=np.int64)
        for g, group in enumerate(self.groups):
            for k, coefficient in enumerate(group.coeffs):
                table[g, k] = wrapped(coefficient)
        return table

    @cached_property
    def table(self) -> np.ndarray:
        """table[g, j, k]: what multiplies D**j t**k in p(D + t)."""
        top = int(self.degrees.max())
        table = np.zeros((len(self.groups), top, top + 1), dtype=np.int64)
        for g, group in enumerate(self.groups):
            for j in range(group.degree):
                for k in range(1, group.degree - j + 1):
                    table[g, j, k] = wrapped(group.coeffs[j + k] * math.comb(j + k, j))
        return table


@dataclass(frozen=True)
class Segment:
    """One linear part of the network and what follows it.

    Args:
        name: the layer that ends it.
        root: the expression to compute.
        ring: bits m of the linear ring.
        scale: fractional bits g of the result.
        bound: the largest |z| that is allowed for.
        seen: the largest |z| of the calibration inputs.
        noise: estimated standard deviation of z's error from this segment's roundings.
        activation: what follows, or None for the network's output.
    """

    name: str
    root: Expression
    ring: int
    scale: int
    bound: float
    seen: float
    noise: float
    activation: Activation | None

    @property
    def elements(self) -> int:
        return math.prod(self.root.shape)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        return tuple(sorted({e.source for e in self.root.walk() if e.op == "source"}))


@dataclass(frozen=True)
class Source:
    """A value that exists as x = D + t: the input, or an activation's result.

    Args:
        shape: without the batch, channels last.
        ring: x = D + t holds modulo 2**ring.
        frac_bits: f.
    """

    shape: tuple[int, ...]
    ring: int
    frac_bits: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Everything public that both parties and the dealer need.

    Args:
        mode: "owner" (rank 0 holds the weights in the clear) or "shared".
        input_shape: (channels, height, width) or (features,), without the batch.
        output_shape: of the logits, without the batch.
        segments: in order of evaluation; source i + 1 is segment i's activation.
        sources: the input and each activation's result.
        weights: how weights become integers.
        input_bound: largest |input| that fits.
    """

    mode: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    sources: tuple[Source, ...]
    weights: tuple[WeightSpec, ...]
    input_bound: float

    # -- identity

    def to_json(self) -> str:
        """The canonical text of the plan: sorted keys, no blanks."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical text."""
        return hashlib.sha256(self.to_json().encode()).digest()

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan received from elsewhere.

        Raises: PlanError if the text is no plan.
        """
        try:
            data = json.loads(text)
            plan = Plan(
                data["mode"],
                tuple(data["input_shape"]),
                tuple(data["output_shape"]),
                tuple(_segment_from(item) for item in data["segments"]),
                tuple(
                    Source(tuple(s["shape"]), s["ring"], s["frac_bits"])
                    for s in data["sources"]
                ),
                tuple(
                    WeightSpec(**{**w, "shape": tuple(w["shape"])})
                    for w in data["weights"]
                ),
                data["input_bound"],
            )
            plan.check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"This is not a plan of this version ({error}). Use the same "
                "crypten-espn on both sides."
            ) from None
        return plan

    def check(self) -> None:
        """Refuse a plan whose numbers contradict each other.

        Raises: PlanError naming the layer.
        """
        for index, segment in enumerate(self.segments):
            last = index == len(self.segments) - 1
            if (segment.activation is None) != last:
                raise PlanError(f"{segment.name}: only the output has no activation.")
            if not RING_LIMITS[0] <= segment.ring <= RING_LIMITS[1]:
                raise PlanError(f"{segment.name}: ring of {segment.ring} bits.")
            for node in segment.root.walk():
                if min((*node.shape, *node.kernel, *node.stride)) < 1:
                    raise PlanError(f"{segment.name}: {node.name} has an empty shape.")
                if node.op == "source" and not 0 <= node.source <= index:
                    raise PlanError(f"{segment.name}: reads a later layer.")
                if node.op == "source" and (
                    segment.ring > self.sources[node.source].ring
                ):
                    raise PlanError(f"{segment.name}: ring wider than its input's.")
                if node.op == "conv" and not 0 <= node.weight < len(self.weights):
                    raise PlanError(f"{segment.name}: {node.name} has no weights.")
            act = segment.activation
            if act is None:
                continue
            if not 1 <= act.drop < act.value_ring - 2 or not act.groups:
                raise PlanError(
                    f"{act.name}: drops {act.drop} of {act.value_ring} bits."
                )
            if any(not 0 <= g.shift <= segment.ring - 3 for g in act.groups):
                raise PlanError(f"{act.name}: shifts more than its ring holds.")

    # -- cost

    @property
    def activation_elements(self) -> int:
        """Activations of one input."""
        return sum(s.elements for s in self.segments if s.activation is not None)

    @property
    def messages(self) -> int:
        """Sequential online messages of one inference."""
        return 2 * len(self.segments)

    def online_bytes(self, *, batch: int = 1) -> tuple[int, int]:
        """Online payload bytes that rank 0 and rank 1 send, frame headers excluded."""
        down = up = 0
        first = self.sources[INPUT]
        up += packed_bytes(batch * first.elements, first.ring)
        for segment in self.segments:
            opened = packed_bytes(batch * segment.elements, segment.ring)
            down += opened
            if segment.activation is not None:
                half = packed_bytes(
                    batch * segment.elements, segment.activation.value_ring
                )
                up += half
                if self.mode == "shared":
                    up += opened
                    down += half
        return down, up

    def dealer_bytes(self, *, batch: int = 1) -> int:
        """Offline bytes the dealer sends for one inference, both parties together."""
        total = 0
        for segment in self.segments:
            count = batch * segment.elements
            total += packed_bytes(count, segment.ring)
            if segment.activation is not None:
                total += 16 * segment.activation.values * count
                if self.mode == "shared":
                    total += packed_bytes(count, segment.ring)
        return total

    def __str__(self) -> str:
        """The plan as a table."""
        head = (
            "layer", "shape", "ring", "scale", "powers", "opens", "sends",
            "seen", "allowed", "noise",
        )  # fmt: skip
        rows = [head]
        for segment in self.segments:
            act = segment.activation
            sent = packed_bytes(segment.elements, segment.ring)
            powers = opens = "-"
            if act is not None:
                sent += packed_bytes(segment.elements, act.value_ring)
                powers = " ".join(
                    str(segment.scale - group.shift) for group in act.groups
                )
                opens = f"{segment.ring}+{act.value_ring}"
            rows.append(
                (
                    segment.name,
                    "x".join(map(str, segment.root.shape)),
                    str(segment.ring),
                    str(segment.scale)
                    + (f" -> {act.value_scale} -> {act.frac_bits}" if act else ""),
                    powers,
                    opens,
                    f"{sent:,}",
                    f"{segment.seen:.3g}",
                    f"{segment.bound:.3g}",
                    f"{segment.noise:.1e}",
                )
            )
        lines = aligned(rows, left=len(head))
        down, up = self.online_bytes()
        lines.append(
            f"{self.messages} messages, {down + up:,} bytes online "
            f"(rank 0 {down:,}, rank 1 {up:,}), {self.dealer_bytes():,} from the "
            f"dealer, {self.activation_elements:,} activations, mode {self.mode}, "
            f"plan {self.digest.hex()[:16]}"
        )
        return "\n".join(line.rstrip() for line in lines)

    # -- the input

    def encode(self, x: torch.Tensor) -> np.ndarray:
        """Integers of an input batch, channels last, at the input's scale.

        Args:
            x: (batch, *input_shape), real numbers.

        Returns: int64 (batch, *sources[0].shape), rounded to nearest.

        Raises: ShapeError for another shape; RangeError for values that are not finite
            or exceed `input_bound`. Nothing has been sent by then.
        """
        if tuple(x.shape[1:]) != self.input_shape or x.dim() < 2 or x.shape[0] < 1:
            raise ShapeError(
                f"Input of shape {tuple(x.shape)}; this network takes (batch, "
                f"{', '.join(map(str, self.input_shape))})."
            )
        if not torch.is_floating_point(x):
            x = x.to(torch.float64)
        if not bool(torch.isfinite(x).all()):
            raise RangeError(
                "The input holds NaN or infinity. Clean it before predicting."
            )
        largest = float(x.abs().max())
        if largest > self.input_bound:
            raise RangeError(
                f"The input reaches {largest:.4g}; the plan allows "
                f"{self.input_bound:.4g}. Normalise the input as in training, or "
                "calibrate with data that covers it."
            )
        values = channels_last(x.detach().cpu().to(torch.float64).numpy())
        scale = 2.0 ** self.sources[INPUT].frac_bits
        return np.rint(values * scale).astype(np.int64)

    def decode(self, z: np.ndarray) -> torch.Tensor:
        """Real logits (batch, *output_shape) from the output segment's integers."""
        last = self.segments[-1]
        real = kernels.centred(z, last.ring).astype(np.float64) * 2.0**-last.scale
        if real.ndim == 4:
            real = real.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(real)).to(torch.float32)


def channels_last(values: np.ndarray) -> np.ndarray:
    """(batch, c, h, w) to (batch, h, w, c); (batch, n) stays."""
    if values.ndim == 4:
        values = values.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(values)


def wrapped(value: int) -> int:
    """The int64 congruent to `value` modulo 2**64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _expression_from(data: Mapping[str, Any]) -> Expression:
    pairs = ("shape", "kernel", "stride", "dilation", "pads")
    return Expression(
        **{
            **data,
            **{key: tuple(data[key]) for key in pairs},
            "inputs": tuple(_expression_from(child) for child in data["inputs"]),
        }
    )


def _segment_from(data: Mapping[str, Any]) -> Segment:
    act = data["activation"]
    if act is not None:
        groups = tuple(Group(g["shift"], tuple(g["coeffs"])) for g in act["groups"])
        act = Activation(**{**act, "groups": groups})
    return Segment(
        **{**data, "root": _expression_from(data["root"]), "activation": act}
    )


# ---------------------------------------------------------------- exact evaluation


def evaluate(
    root: Expression,
    sources: Mapping[int, np.ndarray] | None,
    weights: Sequence[np.ndarray] | None,
    *,
    ring: int,
    batch: int,
    out: np.ndarray | None = None,
    public: bool = True,
    biases: Sequence[np.ndarray | None] | None = None,
) -> np.ndarray:
    """Compute a segment's expression on ring elements, exactly.

    Args:
        root: what to compute.
        sources: channels-last ring elements by source number, or None for zeros.
        weights: integers in kernel layout by weight number, or None for zeros.
        ring: bits m; arrays are `kernels.ring_dtype(m)`.
        batch: number of inputs.
        out: (batch, *root.shape), accumulated in place; zeros when None.
        public: whether paths without a weight count; the dealer leaves them out.
        biases: integers to add after each weight, by weight number.

    Returns: `out`; entries stand for themselves modulo 2**ring.
    """
    dtype = kernels.ring_dtype(ring)
    if out is None:
        out = np.zeros((batch, *root.shape), dtype=dtype)
    _accumulate(root, sources, weights, dtype, out, public, biases)
    return out


def _accumulate(node, sources, weights, dtype, out, public, biases):
    if node.op == "source":
        if public and sources is not None:
            value = sources[node.source].astype(dtype, copy=False)
            if node.multiplier == 1:
                out += value
            else:
                out += value * dtype(_fit(node.multiplier, dtype))
        return
    if node.op == "add":
        for child in node.inputs:
            _accumulate(child, sources, weights, dtype, out, public, biases)
        return
    if node.op == "conv":
        if weights is not None and sources is not None:
            value = _value(node.inputs[0], sources, weights, dtype, True, None)
            kernels.convolve(
                _as_image(value),
                weights[node.weight],
                _as_image(out),
                stride=node.stride,
                dilation=node.dilation,
                pads=node.pads,
            )
        if biases is not None and biases[node.weight] is not None:
            out += biases[node.weight]
        return
    values = [
        _value(child, sources, weights, dtype, public, biases) for child in node.inputs
    ]
    if node.op == "concat":
        out += np.concatenate(values, axis=-1)
    elif node.op == "pad":
        out += kernels.pad(values[0], node.pads)
    elif node.op == "flatten":
        out += _flatten(values[0])
    elif node.op == "pool":
        kernels.pool_sum(
            values[0], out, kernel=node.kernel, stride=node.stride, pads=node.pads
        )
    else:
        raise PlanError(f"{node.name}: unknown operation {node.op!r}.")


def _value(node, sources, weights, dtype, public, biases):
    if node.op == "source" and node.multiplier == 1 and public and sources is not None:
        return sources[node.source].astype(dtype, copy=False)
    if node.op == "flatten" and node.inputs[0].op == "source" and sources is not None:
        return _flatten(_value(node.inputs[0], sources, weights, dtype, public, biases))
    batch = len(next(iter(sources.values()))) if sources else 1
    out = np.zeros((batch, *node.shape), dtype=dtype)
    _accumulate(node, sources, weights, dtype, out, public, biases)
    return out


def _as_image(value: np.ndarray) -> np.ndarray:
    """A flat (batch, n) as one row of pixels, so that a batch shares weights."""
    return value[None, None] if value.ndim == 2 else value


def _flatten(value: np.ndarray) -> np.ndarray:
    if value.ndim == 4:
        value = value.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(value).reshape(len(value), -1)


def _fit(value: int, dtype: type[np.signedinteger]) -> int:
    bits = 8 * np.dtype(dtype).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def truncated(z: np.ndarray, shift: int, r: np.ndarray | None) -> np.ndarray:
    """What an opening with mask r makes of z >> shift: the carry decides the rounding.

    Args:
        z: int64 integers.
        shift: bits dropped.
        r: masks; None rounds to nearest instead.
    """
    if shift == 0:
        return z
    low = np.int64(1 << (shift - 1)) if r is None else r & ((1 << shift) - 1)
    return (z + low) >> shift


def simulate(
    plan: Plan,
    weights: Weights,
    x: torch.Tensor,
    *,
    masks: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
) -> tuple[torch.Tensor, list[np.ndarray]]:
    """The engine's arithmetic in the clear, integer for integer.

    Args:
        plan, weights: the model.
        x: (batch, *input_shape).
        masks: for every activation the first and second mask r of each element; the
            result is then bit-exact what the parties compute. None rounds to nearest.

    Returns:
        The logits, and the integers z of every segment, to compare layer by layer.

    Raises: as `Plan.encode`.
    """
    values: dict[int, np.ndarray] = {INPUT: plan.encode(x)}
    batch = len(x)
    trace = []
    for index, segment in enumerate(plan.segments):
        narrow = {
            s: values[s].astype(kernels.ring_dtype(segment.ring))
            for s in segment.sources
        }
        z = evaluate(
            segment.root,
            narrow,
            weights.integers,
            ring=segment.ring,
            batch=batch,
            biases=weights.biases,
        )
        z = kernels.centred(z, segment.ring)
        trace.append(z)
        act = segment.activation
        if act is None:
            return plan.decode(z), trace
        first, second = (None, None) if masks is None else masks[index]
        y = np.full(z.shape, wrapped(act.constant), dtype=np.int64)
        for group in act.groups:
            base = truncated(
                z, group.shift, None if first is None else first.reshape(z.shape)
            )
            power = base.copy()
            for coefficient in group.coeffs[1:]:
                y += power * np.int64(wrapped(coefficient))
                power *= base
        y = kernels.centred(y, act.value_ring)
        values[index + 1] = truncated(
            y, act.drop, None if second is None else second.reshape(z.shape)
        )
    raise PlanError("The plan has no output segment.")


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class Weights:
    """A model's weights as integers in kernel layout. Rank 0's secret.

    Args:
        integers: per weight, `WeightSpec.kernel_shape`, in the dtype of its ring.
        biases: per weight, (filters,) in the same dtype, or None.
    """

    integers: tuple[np.ndarray, ...] = field(repr=False)
    biases: tuple[np.ndarray | None, ...] = field(repr=False)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all integers: which model offline material was made for."""
        digest = hashlib.sha256()
        for array in (*self.integers, *self.biases):
            digest.update(b"-" if array is None else array.tobytes())
        return digest.digest()


def quantise(plan: Plan, parameters: Mapping[str, np.ndarray]) -> Weights:
    """Round a network's real weights to the plan's integers.

    Args:
        plan: the plan made for this network.
        parameters: real arrays by name, as `parameters_of` gives them.

    Raises: PlanError if a parameter is missing, not finite, or has another shape.
    """
    integers, biases = [], []
    for spec in plan.weights:
        array = parameters.get(spec.parameter)
        if array is None or array.size != math.prod(spec.shape):
            raise PlanError(
                f"{spec.name}: the plan expects weights of shape {spec.shape}; make "
                "the plan from this network."
            )
        dtype = kernels.ring_dtype(spec.ring)
        real = np.asarray(array, dtype=np.float64).reshape(spec.shape)
        if not np.isfinite(real).all():
            raise PlanError(f"{spec.name}: a weight is NaN or infinite.")
        integers.append(spec.arrange(np.rint(real * spec.factor).astype(np.int64)))
        integers[-1] = integers[-1].astype(dtype)
        bias = None
        if spec.bias:
            shift = np.asarray(parameters[spec.bias], dtype=np.float64).reshape(-1)
            bias = np.rint(shift * spec.bias_factor).astype(np.int64).astype(dtype)
        biases.append(bias)
    return Weights(tuple(integers), tuple(biases))
