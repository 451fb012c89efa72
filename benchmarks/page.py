"""What is rendered from a folder of results: CSV files, plots and one page."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2

from . import activations, costmodel, degrees, documents, plots, tables
from .accuracy import rows as accuracy
from .figures import drawing, finished
from .rows import Results, ResultsError, write_atomically

PAGES = Path(__file__).resolve().parent / "pages"
# The results that are rows of rows.py, and their titles.
RUNS = {
    "activations": "One activation layer",
    "masked": "Whole networks, the masked engine",
    "inference": "Whole networks, CrypTen's protocols",
    "large": "Large networks",
    "unfolded": "Whole networks as CrypTen converts them, batch-norm unfolded",
    "lan-metro": "Whole networks on shorter paths",
    "warm": "Whole networks, no slow start after idle",
    "tls": "The messages of an inference, without TLS and with it",
}
TITLES = {
    "offline": "Preparing in a session",
    "growth": "Growth, divided by that of the work",
    "throughput": "Images a second",
    "workers": "Server processes behind one port",
}


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: its heading.
        head, lines: its table.
        command: what made the results.
        figures: caption, name and the SVG in base64.
        notes: a paragraph each.
    """

    title: str
    head: Sequence[str] = ()
    lines: Sequence[Sequence[object]] = ()
    command: str | None = None
    figures: Sequence[tuple[str, str, str]] = ()
    notes: Sequence[str] = ()


def render(folder: Path, out: Path) -> list[Path]:
    """CSV, plots and index.html from the JSON files of `folder`; the files written.

    Raises: ResultsError if there is nothing to show, or a file is not a results file.
    """
    runs = {
        name: Results.read(folder / f"{name}.json")
        for name in RUNS
        if (folder / f"{name}.json").exists()
    }
    if not runs:
        raise ResultsError(
            f"{folder}: no results there; run python -m benchmarks.report"
        )
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for name in (*RUNS, *documents.SHOWN, "degrees", "accuracy", "training"):
        if name in runs and not runs[name].rows:
            continue
        rows = documents.load(folder, name)
        if rows is not None:
            files.append(out / f"{name}.csv")
            rows.to_csv(files[-1], index=False, float_format="%.6g")
    for name, results in runs.items():
        if results.rows:
            draw = activations.plot if name == "activations" else plots.plot_dots
            files += draw(results.rows, out / name)
    if (folder / "accuracy.json").exists():
        files += accuracy.plot(
            accuracy.read(folder / "accuracy.json")[1], out / "accuracy"
        )
    if (folder / "figures.json").exists():
        files += drawing.draw_complete(finished.Finished(folder / "figures.json"), out)
    files.append(out / "index.html")
    write_atomically(files[-1], _page(folder, out, runs))
    return files


def _page(folder: Path, out: Path, runs: Mapping[str, Results]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    machine = next(iter(runs.values())).machine
    return environment.get_template("index.html").render(
        machine=tables.machine_line(machine),
        sections=list(_sections(folder, out, runs)),
    )


def _sections(
    folder: Path, out: Path, runs: Mapping[str, Results]
) -> Iterable[Section]:
    commands = documents.recorded_commands(folder)
    if (folder / "paths.json").exists():
        paths = json.loads((folder / "paths.json").read_text())
        if paths:
            lines = [tuple(path.values()) for path in paths]
            yield Section("The paths, as measured", tuple(paths[0]), lines)
    for name, results in runs.items():
        yield Section(
            RUNS[name],
            tables.COLUMNS,
            [tables.cells(row) for row in results.rows],
            commands.get(name),
            [_figure(path) for path in sorted(out.glob(f"{name}-*.svg"))],
            [
                f"Not run: {cell.network} {cell.model} {cell.activation} "
                f"{cell.engine}: {cell.reason}"
                for cell in results.skipped
            ],
        )
    for name, shown in documents.SHOWN.items():
        if (folder / f"{name}.json").exists():
            lines = shown.lines_of(folder / f"{name}.json")[1]
            yield Section(TITLES[name], shown.COLUMNS, lines, commands.get(name))
    checks = costmodel.table_rows([row for run in runs.values() for row in run.rows])
    if checks:
        title = "The cost model against the measurements"
        yield Section(title, costmodel.COLUMNS, checks)
    if (folder / "degrees.json").exists():
        yield Section(
            "Bytes of one activation",
            degrees.COLUMNS,
            [degrees.cells(row) for row in degrees.read(folder / "degrees.json")[1]],
            commands.get("degrees"),
        )
    if (folder / "accuracy.json").exists():
        rows = accuracy.read(folder / "accuracy.json")[1]
        yield Section(
            "Accuracy",
            accuracy.COLUMNS,
            [accuracy.cells(row) for row in rows],
            commands.get("accuracy"),
            [_figure(out / "accuracy.svg")],
        )
    drawn = [_figure(path, caption) for caption, path in drawing.pictures(out)]
    if drawn:
        yield Section("Training", command="python -m benchmarks.figures", figures=drawn)


def _figure(path: Path, caption: str = "") -> tuple[str, str, str]:
    return caption, path.stem, base64.b64encode(path.read_bytes()).decode()


def document(folder: Path) -> str:
    """docs/benchmarks.md, from `pages/benchmarks.md` and the results in `folder`.

    A section may ask whether its table is `known`, and be left out.

    Raises: ResultsError where the results of a table it asks for are not there.
    """

    def table(name: str) -> str:
        made = documents.markdown(folder, name)
        if made is None:
            raise ResultsError(f"{folder}: no results of {name}; run the benchmarks")
        return made.rstrip("\n")

    def known(name: str) -> bool:
        return documents.markdown(folder, name) is not None

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=False,  # Markdown, of our own files alone
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        comment_start_string="{##",
        comment_end_string="##}",
    )
    return environment.get_template("benchmarks.md").render(
        table=table, known=known, validated=costmodel.validated(folder)
    )
