"""Run the benchmarks and write benchmarks/results/: JSON, CSV, plots and one page.

    python -m benchmarks.report                  # about 20 minutes on two cores
    python -m benchmarks.report --full           # every network and protocol: hours
    python -m benchmarks.report --full --steps inference large    # only these
    python -m benchmarks.report --only render    # page, CSV and plots from the JSON
    python -m benchmarks.report --only readme    # tables in README.md from the CSV
    python -m benchmarks.report --compare OLD_DIRECTORY --only render

Steps run one after another; one that fails is reported and the others still run. How a
README says where a table belongs is told in `benchmarks.documents`.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import activations, costmodel, inference, link, plots, tables
from .accuracy import command as accuracy
from .accuracy import rows as accuracies
from .compare import report_comparison
from .documents import UNFOLDED, recorded_commands, update_readme
from .figures import command as figures
from .figures.drawing import pictures
from .rows import ROOT, Results, ResultsError, write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
PROFILES = ("lan", "metro", "wan")


@dataclasses.dataclass(frozen=True)
class Step:
    """One benchmark run: its results' name and its command line."""

    name: str
    module: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """What to type to run it again."""
        return shlex.join(
            ["python", "-m", f"benchmarks.{self.module}", *self.arguments]
        )


def steps(*, full: bool) -> list[Step]:
    """The runs of `make bench`, or of `make bench-full`."""
    # Within an inference a layer follows another: its connection was not silent.
    layer = ("--points", "32768", "--warm", "--networks", *activations.NETWORKS)
    two = ("--models", "minionn", "resnet18")
    systems = ("--protocols", "masked", "espn", "crypten-relu")
    both = ("--networks", "loopback", "wan")
    whole = (
        *("--images", "1000", "--batch", "100"),
        *("--systems", "masked", "espn", "crypten-relu"),
        *("--precision-bits", "16", "12", "--truncation", "local", "exact"),
    )
    warm = Step(
        "warm",
        "inference",
        (
            *(*two, "--protocols", "masked", "espn", "--channels", "direct"),
            *("--networks", "wan", "--warm", "--repeat", "5"),
        ),
    )
    if full:
        four, large = inference.MODELS[:4], inference.MODELS[4:]
        folded = [name for name in inference.PROTOCOLS if name != UNFOLDED]
        once = (*both, "--repeat", "1")
        return [
            Step("activations", "activations", (*layer, "wan", "--repeat", "21")),
            Step(
                "inference",
                "inference",
                ("--models", *four, "--protocols", *folded, *both, "--repeat", "2"),
            ),
            Step(
                "large",
                "inference",
                ("--models", *large, "--protocols", *folded, *once),
            ),
            Step(
                "unfolded",
                "inference",
                ("--models", *inference.MODELS, "--protocols", UNFOLDED, *once),
            ),
            Step(
                "lan-metro",
                "inference",
                (*two, *systems, "--networks", "lan", "metro", "--repeat", "3"),
            ),
            warm,
            Step("accuracy", "accuracy", whole),
            Step("figures", "figures", ("--full", "--fresh")),
        ]
    return [
        Step("activations", "activations", (*layer, "--repeat", "7")),
        Step("inference", "inference", (*two, *systems, *both, "--repeat", "2")),
        warm,
        Step("accuracy", "accuracy", ("--images", "64", "--batch", "32")),
    ]


# The steps whose results are rows of the harness.
RUNS = ("activations", "inference", "large", "unfolded", "lan-metro", "warm")
MAINS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "activations": activations.main,
    "inference": inference.main,
    "accuracy": accuracy.main,
    "figures": figures.main,
}


# ---------------------------------------------------------------------------- running


def run(chosen: Sequence[Step], folder: Path) -> list[str]:
    """Measure the paths, then every step; what went wrong, one line each."""
    problems = _measure_paths(folder)
    for step in chosen:
        file = folder / f"{step.name}.json"
        arguments = [*step.arguments, "--json", str(file)]
        print(f"\n== {step.command}", flush=True)
        before = _written(file)
        try:
            status = MAINS[step.module](arguments)
        except (OSError, RuntimeError, ValueError) as error:
            problems.append(f"{step.name}: {type(error).__name__}: {error}")
            continue
        finally:
            if _written(file) != before:
                _keep_command(folder, step)
        if status == 130:
            raise KeyboardInterrupt
        if status:
            problems.append(f"{step.name} ended with status {status}")
    return problems


