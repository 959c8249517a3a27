"""The state of a training run in one safetensors file: weights, momentum, average, and where the run stands.

No random state is kept, for there is none: the order of the photographs, their augmentation and dropout are seeded
from (seed, epoch, step, process), so the position in the run determines all of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from thrifty.errors import CheckpointError
from thrifty.files import replacing

FORMAT = 1


@dataclass(frozen=True)
class Position:
    """How far a run has come: `step` steps of `epoch` are done; `seconds` of training so far; running sums of the epoch."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0


def save(
    path: Path,
    recipe: dict[str, Any],
    position: Position,
    rows: list[dict[str, Any]],
    modules: dict[str, nn.Module],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write the state of a run in one step; an interrupted write leaves the previous checkpoint."""
    tensors = {f"{part}.{key}": value for part, module in modules.items() for key, value in module.state_dict().items()}
    for index, parameter in _parameters(optimiser):
        buffer = optimiser.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{index}"] = buffer
    # Memory formats and shared storage don't survive safetensors; dense copies in the default order do.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    state = {"format": FORMAT, "recipe": recipe, "position": asdict(position), "rows": rows}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"thrifty-run": json.dumps(state)})


def peek(path: Path) -> tuple[dict[str, Any], Position, list[dict[str, Any]]]:
    """Recipe, position and rows of a checkpoint, without its tensors.

    Raises:
        CheckpointError: the file is missing, damaged or of a newer format.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = json.loads(metadata["thrifty-run"])
        if state["format"] > FORMAT:
            raise CheckpointError(f"{path} was written by a newer thrifty (format {state['format']}). Upgrade to resume.")
        return state["recipe"], Position(**state["position"]), state["rows"]
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path} to resume from. Start without --resume.") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint or is damaged: {error}. Remove it to start over.") from error


def restore(path: Path, modules: dict[str, nn.Module], optimiser: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back, keeping each tensor's device and memory format.

    Raises:
        CheckpointError: it belongs to another model.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            part, _, name = key.partition(".")
            groups.setdefault(part, {})[name] = file.get_tensor(key)
    for part, module in modules.items():
        try:
            module.load_state_dict(groups.get(part, {}))
        except RuntimeError as error:
            raise CheckpointError(f"{path} belongs to another model: {' '.join(str(error).split())}") from error
    momentum = groups.get("momentum", {})
    for index, parameter in _parameters(optimiser):
        buffer = momentum.get(str(index))
        if buffer is not None:
            optimiser.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)


def _parameters(optimiser: torch.optim.Optimizer) -> list[tuple[int, Tensor]]:
    return list(enumerate(p for group in optimiser.param_groups for p in group["params"]))
