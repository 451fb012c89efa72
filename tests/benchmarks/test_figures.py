"""The training figures: which runs they need, what a run records, what is kept."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import multiprocessing
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import plots, report
from benchmarks.figures import cells, command, drawing, finished, training
from benchmarks.figures.cells import Budget
from benchmarks.figures.finished import Finished
from benchmarks.figures.lines import FIT_BITS
from benchmarks.figures.polynomials import polynomial, real_fit
from benchmarks.figures.training import Outcome, Run
from benchmarks.rows import ResultsError
from crypten_espn.errors import DataError
from crypten_espn.pillar.data import Dataset, Images, Normalization
from crypten_espn.pillar.recipes import find_recipe


def toy(count: int) -> Images:
    """Bright above for class 0, below for class 1, on a little noise."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 2
    noise = torch.randint(60, (count, 1, 8, 8), generator=generator)
    noise[labels == 0, :, :4] += 150
    noise[labels == 1, :, 4:] += 150
    normalization = Normalization((0.4,), (0.3,))
    return Images(noise.to(torch.uint8), labels, normalization)


@pytest.fixture
def data() -> Dataset:
    def unread() -> Images:
        raise AssertionError("the test set was read")

    train, held_out = toy(64), toy(32)
    names = ("above", "below")
    return Dataset(
        "fashion-mnist", names, 1, 8, train.normalization, train, held_out, unread
    )


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


RECIPE = dataclasses.replace(
    find_recipe("fashion-convnet"), epochs=6, batch_size=16, learning_rate=0.05
)
TREATED = Run(RECIPE, polynomial("aware", 4, 10, 5.0), True, 64)


def changed(run: Run, *, clip: bool | None = None, **fields: float) -> Run:
    recipe = dataclasses.replace(run.recipe, **fields)  # type: ignore[arg-type]
    clip = run.clip if clip is None else clip
    return dataclasses.replace(run, recipe=recipe, clip=clip)


def trained(run: Run, data: Dataset) -> tuple[Outcome, int]:
    """The outcome without its time, and the steps that were reported."""
    ticks: list[int] = []
    outcome = training.train(run, data, tick=ticks.append)
    return dataclasses.replace(outcome, seconds=0.0), sum(ticks)


def test_each_fit_has_the_coefficients_it_names():
    fit = polynomial
    assert fit("aware", 4, 8, 5.0).numerators == (70, 128, 45, 0, -1)
    assert fit("rounded", 4, 8, 5.0).numerators == (75, 128, 42, 0, -1)
    cut = fit("truncated", 4, 8, 5.0)
    assert cut.numerators == (75, 128, 41) and cut.requested_degree == 4
    errors = [
        fit(name, 4, 8, 5.0).rmse(torch.relu) for name in ("aware", "rounded")
    ] + [cut.rmse(torch.relu)]
    assert errors == sorted(errors) and errors[2] > 5 * errors[0]
    real = fit("real", 6, 8, 5.0)
    assert real.numerators == fit("real", 7, 8, 5.0).numerators
    assert real.coeffs == pytest.approx(real_fit(6, 5.0), abs=1e-11)
    assert real.rmse(torch.relu) <= fit("aware", 6, 20, 5.0).rmse(torch.relu)


def test_equal_polynomials_share_one_run():
    budget = Budget(RECIPE, 64, (1, 2))
    runs = {
        figure: {cell.run.key for cell in cells.cells(figure, budget)}
        for figure in cells.FIGURES
    }
    # Odd degrees add nothing, and at 10 bits nothing is left above degree 4.
    assert len(cells.cells(3, budget)) == 2 * (3 * 8 + 1)
    assert len(runs[3]) == 2 * (4 + 2 + 4 + 1)
    assert len(runs[5]) == 2 * len(cells.BETAS)
    assert len(runs[3] & runs[4]) == 2  # clip and penalty, degree 6, two seeds
    assert len(runs[3] & runs[11]) == 2  # degree 4 at 10 bits
    untreated = [c for c in cells.cells(3, budget) if c.series == "untreated"]
    assert all(not c.run.clip and c.run.recipe.beta == 0 for c in untreated)
    treated = [c for c in cells.cells(3, budget) if c.series.startswith("treated")]
    assert all(c.run.clip and c.run.recipe.beta > 0 for c in treated)


@pytest.mark.slow
def test_run_learns_records_every_step_and_repeats(data, one_thread):
    outcome, ticks = trained(TREATED, data)
    assert outcome.accuracy is not None and outcome.accuracy > 0.9
    assert outcome.diverged_at is None
    assert len(outcome.inputs) == ticks == TREATED.steps == 24
    assert all(0 < value < math.inf for value in outcome.inputs)
    assert (outcome, ticks) == trained(TREATED, data)
    assert trained(changed(TREATED, seed=2), data)[0] != outcome
    relu = dataclasses.replace(TREATED, polynomial=None, clip=False)
    assert trained(changed(relu, beta=0.0), data)[0].accuracy == 1.0


