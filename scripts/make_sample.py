"""Choose the embedded sample: of each class's 1,000 test photographs the 100 whose number is divisible by ten.

Usage: python scripts/make_sample.py ROOT, where ROOT holds test/<class>/NNNN.jpg.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src" / "thrifty" / "data" / "sample"


def main(root: Path) -> None:
    """Copy the photographs, byte by byte."""
    chosen = [path for path in sorted((root / "test").glob("*/*.jpg")) if int(path.stem) % 10 == 0]
    if len(chosen) != 1000:
        raise SystemExit(f"expected 1,000 photographs under {root}/test, found {len(chosen)}")
    fresh = Path(tempfile.mkdtemp(dir=TARGET.parent, prefix=".sample."))
    for path in chosen:
        (fresh / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, fresh / path.parent.name / path.name)
    fresh.chmod(0o755)
    shutil.rmtree(TARGET, ignore_errors=True)
    fresh.rename(TARGET)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
