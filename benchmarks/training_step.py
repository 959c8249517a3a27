"""What gates cost in training: time of a step with FBS against a step of the dense network, in single and in mixed
precision, interleaved, medians.

Usage: python benchmarks/training_step.py [--net resnet20] [--compile] [--output FILE.csv]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from thrifty import FBS, convert
from thrifty.cli.bench import write_csv
from thrifty.dynamic import Dynamic
from thrifty.machine import machine, versions
from thrifty.zoo.nets import build

PRECISIONS = ("float32", "bfloat16")


def step_of(model: nn.Module, batch: int, compiled: bool, precision: str) -> Callable[[], None]:
    """A function that takes one SGD step on random photographs."""
    model = model.train().to(memory_format=torch.channels_last)
    run = torch.compile(model) if compiled else model
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = run(x)
        loss = F.cross_entropy(logits.float(), y)
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
        steps = {}
        for precision in PRECISIONS:
            dense = build(name)
            dynamic = convert(dense, FBS(density=0.5), torch.zeros(1, 3, 32, 32))
            for kind, model in (("dense", dense), ("fbs", dynamic)):
                steps[precision, kind] = step_of(model, arguments.batch, arguments.compile, precision)
        times: dict[tuple[str, str], list[float]] = {case: [] for case in steps}
        for round_number in range(arguments.rounds + 2):
            for case, step in steps.items():
                start = time.perf_counter()
                step()
                if round_number >= 2:
                    times[case].append(time.perf_counter() - start)
        ms = {case: 1e3 * statistics.median(values) for case, values in times.items()}
        for precision in PRECISIONS:
            rows.append(
                {
                    "net": name,
                    "batch": arguments.batch,
                    "threads": arguments.threads,
                    "compiled": arguments.compile,
                    "precision": precision,
                    "dense_ms": round(ms[precision, "dense"], 1),
                    "fbs_ms": round(ms[precision, "fbs"], 1),
                    "ratio": round(ms[precision, "fbs"] / ms[precision, "dense"], 3),
                }
            )
            print(rows[-1])
    if arguments.output:
        write_csv(arguments.output, rows, {**machine(), **versions("torch")})


if __name__ == "__main__":
    main()
