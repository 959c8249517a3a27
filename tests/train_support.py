"""What the tests of training share: photographs, a small network, and a program that trains in its own process."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from thrifty.train.checkpoint import Position
from thrifty.train.recipe import Recipe
from thrifty.train.trainer import Trainer
from thrifty.zoo.nets import build
from thrifty.zoo.store import ModelCard, save_model

steady = settings(deadline=None, derandomize=True)

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CLASSES = ("blue", "green", "red")
FBS = {"name": "fbs", "density": 0.5, "schedule": "linear", "descent": [0.1, 0.8], "max_overhead": 10.0, "l1": 1e-4}


def tiny(classes: int = 3, dropout: float = 0.0) -> nn.Module:
    """Three convolutions with batch normalisation for photographs of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(12, 8, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def write_folder(root: Path, per_class: int = 14, size: int = 8, kind: str = "png") -> Path:
    """An ImageFolder of noise with a tint by class under `root`/train."""
    rng = np.random.default_rng(7)
    for index, name in enumerate(reversed(CLASSES)):
        directory = root / "train" / name
        directory.mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 160, (size, size, 3))
            pixels[..., index] += 90
            Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{number:03d}.{kind}")
    return root


def write_teacher(path: Path) -> Path:
    """A ResNet-20 of random weights that knows the classes of `write_folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = build("resnet20", classes=3)
    save_model(path, net, ModelCard("resnet20", {"classes": 3}, None, CLASSES, 8, MEAN, STD))
    return path


def make_recipe(root: Path, **changes: Any) -> Recipe:
    """Five steps an epoch, three epochs, on the photographs of `write_folder`."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "model": {"net": "train_support:tiny"},
        "data": {"source": "folder", "root": str(root), "validation": 0.05, "padding": 1, "mean": MEAN, "std": STD},
        "epochs": 3,
        "batch_size": 8,
        "optimiser": {"learning_rate": 0.05},
        "schedule": {"kind": "onecycle", "warmup": 0.5},
        "threads": 1,
        "checkpoint": {"minutes": 1e6},
    }
    for key, value in changes.items():
        settings[key] = settings[key] | value if isinstance(settings.get(key), dict) else value
    return Recipe.model_validate(settings)


def everything(root: Path, teacher: Path, **changes: Any) -> Recipe:
    """A recipe that has all there is at once: dropout, gates, average, teacher, clipping."""
    arguments = {"dropout": 0.3}
    parts: dict[str, Any] = {
        "model": {"net": "train_support:tiny", "arguments": arguments},
        "method": FBS,
        "ema": 0.7,
        "distill": {"teacher": str(teacher)},
        "label_smoothing": 0.1,
        "optimiser": {"learning_rate": 0.05, "clip_norm": 1.0},
    }
    return make_recipe(root, **(parts | changes))


class Watcher:
    """Notes what the trainer reports and calls `at_step` after each step."""

    def __init__(self, at_step: Callable[[Position], None] = lambda _: None) -> None:
        self.at_step = at_step
        self.steps: list[tuple[Position, dict[str, float]]] = []
        self.rows: list[dict[str, Any]] = []

    def step(self, position: Position, status: dict[str, float]) -> None:
        self.steps.append((position, status))
        self.at_step(position)

    def epoch(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def result(directory: Path) -> tuple[dict[str, Tensor], list[dict[str, str]]]:
    """Weights and log of a finished run, without the times."""
    with (directory / "log.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        del row["seconds"]
    return load_file(directory / "model.safetensors"), rows


def assert_same_run(directory: Path, other: Path) -> None:
    """Both runs end with the same weights, bit for bit, and the same log."""
    (weights, rows), (expected, expected_rows) = result(directory), result(other)
    assert rows == expected_rows
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def command(recipe: Recipe, directory: Path, resume: bool = False, pause: float = 0.0, die_at: int = -1) -> list[str]:
    """This file and its arguments, for Python or a launcher: see `main`."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.parent / f"{directory.name}.json"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    return [__file__, str(path), str(directory), str(int(resume)), str(pause), str(die_at)]


def environment() -> dict[str, str]:
    """For processes that train: one thread, no GPU, this directory importable."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parent),
        "PYTHONUNBUFFERED": "1",
    }


def run(arguments: list[str], status: int | None = 0, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments and check how it ends; `status` None expects any failure."""
    done = subprocess.run(
        [sys.executable, *arguments], env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert (done.returncode != 0) if status is None else (done.returncode == status), done.stdout + done.stderr
    return done


def tell(line: str) -> None:
    """Print a line in one write: several processes share the output."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(path: str, directory: str, resume: str, pause: str, die_at: str) -> None:
    """Train; print a line a step; wait `pause` seconds after each; end by SIGKILL after step `die_at` of the run."""

    def after(position: Position) -> None:
        count = position.epoch * len(trainer.loader) + position.step
        tell(f"step {count}")
        time.sleep(float(pause))
        if count == int(die_at):
            os.kill(os.getpid(), 9)

    loaded = Recipe.model_validate_json(Path(path).read_text(encoding="utf-8"))
    trainer = Trainer(loaded, Path(directory), resume=bool(int(resume)), observer=Watcher(after))
    tell(f"processes {trainer.accelerator.num_processes}")
    outcome = trainer.run()
    tell(f"finished {outcome.last['epoch']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
