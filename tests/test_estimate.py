"""Projections: exact where they claim it, against committed cells and the wire."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import crypten_espn as espn
from benchmarks import costmodel
from benchmarks.rows import COMPACT, PLAIN, Results
from crypten_espn import cli
from crypten_espn.cost import GLOO_DELAYS, SessionCost
from crypten_espn.errors import ConversionError, EspnError, ShapeError
from crypten_espn.estimate.deployment import Deployment, capacities, per_million
from crypten_espn.estimate.engines import engine_costs
from crypten_espn.estimate.processor import REFERENCE, calibrate
from crypten_espn.estimate.workload import workload
from crypten_espn.graph import export
from crypten_espn.launch import run_parties
from crypten_espn.masked.inference import online_bytes
from crypten_espn.masked.planning import make_plan
from crypten_espn.pillar import networks
from crypten_espn.pillar.storage import save_network

POLYNOMIAL = espn.Polynomial.fit(torch.relu, degree=4)
WAN = Deployment(rtt_s=0.1, bits_per_second=100e6)


def costs(work, **options):
    return {cost.engine: cost for cost in engine_costs(work, **options)}


class Small(nn.Module):
    """Padding, grouping, a join, a gate, a pool: every kind that costs or not."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.one, self.two = activation(), activation()
        self.gate = nn.Conv2d(8, 8, 1)
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x):
        x = self.one(self.first(x))
        x = x * self.gate(x.mean((2, 3), keepdim=True))
        x = self.pool(x + self.two(self.second(x)))
        return self.last(torch.flatten(x, 1))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The ReLU network as a file, and its polynomial twin."""
    torch.manual_seed(0)
    relu = Small().eval()
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    path.write_bytes(export(relu, torch.zeros(1, 3, 8, 8)))
    same = Small()
    same.load_state_dict(relu.state_dict())
    twin = espn.replace_activations(same, {nn.ReLU: POLYNOMIAL}).eval()
    return path, relu, twin


# ----------------------------------------------------------- against what was measured


@pytest.fixture(scope="module")
def committed():
    """Every committed cell beside its projection: large networks, so made once."""
    rows = [
        row
        for file in costmodel.RESULTS
        for row in Results.read(file).rows
        # Not derived from shapes: these, and a network of the benchmarks' own.
        if row.activation not in (PLAIN, COMPACT) and row.model in costmodel.NAMED
    ]
    checked = list(costmodel.from_shapes(rows, REFERENCE))
    assert len(checked) == len(rows)
    return checked


@pytest.mark.slow
def test_rounds_and_bytes_equal_every_committed_cell(committed):
    assert len(committed) >= 20
    assert all(check.exact for check in committed)


@pytest.mark.slow
def test_seconds_are_near_the_committed_cells_with_a_delay(committed):
    for check in committed:
        if check.row.rtt_ms:
            assert abs(check.difference) < 0.25, check.row.system


def traffic_of(network, x, protocol, truncation):
    """Rounds, true bytes sent and words kept, as this party sees them."""
    import crypten

    from crypten_espn.wire.crypten import use_direct_channel

    provider = crypten.mpc.get_default_provider()
    encrypted = espn.convert(network, x).encrypt(src=0)
    with espn.settings(protocol=protocol, truncation=truncation):
        provider.trace()
        encrypted(crypten.cryptensor(x, src=1)).get_plain_text(dst=1)
        provider.trace(False)
        provider.fill_cache()
        kept = sum(
            tensor_words(part)
            for filled in provider.tuple_cache.values()
            for part in (filled if isinstance(filled, list) else [filled])
        )
        with use_direct_channel() as channel, crypten.no_grad():
            communicator = crypten.communicator.get()
            with crypten.cfg.temp_override({"communicator.verbose": True}):
                communicator.reset_communication_stats()
                encrypted(crypten.cryptensor(x, src=1)).get_plain_text(dst=1)
                rounds = communicator.comm_rounds
            sent = channel.bytes_sent - 20 * channel.messages_sent
    return rounds, sent, kept


def tensor_words(value):
    if isinstance(value, (tuple, list)):
        return sum(map(tensor_words, value))
    value = getattr(value, "_tensor", value)
    value = getattr(value, "_tensor", value)
    return value.numel() if torch.is_tensor(value) else 0


@pytest.mark.parametrize(
    ("engine", "truncation"),
    [
        ("espn", "local"),
        ("espn", "exact"),
        ("opened_mask", "local"),
        ("beaver", "exact"),
        ("crypten-relu", "local"),
    ],
)
def test_crypten_engines_on_the_wire(small, engine, truncation):
    path, relu, twin = small
    work = workload(str(path), input_shape=(3, 8, 8))
    cost = costs(work, batch=2, truncation=truncation)[engine]
    network = relu if engine == "crypten-relu" else twin
    protocol = None if engine == "crypten-relu" else engine
    x = torch.randn(2, 3, 8, 8)
    results = run_parties(
        traffic_of, world_size=2, args=(network, x, protocol, truncation), timeout=120
    )
    for rank, (rounds, sent, kept) in enumerate(results):
        assert rounds == cost.traffic.rounds
        assert sent == cost.traffic.bytes_sent[rank]
        assert 8 * kept == cost.stored[rank]


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("precision", ["fast", "high"])
def test_masked_engine_as_its_own_plan_says(small, batch, precision):
    path, _, twin = small
    work = workload(str(path), input_shape=(3, 8, 8), precision=precision)
    cost = costs(work, batch=batch)["masked"]
    x = torch.randn(4, 3, 8, 8)
    plan, _ = make_plan(espn.convert(twin, x), x, precision=precision)
    assert cost.traffic.rounds == plan.messages
    # What an opening drops and a word is without follows calibration; everything else
    # hangs on shapes.
    dealt = plan.dealer_bytes(batch=batch)
    assert cost.dealer_bytes == pytest.approx(dealt, rel=0.15)
    down, up = online_bytes(plan, batch=batch)
    assert cost.traffic.bytes_sent[1] == up
    assert cost.traffic.bytes_sent[0] == pytest.approx(down, rel=0.15)


def test_masked_engine_as_simulated(small):
    path, _, twin = small
    work = workload(str(path), input_shape=(3, 8, 8))
    cost = costs(work)["masked"]
    x = torch.randn(1, 3, 8, 8)
    _, measured = espn.simulate(espn.convert(twin, x), x, timeout=250)
    assert isinstance(measured, SessionCost)
    frame = 20 * cost.traffic.rounds // 2
    assert measured.rounds == cost.traffic.rounds
    told = 52  # which material was used, and its header
    assert measured.bytes_sent - frame - told == cost.traffic.bytes_sent[1]
    down = measured.peer_bytes_sent - frame - told
    assert cost.traffic.bytes_sent[0] == pytest.approx(down, rel=0.15)
    layers = len(work.linear)
    assert measured.peer_offline_bytes_sent - 20 * layers == cost.once_bytes
    parts = cost.traffic.rounds // 2
    dealt = measured.dealer_bytes_sent - 20 * (2 * parts - 1)
    assert cost.dealer_bytes == pytest.approx(dealt, rel=0.15)
    assert measured.offline.bytes_sent - 20 * (parts - 1) == cost.client_bytes


# ----------------------------------------------------------- reading networks


def test_weights_do_not_matter_and_every_door_leads_to_the_same_costs(tmp_path):
    network = networks.convnet(in_channels=1, size=28)
    twin = espn.replace_activations(network, {nn.ReLU: POLYNOMIAL}).eval()
    saved, exported = tmp_path / "a.safetensors", tmp_path / "a.onnx"
    save_network(twin, saved)
    exported.write_bytes(export(twin, torch.zeros(1, 1, 28, 28)))
    found = [
        engine_costs(work)
        for work in (
            workload("convnet", input_shape=(1, 28, 28)),
            workload(str(saved)),
            workload(str(exported), input_shape=(1, 28, 28)),
        )
    ]
    assert found[0] == found[1] == found[2]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1e6)  # no plan of its own could hold these
    exported.write_bytes(export(twin, torch.zeros(1, 1, 28, 28)))
    work = workload(str(exported), input_shape=(1, 28, 28))
    assert work.unplanned is None and engine_costs(work) == found[0]


@pytest.mark.slow
def test_size_and_classes_scale_as_layers_do():
    small, large = (
        workload("mini_onn", input_shape=(3, size, size), classes=100)
        for size in (32, 64)
    )
    assert large.activations == 4 * small.activations
    assert small.logits == large.logits == 100
    one, four = costs(small)["espn"], costs(small, batch=4)["espn"]
    weights = 8 * sum(layer.weights for layer in small.linear)
    assert four.dealer_bytes == 4 * one.dealer_bytes
    for rank in (0, 1):  # weights are opened once for the whole batch
        each = one.traffic.bytes_sent[rank] - weights
        assert four.traffic.bytes_sent[rank] == weights + 4 * each


def test_what_cannot_be_read_says_so(tmp_path):
    with pytest.raises(EspnError, match=r"resnet51.*give one of minionn"):
        workload("resnet51")
    with pytest.raises(ShapeError, match="square"):
        workload("resnet18", input_shape=(3, 32, 64))
    with pytest.raises(EspnError, match="needs --shape"):
        workload("x.onnx")
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten())
    path = tmp_path / "pooled.onnx"
    path.write_bytes(export(pooled, torch.zeros(1, 1, 8, 8)))
    with pytest.raises(ConversionError, match=r"MaxPool.*replace_pooling"):
        workload(str(path), input_shape=(1, 8, 8))
    with pytest.raises(EspnError, match="--classes 3"):
        workload(str(path), input_shape=(1, 8, 8), classes=3)


# ----------------------------------------------------------- seconds and deployments


def test_seconds_add_up(small):
    path, _, _ = small
    found = costs(workload(str(path), input_shape=(3, 8, 8)))
    slow = REFERENCE.scaled(REFERENCE.macs32 / 2)
    link = {"rtt_s": 0.1, "bits_per_second": math.inf}
    for cost in found.values():
        there = cost.online_s(REFERENCE, **link)
        here = cost.online.seconds(REFERENCE)
        delays = cost.traffic.rounds * cost.traffic.delays
        assert there - here == pytest.approx(delays * 0.05)
        assert cost.online.seconds(slow) == pytest.approx(2 * here)
    slower = found["crypten-relu"].over_gloo()
    assert found["crypten-relu-gloo"] == dataclasses.replace(
        slower, engine="crypten-relu-gloo"
    )
    assert slower.traffic.delays == GLOO_DELAYS
    waiting = slower.online.calls / REFERENCE.calls - (
        found["crypten-relu"].online.calls / REFERENCE.calls
    )
    assert 1e-3 < waiting / slower.traffic.rounds < 5e-3  # a collective, in seconds
    masked = found["masked"]
    line = {**link, "bits_per_second": 1e6, "dealer_bits": math.inf}
    fast = masked.offline_s(REFERENCE, **line)
    late = masked.offline_s(REFERENCE, **{**line, "dealer_bits": 1e6})
    assert late - fast == pytest.approx(8 * masked.dealer_bytes / 1e6 * 1500 / 1448)
    with pytest.raises(EspnError, match="positive number"):
        REFERENCE.scaled(0)


def test_deployment_is_held_by_what_is_scarce(small):
    path, _, _ = small
    (cost,) = engine_costs(workload(str(path), input_shape=(3, 8, 8)), batch=4)[:1]
    base = capacities(cost, REFERENCE, WAN)
    for part, scarce in (
        ("clients", {"clients": 1}),
        ("server cores", {"server_cores": 1}),
        ("server line", {"server_bits": 1e3}),
        ("dealer cores", {"dealer_cores": 1}),
        ("dealer line", {"dealer_bits": 1e3}),
    ):
        held = capacities(cost, REFERENCE, dataclasses.replace(WAN, **scarce))
        assert held[part] < base[part]
        assert all(held[other] == base[other] for other in base if other != part)
    waited = cost.online_s(REFERENCE, rtt_s=0.1, bits_per_second=100e6)
    assert base["clients"] == pytest.approx(4 * 100 / waited)


def test_a_million_images_scale_with_prices_and_batch(small):
    path, _, _ = small
    work = workload(str(path), input_shape=(3, 8, 8))
    cost = costs(work)["espn"]
    free = dataclasses.replace(WAN, core_hour=0, gigabyte_egress=0, gigabyte_month=0)
    assert per_million(cost, REFERENCE, free).price == 0
    paid = dataclasses.replace(free, gigabyte_egress=2.0)
    bill = per_million(cost, REFERENCE, paid)
    sent = cost.traffic.bytes_sent[0] + cost.dealer_bytes
    assert bill.egress_bytes == 1e6 * sent
    assert bill.price == pytest.approx(2 * sent / 1e3)
    stored = dataclasses.replace(free, gigabyte_month=3.0, storage_days=10)
    bill = per_million(cost, REFERENCE, stored)
    assert bill.price == pytest.approx(cost.stored[0] / 1e3)
    batched = per_million(costs(work, batch=8)["espn"], REFERENCE, paid)
    assert batched.egress_bytes < 1e6 * sent  # weights are shared by the batch


@pytest.mark.slow
def test_calibration_gives_every_rate():
    rates = dataclasses.asdict(calibrate(seconds=0.001))
    assert all(1e2 < rate < 1e13 for rate in rates.values()), rates


# ----------------------------------------------------------- the command


def test_command_prints_tables_and_writes_rows(capsys, tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["estimate", "minionn", "--shape", "3,32,32", "--macs", "40"]
    assert cli.main([*arguments, "--rtt", "50", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "path 50 ms, 100 Mbit/s" in text and "100 such clients" in text
    assert "assumed prices of 0.05 a core hour" in text
    content = json.loads(file.read_text())
    assert [row["engine"] for row in content["rows"]] == [
        *("masked", "espn", "opened_mask", "beaver", "crypten-relu"),
        "crypten-relu-gloo",
    ]
    masked = content["rows"][0]
    assert masked["rounds"] == 16 and masked["bytes_sent"] == [791336, 681984]
    assert masked["bottleneck"] in masked["images_per_s"]
    assert content["deployment"]["core_hour"] == 0.05
    assert not content["processor"]["measured"]


def test_command_refuses_with_a_cure(capsys, tmp_path):
    for wrong in (["--rtt", "-1"], ["--batch", "0"], ["--bandwidth", "fast"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["estimate", "minionn", *wrong])
        assert ended.value.code == 2
        assert "give" in capsys.readouterr().err
    missing = str(tmp_path / "none" / "rows.json")
    options = ["--macs", "40", "--engines", "espn", "--json", missing]
    assert cli.main(["estimate", "minionn", *options]) == 2
    assert "name a file in a folder that exists" in capsys.readouterr().err


BENCHMARKS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
SHOWN = re.compile(
    r"^    \$ crypten-espn (estimate .*?)\n((?:    .*\n|\n(?=    ))+)", re.M
)


@pytest.mark.slow
def test_projections_in_the_documents_are_what_the_command_prints(capsys):
    text = BENCHMARKS.read_text().replace("\\\n", "")
    blocks = SHOWN.findall(text)
    assert len(blocks) == 2
    for arguments, expected in blocks:
        assert cli.main(shlex.split(arguments)) == 0
        assert capsys.readouterr().out == textwrap.dedent(expected)
