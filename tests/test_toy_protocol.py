"""A protocol is one object: in the table, it is everywhere a protocol is named."""

from __future__ import annotations

import pytest
import torch

import crypten_espn as espn
from benchmarks import activations, inference
from crypten_espn import cli
from crypten_espn.cost import Cost
from crypten_espn.errors import ProtocolError
from crypten_espn.estimate.engines import engine_costs, engines
from crypten_espn.estimate.workload import workload
from crypten_espn.polynomial import Form
from crypten_espn.protocols import PROTOCOLS
from crypten_espn.protocols.protocol import Protocol


def _evaluate(x: torch.Tensor, p: torch.Tensor, form: Form) -> torch.Tensor:
    raise AssertionError("a projection evaluates nothing")


def _cost(form: Form, elements: int) -> Cost:
    return Cost(5, 24 * elements, 7 * elements)


TOY = Protocol("toy", _evaluate, _cost, lambda degree: 11 * degree)


@pytest.fixture
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, TOY.name, TOY)


@pytest.mark.usefixtures("_toy")
def test_a_new_protocol_is_projected_by_its_declared_cost() -> None:
    assert "toy" in engines()
    work = workload("minionn", degree=4)
    costs = {cost.engine: cost for cost in engine_costs(work)}
    toy, espn_cost = costs["toy"], costs["espn"]
    layers = len(work.nonlinear)
    elements = sum(layer.elements for layer in work.nonlinear)
    # The linear layers are the same: only the activations' declarations differ.
    declared = [espn.Cost(), espn.Cost()]
    for layer in work.nonlinear:
        for index, name in enumerate(("toy", "espn")):
            with espn.settings(protocol=name) as chosen:
                declared[index] += chosen.cost(layer.polynomial, layer.elements)
    assert declared[0].rounds == 5 * layers
    assert declared[0].bytes_sent == 24 * elements
    rounds = declared[0].rounds - declared[1].rounds
    assert toy.traffic.rounds - espn_cost.traffic.rounds == rounds > 0
    words = sum(
        layer.elements * (44 - PROTOCOLS["espn"].stored_words(layer.polynomial.degree))
        for layer in work.nonlinear
    )
    assert toy.stored[0] - espn_cost.stored[0] == 8 * words


@pytest.mark.usefixtures("_toy")
def test_a_new_protocol_is_a_choice_of_settings_benchmarks_and_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with espn.settings(protocol="toy") as chosen:
        assert chosen.protocol is TOY
    for arguments in (["toy"], ["toy", "toy-exact"]):
        parsed = activations.make_parser().parse_args(["--protocols", *arguments])
        assert parsed.protocols == arguments
    assert "toy" in activations.make_parser().parse_args([]).protocols
    assert "toy" in inference.make_parser().parse_args([]).protocols
    with pytest.raises(SystemExit):
        cli.main(["explain", "--help"])
    assert "toy" in capsys.readouterr().out


def test_without_it_the_name_is_refused() -> None:
    assert "toy" not in engines()
    assert "toy" not in activations.make_parser().parse_args([]).protocols
    assert "toy" not in inference.make_parser().parse_args([]).protocols
    with pytest.raises(ProtocolError, match="toy"), espn.settings(protocol="toy"):
        pass
