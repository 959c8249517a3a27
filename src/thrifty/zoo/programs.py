"""Compiled programs of the zoo's models: what `thrifty.load(name)` runs. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from thrifty.errors import CheckpointError
from thrifty.files import sha256
from thrifty.zoo.records import records


def find_program(source: str | Path) -> Path:
    """The program file of a zoo model's name; anything else is taken for a path, whether there is a file or not.

    Raises:
        CheckpointError: the zoo's file is missing, or is not the one that its record describes.
    """
    path = Path(source)
    found = None if path.is_file() else {record.name: record for record in records()}.get(str(source))
    if found is None:
        return path
    if found.program_sha256 is None or not found.program.is_file():
        raise CheckpointError(f"{source} has no compiled program. Make it: python scripts/compile_zoo.py {source}")
    if sha256(found.program) != found.program_sha256:
        raise CheckpointError(f"{found.program} is not the file that its record describes. Install thrifty anew.")
    return found.program
