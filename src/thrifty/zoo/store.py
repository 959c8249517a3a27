"""Models on disk: one safetensors file with the weights and, in its metadata, what is needed to rebuild the model."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.errors import CheckpointError, MissingExtraError, ThriftyError
from thrifty.files import replacing, sha256
from thrifty.methods import method_config
from thrifty.zoo.records import records
from thrifty.zoo.resolve import build_net, is_own

FORMAT = 1


@dataclass(frozen=True)
class ModelCard:
    """What a file says of its model.

    Attributes:
        net: name of the network's definition, as `build_net` takes it.
        arguments: arguments of the definition.
        method: settings of the method that made it dynamic, with its name, or None for a dense model.
        classes: names of the classes, in the order of the logits.
        size: height and width of the photographs in pixels.
        mean, std: per-channel normalisation of pixels in [0, 1].
    """

    net: str
    arguments: dict[str, Any]
    method: dict[str, Any] | None
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def save_model(path: str | Path, model: nn.Module, card: ModelCard, half: bool = False) -> None:
    """Write a model's weights and card to one safetensors file, in one step.

    Args:
        path: of the file.
        model: dense or dynamic.
        card: what the file says of it.
        half: write filters and matrices in float16, half the size; a model that is read from the file has them rounded.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    if half:
        tensors |= {
            name: tensor.half() for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.is_floating_point()
        }
    metadata = {"thrifty-model": json.dumps({"format": FORMAT, **asdict(card)})}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_model(source: str | Path, net: nn.Module | None = None) -> tuple[nn.Module, ModelCard]:
    """Rebuild a model, in evaluation mode.

    Args:
        source: name of a zoo model, or a file written by `save_model`.
        net: the dense network, for a file whose network is the user's own: a file's word is no reason to run code.

    Raises:
        CheckpointError: there is no such model, or the file is damaged, newer, or for another network.
    """
    path = find_weights(source)
    card = read_card(path)
    if net is None:
        if is_own(card.net):
            raise CheckpointError(
                f"{path} holds weights of {card.net}, code of your own: give it as net=, on the command line as --net."
            )
        try:
            net = build_net(card.net, **card.arguments)
        except MissingExtraError:
            raise
        except (ThriftyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: its network cannot be built: {error}") from error
    model = net.eval()
    if card.method is not None:
        settings = {key: value for key, value in card.method.items() if key != "name"}
        example = torch.zeros(1, 3, card.size, card.size)
        model = convert(model, method_config(card.method.get("name", ""), settings), example, inplace=True)
    load_into(model, _tensors(path), path)
    return model.eval(), card


def find_weights(source: str | Path) -> Path:
    """The file behind a zoo model's name or a path."""
    path = Path(source)
    if os.path.isfile(path):
        return path
    shipped = {known.name: known for known in records()}
    found = shipped.get(str(source))
    if found is None:
        run = path.parent.name  # a recipe's place for what another recipe trains
        hint = f" The zoo has what {run} trained: give its name, {run}, instead of the path." if run in shipped else ""
        raise CheckpointError(
            f"there is no model {source}: neither a file nor one of the zoo's: {', '.join(shipped)}.{hint}"
        )
    if sha256(found.path) != found.sha256:
        raise CheckpointError(f"{found.path} is not the file that its record describes. Install thrifty anew.")
    return found.path


def read_card(path: str | Path) -> ModelCard:
    """The card of a model's file."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("thrifty-model")
        if text is None:
            raise CheckpointError(
                f"{path} holds no trained model: it has no model card. A program is for thrifty.load, and for the "
                "commands predict, bench and doctor."
                if Path(path).suffix == ".thrifty"
                else f"{path} was not written by thrifty: it has no model card."
            )
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError("its card is no mapping")
        version = values.pop("format")
        if version > FORMAT:
            raise CheckpointError(f"{path} was written by a newer thrifty (format {version}). Upgrade to load it.")
        for key in ("classes", "mean", "std"):
            values[key] = tuple(values[key])
        return _checked(ModelCard(**values))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a model file or is damaged: {error}.") from error


def _checked(card: ModelCard) -> ModelCard:
    """The card, if every field is of its type; else a TypeError that names one that is not."""
    numbers = all(type(value) in {int, float} and math.isfinite(value) for value in (*card.mean, *card.std))
    fits = {
        "net": isinstance(card.net, str),
        "arguments": isinstance(card.arguments, dict),
        "method": card.method is None or isinstance(card.method, dict),
        "classes": all(isinstance(name, str) for name in card.classes),
        "size": type(card.size) is int and card.size > 0,
        "mean": numbers and len(card.mean) == 3,
        "std": numbers and len(card.std) == 3 and all(value > 0 for value in card.std),
    }
    wrong = [name for name, fit in fits.items() if not fit]
    if wrong:
        raise TypeError(f"its card has no proper {wrong[0]}")
    return card


def load_into(model: nn.Module, tensors: dict[str, Tensor], source: str | Path | None) -> None:
    """Put weights into a model; every name and shape must fit and every value be finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} in {source} has NaN or infinite values.")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit the network: {' '.join(str(error).split())}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Get it anew.") from error
