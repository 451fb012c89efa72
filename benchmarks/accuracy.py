"""Accuracy in the clear, quantised and private, and what privacy costs in time.

For each network file: the share of images that are right
  * in the clear, in float32;
  * quantised: with the masked engine's integers, in the clear;
  * private: computed by two parties, over the masked engine and over CrypTen;
and in how many images the private answer is the one in the clear.

    python -m benchmarks.accuracy --json out/accuracy.json --plot out/accuracy
    python -m benchmarks.accuracy --networks my.safetensors --images 64 --batch 32
    python -m benchmarks.accuracy --images 1000 --batch 100 --systems masked espn \\
        --precision-bits 16 12 --truncation local exact

Without --networks, every bundled network is measured. Up to 256 images are the bundled
ones of Fashion-MNIST's test set; more, or any with --data, are the first of a whole
data set's. Times are of both phases together, per image at the batch size given, in
processes started for the purpose; `benchmarks.inference` measures phases and networks
apart. Networks with ReLU run on CrypTen only.

Precision: b bits are the encoder's fractional bits on CrypTen. The masked engine
chooses scales per layer from its linear ring; a ring of 2 b + 8 bits leaves about b to
weights and b to activations, so 12 is its precision "fast" (32 bits) and 16 its "high"
(40). Without --precision-bits: CrypTen's 16, and "fast".
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import crypten_espn
from crypten_espn.cost import Cost, measure
from crypten_espn.errors import EspnError
from crypten_espn.launch import run_parties
from crypten_espn.masked import plan as masked_plan
from crypten_espn.pillar import data
from crypten_espn.pillar.storage import load_network
from crypten_espn.pillar.surgery import activations
from crypten_espn.protocols import TRUNCATIONS
from crypten_espn.session import (
    DealerServer,
    MaskedModel,
    ModelServer,
    connect,
    masked_model,
)

from . import harness
from .harness import write_atomically

BUNDLED = Path(crypten_espn.__file__).parent / "data"
CALIBRATION = 64  # images the masked engine takes its bounds from
SYSTEMS = ("masked", "espn", "opened_mask", "crypten-relu")
WAN_RTT_S, WAN_BITS_PER_S = 0.1, 1e8
PATIENCE_S = 600.0  # a large batch takes long on a busy machine
# What a private network must keep: agreement, and accuracy within 0.2 points.
LEAST_AGREEMENT, MOST_LOST = 0.995, 0.002


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """One network under one system; accuracies are shares of `images`.

    Args:
        model: the file's name; `activation`: polynomial and its degree, or relu.
        system: masked, espn, opened_mask or crypten-relu.
        images, batch: how many, and how many at once.
        clear, private: accuracies; quantised: None but for the masked engine.
        agreement: share of images with the same answer as in the clear.
        max_abs_error: of the logits.
        total_s: both phases, measured per image over loopback.
        wan_s: total_s and the online messages' delay and bytes at 100 ms round trip
            and 100 Mbit/s, predicted.
        precision_bits: of the encoding, see above.
        truncation: local or exact, of CrypTen's protocols.
    """

    model: str
    activation: str
    system: str
    images: int
    batch: int
    clear: float
    quantised: float | None
    private: float
    agreement: float
    max_abs_error: float
    total_s: float
    wan_s: float
    precision_bits: int | None = None
    truncation: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the private network is as good as the one in the clear."""
        lost = abs(self.private - self.clear)
        return self.agreement >= LEAST_AGREEMENT and lost <= MOST_LOST + 1e-9


def bundled_networks() -> list[Path]:
    """The network files that come with the package."""
    found = []
    for path in sorted(BUNDLED.glob("*.safetensors")):
        try:
            load_network(path)
        except EspnError:
            continue  # images, not a network
        found.append(path)
    return found


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
    logits, total = run_parties(_masked_party, world_size=2, args=(model, parts))[1]
    integers = [
        masked_plan.simulate(model.plan, model.weights, part)[0] for part in parts
    ]
    return logits, total, torch.cat(integers)


def _masked_party(
    model: MaskedModel, parts: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, Cost] | None:
    """One of two processes: rank 0 serves and deals, rank 1 asks for every part."""
    import crypten.communicator as comm

    party = comm.get()
    if party.get_rank() == 0:
        dealer = DealerServer("127.0.0.1:0", timeout=PATIENCE_S)
        server = ModelServer(
            model, "127.0.0.1:0", dealer=dealer.address, timeout=PATIENCE_S
        )
        for service in (dealer, server):
            threading.Thread(target=service.run, daemon=True).start()
        party.broadcast_obj([server.address, dealer.address], 0)
        party.barrier()
        server.close()
        dealer.close()
        return None
    address, dealing = party.broadcast_obj(None, 0)
    logits, total = [], Cost()
    with connect(address, dealer=dealing, timeout=PATIENCE_S) as client:
        client.predict(parts[0][:1])  # from here on nothing is compiled any more
        for part in parts:
            client.online = client.offline = Cost()
            client.prepare(1, batch=len(part))
            logits.append(client.predict(part))
            down, up = model.plan.online_bytes(batch=len(part))
            # The messages of the two alternate.
            seconds = client.online.seconds + client.offline.seconds
            total += Cost(client.online.rounds, down + up, 0, seconds)
    party.barrier()
    return torch.cat(logits), total


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


