"""The parent's side: parties started on each network, their samples made rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from .. import link
from ..rows import Results, Row, Skipped, Spread, system_name
from .measuring import MARK


class Collector:
    """Turns the lines that parties print into rows, as soon as a model is done.

    Args:
        results: where rows and skipped cells go.
        label, rtt_ms, mbit: the network of the rows; with rtt_ms None, the round trip
            that the parties saw.
        threads: of each party.
    """

    def __init__(
        self,
        results: Results,
        label: str,
        rtt_ms: float | None,
        mbit: float | None,
        threads: int,
    ) -> None:
        self._results = results
        self._label, self._rtt_ms, self._mbit = label, rtt_ms, mbit
        self._threads = threads
        self._bar: tqdm | None = None
        self._samples: dict[tuple[str, str, str, int], list[Mapping[str, Any]]] = {}

    def line(self, rank: int, text: str) -> None:
        """Take one line of a party's output; others are passed on to standard error."""
        if not text.startswith(MARK):
            self._hide_progress()
            print(f"[{rank}] {text.rstrip()}", file=sys.stderr, flush=True)
            return
        self.take(json.loads(text[len(MARK) :]))

    def take(self, sample: Mapping[str, Any]) -> None:
        """Take a sample, a cell that was left out, progress, or the end of a model."""
        if "progress" in sample:
            self._show_progress(sample)
            return
        if "done" in sample:
            self.flush(sample["rtt_ms"], map(tuple, sample["done"]))
            return
        model, activation, engine = (
            sample[name] for name in ("model", "activation", "engine")
        )
        if "skipped" in sample:
            self._hide_progress()
            cell = (model, activation, engine, self._label, sample["skipped"])
            self._results.skip(Skipped(*cell))
            return
        key = (model, activation, engine, sample["batch"])
        self._samples.setdefault(key, []).append(sample)

    def flush(self, rtt_ms: float = 0.0, order: Iterable[tuple[str, ...]] = ()) -> None:
        """Add one row for each system with samples.

        Args:
            rtt_ms: the round trip that the parties saw.
            order: of the rows, by activation and engine; those not named come last.
        """
        self._hide_progress()
        collected, self._samples = self._samples, {}
        place = {name: index for index, name in enumerate(order)}
        ordered = sorted(
            collected.items(), key=lambda item: place.get(item[0][1:3], len(place))
        )
        for (model, activation, engine, batch), samples in ordered:
            last = samples[-1]
            agreements = [
                sample["argmax_agreement"]
                for sample in samples
                if sample["argmax_agreement"] is not None
            ]
            row = Row(
                model=model,
                activation=activation,
                engine=engine,
                network=self._label,
                rtt_ms=rtt_ms if self._rtt_ms is None else self._rtt_ms,
                mbit=self._mbit,
                batch=batch,
                threads=self._threads,
                rounds=last["rounds"],
                bytes_sent=(last["bytes_sent"][0], last["bytes_sent"][1]),
                online_s=Spread.of(sample["online_s"] for sample in samples),
                offline_s=Spread.of(sample["offline_s"] for sample in samples),
                total_s=Spread.of(
                    sample["online_s"] + sample["offline_s"] for sample in samples
                ),
                offline_bytes=last["offline_bytes"],
                max_abs_error=max(sample["max_abs_error"] for sample in samples),
                argmax_agreement=min(agreements, default=None),
            )
            self._results.add(row)

    def _show_progress(self, sample: Mapping[str, Any]) -> None:
        if self._bar is None:  # on a terminal only
            title = f"{sample['model']} on {self._label}"
            self._bar = tqdm(
                desc=title, unit="run", leave=False, dynamic_ncols=True, disable=None
            )
        self._bar.n, self._bar.total = sample["progress"]
        self._bar.set_postfix_str(system_name(sample["activation"], sample["engine"]))

    def _hide_progress(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def run_on_networks(
    results: Results,
    networks: Sequence[str],
    *,
    module: str,
    task: Mapping[str, Any],
    provider: str,
    threads: int,
    idle_restart: bool,
    timeout_s: float,
) -> bool:
    """Run `module` as two parties (and a dealer under TTP) on each network in turn.

    1. Make the path; start `python -m module --party TASK` for each rank.
    2. Collect samples; add a row per system as soon as its model is done.
    3. If a party fails, keep what was measured, say what happened, go on; if the run is
       interrupted, keep it too.

    Args:
        task: what the parties are to do, as JSON can hold it; "address", "port" and
            "rank" are added.
    Returns: whether every network ended well.
    Raises: PathError, before anything is measured, for an unknown network.
    """
    profiles = [link.Profile.parse(name) for name in networks]
    parties = 3 if provider == "TTP" else 2
    ended_well = True
    for profile in profiles:
        with link.Path(profile, parties=parties, idle_restart=idle_restart) as path:
            how = f", congestion control {path.congestion}" if path.congestion else ""
            print(f"{profile} ({path.label}{how})", flush=True)
            if path.congestion:
                results.machine["congestion_control"] = path.congestion
            collector = Collector(
                results, path.label, profile.rtt_ms, profile.mbit, threads
            )
            port = link.free_port()
            commands = []
            for rank in range(parties):
                text = json.dumps(
                    {**task, "rank": rank, "address": path.addresses[0], "port": port}
                )
                commands.append([sys.executable, "-m", module, "--party", text])
            try:
                path.run(
                    commands,
                    timeout=timeout_s,
                    environment={"OMP_NUM_THREADS": str(threads)},
                    on_line=collector.line,
                )
            except link.PartyError as error:
                ended_well = False
                print(f"error on {path.label}: {error}", file=sys.stderr, flush=True)
                results.skip(Skipped("", "", "", path.label, _first_line(error)))
            finally:
                collector.flush()
    return ended_well


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if len(lines) < 2 else f"{lines[0]} {lines[-1]}"
