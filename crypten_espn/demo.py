"""`crypten-espn demo`: two parties classify 256 real images by every protocol."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crypten
import torch
from tqdm import tqdm

from .convert import PrivateNetwork, convert
from .cost import measure
from .launch import run_parties
from .masked.planning import masked_model
from .pillar.calibrate import calibrate
from .pillar.data import FASHION_CLASSES, Images, fashion_sample
from .pillar.recipes import bundled
from .serving.local import run_session

BATCH = 32
# CrypTen's ReLU takes about as long for these as the polynomials for all 256.
RELU_BATCHES = 2
# Of the ReLU network fitted without training: asked of the first, fitted to the others.
FITTED_BATCHES = 4

_Row = dict[str, Any]  # of the table, and of the file


@dataclass(frozen=True)
class Outcome:
    """One protocol's run: private logits in the order of the images, and its costs."""

    logits: torch.Tensor
    rounds: int
    bytes_sent: tuple[int, int]
    offline_s: list[float]
    online_s: list[float]
    offline_bytes: int


def run(out: Path) -> int:
    """Run the demo, print its table, and write demo.json and demo.png.

    1. Load the two bundled networks, the same but for their activation.
    2. For each protocol, start two parties and CrypTen's dealer, prepare the tuples of
       a batch (offline), then classify it (online), batch after batch.
    3. The same with the masked engine and its own dealer; last, with it, the ReLU
       network that `calibrate` makes polynomial by half of the images.

    Args:
        out: directory for demo.json and demo.png; made if missing.

    Returns:
        0; a failure raises.
    """
    started = time.perf_counter()
    sample = fashion_sample()
    images = sample.normalization(sample.images)
    print(
        f"{len(images)} Fashion-MNIST test images, batches of {BATCH}, two parties of"
    )
    print("one thread and a dealer on this machine; semi-honest, the dealer does not")
    print("collude. Times are seconds per batch, medians.")
    networks = {
        "polynomial": bundled("fashion-resnet"),
        "relu": bundled("fashion-resnet-relu"),
    }
    with torch.no_grad():
        clear = {name: network(images) for name, network in networks.items()}

    # CrypTen with this package's protocols, then its own ReLU, then the masked engine.
    rows, predictions = [], torch.empty(0)
    cells = [
        ("espn", "local", "polynomial", len(images)),
        ("espn", "exact", "polynomial", len(images)),
        ("opened_mask", "local", "polynomial", len(images)),
        ("beaver", "local", "polynomial", len(images)),
        ("crypten-relu", "local", "relu", RELU_BATCHES * BATCH),
    ]
    for protocol, truncation, name, count in cells:
        given = images[:count]
        private = convert(
            networks[name],
            given[:1],
            protocol=None if name == "relu" else protocol,
            truncation=truncation,
        )
        label = protocol if truncation == "local" else f"{protocol} ({truncation})"
        outcome = _with_crypten(private, given, label)
        rows.append(_row(label, "crypten+gloo", outcome, clear[name], sample))
        if label == "espn":
            predictions = outcome.logits.argmax(1)
    outcome = _with_masked_engine(networks["polynomial"], images)
    rows.append(_row("masked", "masked", outcome, clear["polynomial"], sample))
    asked, seen = images.split(FITTED_BATCHES * BATCH)
    outcome = _with_masked_engine(calibrate(networks["relu"], seen), asked)
    rows.append(_row("relu, fitted", "masked", outcome, clear["relu"], sample))

    # Printed, and written for whoever wants the numbers.
    print(_table(rows))
    out.mkdir(parents=True, exist_ok=True)
    document = {"machine": _machine(), "rows": rows}
    (out / "demo.json").write_text(json.dumps(document, indent=1) + "\n")
    _contact_sheet(sample, predictions, out / "demo.png")
    print(f"wrote {out / 'demo.json'} and {out / 'demo.png'}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


def _with_crypten(private: PrivateNetwork, images: torch.Tensor, label: str) -> Outcome:
    with crypten.cfg.temp_override({"mpc.provider": "TTP"}):
        first, second = run_parties(
            _party, world_size=2, args=(private, images, label, sys.stderr.isatty())
        )
    return Outcome(
        logits=second["logits"],
        rounds=first["rounds"],
        bytes_sent=(first["bytes_sent"], second["bytes_sent"]),
        offline_s=[
            max(pair)
            for pair in zip(first["offline_s"], second["offline_s"], strict=True)
        ],
        online_s=[
            max(pair)
            for pair in zip(first["online_s"], second["online_s"], strict=True)
        ],
        offline_bytes=first["offline_bytes"],
    )


def _party(
    private: PrivateNetwork, images: torch.Tensor, label: str, show: bool
) -> dict[str, Any]:
    """One party: rank 0 owns the network, rank 1 the images and learns the logits."""
    rank = crypten.communicator.get().get_rank()
    private.encrypt(src=0)
    provider = crypten.mpc.get_default_provider()
    batches = images.split(BATCH)

    provider.trace(True)
    private(crypten.cryptensor(batches[0], src=1))
    provider.trace(False)

    logits, offline_s, online_s = [], [], []
    bar = tqdm(batches, f"{label:<16}", unit="batch", disable=rank != 0 or not show)
    for batch in bar:
        with measure() as offline:
            provider.fill_cache()
        offline_s.append(offline.cost.seconds)
        with measure() as online:
            result = private(crypten.cryptensor(batch, src=1)).get_plain_text(dst=1)
        online_s.append(online.cost.seconds)
        logits.append(result)
    return {
        "logits": torch.cat(logits) if rank == 1 else None,
        "rounds": online.cost.rounds,
        "bytes_sent": online.cost.bytes_sent,
        "offline_s": offline_s,
        "online_s": online_s,
        # Rank 0 receives every correction; CrypTen counts them on its side.
        "offline_bytes": 2 * offline.cost.bytes_sent,
    }


def _with_masked_engine(network: torch.nn.Module, images: torch.Tensor) -> Outcome:
    model = masked_model(convert(network, images[:BATCH]), images[:BATCH])
    answers = run_session(model, images.split(BATCH))
    costs = [cost for _, cost in answers]
    last = costs[-1]
    return Outcome(
        logits=torch.cat([logits for logits, _ in answers]),
        rounds=last.rounds,
        bytes_sent=(last.peer_bytes_sent, last.bytes_sent),
        offline_s=[cost.offline.seconds for cost in costs],
        online_s=[cost.seconds for cost in costs],
        offline_bytes=last.dealer_bytes_sent,
    )


def _row(
    label: str, engine: str, outcome: Outcome, clear: torch.Tensor, sample: Images
) -> _Row:
    count = len(outcome.logits)
    private, plain = outcome.logits.argmax(1), clear[:count].argmax(1)
    labels = sample.labels[:count]
    totals = [a + b for a, b in zip(outcome.offline_s, outcome.online_s, strict=True)]
    return {
        "model": "fashion_resnet",
        "activation": label,
        "engine": engine,
        "network": "loopback",
        "rtt_ms": 0.0,
        "mbit": None,
        "batch": BATCH,
        "threads": 1,
        "rounds": outcome.rounds,
        "bytes_sent": list(outcome.bytes_sent),
        "online_s": _spread(outcome.online_s),
        "offline_s": _spread(outcome.offline_s),
        "total_s": _spread(totals),
        "offline_bytes": outcome.offline_bytes,
        "max_abs_error": (outcome.logits - clear[:count]).abs().max().item(),
        "argmax_agreement": (private == plain).double().mean().item(),
        "images": count,
        "accuracy_clear": (plain == labels).double().mean().item(),
        "accuracy_private": (private == labels).double().mean().item(),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
    }


def _table(rows: list[_Row]) -> str:
    titles = (
        "protocol        ",
        "images",
        "clear",
        "private",
        "agree",
        "error",
        "rounds",
        "MB sent",
        "offline s",
        "online s",
    )
    lines = ["", "  ".join(titles)]
    for row in rows:
        agreed = round(row["argmax_agreement"] * row["images"])
        sent = max(row["bytes_sent"]) / 1e6
        cells = (
            f"{row['activation']}",
            f"{row['images']}",
            f"{row['accuracy_clear']:.1%}",
            f"{row['accuracy_private']:.1%}",
            f"{agreed}",
            f"{row['max_abs_error']:.3f}",
            f"{row['rounds']}",
            f"{sent:.1f}",
            f"{row['offline_s']['median']:.3f}",
            f"{row['online_s']['median']:.3f}",
        )
        pairs = zip(cells, titles, strict=True)
        first, *rest = [
            c.ljust(len(t)) if i == 0 else c.rjust(len(t))
            for i, (c, t) in enumerate(pairs)
        ]
        lines.append("  ".join([first, *rest]))
    lines.append(
        "MB sent: online, by the party that sends more, per batch. error: largest "
        "difference\nof a logit from the same network in the clear. crypten-relu: the "
        "ReLU network, on\nas many images as fit the time. relu, fitted: that network "
        "without training,\nevery channel's ReLU a polynomial of degree 8 that half of "
        "the images fitted; clear,\nagree and error are of the ReLU network itself.\n"
        "espn, opened_mask and beaver truncate each share by itself, which fails for "
        "one\nelement in 2^29: an error in the millions is one of those. espn (exact) "
        "and masked\nnever do.\n"
    )
    return "\n".join(lines)


def _machine() -> dict[str, object]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _contact_sheet(sample: Images, predictions: torch.Tensor, path: Path) -> None:
    """48 images under their private predictions; wrong ones in red with the truth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = 4, 12
    figure = Figure(figsize=(columns * 1.05, rows * 1.32), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Private predictions: the model's owner saw none of these images")
    for index, axes in enumerate(figure.subplots(rows, columns).flat):
        axes.imshow(sample.images[index, 0].numpy(), cmap="gray_r")
        axes.set_axis_off()
        predicted, truth = int(predictions[index]), int(sample.labels[index])
        right = predicted == truth
        title = (
            FASHION_CLASSES[predicted]
            if right
            else f"{FASHION_CLASSES[predicted]}\n({FASHION_CLASSES[truth]})"
        )
        axes.set_title(title, fontsize=8, color="black" if right else "crimson")
    figure.savefig(path, dpi=120)
