"""The training loop: any recipe, dense or dynamic, one process or several, resumable at any step bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from thrifty.data import loader
from thrifty.data.augment import normalise
from thrifty.dynamic import Dynamic
from thrifty.errors import NonFiniteError
from thrifty.evaluation import accuracy
from thrifty.files import clear_partial
from thrifty.macs import count_macs
from thrifty.methods.budget import budgeted, open_shares
from thrifty.train import checkpoint
from thrifty.train.build import build_model, build_teacher, check_logits, load_data
from thrifty.train.checkpoint import Position
from thrifty.train.finite import first_non_finite, non_finite_tensor
from thrifty.train.interrupt import Interrupt
from thrifty.train.log import RunLog
from thrifty.train.losses import classification_loss, distillation_loss
from thrifty.train.optimiser import make_average, make_optimiser
from thrifty.train.recipe import Recipe
from thrifty.train.resume import check_new, check_position, load_run
from thrifty.train.schedule import LearningRate
from thrifty.train.sync import synchronise_batch_norm
from thrifty.zoo.store import ModelCard, save_model

MACS_PHOTOGRAPHS = 64
"""Photographs of the validation set on which mean MACs, and the shares of gates, are counted after each epoch."""

FINISHING_PHOTOGRAPHS = 512
"""Photographs of the validation set that a method may set its last values by."""


class Observer(Protocol):
    """What the trainer tells about its progress, in the main process alone."""

    def step(self, position: Position, status: dict[str, float]) -> None:
        """After each step: where the run stands, the epoch's loss and accuracy so far, a dynamic model's density."""

    def epoch(self, row: dict[str, Any]) -> None:
        """After each epoch: its row of the log."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: the weights' file and the last row of the log."""

    weights: Path
    last: dict[str, Any]


