"""What one input computes. The only form in which decisions travel between counting, engine, export and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from thrifty.errors import ThriftyError


@dataclass(frozen=True)
class Decision:
    """Decisions of one gate for a batch of N inputs; None where the gate does not decide on that axis.

    Attributes:
        channels: bool [N, C], channels that are computed (or read, where the gate decides on a map that is read).
        columns: bool [N, H, W], positions that are read.
        layer: bool [N], whether the layer is computed at all.

    The arrays are torch tensors or NumPy arrays.
    """

    channels: Any = None
    columns: Any = None
    layer: Any = None

    def __post_init__(self) -> None:
        for name, rank in (("channels", 2), ("columns", 3), ("layer", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if value.ndim != rank or "bool" not in str(value.dtype):
                raise ThriftyError(
                    f"a decision's {name} must be bool of rank {rank}, not {value.dtype} of shape {tuple(value.shape)}."
                )

    def only(self, inputs: Any) -> Decision:
        """The same for the inputs of a mask, bool [N]; nothing for the others."""

        def masked(value: Any) -> Any:
            return None if value is None else value & inputs.reshape(-1, *[1] * (value.ndim - 1))

        return Decision(masked(self.channels), masked(self.columns), masked(self.layer))

    def checked(self, name: str, axes: Mapping[str, tuple[int, ...]], count: int) -> dict[str, np.ndarray[Any, Any]]:
        """What is given of it as C-contiguous NumPy arrays, by axis.

        Args:
            name: of the gate that it is for.
            axes: that the gate decides on: name -> shape for one input.
            count: of inputs.

        Raises:
            ThriftyError: an axis is given that the gate does not decide on, or not in its shape.
        """
        given = {axis: getattr(self, axis) for axis in ("channels", "columns", "layer")}
        given = {axis: value for axis, value in given.items() if value is not None}
        for axis, value in given.items():
            if axis not in axes:
                known = " and ".join(axes) or "nothing"
                raise ThriftyError(f"the decision for {name} says {axis}, but its gate decides on {known}.")
            shape = (count, *axes[axis])
            if tuple(value.shape) != shape:
                raise ThriftyError(
                    f"the {axis} decided for {name} are {list(value.shape)}, but must be bool {list(shape)}."
                )
        return {axis: np.ascontiguousarray(np.asarray(value)) for axis, value in given.items()}
