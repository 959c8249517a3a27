"""Networks in every engine, dense and with a method, on one thread and two: speed-up and efficiency.

Usage: python benchmarks/engine.py [--method fbs|antidote|lcnet] [--output FILE.csv] [--seconds 1.5] [--nets resnet18 …]

Each network runs in a process of its own, so that none finds the memory as another left it. A file that is there
already keeps its rows of other networks: one file a method. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from thrifty.cli.bench import write_csv

SIDES = {"resnet18": 224, "resnet50": 224, "vgg16_bn": 224}
"""Network -> side of its photographs in px; 32 for the others."""

METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "fbs": dict.fromkeys(("resnet18", "vgg16_bn", "mcifarnet", "resnet20", "resnet56", "vgg16"), ()),
    "antidote": {
        "resnet56": ("--set", "channels=[0.3, 0.3, 0.6]", "--set", "columns=0.6"),
        "vgg16": ("--set", "channels=[0.2, 0.2, 0.6, 0.9, 0.9]"),
        "resnet18": ("--set", "channels=0.5", "--set", "columns=0.5"),
    },
    "lcnet": {
        "resnet56-cifar10-lcnet": ("--photographs", "sample"),
        "resnet56": ("--set", "target=0.5"),
        "resnet50": ("--set", "target=0.5"),
    },
}
"""Method -> network -> options: settings, those of the paper where it gives any, or the photographs that a trained
model decides on. FBS runs at `--density`."""

BARS = {
    ("fbs", "resnet18"): 0.85, ("fbs", "vgg16_bn"): 0.85, ("fbs", "mcifarnet"): 0.85, ("lcnet", "resnet50"): 0.85,
}  # fmt: skip
METHOD_BARS = {"fbs": 0.75, "antidote": 0.70, "lcnet": 0.75}
"""Efficiency that is asked for at batch 1: of single networks, and of all others."""


def main() -> None:
    """Run `thrifty bench` for each network and put the rows together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="fbs", choices=list(METHODS))
    parser.add_argument("--nets", nargs="+")
    parser.add_argument("--seconds", default="1.5")
    parser.add_argument("--density", nargs="+", default=["0.5", "0.7"])
    parser.add_argument("--threads", nargs="+", default=["1", "2"])
    parser.add_argument("--batch", nargs="+", default=["1", "16"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cases = METHODS[arguments.method]
    nets = arguments.nets or list(cases)
    if set(nets) - set(cases):
        parser.error(f"--nets of {arguments.method} are: {', '.join(cases)}")
    rows: list[dict[str, str]] = []
    if arguments.output and arguments.output.exists():
        with arguments.output.open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["model"] not in nets]
    with tempfile.TemporaryDirectory() as directory:
        for net in nets:
            file = Path(directory) / "rows.csv"
            command = [sys.executable, "-m", "thrifty", "bench", net, "--csv", str(file), *cases[net]]
            command += ["--image", str(SIDES.get(net, 32)), "--method", arguments.method]
            for option in ("density", "threads", "batch") if arguments.method == "fbs" else ("threads", "batch"):
                command += [f"--{option}", *getattr(arguments, option)]
            subprocess.run([*command, "--seconds", arguments.seconds], check=True)  # noqa: S603 (our own command line)
            with file.open(newline="", encoding="utf-8") as stream:
                rows += csv.DictReader(stream)
            if arguments.output:
                write_csv(arguments.output, rows, {})
    for row in rows:
        if row["batch"] == "1" and row["method"]:
            bar = BARS.get((row["method"], row["model"]), METHOD_BARS[row["method"]])
            met = "met" if float(row["efficiency"]) >= bar else "MISSED"
            what = f"{row['model']}, {row['method']} {row['density']}, {row['threads']} threads"
            print(f"{what}: efficiency {float(row['efficiency']):.2f}, bar {bar}: {met}")


if __name__ == "__main__":
    main()
