"""Pure functions of gates, and the two modules that every channel-gating method is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.density import check_density, kept

__all__ = [
    "CONV_ATTRIBUTES",
    "Gate",
    "GatedConv",
    "LoweredGate",
    "Pair",
    "check_density",
    "kept",
    "mean_magnitude",
    "top_k_mask",
]

Pair = tuple[Tensor, Tensor]


def top_k_mask(scores: Tensor, k: int | Tensor) -> Tensor:
    """The k highest scores of each row; equal scores go to the lowest index.

    Args:
        scores: [N, C].
        k: how many to keep, an int or an int64 scalar tensor; from C on, all are kept.

    Returns:
        bool [N, C] with exactly min(k, C) true in each row.
    """
    order = torch.sort(scores.detach(), dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank < k


def mean_magnitude(x: Tensor) -> Tensor:
    """Mean of |x| over the positions of each channel: [N, C, H, W] -> [N, C]."""
    # As a norm: forward reads the map once and writes no map, backward scales [N, C] and not the map.
    return torch.linalg.vector_norm(x, 1, (2, 3)) / x[0, 0].numel()


@dataclass(frozen=True)
class LoweredGate:
    """A gate as operators of a program carry it.

    Attributes:
        kind: how executors decide (see `thrifty.program`).
        attributes: its settings there.
        tensors: its weights by role, without the prefix 'gate_'.
    """

    kind: str
    attributes: dict[str, int]
    tensors: dict[str, Tensor]


class Gate(nn.Module, ABC):
    """Decides per input which of `channels` output channels are computed, and by how much each is scaled.

    `forward` takes the map that the gated convolution reads, [N, C_in, H, W], and returns the scale [N, channels],
    zero where a channel is skipped, and the decision, bool [N, channels].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    @abstractmethod
    def forward(self, x: Tensor) -> Pair:
        """Scale and decision for a map x [N, C_in, H, W]."""

    @abstractmethod
    def overhead(self, shape: torch.Size) -> int:
        """MACs that deciding costs per input, for a map of `shape` [N, C_in, H, W]."""

    @abstractmethod
    def lower(self) -> LoweredGate:
        """The gate in the form that programs have.

        Raises:
            LoweringError: programs have none for it.
        """


CONV_ATTRIBUTES = {"weight", "bias", *nn.Conv2d.__constants__} - {"training"}
"""What a model's forward may read from a convolution that it also calls."""


class GatedConv(nn.Module):
    """A convolution, its batch normalisation if it has one, and the gate that scales their output channels.

    The gate multiplies after normalisation, so that a skipped channel is exactly zero for whatever reads it.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module | None, gate: Gate) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        scale, _ = self.gate(x)
        y = self.conv(x)
        if self.norm is not None:
            y = self.norm(y)
        return y * scale[:, :, None, None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.conv, name) if name in CONV_ATTRIBUTES else super().__getattr__(name)
