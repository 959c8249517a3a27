"""`thrifty compile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.cli.options import Channels, Density, MethodSettings, check_has_density, open_model, settings_of
from thrifty.cli.output import console
from thrifty.errors import ThriftyError
from thrifty.onnx_export import save_onnx
from thrifty.program_file import save_program

if TYPE_CHECKING:
    from thrifty.program import Program

NAME = "compile"
ONNX = ".onnx"


def run(
    model: Annotated[
        str,
        typer.Argument(
            help="A zoo model, a model.safetensors file, or a network with random weights: of the zoo, torchvision, "
            "timm, or module:function of your own."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.thrifty, or FILE.onnx for other engines.")],
    net: Annotated[
        str | None, typer.Option(help="The dense network of a file that is not of a zoo network, as `eval` takes it.")
    ] = None,
    image: Annotated[
        int | None, typer.Option(min=1, help="Of a network: height and width in pixels; 32 for the zoo's, else 224.")
    ] = None,
    channels: Channels = None,
    method: Annotated[
        str | None, typer.Option(help="Of a network: make it dynamic first, with random gates: fbs, antidote …")
    ] = None,
    changes: MethodSettings = None,
    density: Density = None,
    show: Annotated[bool, typer.Option("--show", help="Print the program.")] = False,
) -> None:
    """Lower a model to a program file, which `thrifty.load` runs on the engine without torch.

    A trained model's program holds its classes and its preprocessing; a network's takes inputs as they are.
    """
    if output.suffix not in {".thrifty", ONNX}:
        raise ThriftyError(f"the output is {output}, but must end in .thrifty or {ONNX}.")
    if _is_trained(model):
        if image is not None or channels is not None or method is not None or changes:
            raise ThriftyError(
                f"{model} is a trained model as it is: leave --image, --channels, --method and --set out."
            )
        program = _trained(model, net, density)
    else:
        if net is not None:
            raise ThriftyError(f"{model} is a network itself: leave --net out.")
        program = _network(model, image, channels, method, density, settings_of(changes or ()))
    (save_onnx if output.suffix == ONNX else save_program)(program, output)
    lines = str(program).splitlines()
    for line in lines if show else lines[-1:]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    size = output.stat().st_size / 1e6
    console.print(f"{output}: {size:,.1f} MB", highlight=False, soft_wrap=True, markup=False)


def _is_trained(model: str) -> bool:
    from thrifty.zoo.records import records  # noqa: PLC0415

    return Path(model).is_file() or model in {record.name for record in records()}


def _trained(model: str, net: str | None, density: float | None) -> Program:
    from thrifty.zoo.compilation import program_of  # noqa: PLC0415 (needs torch)

    return program_of(*open_model(model, net, density))


def _network(
    model: str,
    image: int | None,
    channels: int | None,
    method: str | None,
    density: float | None,
    settings: dict[str, Any],
) -> Program:
    from thrifty.benchmarking.subjects import find_subject  # noqa: PLC0415
    from thrifty.methods import METHODS  # noqa: PLC0415

    if (density is not None or settings) and method in {None, "none"}:
        raise ThriftyError(f"--density or --set was given, but {model} is a dense network. Give --method fbs too.")
    if density is not None:
        check_has_density(method)
        if settings or (method in METHODS and not hasattr(METHODS[method], "density")):
            raise ThriftyError(
                f"--density was given, but {method} takes settings of its own here: give --set key=value."
            )
    subject = find_subject(
        model,
        image,
        method or "none",
        density=0.5 if density is None else density,
        settings=settings,
        channels=channels,
    )
    return subject.dense if subject.dynamic is None else subject.dynamic
