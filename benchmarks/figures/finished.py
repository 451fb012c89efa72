"""Finished runs in one file, and missing ones trained in processes."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from crypten_espn.pillar.data import Dataset, load_dataset
from crypten_espn.pillar.recipes import Recipe

from ..rows import ResultsError, write_atomically
from ..rows import machine as this_machine
from .training import Outcome, Run, train


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished run, and where and when it was made."""

    settings: dict[str, Any]
    outcome: Outcome
    stamp: dict[str, str]


class Finished:
    """The finished runs of one file, which is rewritten in one step after each.

    Raises: ResultsError for a file that holds something else.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if fresh or not path.exists():
            return
        try:
            for line in json.loads(path.read_text())["runs"]:
                values = line["outcome"]
                outcome = Outcome(**{**values, "inputs": tuple(values["inputs"])})
                key = json.dumps(line["settings"], sort_keys=True)
                self.rows[key] = Row(line["settings"], outcome, line["stamp"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ResultsError(
                f"{path}: not a file of finished runs ({error!r}); give another "
                "--json, or --fresh to train everything again and replace it"
            ) from error

    def __contains__(self, run: Run) -> bool:
        return run.key in self.rows

    def __getitem__(self, run: Run) -> Row:
        return self.rows[run.key]

    def add(self, run: Run, outcome: Outcome, stamp: dict[str, str]) -> None:
        """Keep a run and write the file."""
        self.rows[run.key] = Row(run.settings, outcome, stamp)
        lines = [
            json.dumps(dataclasses.asdict(row), sort_keys=True)
            for row in self.rows.values()
        ]
        write_atomically(self.path, '{"runs": [\n' + ",\n".join(lines) + "\n]}\n")


def train_missing(
    runs: Iterable[Run],
    finished: Finished,
    *,
    data: Dataset,
    folder: str,
    jobs: int,
    after: Callable[[], None],
) -> None:
    """Train the runs that are not finished yet, each kept as soon as it ends.

    Args:
        runs: what is wanted; equal runs are trained once.
        finished: where outcomes are kept.
        data: the runs' data set.
        folder: where worker processes read it from.
        jobs: processes, of one thread each.
        after: called after each run.

    Raises:
        ResultsError: a worker process died.
    """
    wanted: dict[str, Run] = {}
    for run in runs:
        if run not in finished:
            wanted.setdefault(run.key, run)
    missing = list(wanted.values())
    machine = this_machine()
    stamp = {name: str(machine[name]) for name in ("commit", "date", "processor")}
    total = sum(run.steps for run in missing)
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=None) as bar:

        def keep(run: Run, outcome: Outcome) -> None:
            finished.add(run, outcome, stamp)
            bar.write(f"{_title(run)}: {_told(outcome)}")
            sys.stdout.flush()
            after()

        if jobs == 1:
            for run in missing:
                keep(run, train(run, data, tick=bar.update))
        elif missing:
            _in_processes(missing, folder, min(jobs, len(missing)), bar, keep)


def _in_processes(
    runs: Sequence[Run],
    folder: str,
    jobs: int,
    bar: Any,
    keep: Callable[[Run, Outcome], None],
) -> None:
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    done_steps = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin_worker, initargs=(done_steps,)
    )
    try:
        waiting = {pool.submit(_train_in_worker, run, folder): run for run in runs}
        while waiting:
            ended, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(done_steps.value - bar.n)
            for future in ended:
                keep(waiting.pop(future), future.result())
        pool.shutdown()
    except BrokenProcessPool as error:
        raise ResultsError(
            "a worker process died, perhaps for want of memory; finished runs are "
            "kept: run the same command again, with --jobs 1"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()


_done_steps: Any = None


def _begin_worker(done_steps: Any) -> None:
    """One thread; Ctrl-C is the parent's; no worker outlives its parent."""
    global _done_steps
    _done_steps = done_steps
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _train_in_worker(run: Run, folder: str) -> Outcome:
    def tick(steps: int) -> None:
        with _done_steps.get_lock():
            _done_steps.value += steps

    return train(run, data_of(run.recipe, folder), tick=tick)


def data_of(recipe: Recipe, folder: str) -> Dataset:
    return _load(recipe.dataset, folder, recipe.held_out, recipe.crop)


@functools.lru_cache(maxsize=1)
def _load(name: str, folder: str, held_out: int | None, crop: int | None) -> Dataset:
    return load_dataset(name, directory=folder, held_out=held_out, crop=crop)


def _title(run: Run) -> str:
    activation = "ReLU" if run.polynomial is None else str(run.polynomial)
    clip = "clip" if run.clip else "no clip"
    return f"{activation}, {clip}, beta {run.recipe.beta:g}, seed {run.recipe.seed}"


def _told(outcome: Outcome) -> str:
    if outcome.accuracy is None:
        return f"diverged at step {outcome.diverged_at} ({outcome.seconds:.0f} s)"
    largest = math.inf if outcome.largest_input is None else outcome.largest_input
    return (
        f"accuracy {outcome.accuracy:.2%}, largest input {largest:.3g}, "
        f"{outcome.outside:.3%} outside ({outcome.seconds:.0f} s)"
    )
