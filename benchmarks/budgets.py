"""One set of weights at several budgets: accuracy of the zoo's one-for-all model on the test photographs.

Usage: python benchmarks/budgets.py --root DATA [--output benchmarks/results/budgets.csv]
DATA holds test/<class>/*.jpg. Budgets are set on photographs of the training set, DATA/train/<class>/*.jpg.
"""

from __future__ import annotations

from typing import Any

import torch
from accuracy_and_cost import measure, parser_of, training_images, write

from thrifty import set_budget
from thrifty.cli.options import photographs
from thrifty.zoo.store import load_model

MODEL = "resnet20-cifar10-any"
BUDGETS = (1.0, 0.8, 0.6, 0.4)
MEASURED_ON = 64


def main() -> None:
    """Evaluate at each budget."""
    arguments = parser_of(__doc__, "budgets").parse_args()
    torch.set_flush_denormal(True)
    model: Any
    model, card = load_model(MODEL)
    few = training_images(card, arguments.root, MEASURED_ON)
    loader = photographs(card, "folder", arguments.root)
    rows = []
    for budget in BUDGETS:
        set_budget(model, budget, few)
        rows.append(measure(model, loader, model.conversion.total_macs, model=MODEL, budget=budget))
    write(rows, arguments.output)


if __name__ == "__main__":
    main()