@pytest.mark.slow
def test_penalty_and_clip_act_on_large_inputs(data, one_thread):
    """On an interval that is left from the first step."""
    narrow = polynomial("aware", 4, 10, 0.5)
    run = dataclasses.replace(TREATED, polynomial=narrow)
    free = changed(run, clip=False, beta=0.0, radius=0.5, learning_rate=0.01)
    clipped = changed(free, clip=True)
    held = changed(clipped, beta=1e-3, gamma=0.48, stage_epochs=1.0)
    outcomes = [trained(r, data)[0] for r in (free, clipped, held)]
    assert outcomes[0].inputs[0] == outcomes[1].inputs[0] > 0.5
    assert outcomes[0].inputs != outcomes[1].inputs
    outside = [o.outside for o in outcomes]
    assert outside[1] is not None and outside[2] is not None
    assert 0 <= outside[2] < outside[1] / 10


def test_divergence_ends_a_run_and_names_the_step(data, one_thread):
    wild = changed(TREATED, clip=False, beta=0.0, learning_rate=1e6, warmup_epochs=0)
    outcome, ticks = trained(wild, data)
    assert outcome.accuracy is None and outcome.largest_input is None
    assert outcome.diverged_at is not None and 2 <= outcome.diverged_at < wild.steps
    assert outcome.diverged_at - len(outcome.inputs) in (0, 1)
    assert max(outcome.inputs) > 1e3
    assert ticks == wild.steps
    json.dumps(dataclasses.asdict(outcome), allow_nan=False)


def test_inputs_are_counted_before_the_activation():
    network = nn.Sequential(nn.ReLU(), nn.Identity(), nn.ReLU()).eval()
    seen = training._Inputs(network, 5.0)
    network(torch.tensor([-7.0, -5.0, 1.0, 6.0]))
    assert (seen.largest, seen.inside, seen.total) == (7.0, 2 + 3, 8)
    seen.reset()
    network(torch.tensor([math.nan, 1.0]))
    assert math.isinf(seen.largest) and (seen.inside, seen.total) == (2, 4)


def use(monkeypatch: pytest.MonkeyPatch, data: Dataset) -> None:
    for module in (command, finished):
        monkeypatch.setattr(module, "data_of", lambda recipe, folder: data)


def places(folder: Path) -> tuple[str, ...]:
    return ("--json", str(folder / "runs.json"), "--pictures", str(folder))


TINY = ("--jobs", "1", "--images", "32", "--epochs", "1")


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def failing_at(count: int) -> Callable[..., Outcome]:
    """A `train` that is interrupted in its run number `count`."""
    real, calls = training.train, [0]

    def train(run: Run, data: Dataset, *, tick: Callable[[int], None]) -> Outcome:
        calls[0] += 1
        if calls[0] == count:
            raise KeyboardInterrupt
        return real(run, data, tick=tick)

    return train


def unsaved(figure: Any, stem: Path) -> list[Path]:
    """Close the figure: writing pictures takes long, another test has some written."""
    from matplotlib import pyplot

    pyplot.close(figure)
    return []


