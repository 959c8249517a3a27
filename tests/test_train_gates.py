"""gates.csv: what a run's gates left open, epoch by epoch."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from train_support import MEAN, STD, Watcher, assert_same_run, make_recipe, result

from thrifty.data.augment import normalise
from thrifty.dynamic import decisions
from thrifty.train.recipe import Recipe
from thrifty.train.trainer import Trainer
from thrifty.zoo.store import load_model

HELD_OUT = {"validation": 0.2}
METHODS = {
    "lcnet": {"name": "lcnet", "target": 0.4, "max_overhead": 99.0, "relax": 0.0, "rate": 3.0},
    "gumbel": {"name": "gumbel", "target": 0.6, "max_overhead": 99.0},
}


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def residual(classes: int = 3) -> nn.Module:
    """A stem and two residual blocks."""
    stem = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*stem, Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def recipe_of(root: Path, method: str, **changes: Any) -> Recipe:
    settings = {"model": {"net": "test_train_gates:residual"}, "method": METHODS[method], "data": HELD_OUT}
    return make_recipe(root, **settings, **changes)


def table(directory: Path) -> list[dict[str, str]]:
    with (directory / "gates.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("method", METHODS)
def test_shares_are_those_of_the_photographs_held_out(root, tmp_path, method):
    watcher = Watcher()
    trainer = Trainer(recipe_of(root, method), tmp_path / "run", observer=watcher)
    outcome = trainer.run()
    rows = table(tmp_path / "run")
    names = ["3", "3.conv1", "4", "4.conv1"] if method == "lcnet" else ["3", "4"]
    assert [(int(row["epoch"]), row["gate"]) for row in rows] == [(e, name) for e in (1, 2, 3) for name in names]
    model, _ = load_model(outcome.weights, net=residual())
    found = decisions(model, normalise(trainer.validation.images(torch.arange(len(trainer.validation))), MEAN, STD))
    for row in rows[-len(names) :]:
        decision = found[row["gate"]]
        kept = decision.layer if decision.channels is None else decision.channels
        assert float(row["share"]) == pytest.approx(kept.double().numpy().mean())
    assert "gates" not in result(tmp_path / "run")[1][0]
    curve = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("gates/3")
    assert [point.step for point in curve] == [1, 2, 3]
    assert [point.value for point in curve] == pytest.approx([float(r["share"]) for r in rows if r["gate"] == "3"])
    assert any(float(row["share"]) < 1 for row in rows)


def test_a_resumed_run_has_the_unbroken_ones_table(root, tmp_path):
    Trainer(recipe_of(root, "lcnet"), tmp_path / "unbroken").run()
    recipe = recipe_of(root, "lcnet", checkpoint={"minutes": 1e-9})
    for epoch, step in ((0, 4), (1, 3), (2, 2)):

        def stop(position: Any, at: tuple[int, int] = (epoch, step)) -> None:
            if (position.epoch, position.step) == at:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            Trainer(recipe, tmp_path / "run", resume=epoch > 0, observer=Watcher(stop)).run()
        if epoch:
            (tmp_path / "run" / "gates.csv").write_text("epoch,gate,share\n9,9,9\n", encoding="utf-8")
    Trainer(recipe, tmp_path / "run", resume=True).run()
    assert (tmp_path / "run" / "gates.csv").read_bytes() == (tmp_path / "unbroken" / "gates.csv").read_bytes()
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize(("method", "share"), [("lcnet", 0.0), (None, 0.2)])
def test_no_table_without_photographs_held_out_or_gates(root, tmp_path, method, share):
    chosen = {} if method is None else {"method": METHODS[method]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "gates.csv").write_text("of a run that left no checkpoint\n", encoding="utf-8")
    model = {"net": "test_train_gates:residual"}
    Trainer(make_recipe(root, model=model, epochs=1, data={"validation": share}, **chosen), tmp_path / "run").run()
    assert not (tmp_path / "run" / "gates.csv").exists()
