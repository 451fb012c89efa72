"""Pretrained weights in, private answers out: a torchvision network from a file.

What a user does with a network of torchvision's, in a loop of their own:

1. Load the file of weights, as torchvision.models downloads it, into the network.
2. Put average pools in the place of max pools, and let the network learn to answer as
   it did before.
3. Compare degrees and margins of polynomials fitted to some hundred unlabelled images,
   and take the recommended one (espn.sweep, espn.calibrate).
4. With --finetune, learn the old answers once more, the inputs held in the intervals.
5. Answer in private, both parties simulated, and compare.

    python -m benchmarks.pretrained --network resnet18 --weights resnet18.pth
    python -m benchmarks.pretrained --stand-in 200 --finetune 50

Without a file, --stand-in trains one for so many steps. Images are those of --dataset,
as the three channels that torchvision's networks take.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import crypten_espn as espn  # before torchvision: it makes it load beside this torch

# isort: split
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from crypten_espn.errors import EspnError
from crypten_espn.pillar.data import DATASETS, Dataset, load_dataset
from crypten_espn.pillar.surgery import changes

_BATCH = 64
_PENALTY = 1e-4


def batches(dataset: Dataset, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training images (64, 3, height, width) and labels, over and over."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for images, labels in dataset.train.batches(_BATCH, generator=generator):
            yield _coloured(images), labels


def _coloured(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def load(name: str, path: Path, classes: int) -> nn.Module:
    """A torchvision network with the weights of a file.

    Raises:
        EspnError: the file is not there, or of another network.
    """
    network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except Exception as error:  # torch.load raises many kinds
        raise EspnError(
            f"{path} does not fit torchvision's {name} of {classes} classes ({error}); "
            "give the file of a state_dict of that network"
        ) from None
    return network.eval()


def learn(
    network: nn.Module,
    given: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    rate: float,
    aim: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    """Train in place: `aim` of images, logits and labels, and the inputs' penalty."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    network.train()
    for step in range(steps):
        images, labels = next(given)
        logits = network(images)
        reach = max(espn.largest_inputs(network).values(), default=0.0)
        penalty = espn.boundary_penalty(network)
        loss = aim(images, logits, labels)
        optimizer.zero_grad()
        (loss + _PENALTY * penalty).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        falling.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step + 1}: loss {loss:.3f}, |x| / R up to {reach:.2f}")
    network.eval()


def by_labels(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy."""
    return functional.cross_entropy(logits, labels)


def as_before(teacher: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The divergence from a network's own answers, for which no label is needed."""

    def aim(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            taught = teacher(images).log_softmax(1)
        return functional.kl_div(
            logits.log_softmax(1), taught, reduction="batchmean", log_target=True
        )

    return aim


def stand_in(name: str, dataset: Dataset, steps: int, path: Path) -> None:
    """Write a state_dict as torchvision's files hold it, of a network trained here."""
    torch.manual_seed(1)
    classes = dataset.classes
    network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    print(f"{name} trained for {steps} steps as a stand-in")
    learn(network, batches(dataset, 1), steps, 0.05, by_labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)


def follow(options: argparse.Namespace) -> None:
    """Take the five steps that the module's text lists."""
    dataset = load_dataset(options.dataset, directory=options.data)
    # 1. The weights.
    if options.stand_in:
        stand_in(options.network, dataset, options.stand_in, options.weights)
    trained = load(options.network, options.weights, dataset.classes)
    # 2. Pools that have a private form.
    network = espn.replace_pooling(copy.deepcopy(trained))
    if changes(network):
        print(f"average pools in the place of max pools, {options.adapt} steps")
        learn(network, batches(dataset, 2), options.adapt, 0.01, as_before(trained))
    # 3. Polynomials.
    images, _ = _images(dataset, options.images)
    table = espn.sweep(network, images, degrees=options.degrees, margins=[2.0])
    print(table)
    best = table.recommended
    private = espn.calibrate(network, images, degree=best.degree, margin=best.margin)
    # 4. Trained on, if that is wanted.
    if options.finetune:
        print(f"degree {best.degree} fine-tuned, {options.finetune} steps")
        learn(private, batches(dataset, 3), options.finetune, 0.01, as_before(network))
    # 5. In private.
    asked, right = _images(dataset, options.images + options.asked)
    asked, right = asked[options.images :], right[options.images :]
    converted = espn.convert(private, images, protocol="masked")
    logits, cost = espn.simulate(converted, asked)
    answers = logits.argmax(1)
    with torch.no_grad():
        before, clear = trained(asked).argmax(1), private(asked).argmax(1)
    print(
        f"{len(asked)} validation images in private, {cost.bytes_sent:,} bytes of the "
        f"client: {int((answers == clear).sum())} answers as in the clear, "
        f"{int((answers == before).sum())} as the network of the file; right are "
        f"{int((answers == right).sum())}, and {int((before == right).sum())} of that "
        "network"
    )


def _images(dataset: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """The first validation images and their labels."""
    images, labels = next(iter(dataset.validation.batches(count)))
    if len(images) < count:
        raise EspnError(f"{len(images)} validation images; lower --images and --asked")
    return _coloured(images).contiguous(), labels


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--network", default="resnet18", help="of torchvision.models: %(default)s")
    add("--weights", type=Path, default=Path("out/pretrained.pth"), help="state_dict")
    add("--stand-in", type=int, default=0, metavar="STEPS", help="train the file first")
    add("--dataset", choices=tuple(DATASETS), default="fashion-mnist")
    add("--data", type=Path, default=Path("data"), help="folder of the data set")
    add("--images", type=int, default=400, help="unlabelled, to fit polynomials to")
    add("--degrees", type=int, nargs="+", default=[4, 6, 8], help="to compare")
    add("--adapt", type=int, default=50, metavar="STEPS", help="to new pools")
    add("--finetune", type=int, default=0, metavar="STEPS", help="of polynomials")
    add("--asked", type=int, default=64, help="images answered in private")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    try:
        follow(make_parser().parse_args(arguments))
    except EspnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
