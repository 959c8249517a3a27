"""A run that was stopped, however and wherever, and resumed ends where the unbroken run ends, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_support import (
    Watcher,
    assert_same_run,
    command,
    environment,
    everything,
    make_recipe,
    run,
    write_folder,
)

from thrifty.errors import CheckpointError
from thrifty.train import checkpoint
from thrifty.train.checkpoint import Position
from thrifty.train.recipe import Recipe
from thrifty.train.trainer import Trainer

STEPS = 5
EVERY_STEP = {"minutes": 1e-9}


class StoppedError(Exception):
    pass


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unbroken(root, teacher, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    Trainer(everything(root, teacher), directory).run()
    return directory


def stop_at(recipe: Recipe, directory: Path, epoch: int, step: int, resume: bool = False) -> None:
    def stop(position: Position) -> None:
        if (position.epoch, position.step) == (epoch, step):
            raise StoppedError

    with pytest.raises(StoppedError):
        Trainer(recipe, directory, resume=resume, observer=Watcher(stop)).run()


def test_the_unbroken_run_trains_with_all_its_parts(unbroken):
    weights = load_file(unbroken / "model.safetensors")
    assert weights["0.gate.winners"] == 4
    assert weights["3.gate.winners"] == 6
    assert weights["0.gate.predictor.weight"].abs().max() > 0
    rows = checkpoint.peek(unbroken / "checkpoint.safetensors")[2]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[0]["density"] > rows[2]["density"] == 0.5
    kept = load_file(unbroken / "checkpoint.safetensors")
    assert not torch.equal(kept["model.0.conv.weight"], kept["average.module.0.conv.weight"])
    assert any(key.startswith("momentum.") for key in kept)


def test_two_unbroken_runs_are_the_same_and_another_seed_is_not(root, teacher, unbroken, tmp_path):
    Trainer(everything(root, teacher), tmp_path / "again").run()
    assert_same_run(tmp_path / "again", unbroken)
    Trainer(everything(root, teacher, seed=1), tmp_path / "other").run()
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "other", unbroken)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_after_each_step_of_an_epoch(root, teacher, unbroken, tmp_path, step):
    recipe = everything(root, teacher, checkpoint=EVERY_STEP)
    stop_at(recipe, tmp_path / "run", epoch=1, step=step)
    _, position, rows = checkpoint.peek(tmp_path / "run" / "checkpoint.safetensors")
    assert (position.epoch, position.step) == (1, step - 1), "the step's own checkpoint comes after its report"
    assert len(rows) == 1
    Trainer(recipe, tmp_path / "run", resume=True).run()
    assert_same_run(tmp_path / "run", unbroken)


def test_stopped_at_every_step_of_the_whole_run(root, teacher, unbroken, tmp_path):
    recipe = everything(root, teacher, checkpoint=EVERY_STEP)
    stops = [(epoch, step) for epoch in range(3) for step in range(1, STEPS + 1)][1:]
    for number, (epoch, step) in enumerate(stops):
        stop_at(recipe, tmp_path / "run", epoch, step, resume=number > 0)
    Trainer(recipe, tmp_path / "run", resume=True).run()
    assert_same_run(tmp_path / "run", unbroken)


def test_mixed_precision_resumes_too_and_leaves_weights_in_single_precision(root, teacher, unbroken, tmp_path):
    recipe = everything(root, teacher, precision="bfloat16")
    Trainer(recipe, tmp_path / "whole").run()
    stop_at(everything(root, teacher, precision="bfloat16", checkpoint=EVERY_STEP), tmp_path / "run", epoch=1, step=3)
    Trainer(recipe, tmp_path / "run", resume=True).run()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    weights, single = (load_file(run / "model.safetensors") for run in (tmp_path / "whole", unbroken))
    for name, weight in weights.items():
        assert weight.dtype == single[name].dtype
        if weight.is_floating_point():
            torch.testing.assert_close(weight, single[name], rtol=0.1, atol=0.1)
    assert not torch.equal(weights["0.conv.weight"], single["0.conv.weight"])


def test_checkpoints_by_epoch_alone(root, teacher, unbroken, tmp_path):
    recipe = everything(root, teacher, checkpoint={"epochs": 2})
    stop_at(recipe, tmp_path / "run", epoch=2, step=3)
    assert checkpoint.peek(tmp_path / "run" / "checkpoint.safetensors")[1].epoch == 2
    Trainer(recipe, tmp_path / "run", resume=True).run()
    assert_same_run(tmp_path / "run", unbroken)


def test_a_finished_run_resumes_to_the_same_weights(root, teacher, unbroken, tmp_path):
    recipe = everything(root, teacher)
    Trainer(recipe, tmp_path / "run").run()
    (tmp_path / "run" / "model.safetensors").unlink()
    outcome = Trainer(recipe, tmp_path / "run", resume=True).run()
    assert outcome.last["epoch"] == 3
    assert_same_run(tmp_path / "run", unbroken)


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """SIGINT as in a terminal: a job in the background, as tests may be, starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (1, 3), (1, STEPS)])
def test_ctrl_c_saves_after_the_step_under_way(root, teacher, unbroken, tmp_path, epoch, step):
    def press(position: Position) -> None:
        if (position.epoch, position.step) == (epoch, step):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    recipe = everything(root, teacher)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        Trainer(recipe, tmp_path / "run", observer=Watcher(press)).run()
    assert signal.getsignal(signal.SIGINT) is before
    at = checkpoint.peek(tmp_path / "run" / "checkpoint.safetensors")[1]
    assert at.epoch * STEPS + at.step == epoch * STEPS + step + 1
    Trainer(recipe, tmp_path / "run", resume=True).run()
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_in_the_last_step_finishes_the_run(root, teacher, unbroken, tmp_path):
    def press(position: Position) -> None:
        if (position.epoch, position.step) == (2, STEPS - 1):
            signal.raise_signal(signal.SIGINT)

    Trainer(everything(root, teacher), tmp_path / "run", observer=Watcher(press)).run()
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_twice_stops_at_once(root, teacher, tmp_path):
    def press(_: Position) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(everything(root, teacher), tmp_path / "run", observer=Watcher(press)).run()
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("when", [{"minutes": 1e-9}, {"minutes": 1e6}], ids=["every step", "every epoch"])
def test_killed_at_random_moments(root, teacher, unbroken, tmp_path, when):
    """SIGKILL, also in the middle of a write, an evaluation or a step."""
    chance = random.Random(str(when))
    directory = tmp_path / "run"
    recipe = everything(root, teacher, checkpoint=when)
    for after in (4, 3, 6):
        resume = (directory / "checkpoint.safetensors").exists()
        arguments = command(recipe, directory, resume=resume, pause=0.02)
        with subprocess.Popen(
            [sys.executable, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            seen = 0
            for line in process.stdout:
                seen += line.startswith("step")
                if seen == after:
                    break
            time.sleep(chance.uniform(0, 0.06))
            process.kill()
            assert process.wait() == -signal.SIGKILL, process.stderr.read()
    run(command(recipe, directory, resume=True))
    assert_same_run(directory, unbroken)
    assert not list(directory.glob(".checkpoint*.part"))


def test_seconds_go_on_from_the_checkpoint(root, tmp_path):
    recipe = make_recipe(root, checkpoint=EVERY_STEP)
    path = tmp_path / "run" / "checkpoint.safetensors"
    watcher = Watcher(lambda _: time.sleep(0.1))
    stop = watcher.at_step

    def stopping(position: Position) -> None:
        stop(position)
        if position.step == 4:
            raise StoppedError

    watcher.at_step = stopping
    with pytest.raises(StoppedError):
        Trainer(recipe, tmp_path / "run", observer=watcher).run()
    assert checkpoint.peek(path)[1].seconds >= 0.3
    outcome = Trainer(recipe, tmp_path / "run", resume=True).run()
    assert outcome.last["seconds"] >= 0.3
    rows = checkpoint.peek(path)[2]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


@pytest.fixture(scope="module")
def started(root, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("started") / "run"
    stop_at(make_recipe(root, checkpoint=EVERY_STEP), directory, 1, 4)
    return directory


def test_nothing_to_resume(root, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .* Start without --resume"):
        Trainer(make_recipe(root), tmp_path / "run", resume=True)


def test_a_run_is_not_overwritten(root, started):
    with pytest.raises(CheckpointError, match="holds a run already"):
        Trainer(make_recipe(root), started)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed"),
        ({"epochs": 9}, "epochs"),
        ({"data": {"padding": 2}}, "data.padding"),
        ({"optimiser": {"momentum": 0.5}}, "optimiser.momentum"),
        ({"ema": 0.5}, "ema"),
        ({"method": {"name": "fbs"}}, "method.name"),
        ({"distill": {"teacher": "other"}}, "distill.teacher"),
    ],
)
def test_other_settings(root, started, changes, named):
    with pytest.raises(CheckpointError, match=rf"started with other settings of .*{named}"):
        Trainer(make_recipe(root, **changes), started, resume=True)


def test_settings_that_are_gone_count_too(root, teacher, tmp_path):
    stop_at(everything(root, teacher, checkpoint=EVERY_STEP), tmp_path / "run", 0, 3)
    with pytest.raises(CheckpointError, match=r"distill.teacher"):
        Trainer(everything(root, teacher, distill=None), tmp_path / "run", resume=True)


def test_data_that_moved_is_the_same_data(root, started, tmp_path):
    (tmp_path / "moved").symlink_to(root)
    recipe = make_recipe(tmp_path / "moved", threads=2, checkpoint={"epochs": 2, "minutes": 5})
    assert Trainer(recipe, started, resume=True).position.epoch == 1


def test_other_photographs(started, tmp_path):
    recipe = make_recipe(write_folder(tmp_path / "fewer", per_class=3))
    with pytest.raises(CheckpointError, match=r"stands at epoch 1, step 3 .* 3 epochs of 1 steps"):
        Trainer(recipe, started, resume=True)


def test_epochs_may_grow_where_nothing_is_scheduled(root, tmp_path):
    constant = {"kind": "constant", "warmup": 0.0}
    Trainer(make_recipe(root, schedule=constant, epochs=1), tmp_path / "run").run()
    Trainer(make_recipe(root, schedule=constant, epochs=2), tmp_path / "run", resume=True).run()
    Trainer(make_recipe(root, schedule=constant, epochs=2), tmp_path / "whole").run()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_new_run_drops_the_log_of_one_that_left_no_checkpoint(root, tmp_path):
    recipe = make_recipe(root, checkpoint={"epochs": 3})
    stop_at(recipe, tmp_path / "run", 1, 2)
    assert (tmp_path / "run" / "log.csv").exists()

    def look(_: Position) -> None:
        assert not (tmp_path / "run" / "log.csv").exists()
        raise StoppedError

    with pytest.raises(StoppedError):
        Trainer(recipe, tmp_path / "run", observer=Watcher(look)).run()
