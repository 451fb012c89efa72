"""Tables of the documents, made from the JSON files of a results folder.

In README.md and docs/ a table stands between `<!-- begin benchmark NAME -->` and
`<!-- end benchmark NAME -->`; docs/benchmarks.md is rendered whole from
`pages/benchmarks.md`, which asks for its tables by name. A table is one of TABLES, or
else the rows of NAME.json. Below it stand the commands that wrote the results, commit
and date.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas

from crypten_espn.cost import GLOO_DELAYS, Traffic

from . import degrees, growth, offline, throughput, training, workers
from .accuracy import rows as accuracy
from .inference import RELU_PROTOCOLS
from .rows import COMPACT, MASKED, PLAIN, Results, ResultsError, write_atomically
from .tables import STAMP, frame, stamped

# Results that are shown as their command prints them.
SHOWN = {
    "offline": offline,
    "growth": growth,
    "throughput": throughput,
    "workers": workers,
}
FOLDED, UNFOLDED = RELU_PROTOCOLS
NOT_RUN = "not run"


def recorded_commands(folder: Path) -> dict[str, str]:
    """The commands that wrote a folder's results, by the results' name."""
    path = folder / "commands.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load(folder: Path, name: str) -> pandas.DataFrame | None:
    """The results of that name as a frame; None where there are none.

    Raises: ResultsError for a file that holds something else, or no rows.
    """
    if name == "training":
        where = folder / "training"
        return training.summary(where) if where.is_dir() else None
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    if name == "accuracy":
        machine, rows = accuracy.read(path)
        found = stamped([dataclasses.asdict(row) for row in rows], machine)
    elif name in SHOWN:
        shown = SHOWN[name]
        machine, lines = shown.lines_of(path)
        found = stamped(
            [dict(zip(shown.COLUMNS, line, strict=True)) for line in lines], machine
        )
    elif name == "degrees":
        machine, costs = degrees.read(path)
        found = stamped([dataclasses.asdict(row) for row in costs], machine)
    else:
        found = frame(Results.read(path))
    if found.empty:
        raise ResultsError(f"{path}: no rows; run the benchmarks")
    return found


def update(path: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Replace the benchmark tables between markers.

    Returns: names of the tables replaced, and of those without results, left alone.
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
        made = markdown(folder, name)
        if made is None:
            missing.append(name)
            continue
        text = text[:body] + made + text[end:]
        position = body + len(made)
        replaced.append(name)
    if replaced:
        write_atomically(path, text)
    return replaced, missing


def markdown(folder: Path, name: str) -> str | None:
    """A table as Markdown; below it, for each source, its command, commit and date.

    Returns: None if the first of its sources is not there, or has nothing for it.
    """
    table = TABLES.get(name) or Table((name,), _runs)
    sources = {source: load(folder, source) for source in table.sources}
    found = {source: rows for source, rows in sources.items() if rows is not None}
    if table.sources[0] not in found:
        return None
    notes = []
    for source, rows in found.items():
        origins = rows[list(STAMP)].drop_duplicates().itertuples(index=False)
        said = "; ".join(f"commit {o.commit}, {o.date}, {o.processor}" for o in origins)
        command = recorded_commands(folder).get(source)
        notes.append((f"`{command}`: " if command else "") + f"{said}.")
    body = table.make(pandas.concat(found.values(), ignore_index=True))
    if body.empty:
        return None
    lines = [list(body.columns), *body.fillna("").astype(str).to_numpy().tolist()]
    out = ["| " + " | ".join(line) + " |" for line in lines]
    out.insert(1, "|" + "---|" * len(body.columns))
    return "\n".join([*out, "", *notes, ""])


@dataclasses.dataclass(frozen=True)
class Table:
    """How a table is made.

    Args:
        sources: names of the results; it needs the first.
        make: the table, all text, from the rows of all of them.
    """

    sources: tuple[str, ...]
    make: Callable[[pandas.DataFrame], pandas.DataFrame]


# ------------------------------------------------------------------- whole networks

# Activation and engine in the rows, and the title of their column.
SYSTEMS = {
    (PLAIN, "torch+eager"): "plain torch",
    (MASKED, "masked"): "masked",
    (COMPACT, "masked"): "masked compact",
    ("espn", "crypten+direct"): "espn",
    ("opened_mask", "crypten+direct"): "opened_mask",
    ("beaver", "crypten+direct"): "beaver",
    (FOLDED, "crypten+direct"): "ReLU",
    (FOLDED, "crypten+gloo"): "ReLU (gloo)",
    (UNFOLDED, "crypten+gloo"): "unfolded ReLU (gloo)",
}


def _wide(rows: pandas.DataFrame, network: str, value: str) -> pandas.DataFrame:
    """That column on one path: a line for each model, a column for each system."""
    titles = [
        SYSTEMS.get(pair) for pair in zip(rows.activation, rows.engine, strict=True)
    ]
    found = rows.assign(title=titles)
    found = found[(found.network == network) & found.title.notna()]
    found = found.drop_duplicates(["model", "title"], keep="last")
    wide = found.pivot(index="model", columns="title", values=value)
    shown = [title for title in SYSTEMS.values() if title in wide.columns]
    return wide.reindex(index=found.model.unique(), columns=shown)


def _by_system(
    network: str, cell: Callable[[Any], str], rows: pandas.DataFrame
) -> pandas.DataFrame:
    wide = _wide(rows.assign(cell=rows.apply(cell, axis=1)), network, "cell")
    return wide.fillna(NOT_RUN).rename_axis("network").reset_index()


def _seconds(row: Any) -> str:
    """Offline and online; one figure where there is no offline phase, or none known."""
    if row.activation == PLAIN or pandas.isna(row.offline_s):
        return _digits(row.online_s)
    return f"{_digits(row.offline_s)} + {_digits(row.online_s)}"


def _wire(row: Any) -> str:
    if row.activation == PLAIN:
        return "none"
    return f"{row.rounds}, {row.sent / 1e6:.1f} MB"


def _limit(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The masked engine online beside plaintext torch over loopback, milliseconds."""
    lines = []
    near = rows[rows.network == "loopback"]
    for model, found in near.groupby("model", sort=False):
        plain = found[found.activation == PLAIN].set_index("engine").online_s
        if "torch+eager" not in plain:
            continue
        fastest = plain.idxmin()
        usual, best = plain["torch+eager"], plain[fastest]
        for activation, precision in ((MASKED, "fast"), (COMPACT, "compact")):
            masked = found[found.activation == activation].online_s
            if masked.empty:
                continue
            private = masked.iloc[-1]
            lines.append(
                {
                    "network": model,
                    "precision": precision,
                    "masked online ms": _digits(1e3 * private),
                    "torch ms": _digits(1e3 * usual),
                    "masked / torch": f"{private / usual:.2f}",
                    "fastest torch ms": _digits(1e3 * best),
                    "its form": fastest.partition("+")[2],
                    "masked / fastest": f"{private / best:.2f}",
                }
            )
    return pandas.DataFrame(lines)


