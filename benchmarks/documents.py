"""Tables in the READMEs, made from the CSV files of a results folder.

A table stands between `<!-- begin benchmark NAME -->` and `<!-- end benchmark NAME -->`
and is one of TABLES, or else the rows of NAME.csv. Below it stand the commands that
wrote the results, commit and date.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from crypten_espn.cost import GLOO_DELAYS, Traffic

from .inference import RELU_PROTOCOLS
from .rows import ResultsError, system_name, write_atomically

FOLDED, UNFOLDED = RELU_PROTOCOLS
Line = Mapping[str, str]  # of a CSV file, or of a table: text by column


def recorded_commands(folder: Path) -> dict[str, str]:
    """The commands that wrote a folder's results, by the results' name."""
    path = folder / "commands.json"
    return json.loads(path.read_text()) if path.exists() else {}


def update_readme(path: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Replace the benchmark tables between markers.

    Returns: names of the tables replaced, and of those without a CSV, left alone.
    Raises: ResultsError for a marker without its end.
    """
    text = path.read_text()
    replaced: list[str] = []
    missing: list[str] = []
    position = 0
    while (start := text.find("<!-- begin benchmark ", position)) >= 0:
        name = text[start:].split()[3]
        body = text.index("-->", start) + 4
        end = text.find(f"<!-- end benchmark {name} -->", body)
        if end < 0:
            raise ResultsError(f"{path}: benchmark {name} begins and does not end")
        position = end
        if not (folder / f"{_table(name).sources[0]}.csv").exists():
            missing.append(name)
            continue
        table = markdown(folder, name)
        text = text[:body] + table + text[end:]
        position = body + len(table)
        replaced.append(name)
    if replaced:
        write_atomically(path, text)
    return replaced, missing


def markdown(folder: Path, name: str) -> str:
    """A table as Markdown; below it, for each CSV, its command, commit and date."""
    table = _table(name)
    lines: list[dict[str, str]] = []
    notes = []
    for source in table.sources:
        path = folder / f"{source}.csv"
        if not path.exists():
            continue  # of several, the first is there
        with open(path, newline="") as handle:
            rows = list(csv.DictReader(handle))
        if not rows:
            raise ResultsError(f"{path}: no rows; run the benchmarks")
        lines += rows
        stamp = "commit {commit}, {date}, {processor}".format(**rows[0])
        command = recorded_commands(folder).get(source)
        notes.append((f"`{command}`: " if command else "") + f"{stamp}.")
    try:
        body = table.rows(lines)
    except KeyError as error:
        raise ResultsError(
            f"{folder}: {name} has no column {error}; run the benchmarks"
        ) from error
    if not body:
        raise ResultsError(f"{folder}: nothing for the table {name}")
    head = list(body[0])
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    out += ["| " + " | ".join(line.values()) + " |" for line in body]
    return "\n".join([*out, "", "\n".join(notes), ""])


@dataclasses.dataclass(frozen=True)
class Table:
    """How a table is made.

    Args:
        sources: names of the CSV files; it needs the first.
        rows: the table's rows from all their lines.
    """

    sources: tuple[str, ...]
    rows: Callable[[Sequence[Line]], list[dict[str, str]]]


def _table(name: str) -> Table:
    return TABLES.get(name) or Table((name,), functools.partial(_each, _run))


def _each(
    columns: Callable[[Line], dict[str, str]], lines: Sequence[Line]
) -> list[dict[str, str]]:
    return [columns(line) for line in lines]


# ------------------------------------------------------------------- whole networks

# Columns: title, and activation and engine in the rows.
SYSTEMS = {
    "masked": ("masked", "masked"),
    "espn": ("espn", "crypten+direct"),
    "opened_mask": ("opened_mask", "crypten+direct"),
    "beaver": ("beaver", "crypten+direct"),
    "ReLU": (FOLDED, "crypten+direct"),
    "ReLU (gloo)": (FOLDED, "crypten+gloo"),
    "unfolded ReLU (gloo)": (UNFOLDED, "crypten+gloo"),
}


def _by_model(lines: Sequence[Line], network: str) -> dict[str, dict[str, Line]]:
    """Lines of that path by model and title in SYSTEMS."""
    titles = {system: title for title, system in SYSTEMS.items()}
    found: dict[str, dict[str, Line]] = {}
    for line in lines:
        title = titles.get((line["activation"], line["engine"]))
        if line["network"] == network and title is not None:
            found.setdefault(line["model"], {})[title] = line
    return found


def _by_system(
    network: str, cell: Callable[[Line], str], lines: Sequence[Line]
) -> list[dict[str, str]]:
    """A row for each model on that path, a column for each system that was run."""
    found = _by_model(lines, network)
    shown = [title for title in SYSTEMS if any(title in row for row in found.values())]
    return [
        {
            "network": model,
            **{t: cell(row[t]) if t in row else "not run" for t in shown},
        }
        for model, row in found.items()
    ]


def _seconds(line: Line) -> str:
    return f"{_three_digits(line['offline_s'])} + {_three_digits(line['online_s'])}"


def _wire(line: Line) -> str:
    return f"{line['rounds']}, {_sent(line) / 1e6:.1f} MB"


