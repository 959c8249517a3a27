"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from thrifty.benchmarking.peers import PEERS
from thrifty.errors import CheckpointError, DataError, ThriftyError

if TYPE_CHECKING:
    from torch import nn

    from thrifty.data.loader import EvaluationLoader
    from thrifty.zoo.store import ModelCard

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Predictor = Annotated[
    str,
    typer.Argument(help="A zoo model's name (see `thrifty zoo`), a model.safetensors file, or a program FILE.thrifty."),
]
Model = Annotated[str, typer.Argument(help="A zoo model's name (see `thrifty zoo`) or a model.safetensors file.")]
Net = Annotated[
    str | None,
    typer.Option(
        help="The dense network of a file that is not of a zoo network: torchvision:NAME, timm:NAME or module:function."
    ),
]
Density = Annotated[
    float | None, typer.Option(help="Run a dynamic model at this density, in (0, 1], instead of its own.")
]
MeasuredMethod = Annotated[
    str | None,
    typer.Option(help="What a dense network is measured with: fbs, antidote …; none leaves it dense. [default: fbs]"),
]
MethodSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the method as key=value, such as columns=0.5; repeatable."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice if not given.")]
Channels = Annotated[int | None, typer.Option(min=1, help="Of a network: channels of an image. [default: 3]")]

WORDS = frozenset({*PEERS, "none"})
"""That follow --peers."""


class Several(TyperCommand):
    """A command whose repeatable options take several numbers or names of engines at once: `--threads 1 2`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further value, which is what the parser below understands."""
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        expanded: list[str] = []
        option = None
        for argument in args:
            if option is not None and expanded[-1] != option and _is_value(argument):
                expanded.append(option)
            elif argument.startswith("-"):
                option = argument if argument in several else None
            elif option is None or expanded[-1] != option:
                option = None
            expanded.append(argument)
        return super().parse_args(ctx, expanded)


def _is_value(text: str) -> bool:
    return text in WORDS or text.replace(".", "", 1).isdigit()


def open_model(source: str, net: str | None, density: float | None) -> tuple[nn.Module, ModelCard]:
    """The model that a command was asked for, in evaluation mode, at the density asked for."""
    from thrifty.dynamic import Dynamic  # noqa: PLC0415 (torch is imported by commands that need it)
    from thrifty.zoo.resolve import build_net, is_own  # noqa: PLC0415
    from thrifty.zoo.store import find_weights, load_model, read_card  # noqa: PLC0415

    path = find_weights(source)
    card = read_card(path)
    if net is not None and not is_own(card.net) and net != card.net:
        raise ThriftyError(f"{source} holds weights of {card.net}, which thrifty makes by itself: leave --net out.")
    model, card = load_model(path, None if net is None else build_net(net, **card.arguments))
    if density is not None:
        if not isinstance(model, Dynamic):
            raise ThriftyError(f"--density was given, but {source} is a dense model.")
        model.set_density(density)
    return model, card


def check_classes(card: ModelCard, logits: int) -> None:
    """An error where a model doesn't name as many classes as it tells apart."""
    if logits != len(card.classes):
        raise CheckpointError(f"the model's file is damaged: it names {len(card.classes)} classes for {logits} logits.")


def model_name(source: str) -> str:
    """What files made for a model are called: its name in the zoo, that of its run, or that of its file."""
    path = Path(source)
    return path.resolve().parent.name if path.name == "model.safetensors" else path.stem


def settings_of(changes: Iterable[str]) -> dict[str, Any]:
    """Settings given as key=value, the values as in YAML."""
    settings: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ThriftyError(f"--set {change!r} must have the form key=value.")
        from thrifty.train.recipe import parse_value  # noqa: PLC0415 (needs the extra torch)

        settings[key] = parse_value(value)
    return settings


def check_has_density(method: str | None) -> None:
    """An error, before anything takes long, where a density was given for a method that learns how much to skip."""
    if method in {None, "none"}:
        return
    from thrifty.methods import METHODS, MethodConfig  # noqa: PLC0415 (needs the extra torch)
    from thrifty.methods.budget import BudgetConfig  # noqa: PLC0415

    if issubclass(METHODS.get(str(method), MethodConfig), BudgetConfig):
        raise ThriftyError(f"--density was given, but {method} learns how much to skip: give --set target=SHARE.")


def picture_files(pictures: Iterable[Path]) -> list[Path]:
    """The files given, and those with the suffix of a picture in the folders given, however deep.

    Raises:
        DataError: one does not exist, or there are none.
    """
    from thrifty.data.files import SUFFIXES  # noqa: PLC0415 (needs Pillow)

    pictures = list(pictures)
    found: list[Path] = []
    for path in pictures:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"there is no file or folder {path}.")
    if not found:
        raise DataError(f"there are no pictures in {', '.join(str(path) for path in pictures)}.")
    return found


def may_write(path: Path, software: str) -> bool:
    """Whether nothing is at `path`, or a PNG in which `software` stands as what has made it."""
    from PIL import Image  # noqa: PLC0415 (an extra)

    if not path.exists():
        return True
    try:
        with Image.open(path) as image:
            return bool(image.info.get("Software") == software)
    except (OSError, ValueError, SyntaxError):
        return False


def set_threads(threads: int | None) -> None:
    """Limit torch's CPU threads, and flush denormals, which trained gates drive weights to."""
    import torch  # noqa: PLC0415

    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)


def photographs(
    card: ModelCard, source: str, root: Path | None, split: str = "test", in_memory: bool = True
) -> EvaluationLoader:
    """Labelled photographs, prepared as the model wants them; classes must be the model's, in its order."""
    from thrifty.data import sources  # noqa: PLC0415
    from thrifty.data.loader import EvaluationLoader  # noqa: PLC0415

    if source == "sample" and root is not None:
        raise ThriftyError(
            f"--root {root} was given, but the sample ships with thrifty: give --data folder, or no --root."
        )
    images = sources.load(source, root, split, card.size, in_memory)
    if images.classes != card.classes:
        raise ThriftyError(
            f"the data's classes ({', '.join(images.classes[:12])}) are not the model's "
            f"({', '.join(card.classes[:12])}). Give photographs of the model's classes, in directories of these names."
        )
    return EvaluationLoader(images, card.mean, card.std)
