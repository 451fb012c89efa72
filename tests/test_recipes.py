"""Recipes, the training loop, resuming and fine-tuning."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crypten_espn import cli
from crypten_espn.errors import CheckpointError, DataError, TrainingError
from crypten_espn.pillar import data, run, training
from crypten_espn.pillar.data import Dataset, Images, Normalization
from crypten_espn.pillar.data.splits import in_memory
from crypten_espn.pillar.networks import NETWORKS, Architecture
from crypten_espn.pillar.preparation import blending, schedule
from crypten_espn.pillar.recipes import (
    RECIPES,
    Recipe,
    accuracy,
    channel_tuning,
    find_recipe,
    train,
)
from crypten_espn.pillar.run import Run
from crypten_espn.pillar.storage import load_network
from crypten_espn.pillar.surgery import activations
from crypten_espn.polynomial import ChannelPolynomials

TINY = Recipe(
    "tiny",
    "convnet",
    "toy",
    degree=2,
    epochs=4,
    batch_size=32,
    learning_rate=0.05,
    warmup_epochs=1,
    stage_epochs=0.25,
)


def toy_dataset(directory: Path, held_out: int | None) -> Dataset:
    """Four classes, told apart by which quadrant is bright."""
    generator = torch.Generator().manual_seed(7)

    def part(count: int) -> Images:
        labels = torch.arange(count) % 4
        images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
        for index, label in enumerate(labels.tolist()):
            row, column = 4 * (label // 2), 4 * (label % 2)
            images[index, :, row : row + 4, column : column + 4] += 120
        return Images(images.to(torch.uint8), labels, Normalization((0.3,), (0.3,)))

    whole, test = part(320), part(80)
    return in_memory("toy", ("a", "b", "c", "d"), whole, 64, lambda: test)


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.DATASETS, "toy", toy_dataset)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "network.safetensors")


# --- recipes ---------------------------------------------------------------------


def test_every_row_of_the_papers_table_is_a_recipe() -> None:
    rows = {
        "cifar10-resnet18": (4, 4.8, 5e-5, 185, 0.013, 5e-4),
        "cifar10-resnet110": (4, 4.8, 5e-5, 185, 0.013, 5e-4),
        "cifar100-resnet18": (6, 4.8, 5e-5, 185, 0.013, 5e-4),
        "cifar10-minionn": (6, 4.4, 5e-5, 180, 0.06, 5e-4),
        "cifar10-vgg16": (4, 4.8, 1e-6, 300, 0.0025, 5e-4),
        "cifar100-vgg16": (4, 4.8, 1e-6, 300, 0.0025, 5e-4),
        "cifar100-resnet32": (5, 4.0, 1e-2, 150, 0.1, 1e-4),
        "imagenet-resnet50": (4, 4.8, 1e-4, 600, 0.03, 2e-5),
    }
    for name, row in rows.items():
        recipe = find_recipe(name)
        got = (
            recipe.degree,
            recipe.gamma,
            recipe.beta,
            recipe.epochs,
            recipe.learning_rate,
            recipe.weight_decay,
        )
        assert got == row
        assert (recipe.penalty, recipe.stage_epochs) == ("sum", 1)
        assert (recipe.warmup_epochs, recipe.momentum, recipe.radius) == (5, 0.9, 5)
    large = find_recipe("imagenet-resnet50")
    assert (large.batch_size, large.label_smoothing, large.mixup, large.cutmix) == (
        1024,
        0.1,
        0.2,
        1.0,
    )
    assert not large.decay_norm and large.average > 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_can_be_followed(name: str) -> None:
    recipe = find_recipe(name).checked()
    assert recipe.name == name
    assert recipe.network in NETWORKS and recipe.dataset in data.DATASETS
    with warnings.catch_warnings():
        # A degree that collapses is reported; the recipe is still usable.
        warnings.simplefilter("ignore")
        assert 2 <= recipe.polynomial().degree <= recipe.degree


def test_bad_fields_are_all_named() -> None:
    with pytest.raises(TrainingError, match=r"epochs=0, .*beta=nan"):
        replace(TINY, epochs=0, beta=float("nan")).checked()
    with pytest.raises(TrainingError, match=r"'cifar11'.*cifar10-resnet18"):
        find_recipe("cifar11")


# --- the loop --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["polynomial", "relu"])
@pytest.mark.parametrize("penalty", ["sum", "boundary"])
def test_a_run_learns_and_writes_its_files(
    tmp_path: Path, activation: str, penalty: str
) -> None:
    recipe = replace(TINY, activation=activation, penalty=penalty)
    result = train(recipe, out=tmp_path, progress=False)
    assert result.test_accuracy > 0.9
    assert result.recipe == recipe
    assert "validation" in result.selection_rule
    assert result.steps == 4 * (256 // 32)
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["recipe"] == asdict(recipe)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    best = max(float(row["validation_accuracy"]) for row in rows)
    assert best == pytest.approx(result.validation_accuracy)
    network = load_network(result.path)
    assert len(activations(network)) == (2 if activation == "polynomial" else 0)
    assert network.notes is not None
    assert network.notes["test_accuracy"] == result.test_accuracy
    test = toy_dataset(Path(), None).test()
    assert accuracy(network, test) == result.test_accuracy


class Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        TINY,
        replace(TINY, activation="relu", precision="bfloat16"),
        replace(TINY, penalty="boundary", average=0.5, mixup=0.2, cutmix=1.0),
        replace(TINY, replace_epochs=3.0, clip_norm=1.0),
        replace(TINY, relu_epochs=1.5, replace_epochs=1.0, spread=1.0),
    ],
)
def test_a_stopped_run_ends_as_one_that_was_not(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    one = train(recipe, out=whole, progress=False)
    original = torch.optim.SGD.step
    for last_step in (11, 20):
        count = 0

        def step(self, closure=None, *, last=last_step):
            nonlocal count
            count += 1
            if count > last:
                raise Stopped
            return original(self, closure)

        with monkeypatch.context() as patched:
            patched.setattr(torch.optim.SGD, "step", step)
            with pytest.raises(Stopped):
                train(recipe, out=parts, progress=False)
    two = train(recipe, out=parts, progress=False)
    assert (one.epoch, one.test_accuracy) == (two.epoch, two.test_accuracy)
    first, second = tensors_of(whole), tensors_of(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [(folder / "log.csv").read_text() for folder in (whole, parts)]
    # All but the seconds.
    plain = [[row.rsplit(",", 1)[0] for row in log.splitlines()] for log in logs]
    assert plain[0] == plain[1]


SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    import test_recipes as here
    from crypten_espn.pillar import data, recipes
    data.DATASETS["toy"] = here.toy_dataset
    recipes.train(here.TINY, out=sys.argv[1])
"""


