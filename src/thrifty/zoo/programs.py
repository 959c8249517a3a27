"""Compiled programs of the zoo's models: what `thrifty.load(name)` runs. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path

from thrifty.errors import CheckpointError
from thrifty.files import sha256
from thrifty.program import Program
from thrifty.program_file import load_program
from thrifty.zoo.records import records


def read_program(source: str | Path) -> Program:
    """The program of a zoo model's name, or of a file; what is neither is taken for a path.

    Raises:
        CheckpointError: a file of the zoo's is missing, or is not the one that its record describes.
        ProgramError: the file is missing or damaged.
    """
    path = Path(source)
    found = None if os.path.isfile(path) else {record.name: record for record in records()}.get(str(source))
    if found is None:
        return load_program(path)
    if found.program_sha256 is None or not found.program.is_file():
        raise CheckpointError(f"{source} has no compiled program. Make it: python scripts/compile_zoo.py {source}")
    for file, expected in ((found.program, found.program_sha256), (found.path, found.sha256)):
        if not file.is_file() or sha256(file) != expected:
            raise CheckpointError(f"{file} is not the file that its record describes. Install thrifty anew.")
    return load_program(found.program, found.path)
