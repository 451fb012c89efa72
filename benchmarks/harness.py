"""What every benchmark shares: rows, their spread, the file they go to, the plots.

A benchmark adds a Row as soon as it is measured; the file is rewritten at once and in
one step, so an interrupted run keeps its finished rows. Cells that were not run are
listed beside them, with the reason.

    python -m benchmarks.harness --compare OLD.json NEW.json    # rounds and bytes
    python -m benchmarks.harness --table FILE.json
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ResultsError(RuntimeError):
    """A results file cannot be read, or holds something else."""


# ------------------------------------------------------------------------- spread


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

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.min:.4g}, {self.max:.4g}]"


# --------------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured cell. `rounds` and `bytes_sent` are of the online phase.

    Args:
        model: the network, or what stands in for one ("activation[32768]").
        activation: the protocol's name.
        engine: "masked", or CrypTen and its channel: "crypten+gloo", "crypten+direct".
        network: the path's label.
        rtt_ms, mbit: its round trip and rate each way (None: unlimited).
        batch, threads: images at once; threads per party.
        rounds: sequential messages online.
        bytes_sent: online, by rank 0 and by rank 1.
        online_s, offline_s, total_s: seconds; the slower party counts.
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
                spread = dict(fields[name])
                low, high = spread.pop("ci95")
                fields[name] = Spread(ci95=(low, high), **spread)
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


# ---------------------------------------------------------------- machine and file


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
            skipped = content.get("skipped", [])
            results.skipped = [Skipped(**values) for values in skipped]
        except (OSError, KeyError, TypeError, ValueError, ResultsError) as error:
            raise ResultsError(
                f"{path}: not a results file ({error}); give a file that a benchmark "
                "wrote with --json"
            ) from error
        return results


def _progress(row: Row) -> str:
    return (
        f"{row.model} {row.system} {row.network}: online {row.online_s} s, "
        f"{row.rounds} rounds, {sum(row.bytes_sent) / 1e6:.3g} MB"
    )


# ------------------------------------------------------------------ tables and CSV

COLUMNS = (
    "network",
    "model",
    "system",
    "batch",
    "rounds",
    "sent MB",
    "runs",
    "online s",
    "95 %",
    "offline s",
    "total s",
    "offline MB",
    "error",
    "agree",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, one piece per entry of COLUMNS."""
    low, high = row.online_s.ci95
    agree = row.argmax_agreement
    return (
        row.network,
        row.model,
        row.system,
        str(row.batch),
        str(row.rounds),
        f"{sum(row.bytes_sent) / 1e6:.3f}",
        str(row.online_s.repeats),
        f"{row.online_s.median:.4f}",
        f"{low:.4f} to {high:.4f}",
        f"{row.offline_s.median:.4f}",
        f"{row.total_s.median:.4f}",
        f"{row.offline_bytes / 1e6:.3f}",
        f"{row.max_abs_error:.2g}",
        "" if agree is None else f"{agree:.3f}",
    )


def table(results: Results) -> str:
    """Machine line, one line per row, one per skipped cell."""
    lines = [machine_line(results.machine)]
    lines.append(columns([COLUMNS, *map(cells, results.rows)], left=3))
    for cell in results.skipped:
        name = f"{cell.network}  {cell.model}  {cell.activation}  {cell.engine}"
        lines.append(f"skipped: {name}: {cell.reason}")
    return "\n".join(lines)


