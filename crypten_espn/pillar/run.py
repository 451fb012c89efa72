"""The state of one training run: what it is made of, kept in and ends with."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import CalibrationWarning, RangeError, TrainingError
from ..polynomial import polynomial_from_json
from .calibrate import calibrate
from .checkpoint import read_state, write_log, write_state
from .data import Dataset
from .networks import Architecture
from .phases import replace_share
from .preparation import blending, fresh_network, parameter_groups, schedule
from .recipe import Recipe
from .result import SELECTION_RULE, Result, accuracy
from .settle import SAMPLE, settle_intervals
from .storage import save_network
from .surgery import activations, replace_activations
from .watch import Watch

STATE_FORMAT = 3  # of what state.pt holds


class Run:
    """The state of one training run."""

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        folder: Path,
        start: str | Path | None,
        device: str | None,
        progress: bool,
    ) -> None:
        self.recipe, self.dataset, self.folder = recipe, dataset, folder
        # Which of how many processes this is, and where it computes.
        self.rank, self.processes = 0, 1
        if distributed.is_initialized():
            self.rank = distributed.get_rank()
            self.processes = distributed.get_world_size()
        self.progress = progress and self.rank == 0
        self.device = torch.device(
            device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        if self.device.type == "cuda" and self.processes > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        self.started_from = None if start is None else str(start)
        # The one for all activations, where there is one.
        self.polynomial = (
            recipe.polynomial()
            if recipe.activation == "polynomial" and not recipe.calibration_images
            else None
        )
        if start is None and (recipe.calibration_images or recipe.distillation):
            raise TrainingError(
                f"{recipe.name} with calibration_images={recipe.calibration_images}, "
                f"distillation={recipe.distillation:g} starts from a trained network; "
                "give it as start"
            )
        # The network, from the recipe's seed alone.
        torch.manual_seed(recipe.seed)
        built = Architecture(
            recipe.network, dataset.classes, dataset.in_channels, dataset.size
        )
        network = fresh_network(built, start)
        network.normalization = dataset.normalization
        self.model: nn.Module = network
        self.model.to(self.device)
        self.relus = sum(type(m) is nn.ReLU for m in self.model.modules())
        # What it answered before it was touched.
        self.teacher: nn.Module | None = None
        if recipe.distillation:
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
            self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.found = read_state(folder, identity=self._identity(), device=self.device)
        if self.polynomial is not None and not recipe.gradual:
            replace_activations(self.model, {nn.ReLU: self.polynomial})
        elif recipe.calibration_images:
            self.model = self._calibrated()
        # mypy's view of Module.to lacks the memory format alone.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parallel: nn.Module = self.model
        if self.processes > 1:
            self.parallel = DistributedDataParallel(self.model)
        # How it is trained.
        self.optimizer = torch.optim.SGD(
            parameter_groups(recipe, self.model),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
        )
        self.schedule = schedule(
            recipe, self.optimizer, steps_per_epoch=self.steps_per_epoch
        )
        self.blend = blending(recipe, dataset.classes)
        self.average: AveragedModel | None = None
        if recipe.average:
            self.average = AveragedModel(
                self.model,
                multi_avg_fn=get_ema_multi_avg_fn(recipe.average),
                use_buffers=True,
            )
        self.watch = Watch(recipe)
        # How far the run is, which a resumed one overwrites.
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.best_accuracy = -1.0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches, or as many as the recipe says."""
        whole = max(len(self.dataset.train) // self.recipe.batch_size, 1)
        return min(self.recipe.epoch_steps or whole, whole)

    @property
    def clipped_steps(self) -> int:
        """Steps, from the first on, in which training clips activations' inputs."""
        whole = self.recipe.epochs * self.steps_per_epoch
        return whole - round(self.recipe.unclipped * whole)

    def _calibrated(self) -> nn.Module:
        """The network with a polynomial a channel: the state's, or fitted now."""
        if self.found is not None:
            fitted = {
                name: polynomial_from_json(text)
                for name, text in self.found["polynomials"].items()
            }
            return replace_activations(self.model, fitted)
        recipe = self.recipe
        images = self._training_images(recipe.calibration_images)
        return calibrate(self.model, images, degree=recipe.degree, margin=recipe.margin)

    def _training_images(self, count: int) -> Tensor:
        """Some, the same for every run of the seed."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        count = min(count, len(self.dataset.train))
        images, _ = next(self.dataset.train.batches(count, generator=generator))
        return images

    def replace_gradually(self) -> None:
        """Make polynomial the ReLUs whose turn has come, first to last."""
        recipe = self.recipe
        if self.polynomial is None or not recipe.gradual:
            return
        since = self.step + 1 - recipe.relu_epochs * self.steps_per_epoch
        share = since / max(recipe.replace_epochs * self.steps_per_epoch, 1)
        due = math.ceil(min(max(share, 0.0), 1.0) * self.relus)
        if due > len(activations(self.model)):
            replace_share(self.model, {nn.ReLU: self.polynomial}, due / self.relus)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of an epoch: images, and targets (n, classes)."""
        generator = torch.Generator().manual_seed(
            random.Random(f"{self.recipe.seed} {self.epoch}").getrandbits(62)
        )
        torch.manual_seed(self.recipe.seed + self.epoch)  # of the blends
        batches = self.dataset.train.batches(
            self.recipe.batch_size,
            generator=generator,
            part=(self.rank, self.processes),
        )
        for images, labels in islice(batches, self.steps_per_epoch):
            images, targets = self.blend(images, labels)
            yield (
                images.to(self.device, memory_format=torch.channels_last),
                targets.to(self.device),
            )

    def end_epoch(self) -> None:
        """Evaluate on validation images, keep the best, write state and log."""
        model = self.model if self.average is None else self.average.module
        measured = self.on_first(lambda: accuracy(model, self.dataset.validation))
        self.rows[-1]["validation_accuracy"] = measured
        complete = self.recipe.activation == "relu" or not any(
            type(m) is nn.ReLU for m in model.modules()
        )
        if complete and measured >= self.best_accuracy:
            self.best_accuracy, self.best_epoch = measured, self.epoch
            self.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if self.rank == 0:
            write_state(self.folder, self._state())
            write_log(self.folder, self.rows)
        if self.progress:
            row = self.rows[-1]
            print(
                f"epoch {self.epoch}/{self.recipe.epochs}: loss {row['loss']:.4f}, "
                f"penalty {row['penalty']:.4f}, validation accuracy {measured:.2%}, "
                f"largest input {row['largest_input']:.1f}, {row['seconds']:.0f} s",
                flush=True,
            )

    def on_first(self, measure: Callable[[], float]) -> float:
        """Return what process 0 measures, to all of them."""
        value = torch.zeros(1, dtype=torch.float64, device=self.device)
        if self.rank == 0:
            value += measure()
        if self.processes > 1:
            distributed.broadcast(value, 0)
        return float(value)

    def _identity(self) -> str:
        whole = {"recipe": asdict(self.recipe), "start": self.started_from}
        return json.dumps({**whole, "format": STATE_FORMAT}, sort_keys=True)

    def _state(self) -> dict[str, object]:
        return {
            "identity": self._identity(),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_accuracy": self.best_accuracy,
            "rows": self.rows,
            "since": self.watch.since,
            "polynomials": {
                name: module.polynomial.to_json()
                for name, module in activations(self.model).items()
                if self.recipe.calibration_images
            },
        }

    def resume(self) -> None:
        """Continue from state.pt, if there was one when the run was made."""
        if self.found is None:
            return
        state, self.found = self.found, None
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.rows = state["seconds"], state["rows"]
        if self.step:
            # The state was written after a step: as many ReLUs are gone as then.
            self.step -= 1
            self.replace_gradually()
            self.step += 1
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.best_accuracy = state["best_accuracy"]
        self.watch.since = state["since"]
        if self.progress:
            print(f"resumed after epoch {self.epoch} of {self.recipe.epochs}")

    def finish(self) -> Result:
        """Load the best epoch, read the test set once, write network and result."""
        if not self.best:
            raise TrainingError(
                f"{self.recipe.name} ended before its last ReLU was replaced; "
                "train for more epochs than relu_epochs and replace_epochs together"
            )
        self.model.load_state_dict(self.best)
        self.model.eval()
        path = self.folder / "network.safetensors"
        result = Result(
            recipe=self.recipe,
            epoch=self.best_epoch,
            validation_accuracy=self.best_accuracy,
            test_accuracy=self.on_first(
                lambda: accuracy(self.model, self.dataset.test())
            ),
            selection_rule=SELECTION_RULE,
            steps=self.step,
            seconds=round(self.seconds, 1),
            path=str(path),
        )
        if self.rank > 0:
            return result
        notes = {k: v for k, v in asdict(result).items() if k != "path"}
        save_network(
            self._settled(), path, normalization=self.dataset.normalization, notes=notes
        )
        (self.folder / "result.json").write_text(
            json.dumps(asdict(result), indent=2) + "\n"
        )
        return result

    def _settled(self) -> nn.Module:
        """The network, its intervals those of what it sees now, with a guard.

        Warns:
            CalibrationWarning: some images are beyond all bounds; it has no guard.
        """
        if not activations(self.model):
            return self.model
        images = self._training_images(SAMPLE)
        try:
            return settle_intervals(
                self.model, images, normalization=self.dataset.normalization
            )
        except RangeError as error:
            warnings.warn(
                f"the network is written without an input guard: {error}",
                CalibrationWarning,
                stacklevel=2,
            )
            return self.model
