"""`thrifty tune`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from thrifty.cli.options import Json, Model, Net, Several, Threads, model_name, open_model, photographs, set_threads
from thrifty.cli.output import console, millions, percent, print_json, table
from thrifty.errors import DataError, ThriftyError, require
from thrifty.files import check_writable, make_directory

if TYPE_CHECKING:
    from thrifty.data.images import ImageSet
    from thrifty.dynamic import Dynamic
    from thrifty.evaluation import Evaluation
    from thrifty.tuning import Proposal, Sensitivity
    from thrifty.zoo.store import ModelCard

NAME = "tune"
COMMAND = Several

VALIDATION = 0.05
"""Share of the training photographs that recipes hold out."""

AXES = {"channels": ("channels",), "columns": ("columns",), "both": ("channels", "columns")}


def run(
    model: Model,
    target: Annotated[float, typer.Option("--target-macs", help="MACs wanted, as a share of dense, in (0, 1].")],
    data: Annotated[str, typer.Option(help="folder, cifar10 or cifar100.")] = "folder",
    root: Annotated[
        Path | None, typer.Option(help="Of folder: <root>/train/<class>/*.jpg. Of CIFAR: the download.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Of a dense model: antidote or fbs; a dynamic one has its own.")
    ] = None,
    floor: Annotated[float, typer.Option(help="Accuracy that may be lost, in [0, 1]: 0.01 is one point.")] = 0.01,
    images: Annotated[int, typer.Option(min=1, help="Photographs to measure on, at most.")] = 1000,
    axis: Annotated[str, typer.Option(help="What is pruned: channels, or of antidote columns or both.")] = "channels",
    by: Annotated[str, typer.Option(help="Layers that share a ratio: stage (maps of one size) or layer.")] = "stage",
    ratios: Annotated[
        list[float] | None, typer.Option(help="Shares pruned that are tried; several may follow. [default: 0.1 … 0.9]")
    ] = None,
    net: Net = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the curves; runs/tune-<model>-<method> if not given.")
    ] = None,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Find ratios layer by layer: how much each stage can be pruned, and what to prune for a compute target.

    One group of layers after another is pruned at rising ratios while all others keep everything; accuracy is measured
    on photographs that recipes hold out of training (never on test photographs). sensitivity.csv and sensitivity.png
    get the curves. What is proposed is measured as a whole and printed as a line for a recipe: training recovers
    accuracy that an untrained model loses here.
    """
    if axis not in AXES:
        raise ThriftyError(f"--axis is {axis!r}; choose one of: {', '.join(AXES)}.")
    if data == "sample":
        raise DataError("the embedded sample has test photographs, by which nothing may be chosen. Give --data folder.")
    require("matplotlib", "thrifty tune")
    set_threads(threads)
    import torch  # noqa: PLC0415 (only commands that need it import torch)

    from thrifty.data.loader import EvaluationLoader  # noqa: PLC0415
    from thrifty.evaluation import evaluate  # noqa: PLC0415
    from thrifty.tuning import RATIOS, check_goal, check_sweep, groups_of, tune  # noqa: PLC0415

    check_goal(target, floor)
    tried = tuple(ratios or RATIOS)
    dynamic, card = _dynamic(model, net, method, AXES[axis])
    check_sweep(dynamic.method, tried, AXES[axis])
    groups = groups_of(dynamic, torch.zeros(1, 3, card.size, card.size), by)  # type: ignore[arg-type]
    directory = output if output is not None else Path("runs") / f"tune-{model_name(model)}-{dynamic.method.name}"
    held = _held_out(photographs(card, data, root, "train", in_memory=False).images, images)
    loader = EvaluationLoader(held, card.mean, card.std)
    make_directory(directory)  # before the sweep, which takes long
    check_writable(directory / "sensitivity.csv")
    points = len(AXES[axis]) * len(groups) * len(set(tried))
    with _Bar(points) as bar:
        sensitivity = tune(dynamic, loader, groups, tried, AXES[axis], lambda _: bar.step())
    proposal = sensitivity.propose(target, floor)
    proposal.apply(dynamic)
    measured = evaluate(dynamic, loader)
    sensitivity.to_csv(directory / "sensitivity.csv")
    sensitivity.plot(directory / "sensitivity.png", proposal)
    if as_json:
        print_json(_plain(model, sensitivity, proposal, measured, directory))
    else:
        _print(model, sensitivity, proposal, measured, (target, floor), directory)