# ------------------------------------------------------------------ tables and plots

COLUMNS = (
    *("model", "activation", "system", "bits", "images"),
    *("clear", "quantised", "private"),
    *("agree", "error", "s/image", "at 100 ms, 100 Mbit/s"),
)


def cells(row: Accuracy) -> tuple[str, ...]:
    """A row as text, one piece per entry of COLUMNS."""
    return (
        row.model,
        row.activation,
        _system(row),
        "" if row.precision_bits is None else str(row.precision_bits),
        str(row.images),
        f"{row.clear:.2%}",
        "" if row.quantised is None else f"{row.quantised:.2%}",
        f"{row.private:.2%}",
        f"{row.agreement:.2%}",
        f"{row.max_abs_error:.2g}",
        f"{row.total_s:.4f}",
        f"{row.wan_s:.4f}",
    )


def _system(row: Accuracy) -> str:
    return row.system + (" (exact)" if row.truncation == "exact" else "")


def plot(rows: Sequence[Accuracy], stem: Path) -> list[Path]:
    """Private accuracy against seconds per image; the files written.

    A colour for each network, a marker for each system; hollow: 12 bits or fewer.
    """
    figure, (axes,) = harness.new_figure()
    systems = list(dict.fromkeys(_system(row) for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    for row in rows:
        colour = harness.STYLES[models.index(row.model)][0]
        coarse = row.precision_bits is not None and row.precision_bits <= 12
        axes.plot(
            [row.total_s],
            [100 * row.private],
            color=colour,
            marker=harness.STYLES[systems.index(_system(row))][1],
            markerfacecolor="white" if coarse else colour,
            linestyle="none",
            markersize=6,
        )
    entries = [("s", harness.STYLES[i][0], name) for i, name in enumerate(models)]
    entries += [
        (harness.STYLES[i][1], "#444444", name) for i, name in enumerate(systems)
    ]
    for marker, colour, name in entries:
        axes.plot([], [], marker, color=colour, label=name, markersize=5)
    axes.set(
        xscale="log",
        xlabel="seconds per image, both phases, loopback (log); hollow: 12 bits",
        ylabel="private accuracy, %",
        title=f"{rows[0].images} images",
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.1, y=0.1)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return harness.save_figure(figure, stem)


def write(path: Path, machine: dict[str, Any], rows: Sequence[Accuracy]) -> None:
    """Write the rows to a JSON file, in one step."""
    content = {"machine": machine, "rows": [dataclasses.asdict(row) for row in rows]}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def _images(directory: str | None, name: str, count: int) -> tuple[Any, Any]:
    """Normalised images and labels: of the bundled sample, or of a data set's test."""
    split: Any = data.fashion_sample()
    if directory is not None or name != "fashion-mnist" or count > len(split):
        split = data.load_dataset(name, directory=directory or "data").test()
    parts, labels = [], []
    for images, truth in split.batches(min(count, 500)):
        parts.append(images)
        labels.append(truth)
        if sum(map(len, labels)) >= count:
            break
    return torch.cat(parts)[:count], torch.cat(labels)[:count]


def make_parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--data", metavar="DIR", help="a whole data set's files")
    parser.add_argument("--dataset", default="fashion-mnist", help="its name")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--precision-bits",
        nargs="+",
        type=int,
        metavar="BITS",
        help="of the encodings, such as 16 12; see above (default: each system's own)",
    )
    parser.add_argument(
        "--truncation",
        nargs="+",
        choices=TRUNCATIONS,
        default=["local"],
        help="of espn and opened_mask, a row for each (default: local)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--plot", metavar="STEM", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.images < 1 or options.batch < 1:
        parser.error("--images and --batch must be at least 1")
    machine = harness.machine()
    rows: list[Accuracy] = []
    try:
        images, labels = _images(options.data, options.dataset, options.images)
        paths = options.networks or bundled_networks()
        if not paths:
            print("no network is bundled; give --networks FILE", file=sys.stderr)
            return 2
        for path in paths:
            for row in measure_network(
                path,
                images,
                labels,
                batch=options.batch,
                systems=options.systems,
                precision_bits=options.precision_bits,
                truncations=options.truncation,
            ):
                rows.append(row)
                print("  ".join(cells(row)), flush=True)
                if options.json:
                    write(options.json, machine, rows)
    except EspnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished rows are kept", file=sys.stderr)
        return 130
    print(harness.columns([COLUMNS, *map(cells, rows)], left=3))
    short = [row for row in rows if not row.holds]
    print(
        f"{len(rows) - len(short)} of {len(rows)} rows agree in at least "
        f"{LEAST_AGREEMENT:.1%} and lose at most {100 * MOST_LOST:g} points"
    )
    if options.plot and rows:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
