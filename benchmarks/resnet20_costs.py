"""What ResNet-20 reaches at which cost: dense, by gates at several budgets, and smaller dense networks beside it.

Usage: python benchmarks/resnet20_costs.py --root DATA [--runs runs] [--output benchmarks/results/resnet20_costs.csv]
DATA holds train/<class>/*.jpg and test/<class>/*.jpg. Models that the zoo does not have are taken from finished runs of
the recipes of their names. Writes a CSV and, beside it, a plot (needs the extra 'report').
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accuracy_and_cost import draw, find_model, measure, parser_of, training_images, write

from thrifty import count_macs, set_budget
from thrifty.cli.options import photographs
from thrifty.zoo.nets import build
from thrifty.zoo.store import load_model

COMPARED = {
    "dense": ("resnet20-cifar10", "resnet14-cifar10", "resnet8-cifar10"),
    "dense, narrower": ("resnet20-cifar10", "resnet20-cifar10-narrow"),
    "LC-Net": ("resnet20-cifar10-lcnet-70", "resnet20-cifar10-lcnet-short", "resnet20-cifar10-lcnet-35"),
    "C-Net": ("resnet20-cifar10-cnet",),
    "L-Net": ("resnet20-cifar10-lnet",),
    "sampled layer gates": ("resnet20-cifar10-gumbel",),
    "FBS": ("resnet20-cifar10-fbs",),
    "dense, 40 epochs": ("resnet20-cifar10-long",),
    "LC-Net, 40 epochs": ("resnet20-cifar10-lcnet",),
}
"""What is skipped -> models, from the zoo or from runs; those that are nowhere are left out. Where no number is said
they have 26 epochs, FBS 20."""

TWICE = tuple(f"resnet20-cifar10-{name}" for name in ("lcnet-short", "cnet", "lnet", "gumbel"))
"""Recipes that were trained from a second seed too, as runs whose names end in -seed-1."""

LOWER = {"resnet20-cifar10-lcnet-short": (0.45, 0.4, 0.35), "resnet20-cifar10-cnet": (0.45, 0.4, 0.35)}
"""Shares of the dense MACs that a threshold brings models down to, beside their own."""

MEASURED_ON = 512


def main() -> None:
    """Evaluate each model at its own cost and at lower ones."""
    parser = parser_of(__doc__, "resnet20_costs")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    whole = int(count_macs(build("resnet20"), torch.zeros(1, 3, 32, 32)).total[0])
    rows: list[dict[str, Any]] = []
    for kind, names in COMPARED.items():
        for name in (
            run for recipe in names for run in ([recipe, f"{recipe}-seed-1"] if recipe in TWICE else [recipe])
        ):
            source = find_model(name, arguments.runs)
            if source is not None:
                rows += _measured(kind, name, source, arguments.root, whole)
    write(rows, arguments.output)
    draw(rows, "method", "What ResNet-20 reaches at which cost", arguments.output.with_suffix(".png"))


def _measured(method: str, name: str, source: str | Path, root: Path, whole: int) -> list[dict[str, Any]]:
    """Rows of one model, `whole` the MACs of the dense ResNet-20."""
    model: Any
    model, card = load_model(source)
    loader = photographs(card, "folder", root)
    rows = [measure(model, loader, whole, method=method, model=name, budget=None)]
    if name in LOWER:
        few = training_images(card, root, MEASURED_ON)
        for share in LOWER[name]:
            set_budget(model, share, few)
            raised = f"{method}, threshold raised"
            rows.append(measure(model, loader, whole, method=raised, model=name, budget=share))
    return rows


if __name__ == "__main__":
    main()