def _dynamic(source: str, net: str | None, method: str | None, axes: tuple[str, ...]) -> tuple[Dynamic, ModelCard]:
    """The model that was asked for; a dense one is made dynamic."""
    import torch  # noqa: PLC0415

    from thrifty.converter import convert  # noqa: PLC0415
    from thrifty.dynamic import Dynamic  # noqa: PLC0415
    from thrifty.methods import METHODS, method_config  # noqa: PLC0415

    model, card = open_model(source, net, None)
    if isinstance(model, Dynamic):
        if method not in (None, model.method.name):
            raise ThriftyError(f"--method is {method}, but {source} is dynamic already, by {model.method.name}.")
        return model, card
    if method is None:
        raise ThriftyError(f"{source} is a dense model: give --method antidote or --method fbs.")
    settings: dict[str, Any] = {"density": 1.0} if hasattr(METHODS.get(method), "density") else {}
    if method == "antidote":  # a ratio above zero, or there would be no gates; the sweep sets its own
        settings = {"channels": 0.5, "columns": 0.5 if "columns" in axes else 0.0}
    config = method_config(method, settings)
    return convert(model, config, torch.zeros(1, 3, card.size, card.size), inplace=True), card


def _held_out(images: ImageSet, count: int) -> ImageSet:
    """At most `count` of the photographs that recipes hold out of training, of all classes alike."""
    from thrifty.data.loader import sample, split  # noqa: PLC0415

    _, held = split(images, VALIDATION, seed=0)
    if not len(held):
        raise DataError(f"{len(images)} training photographs are too few to hold {VALIDATION:.0%} of them out.")
    return sample(held, count).decoded()


class _Bar:
    """Progress on a terminal."""

    def __init__(self, points: int) -> None:
        columns = (TextColumn("sweep"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task = self.bar.add_task("sweep", total=points)

    def step(self) -> None:
        self.bar.advance(self.task)

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _plain(
    model: str, sensitivity: Sensitivity, proposal: Proposal, measured: Evaluation, directory: Path
) -> dict[str, Any]:
    return {
        "model": model,
        "photographs": sensitivity.inputs,
        "accuracy": sensitivity.accuracy,
        "macs": sensitivity.macs,
        "dense_macs": sensitivity.dense_macs,
        "groups": sensitivity.groups,
        "rows": [asdict(row) for row in sensitivity.rows],
        "proposal": {
            "reached": proposal.reached,
            "ratios": proposal.ratios,
            "predicted_loss": proposal.lost,
            "accuracy": measured.accuracy,
            "macs": measured.macs.mean,
            "share_of_dense": measured.macs.mean / sensitivity.dense_macs,
            "method": proposal.settings,
            "recipe": proposal.recipe,
        },
        "files": [str(directory / name) for name in ("sensitivity.csv", "sensitivity.png")],
    }


def _print(
    model: str,
    sensitivity: Sensitivity,
    proposal: Proposal,
    measured: Evaluation,
    goal: tuple[float, float],
    directory: Path,
) -> None:
    for axis in dict.fromkeys(row.axis for row in sensitivity.rows):
        rows = [row for row in sensitivity.rows if row.axis == axis]
        tried = sorted({row.ratio for row in rows})
        cells: dict[str, list[str]] = {}
        for row in rows:
            cells.setdefault(row.group, []).append(f"{100 * (sensitivity.accuracy - row.accuracy):.1f}")
        table(
            ("points lost", *(f"{ratio:g}" for ratio in tried), "proposed"),
            [(g, *c, f"{proposal.chosen.get((axis, g), 0):g}") for g, c in cells.items()],
            title=f"{model}, {sensitivity.method}, {axis}: {percent(sensitivity.accuracy)} of {sensitivity.inputs:,} "
            "held-out photographs with nothing pruned",
        )
    share = measured.macs.mean / sensitivity.dense_macs
    lines = [
        f"proposal, measured: {percent(measured.accuracy)}, {millions(measured.macs.mean)} MACs, "
        f"{percent(share)} of dense (predicted: {100 * proposal.lost:.1f} points lost)"
    ]
    if not proposal.reached:
        target, floor = goal
        highest = max(row.ratio for row in sensitivity.rows)
        if all(proposal.chosen.get(knob) == highest for knob in sensitivity.curves()):
            reason = "with all that was tried: give higher --ratios, or prune more layers or axes"
        else:
            reason = (
                f"without a predicted loss above {100 * floor:g} points: raise --floor (training recovers much of it), "
                "or prune more layers or axes"
            )
        lines.append(f"the target of {percent(target)} is out of reach {reason}")
    lines += [proposal.recipe, f"curves: {directory / 'sensitivity.png'}, {directory / 'sensitivity.csv'}"]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
