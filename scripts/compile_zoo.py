"""Compile the zoo's models to the programs that run without torch, and note their sums in the records.

Usage: python scripts/compile_zoo.py [NAME …]; all models if none is named.
"""

from __future__ import annotations

import sys

from thrifty import zoo
from thrifty.zoo.compilation import compile_record


def main() -> None:
    """Compile, one after the other."""
    names = sys.argv[1:] or [record.name for record in zoo.records()]
    for name in names:
        record = compile_record(zoo.record(name))
        print(f"{record.program}: {record.program.stat().st_size / 1e6:.1f} MB, sha256 {record.program_sha256}")


if __name__ == "__main__":
    main()