class Trainer:
    """One run of a recipe in a directory.

    Files: `recipe.yaml` (as run), `log.csv` (a row an epoch), `gates.csv` (how often each layer gate's layers ran and
    the mean share of channels that each channel gate left open, a row an epoch and gate, where a method's gates decide
    freely and photographs are held out), `tensorboard/`, `checkpoint.safetensors`, and at the end `model.safetensors`.

    Args:
        recipe: what to train.
        directory: where the run's files are, made when needed.
        resume: go on from the checkpoint in `directory`.
        observer: is told about progress.

    Raises:
        CheckpointError: the directory holds a run already, or none to resume, or one with other settings; or the
            weights to start from, or the teacher, don't fit.
        DataError: photographs are missing or unreadable, or too few for a batch.
        RecipeError: the network doesn't take the photographs or doesn't give logits.
    """

    def __init__(self, recipe: Recipe, directory: Path, resume: bool = False, observer: Observer | None = None) -> None:
        self.recipe = recipe
        self.directory = directory
        self.observer = observer
        self.checkpoint_path = directory / "checkpoint.safetensors"
        self.position = Position()
        rows: list[dict[str, Any]] = []
        if resume:
            self.position, rows = load_run(recipe, directory, self.checkpoint_path)
        else:
            check_new(directory, self.checkpoint_path)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.log = RunLog(directory, main=self.accelerator.is_main_process)
        self.log.rows = rows
        self.interrupt = Interrupt()
        self.stopping = False
        self.begun = self.saved = time.monotonic()
        with _denormals_flushed():
            self._set_up(resume)

    def _set_up(self, resume: bool) -> None:
        recipe, device = self.recipe, self.accelerator.device
        torch.manual_seed(loader.seed_of("weights", recipe.seed))
        self.training, self.validation = load_data(recipe)
        self.loader = loader.TrainingLoader(
            self.training,
            recipe.batch_size,
            recipe.data.mean,
            recipe.data.std,
            recipe.seed,
            recipe.data.padding,
            recipe.data.flip,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        steps = len(self.loader)
        self.total = recipe.epochs * steps
        self.rate = LearningRate(recipe.schedule.kind, self.total, round(recipe.schedule.warmup * steps))
        if resume:
            check_position(recipe, self.checkpoint_path, self.position, self.log.rows, steps)
        self.method = recipe.method_config()
        self.model = build_model(recipe, self.training).to(device).to(memory_format=torch.channels_last)
        if self.accelerator.num_processes > 1:
            synchronise_batch_norm(self.model)
        teacher = build_teacher(recipe, self.training)
        if teacher is not None:
            teacher = teacher.to(device).to(memory_format=torch.channels_last)
        self.teacher = self._compiled(teacher)
        self.optimiser = make_optimiser(self.model, recipe.optimiser)
        self.average = None if recipe.ema is None else make_average(self.model, recipe.ema)
        if resume:
            self._set_density()
            checkpoint.restore(self.checkpoint_path, self._modules(), self.optimiser)
        wrapped, self.optimiser = self.accelerator.prepare(self.model, self.optimiser)
        self.step_model = self._compiled(wrapped)

    def _compiled(self, model: Any) -> Any:
        return torch.compile(model) if self.recipe.compile and model is not None else model

    def _precision(self) -> torch.autocast:
        """In which layers compute what they can in the recipe's precision."""
        mixed = self.recipe.precision == "bfloat16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=mixed)

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model} | ({} if self.average is None else {"average": self.average})

    def run(self) -> Outcome:
        """Train to the end, then write the weights.

        Ctrl-C is met after the step that is under way: the state is saved and KeyboardInterrupt raised. A second
        Ctrl-C stops at once, and what was done since the last checkpoint is lost.

        Raises:
            NonFiniteError: the loss or a weight became NaN or infinite; the last checkpoint stays as it is.
            ThriftyError: a file cannot be written; the last checkpoint stays as it is.
        """
        with _denormals_flushed(), self.log, self.interrupt:
            if self.accelerator.is_main_process:
                clear_partial(self.checkpoint_path)
            self.log.start(self.recipe.model_dump(mode="json"), self.position.epoch)
            while self.position.epoch < self.recipe.epochs:
                self._epoch()
        return self._finish()

    def _epoch(self) -> None:
        steps = len(self.loader)
        self.begun = time.monotonic() - self.position.seconds
        for x, y in self.loader.epoch(self.position.epoch, self.position.step):
            self._step(x, y)
            self._report()
            if self.position.step < steps:
                if self.stopping:
                    self._stop()
                if time.monotonic() - self.saved > 60 * self.recipe.checkpoint.minutes:
                    self._save()
        self._end_epoch()
        last = self.position.epoch == self.recipe.epochs
        if self.stopping and not last:
            self._stop()
        if last or self.position.epoch % self.recipe.checkpoint.epochs == 0:
            self._save()

    def _step(self, x: Tensor, y: Tensor) -> None:
        done = self._done()
        self._set_density()
        factor = self.rate(done)
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.optimiser.learning_rate * factor * group["scale"]
        torch.manual_seed(loader.seed_of("step", self.recipe.seed, done, self.accelerator.process_index))
        x, y = x.to(self.accelerator.device), y.to(self.accelerator.device)
        with self._precision():
            logits = check_logits(self.step_model(x), self.recipe.model.net).float()
        loss = self._loss(logits, x, y)
        value, correct = loss.item(), int((logits.detach().argmax(1) == y).sum())
        self._count(value, correct, len(y))
        if not math.isfinite(self.position.loss_sum):
            place = first_non_finite(self.model, x)  # in every process, for they share batch statistics
            what = f"{value}" if not math.isfinite(value) else "not finite in another process"
            raise NonFiniteError(
                f"the loss is {what} at epoch {self.position.epoch + 1}, step {self.position.step}: {place}. "
                "The last checkpoint is untouched; try a lower learning rate or optimiser.clip_norm."
            )
        self.optimiser.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if self.recipe.optimiser.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimiser.clip_norm)
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _count(self, loss: float, correct: int, seen: int) -> None:
        """Add a step of all processes to the position, and learn whether one of them was asked to stop."""
        asked = self.interrupt.asked
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([loss, correct, seen, asked], dtype=torch.float64, device=self.accelerator.device)
            losses, right, all_seen, asking = self.accelerator.reduce(mine, reduction="sum").tolist()
            loss = losses / self.accelerator.num_processes
            correct, seen, asked = int(right), int(all_seen), asking > 0
        at = self.position
        self.position = replace(
            at, step=at.step + 1, loss_sum=at.loss_sum + loss, correct=at.correct + correct, seen=at.seen + seen
        )
        self.stopping = asked

    def _loss(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        loss = classification_loss(logits, y, self.recipe.label_smoothing)
        section = self.recipe.distill
        if self.teacher is not None and section is not None:
            with torch.no_grad(), self._precision():
                taught = self.teacher(x).float()
            soft = distillation_loss(logits, taught, section.temperature)
            loss = (1 - section.weight) * loss + section.weight * soft
        if isinstance(self.model, Dynamic):
            loss = loss + self.model.regularization()
        return loss

    def _done(self) -> int:
        return self.position.epoch * len(self.loader) + self.position.step

    def _set_density(self) -> None:
        averages = [] if self.average is None else [self.average.module]
        for model in (self.model, *averages):
            if self.method is not None and isinstance(model, Dynamic):
                self.method.advance(model, self._done() / self.total)

    def _report(self) -> None:
        if self.observer is not None and self.accelerator.is_main_process:
            at = self.position
            status = {"loss": at.loss_sum / at.step, "accuracy": at.correct / at.seen}
            if isinstance(self.model, Dynamic):
                status["density"] = self.model.density
            self.observer.step(at, status)

    def _end_epoch(self) -> None:
        at = replace(self.position, seconds=time.monotonic() - self.begun)
        self._check_weights()
        if self._done() == self.total:
            self._set_density()  # the schedule's end, which a descent to the last step has not reached yet
        row: dict[str, Any] = {
            "epoch": at.epoch + 1,
            "seconds": round(at.seconds, 1),
            "learning_rate": self.recipe.optimiser.learning_rate * self.rate(self._done() - 1),
            "loss": at.loss_sum / at.step,
            "accuracy": at.correct / at.seen,
        }
        evaluated = self._evaluated()
        if self._done() == self.total and self.method is not None and isinstance(evaluated, Dynamic):
            self.method.finish(evaluated, self._held_out(FINISHING_PHOTOGRAPHS))
        if isinstance(self.model, Dynamic):
            row["density"] = self.model.density
        if len(self.validation):
            section = self.recipe.data
            held = loader.EvaluationLoader(self.validation, section.mean, section.std)
            row["validation_accuracy"] = accuracy(evaluated, held, self.accelerator.device)
            few = self._held_out(MACS_PHOTOGRAPHS)
            row["validation_macs"] = count_macs(evaluated, few).mean
            if isinstance(evaluated, Dynamic) and budgeted(evaluated):
                row["gates"] = open_shares(evaluated, few)
        self.position = Position(at.epoch + 1, 0, row["seconds"])
        self.begun = time.monotonic() - self.position.seconds
        self.log.add(row)
        if self.observer is not None and self.accelerator.is_main_process:
            self.observer.epoch(row)

    def _held_out(self, count: int) -> Tensor:
        """Some photographs of the validation set, as the model takes them."""
        few = loader.sample(self.validation, count)
        section = self.recipe.data
        pixels = few.images(torch.arange(len(few)))
        return normalise(pixels, section.mean, section.std).to(self.accelerator.device)

    def _evaluated(self) -> nn.Module:
        return self.model if self.average is None else self.average.module

    def _check_weights(self) -> None:
        for module in self._modules().values():
            name = non_finite_tensor(module)
            if name is not None:
                raise NonFiniteError(
                    f"{name} has NaN or infinite values after epoch {self.position.epoch + 1}, step "
                    f"{self.position.step}. The last checkpoint is untouched; try a lower learning rate or "
                    "optimiser.clip_norm."
                )

    def _save(self) -> None:
        self._check_weights()
        if self.accelerator.is_main_process:
            position = replace(self.position, seconds=time.monotonic() - self.begun)
            recipe = self.recipe.model_dump(mode="json")
            checkpoint.save(
                self.checkpoint_path,
                recipe=recipe,
                position=position,
                rows=self.log.rows,
                modules=self._modules(),
                optimiser=self.optimiser,
            )
        self.saved = time.monotonic()

    def _stop(self) -> None:
        self._save()
        self.accelerator.wait_for_everyone()  # else a launcher could end the process that is writing
        at = self.position
        raise KeyboardInterrupt(f"stopped after {at.epoch} epochs and {at.step} steps. Go on with --resume.")

    def _finish(self) -> Outcome:
        section = self.recipe.data
        card = ModelCard(
            net=self.recipe.model.net,
            arguments=self.recipe.model.arguments,
            method=self.recipe.method,
            classes=self.training.classes,
            size=self.training.size,
            mean=section.mean,
            std=section.std,
        )
        path = self.directory / "model.safetensors"
        if self.accelerator.is_main_process:
            save_model(path, self._evaluated(), card)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return Outcome(path, self.log.rows[-1])


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    # Trained gates drive weights to denormals, with which a CPU computes many times slower.
    before = bool(torch.tensor(2e-38).div(4) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