@pytest.mark.slow
def test_interrupted_figures_go_on_where_they_were(data, tmp_path, monkeypatch, capsys):
    use(monkeypatch, data)
    monkeypatch.setattr(plots, "save_figure", unsaved)
    arguments = [*TINY, *places(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(finished, "train", failing_at(3))
        assert command.main([*arguments, "--figure", "5", "11"]) == 130
    kept = Finished(tmp_path / "runs.json").rows
    assert len(kept) == 2 and not list(tmp_path.glob("*.csv"))

    assert command.main([*arguments, "--figure", "5", "11"]) == 0
    assert "14 of 16 runs to train" in capsys.readouterr().out
    rows = Finished(tmp_path / "runs.json").rows
    assert len(rows) == 16 and kept.items() <= rows.items()
    with monkeypatch.context() as patch:
        patch.setattr(finished, "train", failing_at(1))
        assert command.main([*arguments, "--figure", "5"]) == 0
        assert command.main([*arguments, "--figure", "5", "--fresh"]) == 130
    assert Finished(tmp_path / "runs.json").rows == rows

    lines = table(tmp_path / "figure5-fashion-mnist.csv")
    assert [float(line["beta"]) for line in lines] == list(cells.BETAS)
    assert {line["seed"] for line in lines} == {"1"}
    assert all(line["images"] == "32" and line["commit"] for line in lines)
    fits = table(tmp_path / "figure11-fashion-mnist-fit.csv")
    assert len(fits) == 2 * len(FIT_BITS) * 3
    by_fit = [
        [float(f["rmse"]) for f in fits if f["series"] == series]
        for series in ("aware", "rounded", "truncated")
    ]
    assert all(a <= min(r, t) for a, r, t in zip(*by_fit, strict=True))


@pytest.mark.slow
def test_figures_3_and_4_show_divergence(data, tmp_path, monkeypatch):
    use(monkeypatch, data)
    real = training.train

    def train(run: Run, data: Dataset, *, tick: Callable[[int], None]) -> Outcome:
        """Untreated runs of degree 6 and above diverge, the others are real."""
        p = run.polynomial
        if p is not None and p.degree >= 6 and not run.clip and not run.recipe.beta:
            tick(run.steps)
            return Outcome(None, 3, None, None, (4.0, 1e9), 0.1)
        return real(run, data, tick=tick)

    monkeypatch.setattr(finished, "train", train)
    arguments = ["--figure", "3", "4", "--seeds", "1", "2", *places(tmp_path)]
    assert command.main([*TINY, *arguments]) == 0
    lines = table(tmp_path / "figure3-fashion-mnist.csv")
    diverged = [line for line in lines if line["diverged_at_step"]]
    assert {(line["series"], line["degree"]) for line in diverged} == {
        ("untreated", str(degree)) for degree in (6, 7, 8, 9)
    }
    assert all(d["accuracy"] == "" and d["diverged_at_step"] == "3" for d in diverged)
    assert {line["effective_degree"] for line in lines if line["degree"] == "7"} == {
        "4",
        "6",
    }
    steps = table(tmp_path / "figure4-fashion-mnist.csv")
    lost = [s for s in steps if s["series"] == "no clip, no penalty"]
    assert [s["largest_input"] for s in lost] == ["4.0", "1000000000.0", "inf"] * 2
    for stem in ("figure3-fashion-mnist", "figure4-fashion-mnist"):
        assert (tmp_path / f"{stem}.png").stat().st_size > 10_000
        assert "<svg" in (tmp_path / f"{stem}.svg").read_text()
    # Drawn again from the file alone, they are the same.
    again = tmp_path / "again"
    files = drawing.draw_complete(Finished(tmp_path / "runs.json"), again)
    assert {file.name for file in files} == {
        f"{stem}{end}"
        for stem in ("figure3-fashion-mnist", "figure4-fashion-mnist")
        for end in (".csv", ".png", ".svg")
    } | {"figure4-fashion-mnist-runs.csv"}
    for file in files:
        if file.suffix == ".csv":
            assert file.read_text() == (tmp_path / file.name).read_text()
    captions = [caption for caption, _ in drawing.pictures(tmp_path)]
    assert [c.partition(".")[0] for c in captions] == ["Figure 3", "Figure 4"]


def test_bad_input_loses_nothing(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "runs.json"
    out.write_text('{"runs": [{"settings": {}}]}')
    absent = ["--dataset", "cifar10", "--data", str(tmp_path / "none")]
    assert command.main([*absent, "--json", str(out), "--fresh"]) == 2
    assert "curl" in capsys.readouterr().err
    use(monkeypatch, data)
    assert command.main([*TINY, "--json", str(out)]) == 2
    assert "--fresh" in capsys.readouterr().err
    assert out.read_text() == '{"runs": [{"settings": {}}]}'
    for bad in (["--jobs", "0"], ["--figure", "6"], ["--images", "31"]):
        with pytest.raises(SystemExit):
            command.main([*TINY, *bad, "--json", str(out)])


def test_worker_hands_its_error_on_and_leaves(tmp_path):
    run = changed(TREATED)
    run = dataclasses.replace(
        run, recipe=dataclasses.replace(run.recipe, dataset="cifar10")
    )
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="CIFAR-10"):
        finished._in_processes(
            [run], str(tmp_path), 1, finished.tqdm(disable=True), keep
        )
    # The pool's own thread joins its workers too: whichever comes second learns no
    # exit status, so `is_alive` may be wrong. The sentinel is not.
    for process in set(multiprocessing.active_children()) - before:
        assert connection.wait([process.sentinel], timeout=20)


def keep(run: Run, outcome: Outcome) -> None:
    raise AssertionError("no run can have finished")


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "runs.json"
    path.write_text("{")
    with pytest.raises(ResultsError, match=r"runs\.json: not a file of finished runs"):
        Finished(path)


def test_report_runs_the_figures_and_shows_them(tmp_path):
    (step,) = [s for s in report.steps(full=True) if s.module == "figures"]
    options = command.make_parser().parse_args(step.arguments)
    assert options.full and options.fresh
    assert report.MAINS["figures"] is command.main
