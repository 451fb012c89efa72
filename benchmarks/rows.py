"""Rows of a benchmark, their spread, and the file they go to.

A benchmark adds a Row as soon as it is measured; the file is rewritten at once and in
one step, so an interrupted run keeps its finished rows. Cells that were not run are
listed beside them, with the reason.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R")

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "plain"  # plaintext torch, as a row beside the protocols
MASKED, COMPACT = "masked", "masked-compact"  # the engine at "fast" and at "compact"
# What a file says of the masked engine's offline column; without it the column is of
# one process that was its own dealer, which no session is.
OFFLINE, SESSION = "masked_offline", "session"


class ResultsError(RuntimeError):
    """A results file cannot be read, or holds something else."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds over repetitions: median, extremes, 95 % interval of the median.

    The interval lies between two order statistics and assumes nothing about the
    distribution. Fewer than six repetitions cannot give 95 %; it is then the whole
    range.
    """

    median: float
    min: float
    max: float
    ci95: tuple[float, float]
    repeats: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """The spread of at least one sample."""
        ordered = sorted(samples)
        count = len(ordered)
        if count == 0:
            raise ValueError("a spread needs at least one sample")
        rank, tail = 0, 0.0  # P(fewer than `rank` + 1 of `count` lie below the median)
        while rank < count:
            tail += math.comb(count, rank) / 2**count
            if tail > 0.025:
                break
            rank += 1
        low = max(0, rank - 1)
        return cls(
            statistics.median(ordered),
            ordered[0],
            ordered[-1],
            (ordered[low], ordered[count - 1 - low]),
            count,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spread:
        """The inverse of `dataclasses.asdict`, as read from JSON."""
        low, high = values["ci95"]
        return cls(**{**values, "ci95": (low, high)})

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.min:.4g}, {self.max:.4g}]"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured cell. `rounds` and `bytes_sent` are of the online phase.

    Args:
        model: the network, or what stands in for one ("activation[32768]").
        activation: the protocol's name.
        engine: "masked"; CrypTen and its channel, "crypten+gloo", "crypten+direct"; of
            plaintext, torch and its form, "torch+eager".
        network: the path's label.
        rtt_ms, mbit: its round trip and rate each way (None: unlimited).
        batch, threads: images at once; threads per party.
        rounds: sequential messages online.
        bytes_sent: online, by rank 0 and by rank 1.
        online_s, offline_s, total_s: seconds; the slower party counts. NaN where a file
            does not have the masked engine's offline phase as a session's.
        offline_bytes: bytes the offline phase sends, all parties and the dealer.
        max_abs_error: largest difference from the network in the clear.
        argmax_agreement: share of images with the same answer; None without classes.
    """

    model: str
    activation: str
    engine: str
    network: str
    rtt_ms: float
    mbit: float | None
    batch: int
    threads: int
    rounds: int
    bytes_sent: tuple[int, int]
    online_s: Spread
    offline_s: Spread
    total_s: Spread
    offline_bytes: int
    max_abs_error: float
    argmax_agreement: float | None

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What identifies the cell from one run to the next."""
        return (self.model, self.activation, self.engine, self.network, self.batch)

    @property
    def system(self) -> str:
        """Protocol and channel in one word, for tables and legends."""
        return system_name(self.activation, self.engine)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The inverse of `dataclasses.asdict`, as read from JSON."""
        try:
            fields = {field.name: values[field.name] for field in FIELDS}
            for name in ("online_s", "offline_s", "total_s"):
                fields[name] = Spread.from_dict(fields[name])
            first, second = fields["bytes_sent"]
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"not a row of a benchmark: {error}") from error
        fields["bytes_sent"] = (first, second)
        return cls(**fields)


FIELDS = dataclasses.fields(Row)


def system_name(activation: str, engine: str) -> str:
    """Protocol, and the channel in brackets where it runs on CrypTen."""
    channel = engine.partition("+")[2]
    return f"{activation} ({channel})" if channel else activation


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A cell that was asked for and not run, and why."""

    model: str
    activation: str
    engine: str
    network: str
    reason: str


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Processor, cores, versions and commit: what the seconds depend on."""
    commit = _output(["git", "rev-parse", "--short", "HEAD"]) or "unknown"
    if _output(["git", "status", "--porcelain", "--untracked-files=no"]):
        commit += " (modified)"
    versions = {}
    for name in ("torch", "crypten", "numpy", "numba", "crypten-espn"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": " ".join([platform.system(), *platform.release().split("-")[:1]]),
        "python": platform.python_version(),
        **versions,
        OFFLINE: SESSION,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "load": round(os.getloadavg()[0], 2),
    }


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file with that text; a reader sees the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as handle:
        handle.write(text)
    try:
        os.chmod(handle.name, 0o644)
        os.replace(handle.name, path)
    except OSError:
        os.unlink(handle.name)
        raise


def write_rows(
    path: Path, machine: dict[str, Any], rows: Sequence[DataclassInstance]
) -> None:
    """Write a machine and rows to a JSON file, in one step."""
    content = {"machine": machine, "rows": [dataclasses.asdict(row) for row in rows]}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_rows(path: Path, kind: Callable[..., R]) -> tuple[dict[str, Any], list[R]]:
    """The machine and the rows, of one kind, that `write_rows` wrote.

    Raises: ResultsError for a file that holds something else.
    """
    try:
        content = json.loads(path.read_text())
        return content["machine"], [kind(**values) for values in content["rows"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path}: not a results file ({error})") from error


class Results:
    """The rows of a run and the JSON file that holds them.

    Args:
        path: the file, written after each row; None keeps the rows in memory.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.machine = machine()
        self.rows: list[Row] = []
        self.skipped: list[Skipped] = []

    def add(self, row: Row) -> None:
        """Keep a finished row, print it, and write the file."""
        self.rows.append(row)
        print(_progress(row), flush=True)
        self.write()

    def skip(self, cell: Skipped) -> None:
        """Keep a cell that was not run, print why, and write the file."""
        self.skipped.append(cell)
        name = f"{cell.model} {cell.activation} {cell.engine} {cell.network}"
        print(f"skipped {name}: {cell.reason}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the file now."""
        if self.path is None:
            return
        content = {
            "machine": self.machine,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "skipped": [dataclasses.asdict(cell) for cell in self.skipped],
        }
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """The results in a file.

        Raises: ResultsError, naming the file and what is wrong with it.
        """
        try:
            content = json.loads(Path(path).read_text())
            results = cls.__new__(cls)
            results.path = Path(path)
            results.machine = content["machine"]
            results.rows = [Row.from_dict(values) for values in content["rows"]]
            if results.machine.get(OFFLINE) != SESSION:
                results.rows = [_without_offline(row) for row in results.rows]
            skipped = content.get("skipped", [])
            results.skipped = [Skipped(**values) for values in skipped]
        except (OSError, KeyError, TypeError, ValueError, ResultsError) as error:
            raise ResultsError(
                f"{path}: not a results file ({error}); give a file that a benchmark "
                "wrote with --json"
            ) from error
        return results


def _without_offline(row: Row) -> Row:
    """The row as it was; the masked engine's without seconds that no session took."""
    if row.engine != "masked":
        return row
    nan = float("nan")
    unknown = Spread(nan, nan, nan, (nan, nan), 0)
    return dataclasses.replace(row, offline_s=unknown, total_s=unknown)


def _progress(row: Row) -> str:
    return (
        f"{row.model} {row.system} {row.network}: online {row.online_s} s, "
        f"{row.rounds} rounds, {sum(row.bytes_sent) / 1e6:.3g} MB"
    )
