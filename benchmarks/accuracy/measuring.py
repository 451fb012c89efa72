"""One network under every system that runs it: accuracy, agreement, seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import crypten_espn
from crypten_espn.cost import Cost, measure
from crypten_espn.launch import run_parties
from crypten_espn.masked.inference import online_bytes
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.reference import evaluate
from crypten_espn.pillar.storage import load_network
from crypten_espn.pillar.surgery import activations
from crypten_espn.serving.local import run_session

from .rows import Accuracy

CALIBRATION = 64  # images the masked engine takes its bounds from
SYSTEMS = ("masked", "espn", "opened_mask", "crypten-relu")
WAN_RTT_S, WAN_BITS_PER_S = 0.1, 1e8
PATIENCE_S = 600.0  # a large batch takes long on a busy machine


def measure_network(
    path: Path,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch: int,
    systems: Sequence[str] = SYSTEMS,
    precision_bits: Sequence[int] | None = None,
    truncations: Sequence[str] = ("local",),
) -> Iterator[Accuracy]:
    """Every system that runs this network at every precision, one row each.

    Args:
        path: the network's file.
        images: (n, channels, height, width) as the network takes them.
        labels: (n,).
        batch: images at once.
        systems: which of SYSTEMS.
        precision_bits: see above; None for each system's own choice.
        truncations: of this package's protocols on CrypTen, one row for each.
    """
    network = load_network(path)
    with torch.no_grad():
        clear = torch.cat([network(part) for part in images.split(batch)])
    polynomials = list(activations(network).values())
    kind = "relu"
    if polynomials:
        kind = f"polynomial, degree {polynomials[0].polynomial.degree}"
    for system in systems:
        if (system == "crypten-relu") != (not polynomials):
            continue
        choices: Sequence[str | None] = (None,)
        if system in ("espn", "opened_mask"):
            choices = truncations
        for bits, truncation in itertools.product(
            precision_bits or (12 if system == "masked" else 16,), choices
        ):
            quantised = None
            if system == "masked":
                private, cost, integers = _masked(network, images, batch, bits)
                quantised = _share(integers.argmax(1) == labels)
            else:
                protocol = "espn" if system == "crypten-relu" else system
                private, cost = _on_crypten(
                    network, images, batch, protocol, bits, truncation or "local"
                )
            waits = Cost(cost.rounds, cost.bytes_sent, 0, cost.seconds)
            wan_s = waits.seconds_at(rtt_s=WAN_RTT_S, bits_per_second=WAN_BITS_PER_S)
            count = len(images)
            yield Accuracy(
                model=path.stem,
                activation=kind,
                system=system,
                images=count,
                batch=batch,
                clear=_share(clear.argmax(1) == labels),
                quantised=quantised,
                private=_share(private.argmax(1) == labels),
                agreement=_share(private.argmax(1) == clear.argmax(1)),
                max_abs_error=float((private - clear).abs().max()),
                total_s=cost.seconds / count,
                wan_s=wan_s / count,
                precision_bits=bits,
                truncation=truncation,
            )


def _share(right: torch.Tensor) -> float:
    return float(right.double().mean())


def _masked(
    network: Any, images: torch.Tensor, batch: int, bits: int
) -> tuple[torch.Tensor, Cost, torch.Tensor]:
    """Logits of the parties, their cost, and logits of the integers in the clear."""
    example = images[:CALIBRATION]
    private = crypten_espn.convert(network, example)
    model = masked_model(private, example, precision=2 * bits + 8)
    parts = images.split(batch)
    # The first inference may still compile.
    # Every image counts, those too that the guard would refuse.
    batches = [parts[0][:1], *parts]
    answers = run_session(model, batches, timeout=PATIENCE_S, force=True)[1:]
    total = Cost()
    for part, (_, cost) in zip(parts, answers, strict=True):
        # The messages of the two alternate.
        sent = sum(online_bytes(model.plan, batch=len(part)))
        total += Cost(cost.rounds, sent, 0, cost.seconds + cost.offline.seconds)
    integers = [evaluate(model.plan, model.weights, part)[0] for part in parts]
    return torch.cat([logits for logits, _ in answers]), total, torch.cat(integers)


def _on_crypten(
    network: Any,
    images: torch.Tensor,
    batch: int,
    protocol: str,
    bits: int,
    truncation: str,
) -> tuple[torch.Tensor, Cost]:
    import crypten

    private = crypten_espn.convert(
        network, images[:1], protocol=protocol, truncation=truncation
    )
    with crypten.cfg.temp_override({"encoder.precision_bits": bits}):
        parties = run_parties(
            _crypten_party, world_size=2, args=(private, images.split(batch))
        )
    return parties[1]


def _crypten_party(
    private: Any, parts: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, Cost]:
    """One of two CrypTen parties; weights are shared once, then every part is run."""
    import crypten

    encrypted = private.encrypt(src=0)
    logits = []
    with measure() as measured, crypten.no_grad():
        for part in parts:
            shared = crypten.cryptensor(part, src=1)
            logits.append(encrypted(shared).get_plain_text(dst=1))
    known = crypten.communicator.get().get_rank() == 1
    return torch.cat(logits) if known else None, measured.cost
