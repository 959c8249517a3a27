"""The state of a training run in one safetensors file: weights, momentum, average, and where the run stands.

No random state is kept, for there is none: the order of the photographs, their augmentation and dropout are seeded
from (seed, epoch, step, process), so the position in the run determines all of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
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
    """How far a run has come: `step` steps of `epoch` are done, in `seconds` of training.

    Attributes:
        epoch: whole epochs done.
        step: steps done of the epoch after them.
        seconds: of training so far, all epochs together.
        loss_sum: sum of the losses of this epoch's steps.
        correct: photographs of this epoch that were classified as labelled.
        seen: photographs of this epoch.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0


def save(
    path: Path,
    *,
    recipe: dict[str, Any],
    position: Position,
    rows: list[dict[str, Any]],
    modules: dict[str, nn.Module],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write the state of a run in one step; an interrupted write leaves the previous checkpoint.

    Raises:
        ThriftyError: the file cannot be written or the disk is full.
    """
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
            raise CheckpointError(
                f"{path} was written by a newer thrifty (format {state['format']}). Upgrade to resume."
            )
        return _mapping(state["recipe"]), _position(state["position"]), [_mapping(row) for row in state["rows"]]
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path} to resume from. Start without --resume.") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def restore(path: Path, modules: dict[str, nn.Module], optimiser: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back, keeping each tensor's device and memory format.

    Raises:
        CheckpointError: it is damaged, holds NaN or infinity, or belongs to another model.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                part, _, name = key.partition(".")
                tensor = file.get_tensor(key)
                if not tensor.isfinite().all():
                    raise ValueError(f"{key} has NaN or infinite values")
                groups.setdefault(part, {})[name] = tensor
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error
    try:
        for part, module in modules.items():
            module.load_state_dict(groups.get(part, {}))
        momentum = groups.get("momentum", {})
        for index, parameter in _parameters(optimiser):
            buffer = momentum.pop(str(index), None)
            if buffer is None:
                continue
            if buffer.shape != parameter.shape:
                raise RuntimeError(f"momentum {index} has shape {tuple(buffer.shape)}, not {tuple(parameter.shape)}")
            optimiser.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer).detach()
        if momentum:
            raise RuntimeError(f"it has momentum {', '.join(sorted(momentum))} of no parameter")
    except RuntimeError as error:
        raise CheckpointError(f"{path} belongs to another model: {' '.join(str(error).split())}") from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not a checkpoint or is damaged: {error}. Remove it to start over.")


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a mapping was expected, not a {type(value).__name__}")
    return value


def _position(values: Any) -> Position:
    position = Position(**_mapping(values))
    for field in fields(position):
        value = getattr(position, field.name)
        kinds = (int,) if type(field.default) is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or (value < 0 and field.name != "loss_sum"):
            raise ValueError(f"{field.name} of its position is {value!r}")
    return position


def _parameters(optimiser: torch.optim.Optimizer) -> list[tuple[int, Tensor]]:
    return list(enumerate(p for group in optimiser.param_groups for p in group["params"]))
