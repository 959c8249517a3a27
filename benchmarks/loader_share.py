"""What loading costs in training: time to make a batch against a step of ResNet-20, interleaved, medians.

The loader works ahead in a thread of its own, so that its share is an upper bound of what it adds to a step.

Usage: python benchmarks/loader_share.py [--batch 128] [--rounds 15] [--threads N] [--output FILE.csv]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from thrifty.cli.bench import write_csv
from thrifty.data.images import ImageSet
from thrifty.data.loader import TrainingLoader
from thrifty.machine import machine, versions
from thrifty.zoo.nets import build

BAR = 0.05
"""Share of a step that making its batch may take."""


def main() -> None:
    """Measure, print and, if asked, write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--photographs", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    count = arguments.photographs
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
    images = ImageSet(torch.randint(0, 10, (count,)), tuple("0123456789"), range(count), pixels)
    loader = TrainingLoader(images, arguments.batch, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), seed=0)
    order = torch.randperm(count)
    model = build("resnet20").train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    loading, stepping = [], []
    for index in range(arguments.rounds + 2):
        start = time.perf_counter()
        x, y = loader._batch(order, 0, index % len(loader))
        middle = time.perf_counter()
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if index >= 2:  # the first ones warm up
            loading.append(middle - start)
            stepping.append(time.perf_counter() - middle)
    row = {
        "batch": arguments.batch,
        "threads": arguments.threads,
        "loader_ms": round(statistics.median(loading) * 1e3, 2),
        "step_ms": round(statistics.median(stepping) * 1e3, 1),
        "share": round(statistics.median(loading) / statistics.median(stepping), 4),
        "bar": BAR,
    }
    beside = {**machine(), **versions("torch")}
    print(", ".join(f"{key} {value}" for key, value in (row | beside).items()))
    if arguments.output:
        write_csv(arguments.output, [row], beside)


if __name__ == "__main__":
    main()