def columns(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Lines of pieces as aligned text; the first `left` columns to the left."""
    # Importing the package takes seconds; a comparison of two files prints no table.
    from crypten_espn.table import aligned

    return "\n".join(aligned(lines, left=left))


def machine_line(header: Mapping[str, Any]) -> str:
    """The machine header in one line."""
    return (
        f"{header['processor']}, {header['cores']} cores, torch {header['torch']}, "
        f"commit {header['commit']}, {header['date']}"
    )


def to_csv(results: Results) -> str:
    """Rows as CSV text: the fields of Row, spreads as five columns, commit and date."""
    stamp = {name: results.machine[name] for name in ("commit", "date", "processor")}
    return csv_text([{**_flat(row), **stamp} for row in results.rows])


def csv_text(lines: Sequence[Mapping[str, object]]) -> str:
    """Lines with the same keys as CSV text; None is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(row: Row) -> dict[str, object]:
    line: dict[str, object] = {}
    for field in FIELDS:
        value = getattr(row, field.name)
        if isinstance(value, Spread):
            figures = (value.median, value.min, value.max, *value.ci95)
            ends = ("", "_min", "_max", "_low", "_high")
            for end, figure in zip(ends, figures, strict=True):
                line[field.name + end] = f"{figure:.6g}"
        elif isinstance(value, tuple):
            line.update({f"{field.name}_{rank}": v for rank, v in enumerate(value)})
        else:
            line[field.name] = value
    line["runs"] = row.online_s.repeats
    return line


# ---------------------------------------------------------------------- comparison


def compare(old: Results, new: Results) -> tuple[list[str], list[str]]:
    """What changed on the wire between two runs, and which cells are in one only.

    Args:
        old, new: results; rows are matched by model, protocol, engine, network, batch.
    Returns: (changes in rounds or bytes, cells without a counterpart), one line each.
    Raises: ResultsError when no cell is in both.
    """
    before = {row.key: row for row in old.rows}
    after = {row.key: row for row in new.rows}
    common = [key for key in before if key in after]
    if not common:
        raise ResultsError("the two files have no cell in common; nothing to compare")
    changes = []
    for key in common:
        for name in ("rounds", "bytes_sent", "offline_bytes"):
            was, now = getattr(before[key], name), getattr(after[key], name)
            if was != now:
                cell = " ".join(map(str, key))
                changes.append(f"{cell}: {name} was {was}, is {now}")
    lonely = [f"only in the old run: {k}" for k in before if k not in after]
    lonely += [f"only in the new run: {k}" for k in after if k not in before]
    return changes, lonely


# Medians of two runs on a quiet machine are this close, as a share of the older one.
QUIET = 0.15


def drift(old: Results, new: Results) -> list[tuple[str, float]]:
    """How far each cell's online median moved, new / old - 1; far ones first."""
    before = {row.key: row.online_s.median for row in old.rows}
    moved = [
        (" ".join(map(str, row.key)), row.online_s.median / before[row.key] - 1)
        for row in new.rows
        if row.key in before
    ]
    return sorted(moved, key=lambda cell: -abs(cell[1]))


def report_comparison(old: str | Path, new: Results) -> int:
    """Print the comparison with the file `old`; 1 if anything on the wire changed.

    Medians that moved by more than `QUIET` are shown, and are no failure: time is the
    machine's.
    """
    before = Results.read(old)
    changes, lonely = compare(before, new)
    for line in lonely:
        print(line)
    moved = drift(before, new)
    far = [f"{cell}: {share:+.0%}" for cell, share in moved if abs(share) > QUIET]
    for line in far:
        print(f"slower or faster: {line}")
    print(f"online medians: {len(moved) - len(far)} of {len(moved)} within {QUIET:.0%}")
    for line in changes:
        print(f"CHANGED {line}")
    if not changes:
        print(f"rounds and bytes are those of {old}")
    return int(bool(changes))


# --------------------------------------------------------------------------- plots

# Told apart in black and white by marker and line as well as by colour.
STYLES: Sequence[tuple[str, str, Any]] = (
    ("#0b559f", "o", "-"),
    ("#c8500b", "s", "--"),
    ("#1b7837", "^", "-."),
    ("#6a3d9a", "D", ":"),
    ("#444444", "v", (0, (5, 1))),
    ("#b2182b", "P", (0, (3, 1, 1, 1))),
    ("#0d8a8a", "X", (0, (1, 1))),
    ("#8c510a", "*", (0, (6, 2, 1, 2))),
)


def new_figure(
    *, width: float = 6.0, height: float = 3.8, panels: int = 1
) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its panels, styled for print; needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "crypten-espn", "font.size": 9})
    figure, grid = pyplot.subplots(
        panels, figsize=(width, height), layout="constrained", squeeze=False
    )
    for axes in grid[:, 0]:
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, list(grid[:, 0])