def test_resumes_after_kill_9(tmp_path: Path) -> None:
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent)))
    command_line = [sys.executable, "-c", script, str(tmp_path / "killed")]
    process = subprocess.Popen(
        command_line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("epoch 2/4"):
                break
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.stdout.close()
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(TINY, out=tmp_path / "killed", progress=False)
        train(TINY, out=tmp_path / "whole", progress=False)
    finally:
        torch.set_num_threads(threads)
    first, second = tensors_of(tmp_path / "killed"), tensors_of(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As torchrun sets them.
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "two")],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in ("0", "1")
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=60)
    train(TINY, out=tmp_path / "one", progress=False)
    first, second = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    one = train(TINY, out=tmp_path, progress=False)
    began = time.perf_counter()
    two = train(TINY, out=tmp_path, progress=False)
    assert time.perf_counter() - began < 5
    assert one == two


def test_another_recipe_in_the_same_folder_is_an_error(tmp_path: Path) -> None:
    train(replace(TINY, epochs=1), out=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="another folder as --out"):
        train(TINY, out=tmp_path, progress=False)
    (tmp_path / "state.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="remove it to start again"):
        train(TINY, out=tmp_path, progress=False)


def test_a_state_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"identity": Path("x")}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        train(TINY, out=tmp_path, progress=False)


