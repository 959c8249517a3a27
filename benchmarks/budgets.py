"""One set of weights at several budgets: accuracy of the zoo's one-for-all model on the test photographs.

Usage: python benchmarks/budgets.py --root DATA [--output benchmarks/results/budgets.csv]
DATA holds test/<class>/*.jpg. Budgets are set on photographs of the training set, DATA/train/<class>/*.jpg.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from thrifty import set_budget
from thrifty.cli.bench import write_csv
from thrifty.cli.options import photographs
from thrifty.evaluation import evaluate
from thrifty.machine import machine, versions
from thrifty.zoo.store import load_model

MODEL = "resnet20-cifar10-any"
BUDGETS = (1.0, 0.8, 0.6, 0.4)
MEASURED_ON = 64


def main() -> None:
    """Evaluate at each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/budgets.csv"))
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    model: Any
    model, card = load_model(MODEL)
    few, _ = next(iter(photographs(card, "folder", arguments.root, "train")))
    loader = photographs(card, "folder", arguments.root)
    rows = []
    for budget in BUDGETS:
        set_budget(model, budget, few[:MEASURED_ON])
        result = evaluate(model, loader)
        rows.append(
            {
                "model": MODEL,
                "budget": budget,
                "macs_share": result.macs.mean / model.conversion.total_macs,
                "accuracy": result.accuracy,
                "photographs": len(result.labels),
            }
        )
        print(f"budget {budget}: {result.accuracy:.4f} at {rows[-1]['macs_share']:.3f} of the MACs", flush=True)
    write_csv(arguments.output, rows, {**machine(), **versions("torch")})


if __name__ == "__main__":
    main()
