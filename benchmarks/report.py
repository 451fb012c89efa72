"""Run the benchmarks; render their results as one page, CSV, plots and documents.

    python -m benchmarks.report                  # about 20 minutes on two cores
    python -m benchmarks.report --full           # every network and protocol: hours
    python -m benchmarks.report --full --steps inference large    # only these
    python -m benchmarks.report --only render    # page, CSV and plots from the JSON
    python -m benchmarks.report --only readme    # tables of README.md and docs/
    python -m benchmarks.report --compare OLD_DIRECTORY --only render

Steps run one after another; one that fails is reported and the others still run. The
results are JSON, in benchmarks/results/; all else is made of them, in out/benchmarks/.
How a document says where a table belongs is told in `benchmarks.documents`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import (
    activations,
    degrees,
    documents,
    growth,
    inference,
    link,
    offline,
    throughput,
    tls,
    workers,
)
from .accuracy import command as accuracy
from .compare import report_comparison
from .figures import command as figures
from .networks import MODELS
from .page import RUNS, document, render
from .rows import COMPACT, MASKED, PLAIN, ROOT, Results, ResultsError, write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
RENDERED = ROOT / "out" / "benchmarks"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "training.md")
WHOLE = ROOT / "docs" / "benchmarks.md"  # made from a template, tables and all
PROFILES = ("lan", "metro", "wan", "cheetah")


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
    systems = ("--protocols", "masked", PLAIN, "espn", "crypten-relu")
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
        four, large = MODELS[:4], MODELS[4:]
        engine = (MASKED, COMPACT, PLAIN)
        apart = (*engine, documents.UNFOLDED)
        folded = [name for name in inference.protocols() if name not in apart]
        once = (*both, "--repeat", "1")
        return [
            Step("activations", "activations", (*layer, "wan", "--repeat", "21")),
            Step(
                "masked",
                "inference",
                (
                    *("--models", *MODELS, "--protocols", *engine),
                    *(*both, "cheetah", "--repeat", "3"),
                ),
            ),
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
                (
                    "--models",
                    *MODELS,
                    "--protocols",
                    documents.UNFOLDED,
                    *once,
                ),
            ),
            Step(
                "lan-metro",
                "inference",
                (
                    *(*two, *systems),
                    *("--networks", "lan", "metro", "--repeat", "3"),
                ),
            ),
            warm,
            Step("offline", "offline", ("--models", *MODELS)),
            Step("growth", "growth", ()),
            Step("throughput", "throughput", ()),
            Step("workers", "workers", ()),
            Step("tls", "tls", ("--networks", "wan", "cheetah")),
            Step("degrees", "degrees", ()),
            Step("accuracy", "accuracy", whole),
            Step("figures", "figures", ("--full", "--fresh")),
        ]
    return [
        Step("activations", "activations", (*layer, "--repeat", "7")),
        Step("inference", "inference", (*two, *systems, *both, "--repeat", "2")),
        warm,
        Step("offline", "offline", (*two, "--repeat", "3")),
        Step("degrees", "degrees", ()),
        Step("accuracy", "accuracy", ("--images", "64", "--batch", "32")),
    ]


MAINS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "activations": activations.main,
    "inference": inference.main,
    "offline": offline.main,
    "growth": growth.main,
    "throughput": throughput.main,
    "workers": workers.main,
    "tls": tls.main,
    "degrees": degrees.main,
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


def _written(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


def _keep_command(folder: Path, step: Step) -> None:
    """Beside those of other runs, whose results may be in the folder too."""
    commands = {**documents.recorded_commands(folder), step.name: step.command}
    write_atomically(folder / "commands.json", json.dumps(commands, indent=1) + "\n")


def write_documents(folder: Path) -> list[str]:
    """Bring the documents up to date; what has no results, one line each."""
    problems = []
    for path in filter(Path.exists, DOCUMENTS):
        replaced, missing = documents.update(path, folder)
        print(f"{path}: {', '.join(replaced) or 'no tables'}")
        problems += [f"{path}: no results of {name}" for name in missing]
    write_atomically(WHOLE, document(folder))
    print(WHOLE)
    return problems


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
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="DIRECTORY",
        help="where the JSON is (default: benchmarks/results)",
    )
    parser.add_argument(
        "--rendered",
        type=Path,
        default=RENDERED,
        metavar="DIRECTORY",
        help="where what is made from it goes (default: out/benchmarks)",
    )
    parser.add_argument(
        "--only",
        choices=("run", "render", "readme"),
        help="run, render or put tables into the documents; all three by default",
    )
    parser.add_argument("--compare", type=Path, metavar="OLD_DIRECTORY")
    options = parser.parse_args(arguments)
    problems: list[str] = []
    try:
        if options.only in (None, "run"):
            chosen = _choose(steps(full=options.full), options.steps)
            problems = run(chosen, options.out)
        if options.only in (None, "render"):
            for file in render(options.out, options.rendered):
                print(file)
        if options.only in (None, "readme"):
            problems += write_documents(options.out)
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
