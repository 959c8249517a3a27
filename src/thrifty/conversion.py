"""The report of a conversion: which layers are gated, which stay dense and why, and what share of the work that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thrifty.errors import ThriftyError

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("layer", "gated", "MACs", "gate MACs", "note")


@dataclass(frozen=True)
class Place:
    """One convolution, or a linear layer that is skipped with its block.

    Attributes:
        name: its name in the model.
        gated: whether a gate was put there.
        note: why it stays dense; or, of a gated one, what limits it.
        macs: its dense MACs per input; 0 where the example did not reach it.
        gate_macs: what the gate costs per input.
    """

    name: str
    gated: bool
    note: str = ""
    macs: int = 0
    gate_macs: int = 0


@dataclass(frozen=True)
class Conversion:
    """What `convert` did; print it.

    Attributes:
        method: name of the method.
        places: every convolution of the model in the order of execution, then linear layers that layer gates skip.
        total_macs: dense MACs of the whole model per input.
        layers: dense MACs per input of each layer that has any, by name.
        input_shape: [C, H, W] of the inputs for which MACs are given, those of the example.
    """

    method: str
    places: tuple[Place, ...]
    total_macs: int
    layers: Mapping[str, int]
    input_shape: tuple[int, ...]

    def check_shape(self, x: Tensor) -> None:
        """An error where inputs x [N, C, H, W] are not of the shape for which MACs are given."""
        if tuple(x.shape[1:]) != self.input_shape:
            raise ThriftyError(
                f"inputs are {list(x.shape[1:])}, but the model was converted for {list(self.input_shape)}, of which "
                "shares of the MACs are taken. Convert it with an example of the new shape and load its state_dict."
            )

    @property
    def coverage(self) -> float:
        """Share of the dense MACs that is in gated layers, in [0, 1]."""
        return sum(place.macs for place in self.places if place.gated) / self.total_macs if self.total_macs else 0.0

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The report as text, a row a layer, under `COLUMNS`."""
        return [
            (p.name, "yes" if p.gated else "no", f"{p.macs:,}", f"{p.gate_macs:,}" if p.gated else "", p.note)
            for p in self.places
        ]

    def __str__(self) -> str:
        table = [COLUMNS, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: how many layers are gated and what share of the MACs they hold."""
        gated = sum(place.gated for place in self.places)
        return (
            f"{self.method}: {gated} of {len(self.places)} layers gated, "
            f"{self.coverage:.1%} of {self.total_macs / 1e6:,.2f} M MACs"
        )
