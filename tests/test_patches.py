"""Each patch: what works with it, and what fails without it."""

from __future__ import annotations

import io
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import crypten
import crypten.communicator as comm
import onnx
import pytest
import torch
from crypten.common import rng
from crypten.encoder import FixedPointEncoder
from torch import nn

from crypten_espn import patches
from crypten_espn.errors import RandomnessError, RangeError
from crypten_espn.launch import run_parties


@contextmanager
def without(name: str) -> Iterator[None]:
    """The world as it was before a patch; skips where the patch is not needed."""
    patch = patches.get(name)
    if not patch.applied:
        pytest.skip(f"{name} is not needed here")
    patch.revert()
    try:
        yield
    finally:
        patch.apply()


def python(code: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which a warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=check,
    )


def convert(model: nn.Module, example: torch.Tensor) -> crypten.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return crypten.nn.from_pytorch(model, example)


def private(graph: crypten.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The decrypted output: rank 0 owns the network, rank 1 the input."""

    def run() -> torch.Tensor:
        graph.encrypt(src=0)
        return graph(crypten.cryptensor(x, src=1)).get_plain_text()

    first, second = run_parties(run, world_size=2)
    assert torch.equal(first, second)
    return first


def assert_private_agrees(
    model: nn.Module, x: torch.Tensor, *, tolerance: float = 2e-3
) -> None:
    with torch.no_grad():
        expected = model(x)
    result = private(convert(model, x), x)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < tolerance


# The collection.


def test_each_patch_says_what_it_is_for() -> None:
    names = [patch.name for patch in patches.PATCHES]
    assert len(set(names)) == len(names)
    for patch in patches.PATCHES:
        assert patch.broke and patch.seen_on and patch.delete_when
        assert patches.get(patch.name) is patch


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="onnx_registration"):
        patches.get("nothing")


def test_import_is_silent_and_applies_what_is_needed() -> None:
    result = python("import crypten_espn")
    assert result.stdout == result.stderr == ""
    # torchvision's operators load by themselves beside a torch for CUDA.
    optional = {"torchvision_ops"}
    missing = {p.name for p in patches.PATCHES} - {p.name for p in patches.applied()}
    assert missing <= optional


def test_apply_twice_changes_nothing() -> None:
    before = crypten.nn.onnx_converter._to_crypten, rng.generate_random_ring_element
    patches.apply()
    assert before == (
        crypten.nn.onnx_converter._to_crypten,
        rng.generate_random_ring_element,
    )


# All but torchvision_ops, whose names stay defined once torchvision is imported.
@pytest.mark.parametrize("name", [patch.name for patch in patches.PATCHES[1:]])
def test_revert_uncovers_the_defect_and_apply_mends_it(name: str) -> None:
    patch = patches.get(name)
    with without(name):
        assert not patch.applied and patch.probe()
        patch.revert()
    assert patch.applied and not patch.probe()


# Installation and import.


def test_onnx_registration() -> None:
    alone = python("import crypten", check=False)
    assert "torch.onnx._internal.registration" in alone.stderr
    python("import crypten_espn, crypten; crypten.nn.Linear(2, 2)")


def test_torchvision_ops() -> None:
    alone = python("import torchvision", check=False)
    patched = python(
        "import crypten_espn, torch, torchvision\n"
        "torchvision.models.resnet18().eval()(torch.zeros(1, 3, 32, 32))\n"
        "torchvision.transforms.Resize(4)(torch.zeros(3, 8, 8))\n"
        "print([p.name for p in crypten_espn.patches.applied()])"
    )
    if alone.returncode:
        assert "operator torchvision::nms does not exist" in alone.stderr
        assert "torchvision_ops" in patched.stdout
    else:
        assert "torchvision_ops" not in patched.stdout


# Conversion.


def test_exporter() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Softmax(dim=1)), torch.randn(2, 3)
    with without("exporter"), pytest.raises(Exception):  # noqa: B017 - torch's own
        convert(model, x)
    graph = convert(model, x)
    # CrypTen's symbolic keeps softmax whole; its default would be a string of nodes.
    assert [type(m).__name__ for m in graph.modules()][-1] == "Softmax"


def test_identity() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model.eval()
    x = torch.randn(1, 1, 5, 5)
    with without("identity"), pytest.raises(ValueError, match="ONNX op Identity"):
        convert(model, x)
    graph = convert(model, x)
    stored = {n for n, m in graph._modules.items() if type(m).__name__ == "Parameter"}
    counters = "num_batches_tracked"  # no inference needs them
    assert stored == {n for n in model.state_dict() if not n.endswith(counters)}
    values = [graph._modules[n].data.data_ptr() for n in stored]
    assert len(set(values)) == len(values)
    # CrypTen's inverse square root is good to about two parts in a thousand.
    assert_private_agrees(model, x, tolerance=2e-2)
    assert graph.to_pytorch() is not None


def test_identity_of_an_activation_passes_through() -> None:
    node = onnx.helper.make_node
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node("Identity", ["x"], ["a"]), node("Add", ["a", "x"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [2])],
        [value("y", onnx.TensorProto.FLOAT, [2])],
    )
    model = crypten.nn.from_onnx(
        io.BytesIO(onnx.helper.make_model(graph).SerializeToString())
    )
    assert model(torch.ones(2)).tolist() == [2, 2]


def test_onnx_arrays() -> None:
    model, x = nn.Linear(3, 2), torch.randn(1, 3)
    with without("onnx_arrays"), pytest.raises(UserWarning, match="not writable"):
        convert(model, x)
    graph = convert(model, x)
    with torch.no_grad():
        graph._modules["weight"].data.add_(1)
    assert torch.equal(graph._modules["weight"].data, model.weight.data + 1)


def test_conv_padding() -> None:
    model, x = nn.Conv2d(2, 3, 3, padding=(1, 0)).eval(), torch.randn(1, 2, 6, 5)
    with without("conv_padding"):
        assert private(convert(model, x), x).shape != model(x).shape
    assert_private_agrees(model, x)


def test_conv_padding_differs_at_the_two_ends() -> None:
    weight = torch.randn(3, 2, 2, 3)
    node = onnx.helper.make_node(
        "Conv",
        ["x", "w"],
        ["y"],
        strides=[1, 2],
        dilations=[1, 1],
        pads=[1, 0, 0, 2],
        kernel_shape=[2, 3],
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [1, 2, 4, 5])],
        [value("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weight.numpy(), "w")],
    )
    model = onnx.helper.make_model(graph)
    x = torch.randn(1, 2, 4, 5)
    padded = nn.functional.pad(x, (0, 2, 1, 0))
    expected = nn.functional.conv2d(padded, weight, stride=(1, 2))
    converted = crypten.nn.from_onnx(io.BytesIO(model.SerializeToString())).eval()
    assert (private(converted, x) - expected).abs().max() < 2e-3


@pytest.mark.parametrize("include", [True, False])
def test_average_pool(include: bool) -> None:
    model = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=include)
    x = torch.randn(2, 2, 6, 6) + 1
    if not include:
        with without("average_pool"):
            wrong = private(convert(model, x), x)
        assert (wrong - model(x)).abs().max() > 0.1
    assert_private_agrees(model, x)


@pytest.mark.parametrize("kind", [nn.AvgPool2d, nn.MaxPool2d])
def test_pools_keep_every_dimension(kind: type[nn.Module]) -> None:
    model = kind((2, 3), stride=(1, 2), padding=1)
    x = torch.randn(1, 2, 5, 7)
    with without("average_pool"), pytest.raises(AssertionError):
        convert(model, x)
    assert_private_agrees(model, x)


def test_average_pool_pads_each_dimension_and_max_pool_refuses() -> None:
    x = torch.randn(1, 2, 5, 7)
    assert_private_agrees(nn.AvgPool2d(3, stride=2, padding=(0, 1)), x)
    with pytest.raises(ValueError, match="one padding for both"):
        convert(nn.MaxPool2d(3, stride=2, padding=(0, 1)), x)


def test_graph_inputs() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * x
            return x + x

    x = torch.randn(2, 3)
    with without("graph_inputs"), pytest.raises(ValueError, match="forward"):
        convert(Twice(), x)(x)
    assert torch.allclose(convert(Twice(), x)(x), 2 * x * x)
    assert_private_agrees(Twice(), x)


def test_graph_that_is_not_connected_names_what_is_missing() -> None:
    graph = crypten.nn.Graph("input", "output")
    graph.add_module("output", crypten.nn.module.Add(), ["input", "ghost"])
    with pytest.raises(ValueError, match="ghost"):
        graph(torch.ones(1))
    with pytest.raises(ValueError, match="2 inputs"):
        graph(torch.ones(1), torch.ones(1))


# Inference.


def _batch_norm_runs(patched: bool) -> list[tuple[int, float]]:
    """Rounds and largest error of two inferences, as one party sees them."""
    torch.manual_seed(3)
    layer = nn.BatchNorm2d(4).eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(layer, name).data.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        expected = layer(x)
    graph = convert(layer, x)

    def run() -> list[tuple[int, float]]:
        if not patched:
            patches.get("batch_norm").revert()
        graph.encrypt(src=0)
        crypten.cfg.communicator.verbose = True
        results = []
        for _ in range(2):
            crypten.reset_communication_stats()
            output = graph(crypten.cryptensor(x, src=1))
            rounds = comm.get().comm_rounds
            error = (output.get_plain_text() - expected).abs().max().item()
            results.append((rounds, error))
        return results

    return run_parties(run, world_size=2)[0]


def test_batch_norm_costs_one_product() -> None:
    (_, stock_error), (stock, _) = _batch_norm_runs(patched=False)
    (_, error), (rounds, again) = _batch_norm_runs(patched=True)
    # TFP scatters nothing for its tuples: a product is one opening.
    assert rounds == 1
    assert stock >= rounds + 18
    # Most of it is CrypTen's inverse square root, in both.
    assert max(error, again) < stock_error + 2e-3 < 1e-2


def test_batch_norm_notices_new_parameters() -> None:
    layer, x = nn.BatchNorm2d(2).eval(), torch.randn(1, 2, 3, 3)
    graph = convert(layer, x)

    def run() -> torch.Tensor:
        graph.encrypt(src=0)
        graph(crypten.cryptensor(x, src=1))
        three = crypten.cryptensor(torch.full((2,), 3.0), src=0)
        graph._modules["bias"].data.copy_(three)
        return graph(crypten.cryptensor(x, src=1)).get_plain_text()

    with torch.no_grad():
        expected = layer(x) + 3
    assert (run_parties(run, world_size=2)[1] - expected).abs().max() < 2e-2


def test_batch_norm_still_trains() -> None:
    layer, x = nn.BatchNorm2d(2).train(), torch.randn(4, 2, 3, 3)
    model = nn.Sequential(layer, nn.Flatten())
    graph = convert(model, x)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        graph.encrypt(src=0).train()
        output = graph(crypten.cryptensor(x, src=1))
        output.sum().backward()
        bias = graph._modules["0.bias"].data
        return output.get_plain_text(), bias.grad.get_plain_text()

    output, gradient = run_parties(run, world_size=2)[0]
    with torch.no_grad():
        expected = model(x)
    assert (output - expected).abs().max() < 2e-2
    assert (gradient - 36).abs().max() < 1e-2


# Files and the offline phase.


def test_torch_load(tmp_path: Path) -> None:
    path = str(tmp_path / "shares")
    data = torch.randn(3)

    def run(patched: bool) -> torch.Tensor | None:
        if not patched:
            patches.get("torch_load").revert()
        mine = f"{path}-{comm.get().get_rank()}"
        x = crypten.cryptensor(data, src=0, requires_grad=True)
        crypten.save({"x": x * 2, "b": (x > 0)._tensor}, mine)
        try:
            return crypten.load(mine)["x"].get_plain_text()
        except pickle.UnpicklingError:
            return None

    assert run_parties(run, world_size=2, args=(False,)) == [None, None]
    for loaded in run_parties(run, world_size=2, args=(True,)):
        assert (loaded - 2 * data).abs().max() < 1e-3


def test_torch_load_runs_no_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("true",)

    torch.save(Payload(), tmp_path / "file")
    with pytest.raises(pickle.UnpicklingError):
        crypten.load(tmp_path / "file")


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
def test_tuple_cache(provider: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=(1, 0)), nn.ReLU()).eval()
    x = torch.randn(1, 2, 4, 4)
    graph = convert(model, x)
    folder = str(tmp_path)

    def run() -> tuple[int, int, int, torch.Tensor]:
        graph.encrypt(src=0)
        dealer = crypten.mpc.get_default_provider()
        made = 0
        names = dealer.TRACEABLE_FUNCTIONS

        def count(name: str) -> None:
            stock = getattr(type(dealer), name)

            def counted(self: object, *args: object, **kwargs: object) -> object:
                nonlocal made
                made += 1
                return stock(self, *args, **kwargs)

            setattr(type(dealer), name, counted)

        for name in names:
            count(name)
        crypten.trace()
        graph(crypten.cryptensor(x, src=1))
        crypten.trace(False)
        traced = made
        crypten.fill_cache()
        filled = made - traced
        dealer.save_cache(folder)
        assert not dealer.tuple_cache
        dealer.load_cache(folder)
        assert not os.path.exists(dealer._get_tuple_path(folder))
        made = 0
        output = graph(crypten.cryptensor(x, src=1)).get_plain_text()
        online = made
        # The cache is used up: every tuple served once, the next is made on demand.
        again = graph(crypten.cryptensor(x, src=1)).get_plain_text()
        assert (again - output).abs().max() < 2e-3 and made == traced
        return traced, filled, online, output

    with crypten.cfg.temp_override({"mpc.provider": provider}), torch.no_grad():
        for traced, filled, online, output in run_parties(run, world_size=2):
            assert traced == filled > 0 == online
            assert (output - model(x)).abs().max() < 2e-3


def test_tuple_cache_without() -> None:
    model, x = nn.Conv2d(1, 1, 3).eval(), torch.randn(1, 1, 4, 4)
    graph = convert(model, x)

    def run() -> str:
        patches.get("tuple_cache").revert()
        graph.encrypt(src=0)
        crypten.trace()
        graph(crypten.cryptensor(x, src=1))
        crypten.trace(False)
        try:
            crypten.fill_cache()
        except TypeError as error:
            return str(error)
        return "filled"

    assert "unhashable type: 'list'" in run_parties(run, world_size=2)[0]


def test_trace_once() -> None:
    provider = crypten.mpc.provider.TrustedFirstParty()
    provider.trace_once()
    assert provider.tracing
    provider.request_cache.append(("square", (), {}))
    provider.trace_once()
    assert not provider.tracing


# The launcher; tests/test_launch.py has the rest.


def test_launcher() -> None:
    assert crypten.mpc.run_multiprocess is crypten.mpc.context.run_multiprocess

    @crypten.mpc.run_multiprocess(world_size=2)
    def party() -> torch.Tensor:
        return torch.ones(100_000) * comm.get().get_rank()

    zero, one = party()
    assert zero.sum() == 0 and one.sum() == 100_000


def test_launcher_without() -> None:
    result = python(
        "import crypten_espn, crypten, torch\n"
        "crypten_espn.patches.get('launcher').revert()\n"
        "def party():\n"
        "    raise ValueError('boom')\n"
        "print(crypten.mpc.run_multiprocess(world_size=2)(party)())"
    )
    assert result.stdout.strip() == "None"


# The generator; tests/test_randomness.py carries out the attack.


def test_generator_reaches_every_module() -> None:
    from crypten.mpc.primitives import arithmetic, binary
    from crypten.mpc.provider import tfp_provider, ttp_provider

    ring = rng.generate_random_ring_element
    kbit = rng.generate_kbit_random_tensor
    for module in (arithmetic, tfp_provider, ttp_provider):
        assert module.generate_random_ring_element is ring
    for module in (binary, tfp_provider, ttp_provider):
        assert module.generate_kbit_random_tensor is kbit
    with without("generator"):
        for module in (arithmetic, tfp_provider, ttp_provider):
            stock = module.generate_random_ring_element
            assert stock is rng.generate_random_ring_element is not ring
            assert "randint" in stock.__code__.co_names
    assert rng.generate_random_ring_element is arithmetic.generate_random_ring_element


def test_plain_torch_generator_gives_what_it_gave() -> None:
    def draw() -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(5)
        return [
            rng.generate_random_ring_element((4,), generator=g),
            rng.generate_random_ring_element((4,), ring_size=1024, generator=g),
            rng.generate_kbit_random_tensor((4,), bitlength=3, generator=g),
        ]

    patched = draw()
    with without("generator"):
        stock = draw()
    assert all(torch.equal(a, b) for a, b in zip(patched, stock, strict=True))


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_generator_draws_from_a_keystream(provider: str, world_size: int) -> None:
    def run() -> list[object]:
        from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor
        from crypten.mpc.provider.ttp_provider import TTPClient

        found = [
            g for by_device in crypten.generators.values() for g in by_device.values()
        ]
        if crypten.mpc.ttp_required():
            found.append(TTPClient.get().generator)
        assert all(type(g).__name__ == "MaskGenerator" for g in found)
        zero = ArithmeticSharedTensor.PRZS((50,))
        even = BinarySharedTensor.PRZS((50,))
        own = rng.generate_random_ring_element((50,))
        shared = crypten.generators["global"][torch.device("cpu")].keystream.ring(3)
        x = crypten.cryptensor(torch.arange(4.0), src=0)
        y = crypten.cryptensor(torch.arange(4.0), src=world_size - 1)
        return [
            (zero.share, zero.reveal()),
            (even.share, even.reveal()),
            own,
            shared,
            ((x * y).get_plain_text(), (x > 1.5).get_plain_text()),
        ]

    with crypten.cfg.temp_override({"mpc.provider": provider}):
        views = run_parties(run, world_size=world_size)
    for zero, even, _, _, (product, greater) in views:
        assert zero[0].abs().min() > 0 and not zero[1].any()
        assert even[0].abs().min() > 0 and not even[1].any()
        assert (product - torch.tensor([0.0, 1, 4, 9])).abs().max() < 1e-3
        assert greater.tolist() == [0, 0, 1, 1]
    owns = torch.stack([view[2] for view in views])
    assert len(owns.unique()) == owns.numel()
    assert all(torch.equal(view[3], views[0][3]) for view in views)


def test_manual_seed_in_debug_mode_repeats_the_masks() -> None:
    def run() -> list[tuple[torch.Tensor, ...]]:
        rank = comm.get().get_rank()
        draws: list[tuple[torch.Tensor, ...]] = []
        for _ in range(2):
            crypten.manual_seed(2**62 + rank, -3 - rank, 7)
            own = crypten.generators["next"][torch.device("cpu")]
            assert own.initial_seed() == 2**62 + rank
            share = crypten.cryptensor(torch.zeros(4), src=0).share
            dropout = torch.rand(
                4, generator=crypten.generators["global"][torch.device("cpu")]
            )
            draws.append((share, rng.generate_random_ring_element((4,)), dropout))
        return draws

    with crypten.cfg.temp_override({"debug.debug_mode": True}):
        views = run_parties(run, world_size=2)
    for first, second in views:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(views[0][0][2], views[1][0][2])
    assert not torch.equal(views[0][0][1], views[1][0][1])


def test_seeds_ignore_torch_manual_seed() -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(0)
        crypten._setup_prng()
        return rng.generate_random_ring_element((4,))

    draws = [run_parties(run, world_size=1)[0] for _ in range(2)]
    assert not torch.equal(*draws)


def test_ring_sizes_of_mask_generators() -> None:
    def run() -> None:
        small = rng.generate_random_ring_element((1000,), ring_size=8)
        assert sorted(small.unique().tolist()) == list(range(-4, 4))
        bits = rng.generate_kbit_random_tensor((1000,), bitlength=1)
        assert sorted(bits.unique().tolist()) == [0, 1]
        assert rng.generate_kbit_random_tensor((9,)).abs().max() > 2**40
        with pytest.raises(RandomnessError, match="power of two"):
            rng.generate_random_ring_element((1,), ring_size=10)

    run_parties(run, world_size=1)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, math.nan]),
        torch.tensor([math.inf]),
        torch.tensor([-(2.0**48)]),
        torch.tensor([2**47]),
        1e20,
    ],
)
def test_encoder_range(value: torch.Tensor | float) -> None:
    encoder = FixedPointEncoder(precision_bits=16)
    with without("encoder_range"):
        encoder.encode(value if torch.is_tensor(value) else torch.tensor([value]))
    with pytest.raises(RangeError, match=r"finite and below 2\*\*47"):
        encoder.encode(value)


def test_encoder_range_lets_everything_else_pass() -> None:
    encoder = FixedPointEncoder(precision_bits=16)
    edge = torch.tensor([2.0**46, -(2.0**47), 0.0])
    assert encoder.encode(edge).tolist() == [2**62, -(2**63), 0]
    assert encoder.encode(torch.empty(0)).numel() == 0
    assert encoder.encode(3) == 3 * 2**16
    whole = torch.tensor([2**63 - 1, -(2**63)])
    assert torch.equal(FixedPointEncoder(precision_bits=0).encode(whole), whole)


@pytest.mark.parametrize("bits", [8, 12, 16, 20])
def test_decode_negative(bits: int) -> None:
    encoder = FixedPointEncoder(precision_bits=bits)
    ends = torch.arange(-9, 10)[:, None] * 2**bits + torch.arange(-20, 20)
    exact = ends.double() / 2**bits
    assert (encoder.decode(ends) - exact).abs().max() < 1e-6
    assert encoder.decode(ends).dtype == torch.float32
    with without("decode_negative"):
        wrong = (encoder.decode(ends) - exact).abs() > 0.9
        # k - 1 of the values next to each -k, here up to 9.
        assert int(wrong.sum()) == sum(range(9))
        assert bool((exact[wrong] < -1).all())


def test_decode_negative_leaves_integers_alone() -> None:
    values = torch.tensor([-5, -1, 0, 7])
    assert FixedPointEncoder(precision_bits=0).decode(values).tolist() == [-5, -1, 0, 7]