def _tls(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The messages of an inference on each path, without TLS and with it."""
    where = ["network", "model"]
    shown = rows.assign(MB=(rows.sent / 1e6).map("{:.2f}".format))
    wide = shown.pivot(index=[*where, "rounds", "MB"], columns="engine")["online_s"]
    plain, secured = wide["tcp"], wide["tcp+TLS"]
    found = {
        "plain s": plain.map(_digits),
        "TLS s": secured.map(_digits),
        "difference": (secured / plain - 1).map("{:+.1%}".format),
    }
    return pandas.DataFrame(found).reset_index()


def _as_shown(rows: pandas.DataFrame) -> pandas.DataFrame:
    return rows.drop(columns=list(STAMP))


def _gains(rows: pandas.DataFrame) -> pandas.DataFrame:
    """How many times faster online, for each model on wan; and the masked engine's time
    against the sum of its messages' delays, its bytes and its time over loopback."""
    far = _wide(rows, "wan", "online_s")
    far = far.reindex(columns=list(SYSTEMS.values()))
    near = _wide(rows, "loopback", "online_s").reindex(index=far.index)
    masked = rows[(rows.network == "wan") & (rows.activation == MASKED)]
    parts = {
        row.model: _parts(row, near.masked[row.model]) for row in masked.itertuples()
    }
    pairs = (("ReLU (gloo)", "masked"), ("ReLU", "masked"), ("espn", "masked"))
    found = {f"{slow} / {fast}": (far[slow] / far[fast], 1) for slow, fast in pairs}
    found["ReLU / espn"] = (far["ReLU"] / far["espn"], 1)
    found["masked / its parts"] = (far["masked"] / pandas.Series(parts), 2)
    table = pandas.DataFrame(
        {
            title: ratio.reindex(far.index).map(f"{{:.{digits}f}}".format)
            for title, (ratio, digits) in found.items()
        }
    )
    return table.replace("nan", NOT_RUN).rename_axis("network").reset_index()


def _parts(row: Any, seconds: float) -> float:
    """Seconds of a row's delays and bytes, and of the same over loopback."""
    traffic = Traffic(
        rounds=row.rounds,
        bytes_sent=(row.bytes_sent_0, row.bytes_sent_1),
        alternating=row.engine == "masked",
        delays=GLOO_DELAYS if row.engine.endswith("+gloo") else 1,
    )
    rate = float("inf") if pandas.isna(row.mbit) else 1e6 * row.mbit
    return traffic.seconds_at(
        rtt_s=row.rtt_ms / 1e3, bits_per_second=rate, seconds=seconds
    )


# ------------------------------------------------------------ one activation layer


def _layer(rows: pandas.DataFrame) -> pandas.DataFrame:
    """A line for each system, a column of milliseconds for each path; and the time on
    the longest path of unlimited rate against its delays and its time over loopback."""
    longest = rows[rows.mbit.isna()].sort_values("rtt_ms").network.iloc[-1]
    online = rows.pivot(index="system", columns="network", values="online_s")
    near = rows[rows.network == "loopback"].set_index("system")
    far = rows[rows.network == longest].set_index("system")
    parts = [_parts(far.loc[name], near.online_s[name]) for name in far.index]
    share = far.online_s / pandas.Series(parts, index=far.index)
    paths = {path: (1e3 * online[path]).map(_digits) for path in rows.network.unique()}
    table = pandas.DataFrame(
        {
            "rounds": near.rounds,
            "MB sent": (near.sent / 1e6).map("{:.2f}".format),
            **paths,
            f"{longest} / its parts": share.map("{:.2f}".format),
            "offline": (1e3 * near.offline_s).map(_digits),
        }
    )
    ordered = table.reindex(rows.system.unique())
    return ordered.rename_axis("protocol").reset_index()


# ------------------------------------------------------------------------ one row each


def _runs(rows: pandas.DataFrame) -> pandas.DataFrame:
    low, high = rows.online_s_low.map(_digits), rows.online_s_high.map(_digits)
    return pandas.DataFrame(
        {
            "network": rows.network,
            "model": rows.model,
            "protocol": rows.system,
            "rounds": rows.rounds,
            "MB sent": (rows.sent / 1e6).map("{:.2f}".format),
            "runs": rows.runs,
            "online s": rows.online_s.map(_digits),
            "95 %": low + " to " + high,
            "offline s": rows.offline_s.map(_digits),
            "total s": rows.total_s.map(_digits),
        }
    )


def _accuracies(rows: pandas.DataFrame) -> pandas.DataFrame:
    percent = "{:.2%}".format
    protocol = rows.system + (" " + rows.truncation.astype("string")).fillna("")
    return pandas.DataFrame(
        {
            "network": rows.model,
            "activation": rows.activation,
            "protocol": protocol,
            "bits": rows.precision_bits.astype("Int64").astype("string"),
            "images": rows.images,
            "clear": rows.clear.map(percent),
            "quantised": rows.quantised.map(percent, na_action="ignore"),
            "private": rows.private.map(percent),
            "same answer": rows.agreement.map(percent),
            "logit error": rows.max_abs_error.map("{:.3f}".format),
            "s/image": rows.total_s.map(_digits),
        }
    )


def _degrees(rows: pandas.DataFrame) -> pandas.DataFrame:
    """A line for each polynomial: bytes of one activation, online and dealt."""
    bytes_ = (rows.online_bytes, rows.dealer_bytes)
    online, dealt = ((sent / rows.elements).map("{:g}".format) for sent in bytes_)
    shown = rows.assign(cell=online + " + " + dealt)
    lines = ["polynomial", "degree"]
    wide = shown.pivot(index=lines, columns="engine", values="cell")
    wide = wide[list(rows.engine.unique())]
    counted = rows[rows.engine == "masked"].set_index(lines).truncations
    wide.insert(0, "truncations", counted)
    order = pandas.MultiIndex.from_frame(rows[lines].drop_duplicates())
    return wide.reindex(order).rename_axis(columns=None).reset_index()


def _digits(number: float) -> str:
    """Three significant digits; empty for what was not measured."""
    return "" if pandas.isna(number) else f"{number:#.3g}".rstrip(".")


_WHOLE = ("inference", "masked", "large", "unfolded")
TABLES = {
    "networks-wan": Table(_WHOLE, functools.partial(_by_system, "wan", _seconds)),
    "networks-loopback": Table(
        _WHOLE, functools.partial(_by_system, "loopback", _seconds)
    ),
    "networks-cheetah": Table(
        ("masked",), functools.partial(_by_system, "cheetah", _seconds)
    ),
    "networks-plain": Table(("masked",), _limit),
    "networks-vnni": Table(("vnni",), _limit),
    "networks-wire": Table(_WHOLE, functools.partial(_by_system, "loopback", _wire)),
    "networks-gains": Table(_WHOLE, _gains),
    "activations": Table(("activations",), _layer),
    "degrees": Table(("degrees",), _degrees),
    "accuracy": Table(("accuracy",), _accuracies),
    "training": Table(("training",), _as_shown),
    "tls": Table(("tls",), _tls),
    **{name: Table((name,), _as_shown) for name in SHOWN},
}
