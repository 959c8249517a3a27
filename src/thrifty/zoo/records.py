"""What is known of each trained model in the package: a JSON file beside its weights. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thrifty.errors import CheckpointError
from thrifty.files import write_text

WEIGHTS = Path(__file__).parent / "weights"
PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Record:
    """One trained model.

    Attributes:
        name: how `load` knows it.
        net: its network's definition.
        method: settings of the method, or None for a dense model.
        recipe: name of the recipe that trained it.
        lineage: the recipes whose weights it started from, oldest first.
        data: what it was trained and tested on, and how many photographs each.
        seed: of the recipe.
        epochs: of its own recipe.
        total_epochs: including those of its lineage.
        accuracy: on the test photographs, in [0, 1], measured once.
        validation_accuracy: on the photographs held out of training.
        macs: mean MACs per test photograph, gates included.
        macs_percentiles: 5th and 95th percentile of the MACs.
        dense_macs: MACs of the dense network.
        parameters: number of trained values.
        made_with: CPU, threads and versions.
        sha256: of the weights' file.
        program_sha256: of the compiled program, or None where there is none yet.
        curve: what `set_budget` can make of it: by 'budget', a share of the dense MACs, the 'accuracy' and mean 'macs'
            on the photographs held out of training; empty for a model that was trained for one density.
    """

    name: str
    net: str
    method: dict[str, Any] | None
    recipe: str
    lineage: tuple[str, ...]
    data: dict[str, Any]
    seed: int
    epochs: int
    total_epochs: int
    accuracy: float
    validation_accuracy: float
    macs: float
    macs_percentiles: tuple[float, float]
    dense_macs: int
    parameters: int
    made_with: dict[str, Any]
    sha256: str
    program_sha256: str | None = None
    curve: tuple[dict[str, float], ...] = ()

    @property
    def path(self) -> Path:
        """The weights' file."""
        return WEIGHTS / f"{self.name}.safetensors"

    @property
    def program(self) -> Path:
        """The compiled program, which needs no torch."""
        return PROGRAMS / f"{self.name}.thrifty"

    def write(self) -> None:
        """Put the record beside the weights."""
        write_text(self.path.with_suffix(".json"), json.dumps(asdict(self), indent=2) + "\n")


def records() -> list[Record]:
    """All models of the package, by name."""
    return [_read(path) for path in sorted(WEIGHTS.glob("*.json"))]


def record(name: str) -> Record:
    """The record of one model.

    Raises:
        CheckpointError: the package has no such model.
    """
    found = records()
    for candidate in found:
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in found)
    raise CheckpointError(f"the zoo has no model {name!r}. It has: {known}.")


def _read(path: Path) -> Record:
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in ("lineage", "macs_percentiles", "curve"):
        values[key] = tuple(values.get(key, ()))
    return Record(**values)