def _measure_paths(folder: Path) -> list[str]:
    measured, problems = [], []
    for name in PROFILES:
        try:
            with link.Path(name) as path:
                result = link.self_test(path)
                print(result, flush=True)
                measured.append(
                    {
                        "network": name,
                        "rtt_ms": result.profile.rtt_ms,
                        "measured_rtt_ms": round(result.rtt_ms, 3),
                        "mbit": result.profile.mbit,
                        "measured_mbit": round(result.mbit, 1),
                        "congestion_control": path.congestion,
                        "passed": result.passed,
                    }
                )
                if not result.passed:
                    problems.append(f"the {name} path is not as set: {result}")
        except link.PathError as error:
            problems.append(f"the {name} path: {error}")
    write_atomically(folder / "paths.json", json.dumps(measured, indent=1) + "\n")
    return problems


# -------------------------------------------------------------------------- rendering


def render(folder: Path) -> list[Path]:
    """CSV, plots and index.html from the JSON files there; the files written.

    Raises: ResultsError if there is nothing to show, or a file is not a results file.
    """
    files: list[Path] = []
    runs = {
        name: Results.read(folder / f"{name}.json")
        for name in RUNS
        if (folder / f"{name}.json").exists()
    }
    if not runs:
        raise ResultsError(
            f"{folder}: no results there; run python -m benchmarks.report"
        )
    for name, results in runs.items():
        if results.rows:
            files.append(folder / f"{name}.csv")
            write_atomically(files[-1], tables.to_csv(results))
            draw = activations.plot if name == "activations" else plots.plot_dots
            files += draw(results.rows, folder / name)
    tested = _accuracy(folder)
    if tested:
        files.append(folder / "accuracy.csv")
        write_atomically(files[-1], _accuracy_csv(*tested))
        files += accuracies.plot(tested[1], folder / "accuracy")
    files.append(folder / "index.html")
    write_atomically(files[-1], _page(folder, runs, tested))
    return files


def _accuracy(folder: Path) -> tuple[dict[str, Any], list[accuracies.Accuracy]] | None:
    path = folder / "accuracy.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        rows = [accuracies.Accuracy(**values) for values in content["rows"]]
        return (content["machine"], rows) if rows else None
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path}: not a results file ({error})") from error


