"""LC-Net: layers and channels that are skipped where learned scores say so.

Xia, Yin, Dai, Jha, 'Fully Dynamic Inference with Deep Neural Networks', arXiv 2007.15151; IEEE Transactions on Emerging
Topics in Computing 10, 2022.

L-Net decides on a residual block as a whole: x + S(x) F(x), with S the global average pool of x, one linear unit, and
a clip to [0, 1]; a block of score 0 is skipped. C-Net gives each filter of a convolution a score in the same way; a
filter of score 0 is skipped, the maps of the others are multiplied by their scores. LC-Net is both in every block; each
is a method of the paper by itself.

The paper's loss, coefficients, schedule and start were not at hand; these are this project's own:
- the start: weights 0, and biases of 1 and a margin, hence scores of exactly 1 and the dense model's function. Margins
  of a layer's channels lie evenly in (0, `SPREAD`), in the order of the size of their normalisation's scales (of the
  filters where there are none), a block's is `BLOCK_MARGIN`: what matters least is the first that a price reaches.
- how the budget is met: by a price that lowers all scores, see `thrifty.methods.budget`.
- the gradient at the clip: under 0 it passes, times `leak`, where it pushes the score up, so that no gate stays closed
  for want of one; above 1 there is none. An input's derivative by a score is bounded by `STEEPEST`.
- scores are predicted from standardised means, see `thrifty.gates.MeanPredictor`.
- a threshold, 0 at first, under which scores count as 0; it is set after training by `set_budget`.

Differs from the paper in
- where C-Net stands: on the branch's first convolution that is larger than 1x1 and not depthwise (the 3x3 of a
  bottleneck), else on its first; scores come from the map which that convolution reads (the block's input where it is
  the first), and multiply behind its normalisation, before the activation.
- nets without residual blocks, in which C-Net gates every convolution that can be gated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from thrifty.blocks import Block, residual_blocks
from thrifty.conversion import Place
from thrifty.errors import ThriftyError
from thrifty.gates import ChannelGate, LayerGate, LoweredGate, Pair, predictor_macs
from thrifty.graph import ConvSite, Sites, gate_outputs
from thrifty.methods.base import NOT_SELECTED
from thrifty.methods.budget import BudgetConfig, Budgeted, check_threshold

SPREAD = 4.0
"""Of the margins of a layer's channels above 1: a fourth of them is on the way from 1 to 0 at a time."""

BLOCK_MARGIN = 2.5
"""Margin of a block's score above 1 at first."""

STEEPEST = 1.0
"""Largest derivative of an input's loss by a score. Behind a normalisation of maps that are zero it has no bound."""


@dataclass(frozen=True, kw_only=True)
class LCNet(BudgetConfig):
    """Settings of LC-Net (see the module's text for the method and its source).

    Attributes:
        layers: L-Net, a gate on every residual block.
        channels: C-Net, a gate on a convolution of every residual block, or on all where there are no blocks.
        leak: factor of the gradient that opens a gate whose score's linear value is under 0.
        threshold: scores up to it count as 0, in [0, 1).
    """

    name: ClassVar[str] = "lcnet"
    version: ClassVar[int] = 1

    layers: bool = True
    channels: bool = True
    leak: float = 0.1
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flags("layers", "channels")
        if not self.layers and not self.channels:
            raise ThriftyError("LCNet without layers and without channels gates nothing. Set one of them.")
        self.check_number("leak", "a finite number, 0 or more", lambda leak: leak >= 0)
        check_threshold(self.threshold)

    @property
    def least_threshold(self) -> float:
        """The threshold that gates learn with."""
        return self.threshold

    def place(self, model: nn.Module, sites: Sites) -> tuple[Place, ...]:
        """Gate every residual block and a convolution in each, where they can take it."""
        blocks = residual_blocks(model)
        inner = {_inner(block, sites) for block in blocks} if blocks else {site.name for site in sites}
        refused = {site.name: self._refusal(site, inner, sites) for site in sites}
        for site in sites:
            if not refused[site.name]:
                conv: Any = site.conv
                gate = ScoredChannels(conv.in_channels, _margins(model, site), self)
                gate_outputs(model, site, gate)
        layers = self.gate_layers(model, sites, blocks if self.layers else (), self._layer_gate)
        places = []
        for site in sites:
            own = refused[site.name]
            gated = not own or site.name in layers.skipped
            note = site.limit if not own else "" if gated else own
            cost = 0 if own else predictor_macs(site.input_shape, _outputs(site))
            places.append(layers.place(site, gated, note, cost))
        return tuple(places)

    def _layer_gate(self, block: Block, inputs: int) -> LayerGate:
        return ScoredLayer(block, inputs, self)

    def _refusal(self, site: ConvSite, inner: set[str], sites: Sites) -> str:
        if site.conv is None or site.blocked:
            return site.blocked
        if sites.map_of(site.name) is None:
            return "it does not read one map for each input"
        if not self.channels:
            return "its channels are not gated"
        if site.name not in inner:
            return "is not the convolution of a residual block that C-Net gates"
        if not self.selects(site.name, site.conv):
            return NOT_SELECTED
        overhead = predictor_macs(site.input_shape, _outputs(site))
        if overhead > self.max_overhead * site.macs:
            return f"its gate would cost {overhead / site.macs:.0%} of its MACs"
        return ""