def test_escaping_activations_stop_the_run_with_a_diagnosis(tmp_path: Path) -> None:
    wild = replace(TINY, beta=0.0, learning_rate=0.5, escape=1.5, epochs=20)
    with pytest.raises(TrainingError) as caught:
        train(wild, out=tmp_path, progress=False)
    text = str(caught.value)
    assert "features." in text and "first seen at step" in text
    assert "Raise beta (now 0)" in text


def test_a_loss_that_is_not_finite_names_the_layer(tmp_path: Path) -> None:
    wild = replace(TINY, learning_rate=1e12, epochs=3)
    with pytest.raises(TrainingError, match=r"features\.\d.*learning rate \(now 1e"):
        train(wild, out=tmp_path, progress=False)
    plain = replace(wild, activation="relu", learning_rate=1e30)
    with pytest.raises(TrainingError, match="the loss is not finite"):
        train(plain, out=tmp_path / "relu", progress=False)


def test_data_that_are_not_finite_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(directory: Path, held_out: int | None) -> Dataset:
        dataset = toy_dataset(directory, held_out)
        assert isinstance(dataset.train, Images)
        bad = replace(dataset.train, normalization=Normalization((float("nan"),), (1,)))
        return replace(dataset, train=bad)

    monkeypatch.setitem(data.DATASETS, "toy", broken)
    with pytest.raises(DataError, match="training images of toy"):
        train(TINY, out=tmp_path, progress=False)


