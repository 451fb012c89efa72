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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import crypten_espn
from crypten_espn.errors import EspnError
from crypten_espn.pillar import data
from crypten_espn.pillar.storage import load_network
from crypten_espn.protocols import TRUNCATIONS

from .. import tables
from ..rows import machine as this_machine
from .measuring import SYSTEMS, measure_network
from .rows import COLUMNS, LEAST_AGREEMENT, MOST_LOST, Accuracy, cells, plot, write

BUNDLED = Path(crypten_espn.__file__).parent / "data"


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
    machine = this_machine()
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
    print(tables.columns([COLUMNS, *map(cells, rows)], left=3))
    short = [row for row in rows if not row.holds]
    print(
        f"{len(rows) - len(short)} of {len(rows)} rows agree in at least "
        f"{LEAST_AGREEMENT:.1%} and lose at most {100 * MOST_LOST:g} points"
    )
    if options.plot and rows:
        plot(rows, options.plot)
    return 0
