"""LC-Net: layers and channels that are skipped where learned scores say so.

Xia, Yin, Dai, Jha, 'Fully Dynamic Inference with Deep Neural Networks', arXiv 2007.15151; IEEE Transactions on Emerging
Topics in Computing 10, 2022.

L-Net decides on a residual block as a whole: x + S(x) F(x), with S the global average pool of x, one linear unit, and
a clip to [0, 1]; a block of score 0 is skipped. C-Net gives each filter of a convolution a score in the same way; a
filter of score 0 is skipped, the maps of the others are multiplied by their scores. LC-Net is both in every block; each
is a method of the paper by itself.

The paper's loss, coefficients, schedule and start were not at hand; these are this project's own:
- the start: weights 0, biases 1, hence scores of exactly 1 and the dense model's function.
- the objective, see `thrifty.methods.budget`.
- the gradient at the clip: where a score's linear value is outside of [0, 1], the gradient passes, times `leak`, if it
  pushes the value back inside, and is dropped if not. So no gate stays closed because it gets no gradient.
  An input's derivative by a score is bounded by `STEEPEST`, and the scores of C channels, each of which matters less
  than a block's one, learn by C ** `PACE` times their gradient.
- a threshold, 0 at first, under which scores count as 0; it is set after training by `set_budget`.

Differs from the paper in
- where C-Net stands: on the branch's first convolution that is larger than 1x1 and not depthwise (the 3x3 of a
  bottleneck), else on its first; scores come from the map which that convolution reads (the block's input where it is
  the first), and multiply behind its normalisation, before the activation.
- nets without residual blocks, in which C-Net gates every convolution that can be gated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from thrifty.blocks import Block, residual_blocks
from thrifty.conversion import Place
from thrifty.errors import ThriftyError
from thrifty.gates import ChannelGate, LayerGate, LoweredGate, Pair, Predictor
from thrifty.graph import ConvSite, gate_outputs
from thrifty.methods.budget import BudgetConfig, Budgeted, budgeted

if TYPE_CHECKING:
    from thrifty.dynamic import Dynamic


PACE = 0.25
"""Found on small tasks: at 0 channels hardly move before blocks close, at 1 they close in masses."""

STEEPEST = 1.0
"""Largest derivative of an input's loss by a score. Behind a normalisation of maps that are zero it has no bound."""


@dataclass(frozen=True, kw_only=True)
class LCNet(BudgetConfig):
    """Settings of LC-Net (see the module's text for the method and its source).

    Attributes:
        layers: L-Net, a gate on every residual block.
        channels: C-Net, a gate on a convolution of every residual block, or on all where there are no blocks.
        leak: factor of the gradient where a score's linear value is outside of [0, 1].
        threshold: scores up to it count as 0, in [0, 1).
    """

    name: ClassVar[str] = "lcnet"
    version: ClassVar[int] = 1

    layers: bool = True
    channels: bool = True
    leak: float = 1.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers and not self.channels:
            raise ThriftyError("LCNet without layers and without channels gates nothing. Set one of them.")
        if self.leak < 0:
            raise ThriftyError(f"LCNet leak is {self.leak!r}, but must not be negative.")
        _check_threshold(self.threshold)

    def place(self, model: nn.Module, sites: tuple[ConvSite, ...]) -> tuple[Place, ...]:
        """Gate every residual block and a convolution in each, where they can take it."""
        blocks = residual_blocks(model)
        inner = {_inner(block, sites) for block in blocks} if blocks else {site.name for site in sites}
        refused = {site.name: self._refusal(site, inner) for site in sites}
        for site in sites:
            if not refused[site.name]:
                conv: Any = site.conv
                gate = ScoredChannels(conv.in_channels, conv.out_channels, self)
                gate_outputs(model, site, gate)
        layers = self.gate_layers(model, sites, blocks if self.layers else (), self._layer_gate)
        places = []
        for site in sites:
            own = refused[site.name]
            gated = not own or site.name in layers.skipped
            note = site.limit if not own else "" if gated else own
            cost = 0 if own else _overhead(site.input_shape, _outputs(site))
            places.append(layers.place(site, gated, note, cost))
        return tuple(places)

    def _layer_gate(self, block: Block, inputs: int) -> LayerGate:
        return ScoredLayer(block, inputs, self)

    def set_threshold(self, model: Dynamic, threshold: float) -> None:
        """Open from now on only what scores above `threshold` in [0, 1)."""
        _check_threshold(threshold)
        for gate in budgeted(model).values():
            gate.threshold.fill_(threshold)  # type: ignore[operator, union-attr]

    def _refusal(self, site: ConvSite, inner: set[str]) -> str:
        if site.conv is None or site.blocked:
            return site.blocked
        if not self.channels:
            return "its channels are not gated"
        if site.name not in inner:
            return "is not the convolution of a residual block that C-Net gates"
        if not self.selects(site.name, site.conv):
            return "not selected by where="
        overhead = _overhead(site.input_shape, _outputs(site))
        if overhead > self.max_overhead * site.macs:
            return f"its gate would cost {overhead / site.macs:.0%} of its MACs"
        return ""