def plot_lines(
    stem: Path,
    series: Mapping[str, Sequence[tuple[float, Spread]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> list[Path]:
    """Medians with their 95 % intervals against x, one line per entry of `series`.

    Returns: the PNG and SVG files written beside `stem`.
    """
    figure, (axes,) = new_figure()
    for index, (name, points) in enumerate(series.items()):
        colour, marker, line = STYLES[index % len(STYLES)]
        xs = [x for x, _ in points]
        axes.plot(
            xs,
            [spread.median for _, spread in points],
            label=name,
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=4,
        )
        low, high = zip(*(spread.ci95 for _, spread in points), strict=True)
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return save_figure(figure, stem)


def plot_dots(rows: Sequence[Row], stem: str | Path) -> list[Path]:
    """Online seconds of every protocol, a panel per model, a figure per network.

    Filled: over the direct channel. Hollow: over gloo.

    Returns: the PNG and SVG files written beside `stem`.
    """
    files = []
    stem = Path(stem)
    for network in dict.fromkeys(row.network for row in rows):
        chosen = [row for row in rows if row.network == network]
        models = list(dict.fromkeys(row.model for row in chosen))
        names = list(dict.fromkeys(row.activation for row in chosen))[::-1]
        height = 0.9 + len(models) * (0.3 + 0.26 * len(names))
        figure, panels = new_figure(height=height, panels=len(models))
        for axes, model in zip(panels, models, strict=True):
            for row in chosen:
                if row.model == model:
                    _dot(axes, row, names.index(row.activation))
            axes.set(xscale="log", title=model, ylim=(-0.6, len(names) - 0.4))
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(left=False)
            axes.margins(x=0.12)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: "")
        panels[-1].set_xlabel("seconds online (log); filled: direct, hollow: gloo")
        figure.suptitle(network, fontsize=10)
        slug = "".join(c if c.isalnum() else "-" for c in network).strip("-")
        files += save_figure(figure, stem.with_name(f"{stem.name}-{slug}"))
    return files


def _dot(axes: Any, row: Row, at: int) -> None:
    colour = STYLES[0][0] if row.engine == "masked" else "#333333"
    hollow = row.engine.endswith("+gloo")
    spread = row.online_s
    axes.plot(spread.ci95, (at, at), color=colour, linewidth=1)
    axes.plot(
        [spread.median],
        [at],
        marker="o",
        color=colour,
        markersize=5.5,
        markerfacecolor="white" if hollow else colour,
    )
    axes.annotate(
        f"{spread.median:.3g}",
        (spread.median, at),
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=6.5,
        ha="center",
    )


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg and close the figure; the files written."""
    from matplotlib import pyplot

    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    figure.savefig(files[0], dpi=200)
    figure.savefig(files[1], metadata={"Date": None})
    pyplot.close(figure)
    return files


# -------------------------------------------------------------------- command line


def add_run_options(
    parser: argparse.ArgumentParser, *, networks: Sequence[str], repeat: int
) -> None:
    """The options every measuring benchmark has.

    Args:
        networks, repeat: their defaults.
    """
    parser.add_argument(
        "--networks",
        nargs="+",
        default=list(networks),
        help="loopback, lan, metro, wan, or numbers such as 50ms,20mbit (round trip, "
        f"rate); default {' '.join(networks)}",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=repeat,
        help=f"turns; a short system runs several times in each; default {repeat}",
    )
    parser.add_argument("--threads", type=int, default=1, help="per party; default 1")
    parser.add_argument(
        "--provider",
        choices=("TFP", "TTP"),
        default="TFP",
        help="CrypTen's randomness: made by the first party, or by a third process",
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        default=600.0,
        help="fewer repetitions of a system that together take longer; one of which "
        "a single run takes longer is left out; default 600",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=7200.0,
        help="end a network's parties after this; default 7200",
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="without the right to make namespaces, sleep per message, and say so",
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="no TCP slow start after idle (net.ipv4.tcp_slow_start_after_idle=0)",
    )
    parser.add_argument("--json", metavar="FILE", help="write rows here as they finish")
    parser.add_argument("--csv", metavar="FILE", help="write rows here at the end")
    parser.add_argument("--plot", metavar="STEM", help="write STEM-....png and .svg")
    parser.add_argument(
        "--compare",
        metavar="OLD",
        help="exit non-zero if rounds or bytes differ from this results file",
    )


def finish(results: Results, options: argparse.Namespace, *, ended_well: bool) -> int:
    """Print the table, write the CSV, compare; the exit status."""
    print(table(results))
    if options.csv:
        write_atomically(Path(options.csv), to_csv(results))
    changed = report_comparison(options.compare, results) if options.compare else 0
    return changed if ended_well else 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--table", metavar="FILE")
    options = parser.parse_args(arguments)
    if not (options.compare or options.table):
        parser.error("give --compare OLD NEW or --table FILE")
    try:
        if options.table:
            print(table(Results.read(options.table)))
        if options.compare:
            old, new = options.compare
            return report_comparison(old, Results.read(new))
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
