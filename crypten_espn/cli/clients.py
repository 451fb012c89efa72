"""`crypten-espn predict` and `prepare`: what the owner of an input runs."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from ..array_file import load_array
from ..bundle import Description
from ..bundle.images import SUFFIXES, existing
from ..errors import DataError, EspnError, RangeError, ShapeError
from ..serving.client import Client, connect
from ..serving.events import log_to_stderr
from ..serving.filling import answers
from ..serving.link import TIMEOUT_S, Link
from .options import argument, choice, option, whole
from .sessions import (
    Config,
    Corrections,
    Dealer,
    Insecure,
    LogJson,
    Material,
    Revoked,
    Timeout,
    Tls,
    Verbose,
    certificates,
)

_INPUTS = "image files (JPEG, PNG), folders of them, or .npy of inputs"
_BATCH = "inputs sent at once, of one preparation"
_TOP = "likeliest classes of each input, with their scores (default: 1)"
_OUT = ".npy to write the logits to, which are then not printed"
_FORCE = (
    "send inputs that the network's guard refuses: the logits may then be any numbers, "
    "and nothing tells"
)
_FOLDER = "folder for the prepared randomness, as `predict --material` takes it"

Server = Annotated[str, argument("host:port of the server", "ADDRESS")]
Several = typer.Argument(metavar="INPUT...", help=_INPUTS)


def predict(
    address: Server,
    dealer: Dealer,
    inputs: Annotated[list[Path] | None, Several] = None,
    input: Annotated[Path | None, option(".npy sent as one batch", "FILE")] = None,
    top: Annotated[int | None, whole(_TOP)] = None,
    batch: Annotated[int, whole(_BATCH)] = 8,
    format: Annotated[
        str, choice("of what is printed", "text", "csv", "jsonl")
    ] = "text",
    out: Annotated[Path | None, option(_OUT, "FILE")] = None,
    force: Annotated[bool, option(_FORCE, None, "--force")] = False,
    material: Material = None,
    corrections: Corrections = None,
    tls: Tls = None,
    revoked: Revoked = None,
    timeout: Timeout = TIMEOUT_S,
    insecure: Insecure = False,
    verbose: Verbose = False,
    log_json: LogJson = False,
    config: Config = None,
) -> int:
    """Own the input, learn its classes, or the logits of a network without names.

    examples:
      crypten-espn predict server:29500 photo.jpg --dealer dealer:29501 --top 5 \\
        --tls client.pem client.key authority.pem
      crypten-espn predict 127.0.0.1:29500 photos/ more.npy \\
        --dealer 127.0.0.1:29501 --format csv
      crypten-espn predict 127.0.0.1:29500 --dealer 127.0.0.1:29501 \\
        --input x.npy --out logits.npy
    """
    log_to_stderr(verbose=verbose, as_json=log_json)
    files = certificates(tls, revoked)
    link = Link(dealer, material, files, timeout, insecure, corrections)
    if bool(inputs) == (input is not None):
        raise typer.BadParameter(
            "give images, folders or .npy files, or one .npy as --input; one of both",
            param_hint="'INPUT...', '--input'",
        )
    if input is None:
        given = [_read(path) for path in existing(inputs or [])]
    else:
        given = [_Given(str(input), load_array(input))]
    rows = [row for one in given for row in one.rows()]
    with connect(address, link=link) as server:
        described = server.description
        if top is not None and not described.classes:
            raise EspnError(
                "--top was given, and the server does not name its classes; leave it "
                "out for the logits"
            )
        logits = []
        with _progress(2 * len(rows)) as advance:
            write = _writer(format, described, top or 1) if out is None else None
            for one in given:  # all of them, before anything of them is sent
                one.check(server, force)
                advance(len(one.rows()))
            size = batch if input is None else len(rows)

            def load(start: int, end: int) -> torch.Tensor:
                return torch.cat([row.inputs(server) for row in rows[start:end]])

            names = (row.name for row in rows)
            for answer in answers(server, len(rows), load, size=size, force=force):
                found = answer.logits
                logits.append(found)
                part = list(itertools.islice(names, len(found)))
                if write is not None:
                    write(part, found)
                advance(len(part))
    if out is not None:
        np.save(out, torch.cat(logits).numpy())
        print(f"wrote {out}")
    return 0


def prepare(
    address: Server,
    dealer: Dealer,
    material: Annotated[Path, option(_FOLDER, "DIR")],
    count: Annotated[int, whole("inferences")] = 1,
    batch: Annotated[int, whole("inputs in each")] = 1,
    corrections: Corrections = None,
    tls: Tls = None,
    revoked: Revoked = None,
    timeout: Timeout = TIMEOUT_S,
    insecure: Insecure = False,
    verbose: Verbose = False,
    log_json: LogJson = False,
    config: Config = None,
) -> int:
    """Prepare inferences ahead of time; the server keeps its part by --material too.

    examples:
      crypten-espn prepare server:29500 --dealer dealer:29501 --material prepared \\
        --count 100 --batch 8 --tls client.pem client.key authority.pem
    """
    log_to_stderr(verbose=verbose, as_json=log_json)
    files = certificates(tls, revoked)
    link = Link(dealer, material, files, timeout, insecure, corrections)
    with connect(address, link=link) as server:
        server.prepare(count, batch=batch)
        cost = server.offline
    print(
        f"prepared {count} inference{'s' * (count > 1)} of {batch} input"
        f"{'s' * (batch > 1)} in {material}: {cost.bytes_sent / 1e6:,.1f} MB sent, "
        f"{cost.seconds:.1f} s"
    )
    return 0


@dataclass(frozen=True)
class _Given:
    """An .npy file's inputs, or an image file, which is read whenever it is needed."""

    name: str
    source: torch.Tensor | Path

    def rows(self) -> list[_Given]:
        """Each input apart."""
        if isinstance(self.source, Path):
            return [self]
        return [
            _Given(f"{self.name}[{i}]", self.source[i : i + 1])
            for i in range(len(self.source))
        ]

    def inputs(self, server: Client) -> torch.Tensor:
        """As the network takes them, (batch, *input_shape)."""
        if isinstance(self.source, Path):
            return server.read_images(self.source)
        return self.source

    def check(self, server: Client, force: bool) -> None:
        """Raise what `Client.predict` would raise, with the name of the file."""
        x = self.inputs(server)
        try:
            server.plan.encode(x, force=force)
        except (DataError, ShapeError, RangeError) as error:
            raise type(error)(f"{self.name}: {error}") from None


