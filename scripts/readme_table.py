"""Write the table of measured results into the README from the zoo's records.

Usage: python scripts/readme_table.py [--check]; with --check nothing is written, and a stale table is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import thrifty
from thrifty.files import write_text
from thrifty.zoo import Record

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- results -->\n", "<!-- /results -->")
HEADER = (
    "| model | test accuracy | drop | MACs per input | of dense | epochs |",
    "|---|---|---|---|---|---|",
)


def rows(records: list[Record]) -> list[str]:
    """A line a model; the drop is to the dense model of the same network and number of epochs, in points."""
    dense = {(record.net, record.total_epochs): record for record in records if record.method is None}
    lines = []
    for record in sorted(records, key=lambda r: (r.net, r.method is not None, -r.macs)):
        beside = dense.get((record.net, record.total_epochs))
        drop = "" if record.method is None or beside is None else f"{100 * (beside.accuracy - record.accuracy):+.2f}"
        low, high = (f"{value / 1e6:.2f}" for value in record.macs_percentiles)
        macs = f"{record.macs / 1e6:.2f} M" + (f" ({low}–{high})" if low != high else "")
        share = f"{record.macs / record.dense_macs:.3f}"
        lines.append(
            f"| `{record.name}` | {100 * record.accuracy:.2f} % | {drop} | {macs} | {share} | {record.total_epochs} |"
        )
    return lines


def table() -> str:
    """The table and what it was measured on."""
    records = thrifty.zoo.records()
    made = {f"{r.made_with['CPU'].partition(' (')[0]}, torch {r.made_with['torch']}" for r in records}
    note = (
        f"Measured by `scripts/release.py` on all {records[0].data['test']:,} test photographs of CIFAR-10 as JPEG of\n"
        "quality 75, one seed; 'drop' in points, beside the dense model of the same network and as many epochs; MACs\n"
        f"with the 5th and 95th percentile where they vary. Trained on: {'; '.join(sorted(made))}."
    )
    return "\n".join([*HEADER, *rows(records), "", note, ""])


def main() -> None:
    """Rewrite the part of the README between the marks, or check it."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    new = before + MARKS[0] + table() + MARKS[1] + after
    if "--check" in sys.argv[1:]:
        if new != text:
            raise SystemExit("the README's table is stale: run python scripts/readme_table.py")
        return
    write_text(README, new)


if __name__ == "__main__":
    main()
