"""A network is right in every engine, or refused by name before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import crypten_espn as espn
from crypten_espn.convert import PrivateNetwork
from crypten_espn.errors import EspnError
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.planning.network import Network
from crypten_espn.simulate import simulate_model

from .drawn_networks import Draw, Drawn


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Args:
        seed: it was drawn with.
        constructs: in the order of its operations.
        crypten, masked: "right", "refused", or what was wrong, by engine.
        words: of the refusal, or of what was wrong.
    """

    seed: int
    constructs: tuple[str, ...]
    crypten: str
    masked: str
    words: str

    @property
    def ok(self) -> bool:
        return {self.crypten, self.masked} <= {"right", "refused"}


def outcome(seed: int) -> Outcome:
    """Draw a network, check it, and run it wherever `check` says that it runs."""
    network, x = Draw(seed).network()
    crypten = masked = "refused"
    words = ""
    try:
        report = espn.check(network, x)
        if not report.ok:
            words = str(report)
        else:
            other = torch.randn(1 + seed % 5, *x.shape[1:])
            crypten, words = _with_crypten(network, x, other)
            if report.masked is None:
                masked, found = _with_masked(network, x, other)
                words = words or found
            else:
                words = words or report.masked
    except EspnError as error:
        words = f"check raised {type(error).__name__}: {error}"
    except Exception as error:
        crypten = masked = "foreign"
        words = f"{type(error).__name__}: {error}"
    return Outcome(seed, tuple(network.constructs), crypten, masked, words)


def _with_crypten(
    network: Drawn, x: torch.Tensor, other: torch.Tensor
) -> tuple[str, str]:
    private = espn.convert(network, x, engine=espn.CrypTen("espn", "exact"))
    if _compares(private):
        return "right", ""  # CrypTen's own comparisons: two processes, not here
    for given in (x, other):
        found = espn.explain(private, given, runs=1)
        if found.overflow is not None:
            return "right", ""  # named as such
        words = _far(found.logits, network, given, 0.03)
        if words:
            return "wrong", f"espn: {words}"
    return "right", ""


def _with_masked(
    network: Drawn, x: torch.Tensor, other: torch.Tensor
) -> tuple[str, str]:
    private = espn.convert(network, x)
    model, layers = masked_model(private), Network(private)
    layers.cut()
    unit = 2.0**-model.plan.output.frac_bits
    width = unit * 2**model.plan.output.noise_bits
    # Deviations of the whole error; the other input was not calibrated on.
    for given, deviations in ((x, 12), (other, 40)):
        # What leaves the bounds of calibration is the one thing nobody can see.
        values = layers.run(given, layers.ends)
        bounds = zip(layers.ends, model.report.parts, strict=True)
        if any(float(values[end].abs().max()) > part.bound for end, part in bounds):
            continue
        if given.abs().max() > model.plan.input.bound:
            continue
        logits, _ = simulate_model(model, given)
        allowed = deviations * model.report.logits_error + width / 2
        words = _far(logits, network, given, 2.0**-12, allowed)
        if words:
            return "wrong", f"masked: {words}"
    return "right", ""


def _compares(private: PrivateNetwork) -> bool:
    kinds = {type(module).__name__ for module in private._modules.values()}
    return bool(kinds & {"ReLU", "MaxPool2d"})


def _far(
    found: torch.Tensor,
    network: Drawn,
    x: torch.Tensor,
    relative: float,
    allowed: float = 0.0,
) -> str:
    """Why a result is not the network's; empty if it is."""
    expected = network(x)
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} for {tuple(expected.shape)}"
    largest = float(expected.abs().max())
    error = float((found - expected).abs().max())
    limit = allowed + relative * max(largest, 1.0)
    if error <= limit:
        return ""
    return f"off by {error:.3g} of {largest:.3g}, {limit:.3g} allowed"
