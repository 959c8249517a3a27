"""`thrifty train`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from thrifty.cli.output import console, millions, percent

if TYPE_CHECKING:
    from thrifty.train.checkpoint import Position

NAME = "train"


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's YAML file, or the name of one that ships with thrifty.")],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting, such as epochs=3 or data.root=photos; repeatable."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the run; runs/<name of the recipe> if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's checkpoint.")] = False,
) -> None:
    """Train a dense or dynamic model from a recipe.

    The run's directory gets the recipe as run, log.csv, TensorBoard curves, a checkpoint, and at the end
    model.safetensors, which `thrifty eval` and `thrifty predict` take. Ctrl-C and --resume lose nothing.
    Several processes: torchrun --nproc-per-node 2 -m thrifty train …
    """
    from thrifty.train.recipe import load_recipe  # noqa: PLC0415 (only this command needs what training needs)
    from thrifty.train.trainer import Trainer  # noqa: PLC0415

    loaded = load_recipe(recipe, changes or ())
    directory = output if output is not None else Path("runs") / loaded.name
    with _Display(loaded.epochs) as display:
        trainer = Trainer(loaded, directory, resume=resume, observer=display)
        display.begin(len(trainer.loader), trainer.position)
        outcome = trainer.run()
    if trainer.accelerator.is_main_process:
        console.print(f"weights: {outcome.weights}", highlight=False, soft_wrap=True)


class _Display:
    """A bar for the whole run on a terminal, and a line an epoch everywhere."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None
        self.steps = 0
        self.macs = ""

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def begin(self, steps: int, position: Position) -> None:
        self.steps = steps
        done = position.epoch * steps + position.step
        self.task = self.bar.add_task("epoch 1", total=self.epochs * steps, completed=done, status="")

    def step(self, position: Position, status: dict[str, float]) -> None:
        if self.task is None or not console.is_terminal:
            return
        text = f"loss {status['loss']:.3f}  accuracy {percent(status['accuracy'])}"
        if "density" in status:
            text += f"  density {status['density']:.2f}"
        done = position.epoch * self.steps + position.step
        label = f"epoch {position.epoch + 1}/{self.epochs}"
        self.bar.update(self.task, completed=done, description=label, status=text + self.macs)

    def epoch(self, row: dict[str, Any]) -> None:
        parts = [f"epoch {row['epoch']}/{self.epochs}", f"{row['seconds']:,.0f} s", f"loss {row['loss']:.4f}"]
        parts.append(f"accuracy {percent(row['accuracy'])}")
        if "density" in row:
            parts.append(f"density {row['density']:.3f}")
        if "validation_accuracy" in row:
            parts.append(f"validation {percent(row['validation_accuracy'])}")
            parts.append(f"{millions(row['validation_macs'])} MACs")
            self.macs = f"  {millions(row['validation_macs'])} MACs"
        console.print("  ".join(parts), highlight=False, soft_wrap=True)