@pytest.mark.parametrize("kinds", [{}, {"mixup": 1.0}, {"cutmix": 1.0}])
def test_a_batch_is_blended_with_its_targets(kinds: dict[str, float]) -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 6, 6).clone()
    torch.manual_seed(5)
    blend = blending(replace(TINY, **kinds), 4)  # type: ignore[arg-type]
    mixed, targets = blend(images, torch.arange(4))
    assert targets.dtype == torch.float32 and targets.shape == (4, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    # Image i holds the value i, so its mean is the blend of class numbers.
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(4.0))
    assert torch.equal(mixed, images) == (not kinds)


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_rate_rises_to_its_peak_and_falls_to_zero(warmup: int) -> None:
    recipe = replace(TINY, warmup_epochs=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    plan = schedule(recipe, optimizer, steps_per_epoch=8)
    rates = []
    for _ in range(32):
        rates.append(plan.get_last_lr()[0])
        optimizer.step()
        plan.step()
    top = 8 * warmup
    assert rates[:top] == pytest.approx(
        [0.05 * (step + 1) / (top + 1) for step in range(top)]
    )
    assert rates[top] == pytest.approx(0.05) == max(rates)
    assert rates[top + (32 - top) // 2] == pytest.approx(0.025)
    assert rates[top:] == sorted(rates[top:], reverse=True) and rates[-1] < 1e-3
    assert plan.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


# --- fine-tuning -----------------------------------------------------------------


def test_finetuning_replaces_one_relu_after_the_other(tmp_path: Path) -> None:
    start = train(
        replace(TINY, activation="relu"), out=tmp_path / "relu", progress=False
    )
    recipe = replace(TINY, epochs=2, replace_epochs=1.0, learning_rate=0.01)
    result = train(recipe, out=tmp_path / "fine", start=start.path, progress=False)
    assert result.test_accuracy > 0.9
    assert len(activations(load_network(result.path))) == 2
    other = replace(recipe, network="fashion_resnet")
    with pytest.raises(CheckpointError, match=r"needs Architecture.*fashion_resnet"):
        train(other, out=tmp_path / "other", start=start.path, progress=False)


def test_relus_give_way_after_their_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = Run.replace_gradually

    def watched(run: Run) -> None:
        original(run)
        seen.append(len(activations(run.model)))

    monkeypatch.setattr(Run, "replace_gradually", watched)
    recipe = replace(TINY, relu_epochs=1.0, replace_epochs=1.0)
    train(recipe, out=tmp_path, progress=False)
    assert seen == [0] * 8 + [1] * 4 + [2] * 20
    with pytest.raises(TrainingError, match="relu_epochs"):
        replace(recipe, relu_epochs=-1.0).checked()
    with pytest.raises(TrainingError, match="replace_epochs"):
        replace(recipe, relu_epochs=3.5).checked()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_finetuning_starts_from_a_plain_state_dict(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(3)
    state = Architecture("convnet", 4, 1, 8).build().state_dict()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    recipe = replace(TINY, epochs=1, learning_rate=1e-9, weight_decay=0)
    result = train(recipe, out=tmp_path / "fine", start=path, progress=False)
    for name, tensor in load_network(result.path).state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-4)


# --- a polynomial a channel ------------------------------------------------------


def relu_start(folder: Path) -> str:
    recipe = replace(TINY, activation="relu")
    return train(recipe, out=folder, progress=False).path


def tuned(**fields: Any) -> Recipe:
    recipe = channel_tuning(TINY, degree=2, epochs=2)
    return replace(recipe, calibration_images=128, precision="float32", **fields)


def test_a_calibrated_network_learns_what_it_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = relu_start(tmp_path / "relu")
    recipe = tuned(replayed=4, unclipped=0.5)
    whole = train(recipe, out=tmp_path / "whole", start=start, progress=False)
    assert whole.test_accuracy > 0.9
    found = activations(load_network(whole.path))
    assert len(found) == 2
    assert all(isinstance(m.polynomial, ChannelPolynomials) for m in found.values())
    # Stopped in its second epoch, it goes on with the polynomials that it had.
    count, original = 0, torch.optim.SGD.step

    def step(self, closure=None):
        nonlocal count
        count += 1
        if count > 11:
            raise Stopped
        return original(self, closure)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.SGD, "step", step)
        with pytest.raises(Stopped):
            train(recipe, out=tmp_path / "parts", start=start, progress=False)
    monkeypatch.setattr(run, "calibrate", None)
    parts = train(recipe, out=tmp_path / "parts", start=start, progress=False)
    first, second = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert parts.test_accuracy == whole.test_accuracy
    again = activations(load_network(parts.path))
    assert [m.polynomial for m in again.values()] == [
        m.polynomial for m in found.values()
    ]


def test_labels_are_not_needed_to_learn_from_what_a_network_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, recipe = relu_start(tmp_path / "relu"), tuned(epochs=1)
    train(recipe, out=tmp_path / "right", start=start, progress=False)

    def mislabelled(directory: Path, held_out: int | None) -> Dataset:
        dataset = toy_dataset(directory, held_out)
        assert isinstance(dataset.train, Images)
        wrong = replace(dataset.train, labels=(dataset.train.labels + 1) % 4)
        return replace(dataset, train=wrong)

    monkeypatch.setitem(data.DATASETS, "toy", mislabelled)
    train(recipe, out=tmp_path / "wrong", start=start, progress=False)
    first, second = tensors_of(tmp_path / "right"), tensors_of(tmp_path / "wrong")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_epoch_ends_after_its_steps(tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=2, epoch_steps=3)
    result = train(recipe, out=tmp_path, progress=False)
    assert result.steps == 6


def test_without_a_network_to_start_from_nothing_is_calibrated(tmp_path: Path) -> None:
    for recipe in (tuned(), replace(TINY, distillation=0.5)):
        with pytest.raises(TrainingError, match="give it as start"):
            train(recipe, out=tmp_path, progress=False)
    bad = replace(tuned(), margin=0.5, distillation=2, replayed=32, epoch_steps=0)
    with pytest.raises(TrainingError, match=r"margin=0\.5, dist.*=2, re.*=32, ep.*=0"):
        bad.checked()
    with pytest.raises(TrainingError, match="calibration_images=128"):
        replace(tuned(), replace_epochs=1.0).checked()


def test_how_long_a_calibrated_network_is_tuned() -> None:
    for name in RECIPES:
        recipe = find_recipe(name)
        four, two = channel_tuning(recipe), channel_tuning(recipe, degree=2)
        assert (four.epochs, four.epoch_steps) == (1, 200)
        assert two.epochs == max(recipe.epochs // 5, 1) and two.epoch_steps is None
        assert four.checked().degree == 4 and two.checked().degree == 2
    with pytest.raises(TrainingError, match="give one of them"):
        channel_tuning(TINY, steps=5, epochs=1)


# --- command line ----------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each command asks `train` for; each is interrupted before it starts."""
    calls: list[dict[str, Any]] = []

    def interrupted(recipe: Recipe, **options: Any) -> None:
        calls.append({"recipe": recipe, **options})
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    return calls


def test_options_override_the_recipe(asked: list[dict[str, Any]]) -> None:
    for options in (
        ["train", "--epochs", "1", "--beta", "1e-3", "--activation", "relu"],
        ["train", "--recipe", "fashion-minionn", "--epochs", "3"],
        ["finetune", "--recipe", "cifar10-resnet18", "--start", "x"],
        ["finetune", "--start", "x", "--epochs", "8", "--beta", "3e-4"],
        ["finetune", "--start", "x", "--replace-epochs", "0.5", "--crop", "0"],
        ["finetune", "--start", "x", "--calibrated", "--margin", "1.25"],
        ["finetune", "--start", "x", "--calibrated", "--degree", "2", "--steps", "9"],
    ):
        assert cli.main(options) == 130
    recipe, short, tuned, quick, gradual, four, two = (call["recipe"] for call in asked)
    assert (four.calibration_images, four.margin, four.degree) == (1000, 1.25, 4)
    assert (four.epochs, four.epoch_steps, four.distillation) == (1, 200, 1)
    assert (two.degree, two.epochs, two.epoch_steps) == (2, 1, 9)
    assert (recipe.epochs, recipe.beta, recipe.activation) == (1, 1e-3, "relu")
    assert (short.checked().epochs, short.relu_epochs) == (3, 1)
    assert (tuned.epochs, tuned.replace_epochs) == (37, 9.25)
    assert (tuned.penalty, tuned.beta) == ("boundary", 1e-4)
    assert tuned.learning_rate == pytest.approx(0.013 * 0.4)
    assert (quick.epochs, quick.replace_epochs, quick.beta) == (8, 2, 3e-4)
    assert (gradual.replace_epochs, gradual.crop) == (0.5, 0)


def test_options_of_one_kind_of_fine_tuning_are_refused_with_the_other(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["finetune", "--start", "x"]
    for more, said in (
        (["--steps", "9"], "--steps and --margin are for --calibrated"),
        (["--margin", "2"], "--steps and --margin are for --calibrated"),
        (["--calibrated", "--replace-epochs", "1"], "all ReLUs at once"),
        (["--calibrated", "--steps", "9", "--epochs", "1"], "give one of them"),
    ):
        assert cli.main([*start, *more]) != 0
        assert said in capsys.readouterr().err
    assert not asked


def test_options_that_are_no_fields_say_where_and_how(
    asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    out, data = str(tmp_path / "out"), str(tmp_path / "data")
    where = ["--out", out, "--data", data, "--device", "cpu", "--quiet"]
    assert cli.main(["train", "--activation", "relu"]) == 130
    assert cli.main(["train", *where]) == 130
    assert cli.main(["finetune", "--start", "fashion-resnet-relu"]) == 130
    assert cli.main(["finetune", "--start", "fashion-resnet-relu", "--calibrated"])
    plain, told, tuned, calibrated = asked
    assert calibrated["out"] == Path("out/fashion-resnet-calibrated")
    assert plain["out"] == Path("out/fashion-resnet-relu")
    assert plain["data"] == Path("data") and plain["start"] is plain["device"] is None
    assert (told["out"], told["data"]) == (Path(out), Path(data))
    assert told["device"] == "cpu" and plain["progress"] and not told["progress"]
    assert tuned["out"] == Path("out/fashion-resnet-finetuned")
    assert tuned["start"].name == "fashion_resnet_relu.safetensors"


def test_the_command_trains_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    out = str(tmp_path / "out")
    assert cli.main(["train", "--recipe", "tiny", "--out", out, "--epochs", "2"]) == 0
    text = capsys.readouterr().out
    assert "test accuracy" in text and "selection:" in text
    assert "features.1" in text and "to spare" in text


def test_ctrl_c_says_how_to_continue(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train"]) == 130 and len(asked) == 1
    assert "the same command continues" in capsys.readouterr().out
