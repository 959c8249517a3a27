"""What gates cost in training: time of a step with FBS against a step of the dense network, interleaved, medians.

Usage: python benchmarks/training_step.py [--net resnet20] [--compile] [--output FILE.csv]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from thrifty import FBS, convert
from thrifty.dynamic import Dynamic
from thrifty.machine import machine
from thrifty.zoo.nets import build


def step_of(model: nn.Module, batch: int, compiled: bool) -> Callable[[], None]:
    """A function that takes one SGD step on random photographs."""
    model = model.train().to(memory_format=torch.channels_last)
    run = torch.compile(model) if compiled else model
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,))

    def step() -> None:
        loss = F.cross_entropy(run(x), y)
        if isinstance(model, Dynamic):
            loss = loss + model.regularization()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


def main() -> None:
    """Measure, print and, if asked, write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", default=["resnet20", "mcifarnet"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    rows = []
    for name in arguments.net:
        dense = build(name)
        dynamic = convert(dense, FBS(density=0.5), torch.zeros(1, 3, 32, 32))
        steps = {"dense": step_of(dense, arguments.batch, arguments.compile)}
        steps["fbs"] = step_of(dynamic, arguments.batch, arguments.compile)
        times: dict[str, list[float]] = {kind: [] for kind in steps}
        for round_number in range(arguments.rounds + 2):
            for kind, step in steps.items():
                start = time.perf_counter()
                step()
                if round_number >= 2:
                    times[kind].append(time.perf_counter() - start)
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        rows.append(
            {
                "net": name,
                "batch": arguments.batch,
                "threads": arguments.threads,
                "compiled": arguments.compile,
                "dense_ms": round(1e3 * medians["dense"], 1),
                "fbs_ms": round(1e3 * medians["fbs"], 1),
                "ratio": round(medians["fbs"] / medians["dense"], 3),
                "cpu": machine()["CPU"],
                "torch": torch.__version__.partition("+")[0],
            }
        )
        print(rows[-1])
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, fieldnames=list(rows[0]))
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