class _Clip(torch.autograd.Function):
    """Values clipped to [0, 1], and zero where they are not above a threshold.

    The gradient, bounded and times `pace`, passes inside of [0, 1]; outside it is times `leak`, and dropped where a
    step down it would lead farther out.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, leak: float, pace: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.leak, ctx.pace = leak, pace
        return _scores(z, threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (z,) = ctx.saved_tensors
        bound = STEEPEST / len(z)
        gradient = gradients[0].clamp(-bound, bound) * ctx.pace
        above = gradient.clamp(min=0) * ctx.leak
        below = gradient.clamp(max=0) * ctx.leak
        return torch.where(z > 1, above, torch.where(z < 0, below, gradient)), None, None, None


def _scores(z: Tensor, threshold: Tensor) -> Tensor:
    scores = z.clamp(0, 1)
    return torch.where(scores > threshold, scores, torch.zeros_like(scores))


class _Scored(Budgeted, Predictor):
    """Scores clip(W mean(x) + b) in [0, 1] of maps x [N, C, H, W], with W = 0 and b = 1 at first."""

    CENTRE = 0.5
    threshold: Tensor

    def _prepare(self, inputs: int, outputs: int, method: LCNet) -> None:
        self.predictor = nn.Linear(inputs, outputs)
        nn.init.zeros_(self.predictor.weight)
        nn.init.ones_(self.predictor.bias)
        self.register_buffer("threshold", torch.tensor(float(method.threshold)))
        self.leak, self.knee = method.leak, method.knee
        self.pace = outputs**PACE

    def weight(self) -> Tensor:
        """W, [outputs, C]: what is learned over the root of C, so that a step moves scores alike whatever C is."""
        return self.predictor.weight * self.predictor.in_features**-0.5

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [N, outputs], 0 where they are not above the threshold, and where they are."""
        z = nn.functional.linear(self.features(x), self.weight(), self.predictor.bias)
        if not self.training:
            scores = _scores(z, self.threshold)
            return scores, scores > 0
        scores = _Clip.apply(z, self.threshold, self.leak, self.pace)
        decided = scores.detach() > 0
        counted = (1 + self.knee) * scores / (scores + self.knee)
        self.opened = (counted.mean(1), decided.to(scores.dtype).mean(1))
        return scores, decided

    def features(self, x: Tensor) -> Tensor:
        """Means [N, C] over the positions of each channel."""
        return x.mean((2, 3))

    @torch.no_grad()
    def predict(self, weight: Tensor, bias: Tensor) -> None:
        """Take weight [outputs, C] as W and bias [outputs] as b."""
        self.predictor.weight.copy_(weight * self.predictor.in_features**0.5)
        self.predictor.bias.copy_(bias)

    def overhead(self, shape: torch.Size) -> int:
        """One MAC for each element that is pooled and one for each weight."""
        return _overhead(shape[1:], self.predictor.out_features)

    def lower(self, shape: tuple[int, int, int]) -> LoweredGate:
        """The gate as programs have it: clipped linear scores of means, and a threshold."""
        weights = {"weight": self.weight(), "bias": self.predictor.bias}
        return LoweredGate(self.KIND, {"threshold": float(self.threshold)}, weights)

    KIND: ClassVar[str]


class ScoredChannels(_Scored, ChannelGate):
    """C-Net: a score for each output channel of a convolution."""

    KIND = "clip"

    def __init__(self, inputs: int, channels: int, method: LCNet) -> None:
        super().__init__(channels)
        self._prepare(inputs, channels, method)

    def forward(self, x: Tensor) -> Pair:
        return self.scores(x)


class ScoredLayer(_Scored, LayerGate):
    """L-Net: one score for a residual block."""

    KIND = "layer_gate"

    def __init__(self, block: Block, inputs: int, method: LCNet) -> None:
        super().__init__(block.name, block.members)
        self._prepare(inputs, 1, method)

    def forward(self, x: Tensor) -> Pair:
        scores, decided = self.scores(x)
        return scores[:, 0], decided[:, 0]


def _inner(block: Block, sites: tuple[ConvSite, ...]) -> str:
    """The convolution of a block whose channels C-Net gates."""
    convs: list[Any] = [site for site in sites if site.name in block.members and site.conv is not None]
    wide = [site for site in convs if max(site.conv.kernel_size) > 1 and site.conv.groups < site.conv.in_channels]
    return (wide or convs)[0].name if convs else ""


def _outputs(site: ConvSite) -> int:
    conv: Any = site.conv
    return int(conv.out_channels)


def _overhead(shape: torch.Size, outputs: int) -> int:
    return shape.numel() + shape[0] * outputs


def _check_threshold(threshold: float) -> None:
    if isinstance(threshold, bool) or not 0 <= threshold < 1:
        raise ThriftyError(f"a threshold of scores must be in [0, 1), not {threshold!r}.")
