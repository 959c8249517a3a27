"""The training loop: any recipe, dense or dynamic, one process or several, resumable at any step bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from thrifty.convert import convert
from thrifty.data import loader, sources
from thrifty.data.images import ImageSet
from thrifty.dynamic import Dynamic
from thrifty.errors import CheckpointError, NonFiniteError
from thrifty.evaluate import accuracy
from thrifty.gates import Gate
from thrifty.macs import count_macs
from thrifty.train import checkpoint
from thrifty.train.checkpoint import Position
from thrifty.train.log import RunLog
from thrifty.train.recipe import Recipe
from thrifty.train.schedule import LearningRate
from thrifty.train.sync import synchronise_batch_norm
from thrifty.zoo.resolve import build_net
from thrifty.zoo.store import ModelCard, load_into, load_model, save_model

FREE = ("data.root", "threads", "checkpoint", "epochs")
"""Settings that may differ when a run is resumed (`epochs` only where the rate doesn't depend on it)."""

MACS_PHOTOGRAPHS = 64
"""Photographs of the validation set on which mean MACs are counted after each epoch."""


class Observer(Protocol):
    """What the trainer tells about its progress."""

    def step(self, position: Position, status: dict[str, float]) -> None: ...
    def epoch(self, row: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: the weights' file and the last row of the log."""

    weights: Path
    last: dict[str, Any]


class Trainer:
    """One run of a recipe in a directory.

    Files: `recipe.yaml` (as run), `log.csv` (a row an epoch), `tensorboard/`, `checkpoint.safetensors`, and at the
    end `model.safetensors`.
    """

    def __init__(self, recipe: Recipe, directory: Path, resume: bool = False, observer: Observer | None = None) -> None:
        self.recipe = recipe
        self.directory = directory
        self.observer = observer
        self.checkpoint_path = directory / "checkpoint.safetensors"
        self._check_directory(resume)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        torch.set_flush_denormal(True)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        torch.manual_seed(loader.seed_of("weights", recipe.seed))
        self.training, self.validation = self._data()
        self.method = recipe.method_config()
        self.model = self._build()
        self.teacher = self._teacher()
        self.optimiser = self._optimiser()
        self.average = self._average()
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
        self.rate = LearningRate(recipe.schedule.kind, recipe.epochs * steps, round(recipe.schedule.warmup * steps))
        self.position = Position()
        self.log = RunLog(directory, main=self.accelerator.is_main_process)
        if resume:
            _, self.position, rows = checkpoint.peek(self.checkpoint_path)
            self._set_density()
            checkpoint.restore(self.checkpoint_path, self._modules(), self.optimiser)
            self.log.rows = rows
        if self.accelerator.is_main_process:
            self.log.start(recipe.model_dump(mode="json"), self.position.epoch)
        wrapped, self.optimiser = self.accelerator.prepare(self.model, self.optimiser)
        self.step_model = torch.compile(wrapped) if recipe.compile else wrapped

    # ------------------------------------------------------------------------------------------------ set-up

    def _check_directory(self, resume: bool) -> None:
        if not resume:
            if self.checkpoint_path.exists():
                raise CheckpointError(
                    f"{self.directory} holds a run already. Go on with --resume, or choose another place with --output."
                )
            return
        kept, _, _ = checkpoint.peek(self.checkpoint_path)
        mine = self.recipe.model_dump(mode="json")
        free = FREE if self.recipe.schedule.kind == "constant" else FREE[:-1]
        differing = sorted(
            key for key, value in _flat(mine).items() if value != _flat(kept).get(key) and not key.startswith(free)
        )
        if differing:
            raise CheckpointError(
                f"{self.directory} was started with other settings of {', '.join(differing)}. "
                "Resume with the old ones, or start a new run with --output."
            )

    def _data(self) -> tuple[ImageSet, ImageSet]:
        section = self.recipe.data
        images = sources.load(section.source, section.root, "train", section.size)
        return loader.split(images, section.validation, seed=0)

    def _build(self) -> nn.Module:
        section = self.recipe.model
        classes = self.training.classes
        model = build_net(section.net, **section.arguments)
        example = self._example()
        start = None
        if section.weights is not None:
            start, card = load_model(section.weights)
            if card.method is None:
                load_into(model, start.state_dict(), section.weights)
        outputs = model.eval()(example).shape[-1]
        if outputs != len(classes):
            raise CheckpointError(
                f"network {section.net} gives {outputs} logits, the data has {len(classes)} classes. "
                "Set the number of classes in model.arguments."
            )
        if self.method is not None:
            model = convert(model, self.method, example=example, inplace=True)
        if start is not None and isinstance(start, Dynamic):
            load_into(model, start.state_dict(), section.weights)
        model.train().to(self.accelerator.device, memory_format=torch.channels_last)
        if self.accelerator.num_processes > 1:
            synchronise_batch_norm(model)
        return model

    def _example(self) -> Tensor:
        section = self.recipe.data
        pixels = self.training.images(torch.arange(1))
        return loader.normalise(pixels, section.mean, section.std)

    def _teacher(self) -> nn.Module | None:
        if self.recipe.distill is None:
            return None
        teacher, _ = load_model(self.recipe.distill.teacher)
        return teacher.eval().requires_grad_(False).to(self.accelerator.device, memory_format=torch.channels_last)

    def _optimiser(self) -> torch.optim.Optimizer:
        section = self.recipe.optimiser
        gates = {id(p) for module in self.model.modules() if isinstance(module, Gate) for p in module.parameters()}
        decayed, undecayed, gated = [], [], []
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in gates:
                gated.append(parameter)
            else:
                (decayed if parameter.ndim > 1 else undecayed).append(parameter)
        groups = [
            {"params": decayed, "scale": 1.0},
            {"params": undecayed, "weight_decay": 0.0, "scale": 1.0},
            {"params": gated, "weight_decay": 0.0, "scale": section.gate_learning_rate},
        ]
        return torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=section.learning_rate,
            momentum=section.momentum,
            nesterov=section.nesterov,
            weight_decay=section.weight_decay,
        )

    def _average(self) -> AveragedModel | None:
        if self.recipe.ema is None:
            return None
        return AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema), use_buffers=True)

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model} | ({} if self.average is None else {"average": self.average})

    # ---------------------------------------------------------------------------------------------- the loop

    def run(self) -> Outcome:
        """Train to the end, then write the weights.

        Raises:
            NonFiniteError: the loss became NaN or infinite; the last checkpoint stays as it is.
        """
        saved = time.monotonic()
        with self.log:
            while self.position.epoch < self.recipe.epochs:
                saved = self._epoch(saved)
        return self._finish()

    def _epoch(self, saved: float) -> float:
        steps = len(self.loader)
        with _timed() as clock:
            for x, y in self.loader.epoch(self.position.epoch, self.position.step):
                loss, correct = self._step(x, y)
                old = self.position
                self.position = replace(
                    old,
                    step=old.step + 1,
                    loss_sum=old.loss_sum + loss,
                    correct=old.correct + correct,
                    seen=old.seen + len(y),
                )
                self._report()
                if time.monotonic() - saved > 60 * self.recipe.checkpoint.minutes and self.position.step < steps:
                    self._save(clock())
                    saved = time.monotonic()
        self._end_epoch(clock())
        last = self.position.epoch == self.recipe.epochs
        if last or self.position.epoch % self.recipe.checkpoint.epochs == 0:
            self._save()
            saved = time.monotonic()
        return saved

    def _step(self, x: Tensor, y: Tensor) -> tuple[float, int]:
        done = self._done()
        self._set_density()
        factor = self.rate(done)
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.optimiser.learning_rate * factor * group["scale"]
        torch.manual_seed(loader.seed_of("step", self.recipe.seed, done, self.accelerator.process_index))
        x, y = x.to(self.accelerator.device), y.to(self.accelerator.device)
        logits = self.step_model(x)
        loss = self._loss(logits, x, y)
        value = loss.item()
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss is {value} at epoch {self.position.epoch + 1}, step {self.position.step + 1}: "
                f"{first_non_finite(self.model, x)}. The last checkpoint is untouched; try a lower learning rate or "
                "optimiser.clip_norm."
            )
        self.optimiser.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if self.recipe.optimiser.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimiser.clip_norm)
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return value, int((logits.detach().argmax(1) == y).sum())

    def _loss(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, y, label_smoothing=self.recipe.label_smoothing)
        section = self.recipe.distill
        if self.teacher is not None and section is not None:
            with torch.no_grad():
                target = F.log_softmax(self.teacher(x) / section.temperature, 1)
            student = F.log_softmax(logits / section.temperature, 1)
            soft = F.kl_div(student, target, reduction="batchmean", log_target=True) * section.temperature**2
            loss = (1 - section.weight) * loss + section.weight * soft
        if isinstance(self.model, Dynamic):
            loss = loss + self.model.regularization()
        return loss

    def _done(self) -> int:
        return self.position.epoch * len(self.loader) + self.position.step

    def _set_density(self) -> None:
        if self.method is not None and isinstance(self.model, Dynamic):
            total = self.recipe.epochs * len(self.loader)
            self.method.advance(self.model, self._done() / total)

    def _report(self) -> None:
        if self.observer is not None and self.accelerator.is_main_process:
            at = self.position
            status = {"loss": at.loss_sum / at.step, "accuracy": at.correct / at.seen}
            if isinstance(self.model, Dynamic):
                status["density"] = self.model.density
            self.observer.step(at, status)

    def _end_epoch(self, seconds: float) -> None:
        at = self.position
        total = self.accelerator.reduce(
            torch.tensor([at.loss_sum / at.step, at.correct, at.seen], dtype=torch.float64), reduction="sum"
        )
        row: dict[str, Any] = {
            "epoch": at.epoch + 1,
            "seconds": round(at.seconds + seconds, 1),
            "learning_rate": self.recipe.optimiser.learning_rate * self.rate(self._done() - 1),
            "loss": total[0].item() / self.accelerator.num_processes,
            "accuracy": total[1].item() / total[2].item(),
        }
        evaluated = self._evaluated()
        if isinstance(evaluated, Dynamic):
            row["density"] = evaluated.density
        if len(self.validation):
            section = self.recipe.data
            held = loader.EvaluationLoader(self.validation, section.mean, section.std)
            row["validation_accuracy"] = accuracy(evaluated, held, self.accelerator.device)
            few = self.validation.images(torch.arange(min(MACS_PHOTOGRAPHS, len(self.validation))))
            few = loader.normalise(few, section.mean, section.std).to(self.accelerator.device)
            row["validation_macs"] = count_macs(evaluated, few).mean
        self.position = Position(at.epoch + 1, 0, row["seconds"])
        if self.accelerator.is_main_process:
            self.log.add(row)
            if self.observer is not None:
                self.observer.epoch(row)

    def _evaluated(self) -> nn.Module:
        return self.model if self.average is None else self.average.module

    def _save(self, seconds: float = 0.0) -> None:
        if self.accelerator.is_main_process:
            position = replace(self.position, seconds=self.position.seconds + seconds)
            recipe = self.recipe.model_dump(mode="json")
            checkpoint.save(
                self.checkpoint_path, recipe, position, self.log.rows, self._modules(), self.optimiser
            )

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


def first_non_finite(model: nn.Module, x: Tensor) -> str:
    """Where NaN or infinity first appears when `model` computes `x`: input, a weight, or a layer's output, by name."""
    if not x.isfinite().all():
        return "the input has it already"
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            return f"{name} has it"
    found: list[str] = []

    def look(name: str):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not found and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return f"it first appears in the output of {found[0]}" if found else "every layer's output is finite, the loss is not"


@contextmanager
def _timed() -> Iterator[Any]:
    start = time.monotonic()
    yield lambda: time.monotonic() - start


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