def _read(path: Path) -> _Given:
    if path.suffix.lower() in SUFFIXES:
        return _Given(str(path), path)
    return _Given(str(path), load_array(path))


_Write = Callable[[list[str], torch.Tensor], None]


def _writer(format: str, described: Description, top: int) -> _Write:
    """Prints names and logits of a batch in a format, classes where they have names."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    named = bool(described.classes)
    if format == "csv" and named:
        table.writerow(["input", "rank", "class", "score"])
    begun = False

    def logits(names: list[str], found: torch.Tensor) -> None:
        nonlocal begun
        rows = found.flatten(1).tolist()
        if format == "csv" and not begun:
            table.writerow(["input", *(f"logit {i}" for i in range(len(rows[0])))])
            begun = True
        for name, row in zip(names, rows, strict=True):
            if format == "csv":
                table.writerow([name, *(f"{value:.4f}" for value in row)])
            elif format == "jsonl":
                print(json.dumps({"input": name, "logits": row}))
            else:
                print(" ".join(f"{value:.4f}" for value in row))
        sys.stdout.flush()

    def classes(names: list[str], found: torch.Tensor) -> None:
        for name, ranked in zip(names, described.ranked(found, top=top), strict=True):
            if format == "csv":
                table.writerows(
                    [name, rank, label, f"{score:.4f}"]
                    for rank, (label, score) in enumerate(ranked, 1)
                )
            elif format == "jsonl":
                likeliest = [{"class": label, "score": s} for label, s in ranked]
                print(json.dumps({"input": name, "classes": likeliest}))
            else:
                likely = "; ".join(f"{label} {score:.4f}" for label, score in ranked)
                print(f"{name}: {likely}")
        sys.stdout.flush()

    return classes if named else logits


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if that is a terminal and there is much to wait for."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal or steps < 4:
        yield lambda count: None
        return
    # Lines go above the bar where both are on one terminal; into a pipe as they are.
    with Progress(
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        redirect_stdout=sys.stdout.isatty(),
        transient=True,
    ) as progress:
        task = progress.add_task("", total=steps)
        yield lambda count: progress.advance(task, count)
