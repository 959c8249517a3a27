"""Write the tables of measured results: into README.md accuracy from the zoo's records and speed from engine.csv, into
benchmarks/README.md speed from the other CSV files.

Usage: python scripts/readme_tables.py [--check]; with --check nothing is written, and a stale table is an error.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import thrifty
from thrifty.files import write_text
from thrifty.zoo import Record

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPEED = RESULTS / "engine.csv"
OTHERS = {"AntiDote": RESULTS / "antidote.csv", "LC-Net": RESULTS / "lcnet.csv"}


def accuracy_row(record: Record, beside: Record | None) -> str:
    """A model's line; the drop is to the dense model of the same network and number of epochs, in points."""
    drop = "" if record.method is None or beside is None else f"{100 * (beside.accuracy - record.accuracy):+.2f}"
    low, high = (f"{value / 1e6:.2f}" for value in record.macs_percentiles)
    macs = f"{record.macs / 1e6:.2f} M" + (f" ({low}–{high})" if low != high else "")
    share = f"{record.macs / record.dense_macs:.3f}"
    return f"| `{record.name}` | {100 * record.accuracy:.2f} % | {drop} | {macs} | {share} | {record.total_epochs} |"


def accuracy() -> str:
    """What the zoo's models reach, and what they were measured on."""
    records = thrifty.zoo.records()
    dense = sorted((record for record in records if record.method is None), key=lambda record: record.total_epochs)
    lines = ["| model | test accuracy | drop | MACs per input | of dense | epochs |", "|---|---|---|---|---|---|"]
    order = sorted(records, key=lambda r: (r.net, r.method is not None, -r.macs))
    for record in order:
        trained_as_long = [d for d in dense if d.net == record.net and d.total_epochs <= record.total_epochs]
        lines.append(accuracy_row(record, trained_as_long[-1] if trained_as_long else None))
    made = {f"{r.made_with['CPU'].partition(' (')[0]}, torch {r.made_with['torch']}" for r in records}
    note = (
        f"Measured by `scripts/release.py` on all {records[0].data['test']:,} test photographs of CIFAR-10 as JPEG of\n"
        "quality 75, one seed; 'drop' in points, beside the dense model of the same network and as many epochs (for\n"
        "`-any`, of all budgets, the next shorter trained); MACs with the 5th and 95th percentile where they vary.\n"
        f"Trained on: {'; '.join(sorted(made))}."
    )
    return "\n".join([*lines, "", note, ""])


def speed() -> str:
    """Milliseconds at batch 1, and what they were measured on."""
    rows = _rows(SPEED)
    densities = sorted({row["density"] for row in rows if row["density"]}, reverse=True)
    titles = [
        "network, threads",
        "fastest other engine, dense, ms",
        "thrifty, dense, ms",
        *(f"FBS {d}, ms" for d in densities),
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for model, image, threads in dict.fromkeys((r["model"], r["image"], r["threads"]) for r in rows):
        part = [r for r in rows if (r["model"], r["image"], r["threads"]) == (model, image, threads)]
        ours = {r["density"]: r for r in part if r["engine"] == "thrifty"}
        cells = [*_dense_cells(part), *(_against_others(ours[d]) for d in densities)]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    openvino, torch = first["openvino"].partition("-")[0], first["torch"].partition("+")[0]
    note = (
        "Median latency of one image, in ms; in the FBS columns the speed-up over the fastest other engine and, in\n"
        "brackets, the efficiency: speed-up / (dense MACs / MACs), which is 1 where time falls exactly as work\n"
        f"falls. Measured by `make bench` on {first['CPU']}, {first['cores']} cores, {first['instructions']};\n"
        f"ONNX Runtime {first['onnxruntime']}, OpenVINO {openvino}, torch {torch}; gates with random weights."
    )
    return "\n".join([*lines, "", note, ""])


def others() -> str:
    """Milliseconds at batch 1 of the methods that have settings of their own."""
    lines = [
        "| network, threads | fastest other engine, dense, ms | thrifty, dense, ms | method | MACs of dense | ms |",
        "|---|---|---|---|---|---|",
    ]
    machines = set()
    for name, path in OTHERS.items():
        rows = _rows(path)
        for row in rows:
            machines.add(f"{row['CPU']}, {row['cores']} cores, {row['instructions']}")
            if not row["method"]:
                continue
            same = [r for r in rows if (r["model"], r["threads"]) == (row["model"], row["threads"])]
            cells = [*_dense_cells(same), name, f"{float(row['mac_ratio']):.3f}", _against_others(row)]
            lines.append(f"| {' | '.join(cells)} |")
    note = (
        "The same for AntiDote at its paper's ratios (ResNet-18: half of channels and columns) and for LC-Net at half\n"
        "of the MACs: the zoo's model on the photographs that ship, and networks with random gates. Measured by\n"
        f"`make bench` on {'; '.join(sorted(machines))}; `benchmarks/results/lcnet.csv` has further percentiles."
    )
    return "\n".join([*lines, "", note, ""])


def _rows(path: Path) -> list[dict[str, str]]:
    """What was measured at batch 1."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if row["batch"] == "1"]


def _dense_cells(rows: list[dict[str, str]]) -> list[str]:
    """A network and its threads, the time of the fastest other engine, and ours of the dense network."""
    dense = next(row for row in rows if row["engine"] == "thrifty" and not row["method"])
    fastest = next(row for row in rows if row["engine"] == dense["fastest"])
    name = f"{dense['model'].removeprefix('torchvision:')}, {dense['image']} px, {dense['threads']}"
    return [name, f"{_ms(fastest)} ({fastest['engine']})", _ms(dense)]


def _against_others(row: dict[str, str]) -> str:
    """Time, speed-up and efficiency."""
    return f"{_ms(row)}, {float(row['speed_up']):.2f}× ({float(row['efficiency']):.2f})"


def _ms(row: dict[str, str]) -> str:
    ms = float(row["ms"])
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def replaced(text: str, name: str, table: Callable[[], str]) -> str:
    """The text with the part between the marks of this name made anew."""
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = text.partition(first)
    _, _, after = rest.partition(last)
    return before + first + table() + last + after


TABLES = {
    ROOT / "README.md": {"results": accuracy, "speed": speed},
    ROOT / "benchmarks" / "README.md": {"methods": others},
}


def main() -> None:
    """Rewrite the parts of the files between the marks, or check them."""
    for path, tables in TABLES.items():
        text = path.read_text(encoding="utf-8")
        new = text
        for name, table in tables.items():
            new = replaced(new, name, table)
        if new == text:
            continue
        if "--check" in sys.argv[1:]:
            raise SystemExit(f"tables of {path.relative_to(ROOT)} are stale: run python scripts/readme_tables.py")
        write_text(path, new)


if __name__ == "__main__":
    main()