def _gains(lines: Sequence[Line]) -> list[dict[str, str]]:
    """How many times faster online, for each model on wan; and the masked engine's time
    against the sum of its messages' delays, its bytes and its time over loopback."""
    near = _by_model(lines, "loopback")
    rows = []
    for model, far in _by_model(lines, "wan").items():
        online = {title: float(line["online_s"]) for title, line in far.items()}

        def times(slow: str, fast: str, online: Mapping[str, float] = online) -> str:
            both = slow in online and fast in online
            return f"{online[slow] / online[fast]:.1f}" if both else "not run"

        against_parts = "not run"
        if "masked" in far and "masked" in near.get(model, {}):
            parts = _parts(far["masked"], near[model]["masked"])
            against_parts = f"{online['masked'] / parts:.2f}"
        rows.append(
            {
                "network": model,
                "ReLU (gloo) / masked": times("ReLU (gloo)", "masked"),
                "ReLU / masked": times("ReLU", "masked"),
                "espn / masked": times("espn", "masked"),
                "ReLU / espn": times("ReLU", "espn"),
                "masked / its parts": against_parts,
            }
        )
    return rows


def _parts(far: Line, near: Line) -> float:
    """Seconds of a cell's delays and bytes, and of the same over loopback."""
    traffic = Traffic(
        rounds=int(far["rounds"]),
        bytes_sent=(int(far["bytes_sent_0"]), int(far["bytes_sent_1"])),
        alternating=far["engine"] == "masked",
        delays=GLOO_DELAYS if far["engine"].endswith("+gloo") else 1,
    )
    return traffic.seconds_at(
        rtt_s=float(far["rtt_ms"]) / 1e3,
        bits_per_second=1e6 * float(far["mbit"] or "inf"),
        seconds=float(near["online_s"]),
    )


# ------------------------------------------------------------ one activation layer


def _layer(lines: Sequence[Line]) -> list[dict[str, str]]:
    """A row for each system, a column of milliseconds for each path; and the time on
    the longest path of unlimited rate against its delays and its time over loopback."""
    systems: dict[str, dict[str, Line]] = {}
    for line in lines:
        name = system_name(line["activation"], line["engine"])
        systems.setdefault(name, {})[line["network"]] = line
    longest = max(
        (line for line in lines if not line["mbit"]),
        key=lambda line: float(line["rtt_ms"]),
    )["network"]
    rows = []
    for name, by_path in systems.items():
        near, far = by_path["loopback"], by_path[longest]
        online = {path: float(line["online_s"]) for path, line in by_path.items()}
        rows.append(
            {
                "protocol": name,
                "rounds": near["rounds"],
                "MB sent": f"{_sent(near) / 1e6:.2f}",
                **{path: _three_digits(1e3 * s) for path, s in online.items()},
                f"{longest} / its parts": f"{online[longest] / _parts(far, near):.2f}",
                "offline": _three_digits(1e3 * float(near["offline_s"])),
            }
        )
    return rows


# ------------------------------------------------------------------------ one row each


def _run(line: Line) -> dict[str, str]:
    low, high = (_three_digits(line[f"online_s_{end}"]) for end in ("low", "high"))
    return {
        "network": line["network"],
        "model": line["model"],
        "protocol": system_name(line["activation"], line["engine"]),
        "rounds": line["rounds"],
        "MB sent": f"{_sent(line) / 1e6:.2f}",
        "runs": line["runs"],
        "online s": _three_digits(line["online_s"]),
        "95 %": f"{low} to {high}",
        "offline s": _three_digits(line["offline_s"]),
        "total s": _three_digits(line["total_s"]),
    }


def _sent(line: Line) -> int:
    return int(line["bytes_sent_0"]) + int(line["bytes_sent_1"])


def _three_digits(number: str | float) -> str:
    return f"{float(number):#.3g}".rstrip(".")


def _accuracy(line: Line) -> dict[str, str]:
    quantised = line["quantised"]
    return {
        "network": line["model"],
        "activation": line["activation"],
        "protocol": " ".join(filter(None, (line["system"], line["truncation"]))),
        "bits": line["precision_bits"],
        "images": line["images"],
        "clear": f"{float(line['clear']):.2%}",
        "quantised": f"{float(quantised):.2%}" if quantised else "",
        "private": f"{float(line['private']):.2%}",
        "same answer": f"{float(line['agreement']):.2%}",
        "logit error": f"{float(line['max_abs_error']):.3f}",
        "s/image": _three_digits(line["total_s"]),
    }


def _training(line: Line) -> dict[str, str]:
    return {k: v for k, v in line.items() if k not in ("commit", "date", "processor")}


_WHOLE = ("inference", "large", "unfolded")
TABLES = {
    "networks-wan": Table(_WHOLE, functools.partial(_by_system, "wan", _seconds)),
    "networks-loopback": Table(
        _WHOLE, functools.partial(_by_system, "loopback", _seconds)
    ),
    "networks-wire": Table(_WHOLE, functools.partial(_by_system, "loopback", _wire)),
    "networks-gains": Table(_WHOLE, _gains),
    "activations": Table(("activations",), _layer),
    "accuracy": Table(("accuracy",), functools.partial(_each, _accuracy)),
    "training": Table(("training",), functools.partial(_each, _training)),
}
