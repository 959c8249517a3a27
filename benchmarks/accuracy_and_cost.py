"""What the benchmarks that set accuracy beside cost share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thrifty.cli.bench import write_csv
from thrifty.cli.options import photographs
from thrifty.data.loader import EvaluationLoader
from thrifty.evaluation import evaluate
from thrifty.files import replacing
from thrifty.machine import machine, versions
from thrifty.zoo.records import records
from thrifty.zoo.store import ModelCard

COLOURS = 10
"""That matplotlib's cycle has before it begins anew."""


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options that all take: where the photographs are, and where the CSV of that name goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(f"benchmarks/results/{name}.csv"))
    return parser


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the rows as CSV, with the machine and the versions beside each."""
    write_csv(path, list(rows), {**machine(), **versions("torch")})


def find_model(name: str, runs: Path) -> str | Path | None:
    """What to load a model by: its name if the zoo has it, else the finished run's weights; None if there are none."""
    if name in {record.name for record in records()}:
        return name
    path = runs / name / "model.safetensors"
    if path.is_file():
        return path
    print(f"{name} is neither in the zoo nor a finished run in {runs}: left out")
    return None


def training_images(card: ModelCard, root: Path, count: int) -> Tensor:
    """Some `count` photographs of the training set, of all classes, as the model takes them: float32 [N, 3, H, W]."""
    loader = photographs(card, "folder", root, "train", in_memory=False)
    every = max(1, len(loader.images) // count)
    chosen = loader.images.subset(torch.arange(0, len(loader.images), every)[:count])
    ((x, _),) = replace(loader, images=chosen, batch_size=count)
    return x


def measure(model: Any, loader: EvaluationLoader, whole: int, /, **labels: Any) -> dict[str, Any]:
    """A row of `labels`, accuracy and MACs, these also as a share of `whole`; printed too."""
    result = evaluate(model, loader)
    share = result.macs.mean / whole
    print(
        ", ".join(str(value) for value in labels.values()),
        f"{result.accuracy:.4f} at {share:.3f} of the MACs",
        flush=True,
    )
    return labels | {
        "accuracy": result.accuracy,
        "macs": result.macs.mean,
        "macs_p5": result.macs.percentile(5),
        "macs_p95": result.macs.percentile(95),
        "macs_share": share,
        "photographs": len(result.labels),
    }


def draw(rows: Sequence[dict[str, Any]], by: str, title: str, path: Path) -> None:
    """Draw one line for each value of `by`, accuracy over `macs_share`, as PNG (needs the extra 'report')."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row[by] for row in rows)):
        part = sorted((row for row in rows if row[by] == name), key=lambda row: row["macs_share"])
        axes.plot(
            [row["macs_share"] for row in part],
            [100 * row["accuracy"] for row in part],
            "o-" if number < COLOURS else "s--",
            label=name,
        )
    axes.set_xlabel("MACs, share of dense")
    axes.set_ylabel("accuracy on the test photographs, %")
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
