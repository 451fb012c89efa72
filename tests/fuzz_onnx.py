"""Mutated ONNX files: each is refused by name, reported on, or converted.

python -m tests.fuzz_onnx SEED FIRST COUNT < files.json
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from . import fuzzing
from .fuzz_networks import no_memory
from .fuzzing import EDGES, Outcome, damaged

MEMORY = 2 << 30  # of a child's address space, beyond what importing takes
CONVERTED, REPORTED, REFUSED = "converted", "reported", "refused"

SHAPE = (2, 2, 6, 6)  # of the example all files are read with
# Beside the folder of the file, and in it.
OUTSIDE, INSIDE = "outside.bin", "inside.bin"

_SIZES = tuple(e for e in EDGES if -(1 << 63) <= e < 1 << 63)
_OPERATIONS = (
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "DequantizeLinear", "Div", "Dropout",
    "Einsum", "Erf", "Expand", "EyeLike", "Flatten", "Gather", "Gemm",
    "GlobalAveragePool", "Identity", "If", "LSTM", "Loop", "MatMul", "MaxPool", "Mul",
    "Neg", "NonZero", "OneHot", "Pad", "PolynomialActivation", "Pow", "RandomNormal",
    "Range", "ReduceMean", "Relu", "Reshape", "Resize", "Scan", "Shape", "Sigmoid",
    "Slice", "Softmax", "Split", "Squeeze", "Sub", "Tile", "TopK", "Transpose",
    "Unsqueeze", "Upsample", "Where", "unknown",
)  # fmt: skip
# Known to the passes, and more likely to go far.
_NAMES = (
    "axes", "axis", "alpha", "auto_pad", "ceil_mode", "dilations", "ends", "epsilon",
    "frac_bits", "group", "interval", "keepdims", "kernel_shape", "mode", "numerators",
    "pads", "perm", "shape", "split", "starts", "strides", "to", "transB", "value",
)  # fmt: skip


def files() -> list[bytes]:
    """Small networks in which every supported operation occurs."""
    import crypten_espn as espn
    from crypten_espn.graph.trace import export

    torch.manual_seed(1)
    quartic = espn.Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))

    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Conv2d(2, 3, 3, padding=1)
            self.b = torch.nn.Conv2d(2, 3, 1, bias=False)
            self.norm = torch.nn.BatchNorm2d(3)
            self.activation = espn.PolynomialActivation(quartic)
            self.last = torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = (x - 0.5) * 2
            a, b = self.activation(self.norm(self.a(x))), self.b(x)
            both = torch.cat([a + b, a[:, [2, 1, 0]]], 1)
            return self.last(torch.nn.functional.pad(both, (1, 0, 0, 1)).mean((2, 3)))

    plain = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, stride=2, groups=2),
        espn.PolynomialActivation(quartic),
        torch.nn.AvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 5),
        espn.PolynomialActivation(espn.ChannelPolynomials((quartic,) * 5)),
        torch.nn.Linear(5, 2),
    )
    compared = torch.nn.Sequential(
        torch.nn.Conv2d(2, 2, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(8, 2), torch.nn.SiLU(),
    )  # fmt: skip
    return [
        export(network.eval(), torch.zeros(SHAPE))
        for network in (Branches(), plain, compared)
    ]


# ---------------------------------------------------------------- mutations


def mutant(given: Sequence[bytes], seed: int, number: int) -> bytes:
    """The file of mutant `number`, the same for the same seed."""
    toss = random.Random(f"{seed} {number}")
    data = toss.choice(given)
    if toss.random() < 0.2:
        return damaged(data, toss)
    model = onnx.load_model_from_string(data)
    for _ in range(toss.choice((1, 1, 1, 2, 2, 3, 6))):
        try:
            toss.choice(_KINDS)(model, toss)
        except (IndexError, TypeError, ValueError, onnx.checker.ValidationError):
            continue  # nothing there to change, or no value of its field
    return model.SerializeToString()


def _attributes(model: onnx.ModelProto, toss: random.Random) -> None:
    """A value of an attribute, its name, its type, one more or one less."""
    node = toss.choice([n for n in model.graph.node if n.attribute])
    attribute = toss.choice(node.attribute)
    kind = toss.choice(("near", "near", "edge", "edge", "length", "other", "name"))
    if kind in ("near", "edge"):
        at = toss.randrange(len(attribute.ints)) if attribute.ints else None
        old = attribute.i if at is None else attribute.ints[at]
        near = (old + 1, old - 1, 2 * old, -old, old + 7)
        value = toss.choice(near if kind == "near" else _SIZES)
        if attribute.type == AttributeProto.FLOAT:
            attribute.f = toss.choice((float("nan"), float("inf"), -1.0, 0.0, 1e30))
        elif at is None:
            attribute.i = value
        else:
            attribute.ints[at] = value
    elif kind == "length" and attribute.ints:
        attribute.ints.extend(list(attribute.ints) * toss.choice((1, 2, 500)))
    elif kind == "length":
        del attribute.ints[:]
    elif kind == "name":
        attribute.name = toss.choice(_NAMES)
    else:
        node.attribute.remove(attribute)
        _one_more(node, toss)


def _one_more(node: NodeProto, toss: random.Random) -> None:
    values: tuple[object, ...] = (
        1, 1 << 40, -3, 2.5, "SAME_UPPER", b"\xff", [2, 2], [1 << 40], [0, 0],
        [1.5, float("nan")], [[]], numpy_helper.from_array(np.ones((2, 2))),
        helper.make_graph([], "inner", [], []),
    )  # fmt: skip
    node.attribute.append(
        helper.make_attribute(toss.choice(_NAMES), toss.choice(values))
    )


def _initialisers(model: onnx.ModelProto, toss: random.Random) -> None:
    """Dimensions, type, values, name or place of a weight."""
    tensor = toss.choice(model.graph.initializer)
    kind = toss.choice(
        ("dims", "type", "value", "cut", "name", "external", "twice", "sparse", "drop")
    )
    if kind == "dims":
        _resize(tensor.dims, toss)
    elif kind == "type":
        tensor.data_type = toss.randrange(-1, 30)
    elif kind == "value":
        array = numpy_helper.to_array(tensor).copy()
        number = (float("nan"), float("inf"), 1e38, -1.0, 0.0)
        if array.dtype.kind != "f":
            return
        array.reshape(-1)[toss.randrange(array.size)] = toss.choice(number)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    elif kind == "cut":
        tensor.raw_data = tensor.raw_data[: toss.randrange(len(tensor.raw_data) + 1)]
    elif kind == "name":
        tensor.name = toss.choice(list(_values(model)))
    elif kind == "external":
        _external(tensor, toss)
    elif kind == "twice":
        model.graph.initializer.append(tensor)
    elif kind == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    else:
        model.graph.initializer.remove(tensor)


def _resize(dims: list[int], toss: random.Random) -> None:
    kind = toss.randrange(3)
    if kind == 0:
        dims.append(toss.choice(_SIZES))
    elif kind == 1:
        del dims[toss.randrange(len(dims))]
    else:
        dims[toss.randrange(len(dims))] = toss.choice(_SIZES)


def _external(tensor: TensorProto, toss: random.Random) -> None:
    """Let a tensor lie in another file, here or where nobody asked to read."""
    places = (
        f"../{OUTSIDE}", "/etc/passwd", "../../../../etc/passwd", "", ".", "link",
        "/dev/zero", f"./{INSIDE}", INSIDE, INSIDE, "none", f"x/../../{OUTSIDE}",
    )  # fmt: skip
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": toss.choice(places)}
    if toss.random() < 0.5:
        entries["offset"] = str(toss.choice((*_SIZES, "x")))
        entries["length"] = str(toss.choice((*_SIZES, "x")))
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _values(model: onnx.ModelProto) -> Iterator[str]:
    """The names of every value, none, and one that nothing makes."""
    for node in model.graph.node:
        yield from (*node.input, *node.output)
    yield from ("", "made by nothing")


def _nodes(model: onnx.ModelProto, toss: random.Random) -> None:
    """What a node reads, makes and is; cycles and names made twice among it."""
    nodes = model.graph.node
    at = toss.randrange(len(nodes))
    node, names = nodes[at], list(_values(model))
    kind = toss.choice(
        ("input", "input", "cycle", "output", "operation", "operation", "domain",
         "drop", "twice", "order", "more", "less", "name")
    )  # fmt: skip
    if kind == "input":
        node.input[toss.randrange(len(node.input))] = toss.choice(names)
    elif kind == "cycle":
        later = toss.choice(nodes[at:])
        node.input[toss.randrange(len(node.input))] = toss.choice(later.output)
    elif kind == "output":
        node.output[toss.randrange(len(node.output))] = toss.choice(names)
    elif kind == "operation":
        node.op_type = toss.choice(_OPERATIONS)
    elif kind == "domain":
        node.domain = toss.choice(("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "x"))
    elif kind == "drop":
        del nodes[at]
    elif kind == "twice":
        nodes.append(node)
    elif kind == "order":
        other = nodes[toss.randrange(len(nodes))]
        kept = NodeProto()
        kept.CopyFrom(node)
        node.CopyFrom(other)
        other.CopyFrom(kept)
    elif kind == "more":
        toss.choice((node.input, node.output)).append(toss.choice(names))
    elif kind == "less":
        toss.choice((node.input, node.output)).pop()
    else:
        node.name = toss.choice(("", "a" * 9999, "\x1b[2J", "/a/b/c", node.op_type))


def _new_node(model: onnx.ModelProto, toss: random.Random) -> None:
    """One more operation between a value and its reader, often an enlarging one."""
    nodes = model.graph.node
    at = toss.randrange(len(nodes))
    place = toss.randrange(len(nodes[at].input))
    source = nodes[at].input[place]
    size = toss.choice((3, 1 << 10, 1 << 20, 1 << 33, 1 << 62, -1))
    sizes = [toss.choice((1, 2, size)) for _ in range(toss.choice((1, 2, 4)))]
    numbers = numpy_helper.from_array(np.array(sizes, np.int64), f"sizes {at}")
    scalar = numpy_helper.from_array(np.array(size, np.int64), f"scalar {at}")
    new = toss.choice(("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "Concat",
                       "Resize", "Reshape", "OneHot", "EyeLike", "Loop", "If",
                       "doubled", "MatMul"))  # fmt: skip
    inputs, attributes = [source, numbers.name], {}
    if new == "ConstantOfShape":
        inputs = [numbers.name]
    elif new == "Range":
        inputs = [scalar.name, numbers.name, scalar.name][: toss.randint(1, 3)]
    elif new in ("Loop", "If"):
        attributes = {"body": helper.make_graph([], "inner", [], [])}
    elif new in ("Concat", "doubled"):
        inputs, attributes = [source, source], {"axis": toss.choice((0, 1, -1, 9))}
    made = []
    for step in range(toss.choice((12, 40)) if new == "doubled" else 1):
        output = f"new {at} {step}"
        operation = "Concat" if new == "doubled" else new
        made.append(helper.make_node(operation, inputs, [output], **attributes))
        inputs = [output] * 2
    model.graph.initializer.extend([numbers, scalar])
    rest = list(nodes[at:])
    rest[0].input[place] = output
    kept = [NodeProto.FromString(node.SerializeToString()) for node in rest]
    del nodes[at:]
    nodes.extend([*made, *kept])


def _whole(model: onnx.ModelProto, toss: random.Random) -> None:
    """Inputs, outputs, operation sets, functions of the model."""
    graph = model.graph
    kind = toss.randrange(8)
    if kind == 0:
        _resize_value(graph.input[0], toss)
    elif kind == 1:
        graph.input[0].type.tensor_type.elem_type = toss.randrange(-1, 30)
    elif kind == 2:
        one = helper.make_tensor_value_info("another", TensorProto.FLOAT, [2])
        toss.choice((graph.input, graph.output)).append(one)
    elif kind == 3:
        toss.choice((graph.input, graph.output)).pop()
    elif kind == 4:
        graph.output[0].name = toss.choice(list(_values(model)))
    elif kind == 5:
        model.opset_import[0].version = toss.choice((*_SIZES, 7, 13, 25))
    elif kind == 6:
        made = model.opset_import.add()
        made.domain, made.version = (
            toss.choice(("", "x")),
            toss.choice((9, 17, 1 << 40)),
        )
    else:
        function = model.functions.add()
        function.name, function.domain = toss.choice(_OPERATIONS), ""


def _resize_value(value: onnx.ValueInfoProto, toss: random.Random) -> None:
    dims = value.type.tensor_type.shape.dim
    if toss.random() < 0.5:
        dims[toss.randrange(len(dims))].dim_value = toss.choice(_SIZES)
    elif toss.random() < 0.5:
        dims.add().dim_value = toss.choice(_SIZES)
    else:
        value.ClearField("type")


_KINDS: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    _attributes, _attributes, _initialisers, _initialisers, _nodes, _nodes, _new_node,
    _whole,
)  # fmt: skip


# ---------------------------------------------------------------- trying one


def attempt(data: bytes, path: Path) -> str:
    """Check a file and convert it where the check allows it.

    Returns: CONVERTED, REPORTED or REFUSED; any exception but the package's own is a
        fault, and so is a conversion that does what the check did not say.
    """
    import crypten_espn as espn
    from crypten_espn.errors import EspnError

    path.write_bytes(data)
    example = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    try:
        report = espn.check(path, example)
    except EspnError as error:
        no_memory(error)
        return REFUSED
    assert str(report) and "allocate" not in str(report), report
    try:
        espn.convert(path, example, protocol="espn")
    except EspnError as error:
        assert not report.ok, error
        return REPORTED
    assert report.ok, report
    return CONVERTED


def run(given: Sequence[bytes], *, seed: int, count: int) -> Outcome:
    """Try `count` mutants in child processes, one after the other."""
    return fuzzing.run(__name__, given, seed=seed, count=count)


def main() -> None:
    """Try a range of mutants of the files on standard input."""
    given, seed = fuzzing.taken()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "networks"
        folder.mkdir()
        (folder.parent / OUTSIDE).write_bytes(bytes(1 << 16))
        (folder / INSIDE).write_bytes(bytes(1 << 10))
        (folder / "link").symlink_to(folder.parent / OUTSIDE)
        opened: list[str] = []

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            if event == "open" and str(arguments[0]).endswith(
                (OUTSIDE, "passwd", "/link", "/dev/zero")
            ):
                opened.append(str(arguments[0]))

        sys.addaudithook(watch)

        def tried(number: int) -> str:
            opened.clear()
            result = attempt(mutant(given, seed, number), folder / "network.onnx")
            assert not opened, opened
            return result

        fuzzing.serve(tried, memory=MEMORY)


if __name__ == "__main__":
    main()