class _Clip(torch.autograd.Function):
    """Values clipped to [0, 1], zero where they are not above a threshold; the module's text tells the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, leak: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.leak = leak
        return _scores(z, threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        bound = STEEPEST / len(z)
        gradient = gradients[0].clamp(-bound, bound)
        below = gradient.clamp(max=0) * ctx.leak
        return torch.where(z > 1, torch.zeros_like(z), torch.where(z < 0, below, gradient)), None, None


def _scores(z: Tensor, threshold: Tensor) -> Tensor:
    scores = z.clamp(0, 1)
    return torch.where(scores > threshold, scores, torch.zeros_like(scores))


class _Scored(Budgeted):
    """Scores of maps clipped to [0, 1], at first 1 and the margin under it."""

    CENTRE = 0.5

    def _prepare(self, inputs: int, margins: Tensor, method: LCNet) -> None:
        self.prepare(inputs, 1 + margins, method.threshold)
        self.leak = method.leak

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [N, outputs], 0 where they are not above the threshold, and where they are."""
        z = self.predicted(x)
        if not self.training:
            scores = _scores(z, self.threshold)
            return scores, scores > 0
        scores = _Clip.apply(z, self.threshold, self.leak)
        decided = scores.detach() > 0
        self.open(decided.to(scores.dtype).mean(1))
        return scores, decided

    def lower(self, shape: tuple[int, int, int]) -> LoweredGate:
        """The gate as programs have it: clipped linear scores of means, and a threshold."""
        weight, bias = self.of_means()
        return LoweredGate(self.KIND, {"threshold": float(self.threshold)}, {"weight": weight, "bias": bias})

    KIND: ClassVar[str]


class ScoredChannels(_Scored, ChannelGate):
    """C-Net: a score for each output channel of a convolution."""

    KIND = "clip"

    def __init__(self, inputs: int, margins: Tensor, method: LCNet) -> None:
        super().__init__(len(margins))
        self._prepare(inputs, margins, method)

    def forward(self, x: Tensor) -> Pair:
        return self.scores(x)


class ScoredLayer(_Scored, LayerGate):
    """L-Net: one score for a residual block."""

    KIND = "layer_gate"

    def __init__(self, block: Block, inputs: int, method: LCNet) -> None:
        super().__init__(block.name, block.members)
        self._prepare(inputs, torch.tensor([BLOCK_MARGIN]), method)

    def forward(self, x: Tensor) -> Pair:
        scores, decided = self.scores(x)
        return scores[:, 0], decided[:, 0]


def _inner(block: Block, sites: Sites) -> str:
    """The convolution of a block whose channels C-Net gates."""
    convs: list[Any] = [site for site in sites if site.name in block.members and site.conv is not None]
    wide = [site for site in convs if max(site.conv.kernel_size) > 1 and site.conv.groups < site.conv.in_channels]
    return (wide or convs)[0].name if convs else ""


@torch.no_grad()
def _margins(model: nn.Module, site: ConvSite) -> Tensor:
    """How far above 1 the score of each output channel starts, by its rank among the others, [C]."""
    conv: Any = site.conv
    scale: Any = None if site.norm is None else getattr(model.get_submodule(site.norm), "weight", None)
    sizes = conv.weight.flatten(1).norm(dim=1) if scale is None else scale.abs()
    rank = torch.argsort(torch.argsort(sizes.detach().cpu(), stable=True))
    return SPREAD * (rank + 0.5) / len(sizes)


def _outputs(site: ConvSite) -> int:
    conv: Any = site.conv
    return int(conv.out_channels)