def _accuracy_csv(
    machine: Mapping[str, Any], rows: Sequence[accuracies.Accuracy]
) -> str:
    stamp = {name: machine[name] for name in ("commit", "date", "processor")}
    return tables.csv_text([{**dataclasses.asdict(row), **stamp} for row in rows])


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; text-align: right; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
tbody tr:hover { background: var(--soft); }
pre { background: var(--soft); padding: 0.6rem; overflow-x: auto; font-size: 0.8rem; }
figure { margin: 1rem 0; } img { max-width: 100%; background: white; }
@media print { body { max-width: none; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } }
"""


def _page(
    folder: Path,
    runs: Mapping[str, Results],
    tested: tuple[dict[str, Any], list[accuracies.Accuracy]] | None,
) -> str:
    first = next(iter(runs.values()))
    commands = recorded_commands(folder)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>crypten-espn benchmarks</title><style>{STYLE}</style></head><body>",
        "<h1>crypten-espn benchmarks</h1>",
        f"<p>{_text(tables.machine_line(first.machine))}</p>",
        "<p>Semi-honest, two parties, a dealer that does not collude. Online seconds "
        "are medians of interleaved repetitions, from a common start until the slower "
        "party is done; 95 % intervals of the median.</p>",
    ]
    paths = folder / "paths.json"
    if paths.exists():
        lines = [tuple(line.values()) for line in json.loads(paths.read_text())]
        if lines:
            head = tuple(json.loads(paths.read_text())[0])
            parts += ["<h2>The paths, as measured</h2>", _html_table(head, lines)]
    titles = {
        "activations": "One activation layer",
        "inference": "Whole networks",
        "large": "Large networks",
        "unfolded": "Whole networks as CrypTen converts them, batch-norm unfolded",
        "lan-metro": "Whole networks on shorter paths",
        "warm": "Whole networks, no slow start after idle",
    }
    for name, results in runs.items():
        parts.append(f"<h2>{titles[name]}</h2>")
        parts.append(_command(commands.get(name)))
        parts += map(_figure, sorted(folder.glob(f"{name}-*.svg")))
        parts.append(_html_table(tables.COLUMNS, map(tables.cells, results.rows)))
        for cell in results.skipped:
            where = f"{cell.network} {cell.model} {cell.activation} {cell.engine}"
            parts.append(f"<p>Not run: {_text(where)}: {_text(cell.reason)}</p>")
    checks = costmodel.table_rows([row for run in runs.values() for row in run.rows])
    if checks:
        parts += [
            "<h2>The cost model against the measurements</h2>",
            _html_table(costmodel.COLUMNS, checks),
        ]
    if tested:
        parts += ["<h2>Accuracy</h2>", _command(commands.get("accuracy"))]
        parts.append(_figure(folder / "accuracy.svg"))
        parts.append(_html_table(accuracies.COLUMNS, map(accuracies.cells, tested[1])))
    drawn = pictures(folder)
    if drawn:
        parts += ["<h2>Training</h2>", _command("python -m benchmarks.figures")]
    for caption, path in drawn:
        parts += [f"<p>{_text(caption)}</p>", _figure(path)]
    return "\n".join(parts) + "</body></html>\n"


def _written(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


def _keep_command(folder: Path, step: Step) -> None:
    """Beside those of other runs, whose results may be in the folder too."""
    commands = {**recorded_commands(folder), step.name: step.command}
    write_atomically(folder / "commands.json", json.dumps(commands, indent=1) + "\n")


def _text(value: object) -> str:
    return html.escape(str(value))


def _command(command: str | None) -> str:
    return "" if command is None else f"<pre>{_text(command)}</pre>"


def _figure(path: Path) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    name = _text(path.stem)
    source = f"data:image/svg+xml;base64,{data}"
    return f"<figure><img alt='{name}' src='{source}'></figure>"


def _html_table(head: Sequence[str], lines: Any) -> str:
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in line) + "</tr>"
        for line in lines
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


# ----------------------------------------------------------------------- command line


def compare(old: Path, new: Path) -> int:
    """Compare every results file that is in both folders; 1 if the wire changed."""
    status, compared = 0, 0
    for name in RUNS:
        before, after = old / f"{name}.json", new / f"{name}.json"
        if before.exists() and after.exists():
            compared += 1
            status |= report_comparison(before, Results.read(after))
    if not compared:
        raise ResultsError(f"{old} and {new} have no results file in common")
    return status


def _choose(among: Sequence[Step], names: Sequence[str] | None) -> Sequence[Step]:
    """The steps of those names, all of them for None."""
    if names is None:
        return among
    known = [step.name for step in among]
    absent = [name for name in names if name not in known]
    if absent:
        raise ResultsError(
            f"--steps {' '.join(absent)}: not without --full; without, there are "
            f"{', '.join(known)}"
        )
    return [step for step in among if step.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text for examples."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="everything: hours")
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=[step.name for step in steps(full=True)],
        help="measure only these; results of the others stay as they are",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY")
    parser.add_argument(
        "--only",
        choices=("run", "render", "readme"),
        help="run, render or put tables into the READMEs; all three by default",
    )
    parser.add_argument("--compare", type=Path, metavar="OLD_DIRECTORY")
    options = parser.parse_args(arguments)
    problems: list[str] = []
    try:
        if options.only in (None, "run"):
            chosen = _choose(steps(full=options.full), options.steps)
            problems = run(chosen, options.out)
        if options.only in (None, "render"):
            for file in render(options.out):
                print(file)
        if options.only in (None, "readme"):
            for readme in READMES:
                if readme.exists():
                    replaced, missing = update_readme(readme, options.out)
                    print(f"{readme}: {', '.join(replaced) or 'no tables'}")
                    problems += [f"{readme}: no {name}.csv" for name in missing]
        changed = compare(options.compare, options.out) if options.compare else 0
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished rows are kept", file=sys.stderr)
        return 130
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return changed or (3 if problems else 0)


if __name__ == "__main__":
    sys.exit(main())
