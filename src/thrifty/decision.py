"""What one input computes. The only form in which decisions travel between counting, engine, export and report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.errors import ThriftyError


@dataclass(frozen=True)
class Decision:
    """Decisions of one gate for a batch of N inputs; None where the gate does not decide on that axis.

    Attributes:
        channels: bool [N, C], channels that are computed.
        columns: bool [N, H, W], positions that are computed.
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
