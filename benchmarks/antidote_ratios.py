"""ResNet-20 pruned by attention at rising ratios: trained by targeted dropout, by other means, and not trained for it.

Usage: python benchmarks/antidote_ratios.py --root DATA [--runs runs] [--output benchmarks/results/antidote_ratios.csv]
DATA holds test/<class>/*.jpg. Writes a CSV and, beside it, a plot (needs the extra 'report').
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accuracy_and_cost import draw, find_model, measure, parser_of, write
from torch import nn

from thrifty import AntiDote, convert
from thrifty.cli.options import photographs
from thrifty.data.loader import EvaluationLoader
from thrifty.zoo.store import load_model

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the trained model's ratios."""

TRAINED = "resnet20-cifar10-antidote"
COMPARED = {
    "targeted dropout and sparsity, twenty epochs": TRAINED,
    "targeted dropout, six epochs": "resnet20-cifar10-antidote-short",
    "one for all ratios, six epochs": "resnet20-cifar10-antidote-any",
    "random criterion, six epochs": "resnet20-cifar10-antidote-random",
    "pruned at test time alone": "resnet20-cifar10",
    "pruned at test time alone, random": "resnet20-cifar10",
}
"""How it was made -> the model, from the zoo or from runs; those that are nowhere are left out."""


def main() -> None:
    """Evaluate each model at each strength."""
    parser = parser_of(__doc__, "antidote_ratios")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    rows = []
    for training, name in COMPARED.items():
        source = find_model(name, arguments.runs)
        if source is None:
            continue
        loader, model = _prepared(source, "random" if training.endswith("random") else "attention", arguments.root)
        for strength in STRENGTHS:
            torch.manual_seed(0)
            model.method.set_strength(model, strength)
            labels = {"training": training, "model": name, "strength": strength}
            rows.append(measure(model, loader, model.conversion.total_macs, **labels))
    write(rows, arguments.output)
    title = "ResNet-20, channels and columns pruned inside the blocks"
    draw(rows, "training", title, arguments.output.with_suffix(".png"))


def _prepared(source: str | Path, criterion: Any, root: Path) -> tuple[EvaluationLoader, Any]:
    """The photographs and the model; a dense one is made prunable, at the trained one's ratios."""
    model: nn.Module
    model, card = load_model(source)
    loader = photographs(card, "folder", root)
    if card.method is None:
        trained, _ = load_model(TRAINED)
        method: Any = trained.method
        config = AntiDote(channels=method.channels, columns=method.columns, criterion=criterion)
        model = convert(model, config, torch.zeros(1, 3, card.size, card.size))
    return loader, model


if __name__ == "__main__":
    main()
