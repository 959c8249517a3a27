"""Layer gates that are sampled in training, for comparison with LC-Net.

Veit, Belongie, 'Convolutional Networks with Adaptive Inference Graphs', ECCV 2018, arXiv 1711.11503 (ConvNet-AIG), and
Wang, Yu, Dou, Darrell, Gonzalez, 'SkipNet: Learning Dynamic Routing in Convolutional Networks', ECCV 2018,
arXiv 1711.09485: a residual block runs or not, as a logit says that a small network gives for the block's input. In
training the decision is drawn by the Gumbel-softmax trick (Jang, Gu, Poole, arXiv 1611.01144; Maddison, Mnih, Teh,
arXiv 1611.00712): hard forward, the gradient that of the relaxed sample. In evaluation the more probable decision is
taken. A block that runs is not scaled.

Differs from the papers in
- the network behind a gate: global average pool and one linear unit, as in L-Net. For two choices one logit is
  enough, with logistic noise.
- how the budget is met, by LC-Net's price, see `thrifty.methods.budget`; ConvNet-AIG aims at a rate of execution per
  layer.
- the start: weights 0 and a logit of `START`, so that evaluation gives the dense model's function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from thrifty.blocks import Block, residual_blocks
from thrifty.conversion import Place
from thrifty.gates import LayerGate, LoweredGate, Pair
from thrifty.graph import Sites
from thrifty.methods.budget import BudgetConfig, Budgeted

START = 3.0
"""Logit of running at first: 95 % of the blocks run in training."""

ALMOST_ONE = 1 - 2**-24
"""The largest float32 below 1: a clipped score above it is 1."""


@dataclass(frozen=True, kw_only=True)
class Gumbel(BudgetConfig):
    """Settings of sampled layer gates (see the module's text for the method and its sources).

    Attributes:
        temperature: of the relaxed samples whose gradient is taken.
    """

    name: ClassVar[str] = "gumbel"
    version: ClassVar[int] = 1

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("temperature", "a finite number above 0", lambda temperature: temperature > 0)

    def place(self, model: nn.Module, sites: Sites) -> tuple[Place, ...]:
        """Gate every residual block that can take it."""
        layers = self.gate_layers(
            model, sites, residual_blocks(model), lambda block, inputs: SampledLayer(block, inputs, self.temperature)
        )
        return tuple(
            layers.place(site, site.name in layers.skipped, "" if site.name in layers.notes else "in no residual block")
            for site in sites
        )


class SampledLayer(Budgeted, LayerGate):
    """Runs a block where the logit of maps x [N, C, H, W] is positive, or by a draw in training.

    With a threshold it runs where its probability is above (1 + threshold) / 2.
    """

    CENTRE = 0.0

    def __init__(self, block: Block, inputs: int, temperature: float) -> None:
        super().__init__(block.name, block.members)
        self.prepare(inputs, torch.full((1,), START))
        self.temperature = temperature

    def forward(self, x: Tensor) -> Pair:
        logits = self.predicted(x)[:, 0] - self._least()
        if not self.training:
            decided = logits > 0
            return decided.to(x.dtype), decided
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        relaxed = torch.sigmoid((logits + torch.log(uniform) - torch.log1p(-uniform)) / self.temperature)
        decided = relaxed.detach() > 0.5
        hard = decided.to(relaxed.dtype)
        self.open(hard.detach())
        return hard + (relaxed - relaxed.detach()), decided

    def lower(self, shape: tuple[int, int, int]) -> LoweredGate:
        """The gate as programs have it: a score of 1 + logit clipped to [0, 1], which counts where it is 1."""
        weight, bias = self.of_means()
        tensors = {"weight": weight, "bias": bias + 1 - self._least()}
        return LoweredGate("layer_gate", {"threshold": ALMOST_ONE}, tensors)

    def _least(self) -> Tensor:
        """What a logit has to be above, by the threshold."""
        return torch.log1p(self.threshold) - torch.log1p(-self.threshold)
