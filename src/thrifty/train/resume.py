"""Whether a run may start in a directory, or go on there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from thrifty.errors import CheckpointError
from thrifty.train import checkpoint
from thrifty.train.checkpoint import Position
from thrifty.train.recipe import Recipe

FREE = ("data.root", "threads", "checkpoint.epochs", "checkpoint.minutes")
"""Settings that may differ when a run is resumed; beside them `epochs`, where nothing is scheduled over the run."""


def check_new(directory: Path, path: Path) -> None:
    """Refuse a directory in which a run has left its checkpoint `path`.

    Raises:
        CheckpointError: there is a checkpoint.
    """
    if path.exists():
        raise CheckpointError(
            f"{directory} holds a run already. Go on with --resume, or choose another place with --output."
        )


def load_run(recipe: Recipe, directory: Path, path: Path) -> tuple[Position, list[dict[str, Any]]]:
    """Position and rows of the run of `recipe` whose checkpoint is `path`.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it was started with other settings.
    """
    settings, position, rows = checkpoint.peek(path)
    try:  # a setting that is newer than the checkpoint has its default there
        kept = _flat(Recipe.model_validate(settings).model_dump(mode="json"))
    except ValidationError as error:
        raise CheckpointError(
            f"{path} holds a recipe that this version doesn't read: {error.errors()[0]['msg']}. "
            "Start a new run with --output."
        ) from error
    mine = _flat(recipe.model_dump(mode="json"))
    free = {*FREE, "epochs"} if recipe.schedule.kind == "constant" and recipe.method is None else {*FREE}
    differing = sorted(key for key in (mine.keys() | kept.keys()) - free if mine.get(key) != kept.get(key))
    if differing:
        raise CheckpointError(
            f"{directory} was started with other settings of {', '.join(differing)}. "
            "Resume with the old ones, or start a new run with --output."
        )
    return position, rows


def check_position(recipe: Recipe, path: Path, position: Position, rows: list[dict[str, Any]], steps: int) -> None:
    """Refuse a position that a run of `recipe` with `steps` steps an epoch can't have.

    Raises:
        CheckpointError: it can't, as when photographs were added or removed.
    """
    if position.epoch > recipe.epochs or position.step > steps or position.epoch != len(rows):
        raise CheckpointError(
            f"{path} stands at epoch {position.epoch}, step {position.step} with {len(rows)} epochs logged, but this "
            f"run has {recipe.epochs} epochs of {steps} steps. Resume with the same photographs and at least as many "
            "epochs, or start a new run with --output."
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
