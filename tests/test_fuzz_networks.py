"""Network files that were mutated or made to harm: refused by name, or used."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load, save

import crypten_espn as espn
from crypten_espn.errors import CheckpointError, ConversionError, PolynomialError
from crypten_espn.pillar.networks import convnet
from crypten_espn.pillar.storage import load_network, load_weights, save_network
from crypten_espn.polynomial import Polynomial

from . import fuzz_networks, fuzz_onnx


def test_a_mutated_network_file_is_refused_by_name_or_loads():
    outcome = fuzz_networks.run(fuzz_networks.files(), seed=1, count=40)
    assert outcome.faults == []
    assert sum(outcome.counts.values()) == 40
    assert outcome.counts[fuzz_networks.LOADED] > 2
    assert outcome.counts[fuzz_networks.REFUSED] > 20


def test_a_mutated_onnx_file_is_refused_by_name_reported_or_converted():
    outcome = fuzz_onnx.run(fuzz_onnx.files(), seed=1, count=30)
    assert outcome.faults == []
    assert sum(outcome.counts.values()) == 30
    assert outcome.counts[fuzz_onnx.CONVERTED] > 1
    assert outcome.counts[fuzz_onnx.REFUSED] > 10


# ---------------------------------------------------------------- our own files


def own(tmp_path: Path, **changes: object) -> Path:
    """A network's file whose description says something else."""
    path = tmp_path / "network.safetensors"
    save_network(convnet(classes=2, in_channels=1, size=4), path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header["__metadata__"]
    for name, value in changes.items():
        metadata[name] = value if isinstance(value, str) else json.dumps(value)
    path.write_bytes(save(load(data), metadata))
    return path


SQUARE = {
    "numerators": [0, 0, 1], "frac_bits": 0, "interval": [-1, 1], "requested_degree": 2
}  # fmt: skip
BUILT = {"name": "convnet", "classes": 2, "in_channels": 1, "size": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": BUILT | {"classes": 2**31}},
        {"architecture": BUILT | {"classes": 10**30}},
        {"architecture": BUILT | {"classes": 2.0}},
        {"architecture": BUILT | {"classes": True}},
        {"architecture": BUILT | {"size": "4"}},
        {"architecture": BUILT | {"more": 1}},
        {"architecture": [BUILT]},
        {"architecture": "[" * 100_000},
        {"notes": "[" * 100_000},
        {"notes": [1]},
        {"polynomials": [SQUARE]},
        {"polynomials": {"*": SQUARE}},
        {"polynomials": {"features.1": SQUARE | {"frac_bits": "0"}}},
        {"polynomials": {"features.1": SQUARE | {"frac_bits": 0.5}}},
        {"polynomials": {"features.1": SQUARE | {"numerators": [10**400]}}},
        {"polynomials": {"features.1": SQUARE | {"interval": [-1, 10**400]}}},
        {"polynomials": {"features.1": {"channels": []}}},
        {"polynomials": {"features.1": {"channels": [SQUARE, 1]}}},
        {"polynomials": {"features.1": {"channels": [SQUARE], "more": 1}}},
        {"polynomials": {"features.1": {"channels": [{"channels": [SQUARE]}]}}},
        {"normalization": {"mean": "0", "std": "1"}},
        {"normalization": {"mean": [0.0, 0.0], "std": [1.0, 1.0]}},
        {"normalization": {"mean": [0.0], "std": [0.0]}},
        {"normalization": {"mean": [None], "std": [1.0]}},
        {"format": "crypten-espn network 2"},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_description_that_is_not_one_of_ours_is_refused(tmp_path, changes):
    with pytest.raises(CheckpointError, match=r"damaged|description|no activation"):
        load_network(own(tmp_path, **changes))


def test_a_description_that_is_one_of_ours_is_read(tmp_path):
    path = own(tmp_path, architecture=BUILT, polynomials={"features.1": SQUARE})
    assert load_network(path).input_shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("classifier.bias", lambda t: t.to(torch.complex64), "of torch.complex64"),
        ("classifier.bias", lambda t: t.to(torch.int64), "of torch.int64"),
        ("classifier.bias", lambda t: t.double() + 1e300, "not finite"),
        ("classifier.bias", lambda t: (t * torch.nan).to(torch.float8_e5m2), "finite"),
        ("classifier.bias", lambda t: t.reshape(1, -1), r"is \(1, 2\), not \(2,\)"),
    ],
)
def test_tensors_of_another_type_or_value_are_refused_by_both_readers(
    tmp_path, name, change, message
):
    path = own(tmp_path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load(data)
    changed = change(tensors[name])
    path.write_bytes(save({**tensors, name: changed}, header["__metadata__"]))
    with pytest.raises(CheckpointError, match=message):
        load_network(path)
    with pytest.raises(CheckpointError, match=message):
        load_weights(convnet(classes=2, in_channels=1, size=4), path)


def test_a_stored_polynomial_has_integers_that_fit_the_ring():
    with pytest.raises(PolynomialError, match="numerator of 64 bits"):
        Polynomial((1, 2**63), 0, (-1.0, 1.0))
    for text in ('{"frac_bits": "1"}', "[" * 100_000, json.dumps(SQUARE | {"x": 1})):
        with pytest.raises(PolynomialError, match="not a stored polynomial"):
            Polynomial.from_json(text)


# ---------------------------------------------------------------- ONNX files


def graph_of(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray] | None = None
) -> onnx.ModelProto:
    """A file that reads x (batch, 4) and gives y."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(a, name) for name, a in (weights or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )


EYE = {"w": np.eye(4, dtype=np.float32)}
X = torch.ones(2, 4)


def node(operation: str, inputs: str, outputs: str = "y", **attributes: object):
    return helper.make_node(operation, inputs.split(), outputs.split(), **attributes)


def doubled(times: int, first: str, axis: int) -> list[onnx.NodeProto]:
    """A value beside itself, again and again."""
    names = [first, *(f"d{number}" for number in range(times))]
    return [
        node("Concat", f"{a} {a}", b, axis=axis) for a, b in itertools.pairwise(names)
    ]


def test_a_sound_file_is_converted():
    model = graph_of([node("MatMul", "x w")], EYE)
    assert espn.check(model.SerializeToString(), X).ok


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("MatMul", "z w")], "nothing before it makes"),
        ([node("MatMul", "y w")], "nothing before it makes"),
        ([node("Add", "z w", "a"), node("MatMul", "x w", "z"), node("Add", "a z")],
         "nothing before it makes"),
        ([node("MatMul", "x w"), node("MatMul", "x w")], "made before"),
        ([node("MatMul", "x w", "x"), node("MatMul", "x w")], "made before"),
        ([node("MatMul", "x w", "w"), node("MatMul", "x w")], "made before"),
        ([node("MatMul", "x w", "z")], "nothing makes the output"),
        ([helper.make_node("MatMul", ["x", "w"], [""]), node("MatMul", "x w")],
         "no name"),
    ],
)  # fmt: skip
def test_a_value_is_made_once_and_before_it_is_read(nodes, message):
    with pytest.raises(ConversionError, match=message):
        espn.check(graph_of(nodes, EYE).SerializeToString(), X)


@pytest.mark.parametrize(
    ("nodes", "sizes"),
    [
        ([node("ConstantOfShape", "s", "c"), node("Add", "x c")], [1 << 62]),
        ([node("ConstantOfShape", "s", "c"), node("Add", "x c")], [1 << 20, 1 << 20]),
        ([node("Expand", "x s")], [1 << 40, 1, 4]),
        ([node("Tile", "w s", "c"), node("MatMul", "x c")], [1, 1 << 36]),
        ([*doubled(40, "x", 1), node("Identity", "d39")], [1]),
        ([*doubled(40, "w", 1), node("MatMul", "x d39")], [1]),
        ([*doubled(40, "s", 0), node("Reshape", "x d39")], [1]),
    ],
)
def test_a_network_out_of_proportion_to_its_file_is_refused_before_it_grows(
    nodes, sizes
):
    weights = EYE | {"s": np.array(sizes, np.int64)}
    with pytest.raises(ConversionError, match="too large for its input"):
        espn.check(graph_of(nodes, weights).SerializeToString(), X)


def external(tmp_path: Path, location: str, **entries: int) -> Path:
    model = graph_of([node("MatMul", "x w")], EYE)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, str(value)
    folder = tmp_path / "networks"
    folder.mkdir(exist_ok=True)
    path = folder / "network.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_in_a_file_of_the_networks_own_folder_are_read(tmp_path):
    path = external(tmp_path, "weights.bin", offset=8)
    (path.parent / "weights.bin").write_bytes(bytes(8) + EYE["w"].tobytes())
    assert espn.check(path, X).ok
    with pytest.raises(ConversionError, match="give the path"):
        espn.check(path.read_bytes(), X)


@pytest.mark.parametrize(
    "location",
    ["../outside", "/etc/passwd", "link", "linked/outside", "", ".", "/dev/zero", "no",
     "linked/../../outside"],
)  # fmt: skip
def test_weights_in_any_other_file_are_not_read(tmp_path, location):
    path = external(tmp_path, location)
    (tmp_path / "outside").write_bytes(EYE["w"].tobytes())
    (path.parent / "link").symlink_to(tmp_path / "outside")
    (path.parent / "linked").symlink_to(tmp_path)
    with pytest.raises(ConversionError, match="own folder are read, no links"):
        espn.check(path, X)


@pytest.mark.parametrize(
    "entries", [{"offset": 1}, {"length": 63}, {"offset": -1}, {"length": 1 << 62}]
)
def test_weights_of_other_sizes_than_their_file_are_not_read(tmp_path, entries):
    path = external(tmp_path, "weights.bin", **entries)
    (path.parent / "weights.bin").write_bytes(EYE["w"].tobytes())
    with pytest.raises(ConversionError, match=r"takes 64 bytes|offset or length"):
        espn.check(path, X)


def _function(model: onnx.ModelProto) -> None:
    function = model.functions.add()
    function.name, function.domain = "MatMul", ""


def _opsets(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx", 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [(_function, "defines MatMul anew"), (_opsets, "version 9 and 17")],
)
def test_a_file_that_says_two_things_of_one_operation_is_refused(
    change: Callable[[onnx.ModelProto], None], message: str
):
    model = graph_of([node("MatMul", "x w")], EYE)
    change(model)
    with pytest.raises(ConversionError, match=message):
        espn.check(model.SerializeToString(), X)


def test_a_name_that_is_no_text_is_refused():
    data = graph_of([node("MatMul", "x w")], EYE).SerializeToString()
    with pytest.raises(ConversionError, match="no text"):
        espn.check(data.replace(b"MatMul", b"Mat\xfful"), X)


@pytest.mark.parametrize(
    ("nodes", "weights", "words"),
    [
        ([node("MatMul", "x w")], {"w": np.full((4, 4), np.nan, np.float32)}, "finite"),
        ([node("PolynomialActivation", "x", numerators=[1], frac_bits=99,
               interval=[-1.0, 1.0])], {}, "0 to 40 fractional bits"),
        ([node("PolynomialActivation", "x", numerators=[1])], {}, "lacks the attr"),
    ],
)  # fmt: skip
def test_what_no_layer_can_be_made_of_is_reported(nodes, weights, words):
    found = espn.check(graph_of(nodes, weights).SerializeToString(), X)
    assert not found.ok and words in str(found)
    with pytest.raises(ConversionError, match="cannot be converted"):
        espn.convert(graph_of(nodes, weights).SerializeToString(), X)


def test_what_conversion_does_not_foresee_ends_in_an_error_of_ours(monkeypatch):
    def fail(*given: object) -> None:
        raise KeyError("kernel_shape")

    # The package's name for it is the function.
    module = importlib.import_module("crypten_espn.convert")
    monkeypatch.setattr(module, "report", fail)
    model = graph_of([node("MatMul", "x w")], EYE)
    with pytest.raises(ConversionError, match=r"does not know .KeyError: 'kernel_sha"):
        espn.check(model.SerializeToString(), X)
