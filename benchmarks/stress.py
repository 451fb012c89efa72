"""Networks on clean and corrupted test images: what escapes, what the guard refuses.

    python -m benchmarks.stress                      # all bundled, an hour on a core
    python -m benchmarks.stress --networks fashion-resnet --images 500 --corrupted 2000

Test images of Fashion-MNIST; corruptions are drawn with another seed than that of
calibration. Half of them are of the standard kinds (`espn.stress`), half of kinds that
nothing was fitted to (`benchmarks.unseen`). A network of ReLUs is calibrated first, on
1,000 validation images; --settle settles the intervals of the others on the same
(`espn.settle_intervals`). One without a guard refuses nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import crypten_espn as espn
from crypten_espn.errors import EspnError
from crypten_espn.pillar.data import Normalization, Split, load_dataset
from crypten_espn.pillar.guard import InputGuard, guard_of
from crypten_espn.pillar.storage import BUNDLED, load_network, network_file
from crypten_espn.pillar.stress import CLEAN, corruptions, reaches
from crypten_espn.pillar.surgery import activations
from crypten_espn.table import aligned

from .rows import ROOT, machine, write_atomically
from .unseen import UNSEEN, unseen

_SEED = 20_241
_CALIBRATION = 1_000
# Images corrupted in all ways at once.
_TOGETHER = 250


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of images.

    Attributes:
        images: how many.
        escaping: with a value outside an interval.
        passing: of these, how many the guard lets pass.
        refused: by the guard.
        wrongly: of these, how many do not escape.
        reach: the largest distance of those that pass, in radii.
    """

    images: int = 0
    escaping: int = 0
    passing: int = 0
    refused: int = 0
    wrongly: int = 0
    reach: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.images + other.images,
            self.escaping + other.escaping,
            self.passing + other.passing,
            self.refused + other.refused,
            self.wrongly + other.wrongly,
            max(self.reach, other.reach),
        )

    @property
    def false_refusals(self) -> float:
        """Of those that do not escape, the share that is refused."""
        return self.wrongly / max(self.images - self.escaping, 1)

    @staticmethod
    def of(network: nn.Module, guard: InputGuard | None, images: Tensor) -> Counts:
        """Of a network's images (n, channels, ...)."""
        reach, _, _ = reaches(network, images)
        escaping = reach > 1.0
        refused = torch.zeros_like(escaping) if guard is None else guard.refused(images)
        passed = reach[~refused]
        return Counts(
            len(images),
            int(escaping.sum()),
            int((escaping & ~refused).sum()),
            int(refused.sum()),
            int((refused & ~escaping).sum()),
            float(passed.max()) if len(passed) else 0.0,
        )


