"""Six networks in every engine, dense and with FBS at two densities, on one thread and two: speed-up and efficiency.

Usage: python benchmarks/engine.py [--output FILE.csv] [--seconds 1.5] [--nets resnet18 mcifarnet …]

Each network runs in a process of its own, so that none finds the memory as another left it. A file that is there
already keeps its rows of other networks. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from thrifty.cli.bench import write_csv

NETS = {
    "resnet18": 224,
    "vgg16_bn": 224,
    "mcifarnet": 32,
    "resnet20": 32,
    "resnet56": 32,
    "vgg16": 32,
}
"""Network -> side of its photographs in px."""

BARS = {"resnet18": 0.85, "vgg16_bn": 0.85, "mcifarnet": 0.85}
OTHERS_BAR = 0.75
"""Efficiency that is asked for at batch 1: of the larger networks, and of the others at 32 px."""


def main() -> None:
    """Run `thrifty bench` for each network and put the rows together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seconds", default="1.5")
    parser.add_argument("--density", nargs="+", default=["0.5", "0.7"])
    parser.add_argument("--threads", nargs="+", default=["1", "2"])
    parser.add_argument("--batch", nargs="+", default=["1", "16"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, str]] = []
    if arguments.output and arguments.output.exists():
        with arguments.output.open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["model"] not in arguments.nets]
    with tempfile.TemporaryDirectory() as directory:
        for net in arguments.nets:
            file = Path(directory) / "rows.csv"
            command = [sys.executable, "-m", "thrifty", "bench", net, "--image", str(NETS[net]), "--csv", str(file)]
            for option in ("density", "threads", "batch"):
                command += [f"--{option}", *getattr(arguments, option)]
            subprocess.run([*command, "--seconds", arguments.seconds], check=True)  # noqa: S603 (our own command line)
            with file.open(newline="", encoding="utf-8") as stream:
                rows += csv.DictReader(stream)
            if arguments.output:
                write_csv(arguments.output, rows, {})
    for row in rows:
        if row["batch"] == "1" and row["method"]:
            bar = BARS.get(row["model"], OTHERS_BAR)
            met = "met" if float(row["efficiency"]) >= bar else "MISSED"
            what = f"{row['model']}, {row['method']} {row['density']}, {row['threads']} threads"
            print(f"{what}: efficiency {float(row['efficiency']):.2f}, bar {bar}: {met}")


if __name__ == "__main__":
    main()