def measured(
    network: nn.Module, normalization: Normalization, images: Tensor, corrupted: int
) -> dict[str, dict[str, Counts]]:
    """Counts by group (clean, seen, unseen) and corruption.

    Args:
        network: with polynomial activations.
        normalization: of its inputs.
        images: (n, channels, height, width), as it takes them.
        corrupted: how many corrupted images, about.
    """
    guard = guard_of(network)
    groups: dict[str, dict[str, Counts]] = {CLEAN: {}, "seen": {}, "unseen": {}}
    for part in images.split(_TOGETHER):
        counts = Counts.of(network, guard, part)
        groups[CLEAN][CLEAN] = groups[CLEAN].get(CLEAN, Counts()) + counts
    kinds = [kind for kind in corruptions(images[:2]) if kind != CLEAN]
    for group, names in (("seen", len(kinds)), ("unseen", len(UNSEEN))):
        number = -(-corrupted // (2 * names))
        for place, some in _parts(images, number):
            given = _corrupted(group, some, normalization, _SEED + place)
            for name, made in given:
                # What is the same for every image is given once, and counts as often.
                counts = Counts.of(network, guard, made)
                before = groups[group].get(name, Counts())
                for _ in range(len(some) // len(made)):
                    before = before + counts
                groups[group][name] = before
    return groups


def _parts(images: Tensor, number: int) -> Iterator[tuple[int, Tensor]]:
    """So many of the images, evenly chosen, a part at a time with its place."""
    chosen = torch.arange(number) * len(images) // number
    for place, part in enumerate(chosen.split(_TOGETHER)):
        yield place, images[part % len(images)]


def _corrupted(
    group: str, images: Tensor, normalization: Normalization, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Each corruption's name and the images it makes."""
    if group == "seen":
        given = corruptions(images, seed=seed)
        yield from ((name, made) for name, made in given.items() if name != CLEAN)
        return
    mean = torch.tensor(normalization.mean).view(1, -1, 1, 1)
    std = torch.tensor(normalization.std).view(1, -1, 1, 1)
    plain = (images * std + mean).clamp(0, 1)
    for name in UNSEEN:
        yield name, (unseen(plain, name, seed=seed) - mean) / std


def prepared(
    name: str, images: Tensor, *, degree: int, settle: bool
) -> tuple[str, nn.Module]:
    """A network with polynomial activations and what to call it.

    Args:
        name: of a bundled network, or a file.
        images: as it takes them, to calibrate it on if it has ReLUs.
        degree: of that calibration.
        settle: whether to settle a network that has polynomials.
    """
    network = load_network(network_file(name))
    if not activations(network):
        return f"{name}, degree {degree}", espn.calibrate(
            network, images, degree=degree
        )
    if settle:
        return f"{name}, settled", espn.settle_intervals(network, images)
    return name, network


def shown(found: dict[str, dict[str, dict[str, Counts]]], *, kinds: bool) -> str:
    """One line for each network and group; with `kinds` for each corruption too."""
    head = (
        "network",
        "images",
        "",
        "escaping",
        "passing",
        "refused",
        "wrongly",
        "reach",
    )
    rows = []
    for network, groups in found.items():
        for group, counts in groups.items():
            lines = {group: sum(counts.values(), Counts())}
            if kinds and group != CLEAN:
                lines.update({f"  {name}": each for name, each in counts.items()})
            for name, each in lines.items():
                numbers = each.images, each.escaping, each.passing, each.refused
                cells = [network, name, *(f"{number:,}" for number in numbers)]
                rows.append((*cells, f"{each.false_refusals:.2%}", f"{each.reach:.3g}"))
    return "\n".join(aligned([head, *rows], left=2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if an image escaped that the guard lets pass."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", default=list(BUNDLED))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--corrupted", type=int, default=50_000)
    parser.add_argument("--degrees", nargs="+", type=int, default=[8])
    parser.add_argument("--settle", action="store_true")
    parser.add_argument("--kinds", action="store_true", help="a line for each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks/results/stress.json"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False
    dataset = load_dataset("fashion-mnist")
    normalization = dataset.normalization
    test = _spread(dataset.test(), options.images)
    calibration = _spread(dataset.validation, _CALIBRATION)
    found: dict[str, dict[str, dict[str, Counts]]] = {}
    for name in options.networks:
        for degree in options.degrees:
            try:
                title, network = prepared(
                    name, calibration, degree=degree, settle=options.settle
                )
            except EspnError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
            if title in found:
                continue
            network.to(options.device)
            found[title] = measured(network, normalization, test, options.corrupted)
            print(shown({title: found[title]}, kinds=options.kinds), flush=True)
            record = {"machine": machine(), "networks": _plain_values(found)}
            write_atomically(options.json, json.dumps(record, indent=1) + "\n")
    passing = sum(
        each.passing
        for groups in found.values()
        for counts in groups.values()
        for each in counts.values()
    )
    return int(passing > 0)


def _spread(split: Split, count: int) -> Tensor:
    """So many images of a split, evenly chosen, as networks take them."""
    images = torch.cat([batch for batch, _ in split.batches(1000)])
    return images[torch.arange(min(count, len(images))) * len(images) // count]


def _plain_values(
    found: dict[str, dict[str, dict[str, Counts]]],
) -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    """The counts as plain values; a reach that is infinite as None."""
    return {
        network: {
            group: {name: _plain(each) for name, each in counts.items()}
            for group, counts in groups.items()
        }
        for network, groups in found.items()
    }


def _plain(counts: Counts) -> dict[str, object]:
    values: dict[str, object] = dataclasses.asdict(counts)
    if counts.reach == float("inf"):
        values["reach"] = None
    return values


if __name__ == "__main__":
    sys.exit(main())
