"""Pure functions of gates, and the modules that every method is made of."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from thrifty.decision import Decision
from thrifty.errors import ThriftyError

Pair = tuple[Tensor, Tensor]


def top_k_mask(scores: Tensor, k: int | Tensor) -> Tensor:
    """The k highest scores of each row; equal scores go to the lowest index, NaN comes last.

    Args:
        scores: [N, C].
        k: how many to keep, an int or an int64 tensor, scalar or [N, 1]; from C on, all are kept.

    Returns:
        bool [N, C] with exactly min(k, C) true in each row, of its own k where there are several.
    """
    ranked = scores.detach()
    order = torch.sort(ranked.where(~ranked.isnan(), -torch.inf), dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank < k


def strengths(images: int, offset: Tensor, first: int = 0) -> Tensor:
    """Strengths [images, 1] in [0, 1] for a batch: about a quarter of them 0, a quarter 1, the others between.

    They are spread evenly over the batch (as the multiples of the golden ratio are over the unit interval), from
    another one on for every `offset`, a scalar in [0, 1). `first` is the number of the first image in the batch.
    """
    # Smaller types than float32 can't tell many images apart.
    numbers = torch.arange(first, first + images, device=offset.device, dtype=torch.float32)
    return (2 * torch.frac(offset.float() + numbers * 0.6180339887) - 0.5).clamp(0, 1)[:, None]


def mean_magnitude(x: Tensor, over: tuple[int, ...] = (2, 3)) -> Tensor:
    """Mean of |x| over the positions of each channel, or over other dimensions: [N, C, H, W] -> [N, C]."""
    # As a norm: forward reads the map once and writes no map, backward scales [N, C] and not the map.
    sums = torch.linalg.vector_norm(x, 1, over, dtype=torch.promote_types(x.dtype, torch.float32))
    count = math.prod(x.shape[dimension] for dimension in over)
    return (sums / count).to(x.dtype)  # half precision holds the mean, but not the sum


def predictor_macs(shape: torch.Size, outputs: int) -> int:
    """MACs of pooling a map of `shape` [C, H, W], one for each element, and of a predictor of `outputs` scores."""
    return shape.numel() + shape[0] * outputs


@dataclass(frozen=True)
class LoweredGate:
    """A gate as operators of a program carry it.

    Attributes:
        kind: how executors decide (see `thrifty.program`).
        attributes: its settings there.
        tensors: its weights by role, without the prefix 'gate_'.
    """

    kind: str
    attributes: dict[str, int | float]
    tensors: dict[str, Tensor]


class Gate(nn.Module, ABC):
    """Decides per input, from the map [N, C, H, W] that `forward` takes, what is computed."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Any, ...]:
        """What the module that holds the gate needs, the decision included."""

    @abstractmethod
    def decision(self, output: tuple[Any, ...]) -> Decision:
        """The decision in what `forward` returned."""

    @abstractmethod
    def overhead(self, shape: torch.Size) -> int:
        """MACs that deciding costs per input, for a map of `shape` [N, C, H, W]."""

    @abstractmethod
    def lower(self, shape: tuple[int, int, int]) -> LoweredGate:
        """The gate in the form that programs have, for a map [C, H, W] of `shape`.

        Raises:
            LoweringError: programs have none for it.
        """


def decide(gate: Gate, x: Tensor) -> tuple[Any, ...]:
    """What `gate` says of the map x; in mixed precision it still computes in its own, single as a rule.

    Scores rounded to the 8 bits of bfloat16 would tie, and training would take other channels than evaluation.
    """
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return gate(x)  # type: ignore[no-any-return]
    own = next((parameter.dtype for parameter in gate.parameters()), torch.float32)
    with torch.autocast(kind, enabled=False):
        return gate(x.to(own))  # type: ignore[no-any-return]


class Predictor(ABC):
    """A gate's linear predictor of scores from features of the map that it reads."""

    CENTRE: ClassVar[float]
    """Score about which it decides both ways."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """What it predicts from, [N, C], of maps x [N, C, H, W]."""

    @abstractmethod
    def predict(self, weight: Tensor, bias: Tensor) -> None:
        """Score by weight [O, C] and bias [O] from now on."""


class SpreadGate(Gate):
    """A gate that can be trained for all budgets at once: in training every image of a batch has a strength of its own.

    So batches mix all budgets, and batch normalisation sees in every step, and keeps as its running statistics, what
    one set of weights is to work with at all of them. All gates of a model take the same strengths for an image.

    Attributes:
        offset: of `strengths`, a scalar buffer.
        spread: whether that is so; else all images get what is set.
        rank: number of this process, each of which holds a part of the batch.
    """

    offset: Tensor

    def prepare_spread(self) -> None:
        """What every budget for itself needs, not spread at first."""
        self.register_buffer("offset", torch.tensor(0.0), persistent=False)
        self.spread = False
        self.rank = 0

    def spread_from(self, offset: float | None) -> None:
        """Spread the strengths of the next batch from `offset` on; None: no longer."""
        self.spread = offset is not None
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if offset is not None:
            self.offset.fill_(offset)

    def counts(self, given: Tensor, ratio: float, of: int, images: int) -> Tensor:
        """How many of `of` each image keeps: `given`, or where budgets are spread 1 - strength * ratio of them.

        Args:
            given: int64 scalar.
            ratio: pruned at strength 1, in [0, 1).
            of: channels or columns.
            images: in the batch.

        Returns:
            int64, scalar or [images, 1], rounded up as `thrifty.density.kept` does.
        """
        if not (self.training and self.spread):
            return given
        share = 1 - ratio * strengths(images, self.offset, self.rank * images).double()
        return torch.ceil(share * of - 1e-9).clamp(min=1).to(torch.int64)


class PenalisedGate(Gate):
    """A gate that adds to the loss.

    Attributes:
        penalty: what the last pass in training adds, a scalar; None if nothing.
    """

    penalty: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"penalty": None}  # it belongs to one backward pass and can't be copied


def sum_of_penalties(gates: Iterable[PenalisedGate]) -> Tensor:
    """Of all gates that have one, a scalar; zero if none has."""
    penalties = [gate.penalty for gate in gates if gate.penalty is not None]
    return torch.stack(penalties).sum() if penalties else torch.zeros(())


class ChannelGate(Gate):
    """Decides which of `channels` output channels of a convolution are computed, and by how much each is scaled.

    `forward` takes the map that the convolution reads and returns the scale [N, channels], zero where a channel is
    skipped, and the decision, bool [N, channels].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def decision(self, output: tuple[Any, ...]) -> Decision:
        """Channels that are computed, [N, channels]."""
        return Decision(channels=output[1])


class InputGate(Gate):
    """Decides which channels and columns of the map that a convolution reads are used.

    `forward` returns the map with zeros elsewhere, and which channels, bool [N, C], and columns, bool [N, H, W], it
    kept, None on an axis that it does not prune.
    """

    @abstractmethod
    def decides(self) -> tuple[bool, bool]:
        """Whether it prunes channels, and columns, as it is set now."""

    def decision(self, output: tuple[Any, ...]) -> Decision:
        """Channels and columns that are read."""
        by_channels, by_columns = self.decides()
        return Decision(channels=output[1] if by_channels else None, columns=output[2] if by_columns else None)


class LayerGate(Gate):
    """Decides whether a block's layers are executed at all.

    `forward` takes the block's input and returns the scale of what the layers make, [N], zero where they are skipped,
    and the decision, bool [N].

    Attributes:
        block: the block's name in the model.
        members: names of the layers that run for the block's sake alone.
    """

    def __init__(self, block: str, members: Iterable[str]) -> None:
        super().__init__()
        self.block = block
        self.members = tuple(members)

    def decision(self, output: tuple[Any, ...]) -> Decision:
        """Whether the layers run, [N]."""
        return Decision(layer=output[1])


class MeanPredictor(Predictor):
    """Scores W s + b of maps x [N, C, H, W], for a gate to take part in: W = 0 at first.

    s are the means over positions, standardised by the batch in training and by running statistics in evaluation, like
    batch normalisation without a scale. Means of neighbouring inputs are much alike: W would learn little but another b
    from them as they are. It is learned over the root of C, so that a step moves scores alike whatever C is.
    """

    training: bool
    standardise: nn.BatchNorm2d
    predictor: nn.Linear

    def make_predictor(self, inputs: int, bias: Tensor) -> None:
        """Predict from `inputs` channels, with bias [outputs] at first."""
        self.standardise = nn.BatchNorm2d(inputs, eps=1e-4, affine=False)
        self.predictor = nn.Linear(inputs, len(bias))
        with torch.no_grad():
            self.predictor.weight.zero_()
            self.predictor.bias.copy_(bias)

    def features(self, x: Tensor) -> Tensor:
        """Standardised means [N, C] over the positions of each channel."""
        means = x.mean((2, 3), keepdim=True)
        norm = self.standardise
        if self.training and len(x) == 1:  # it has no deviation
            return nn.functional.batch_norm(means, norm.running_mean, norm.running_var, eps=norm.eps).flatten(1)
        return norm(means).flatten(1)

    def predicted(self, x: Tensor) -> Tensor:
        """Scores [N, outputs]."""
        weight = self.predictor.weight * self.predictor.in_features**-0.5
        return nn.functional.linear(self.features(x), weight, self.predictor.bias)

    def of_means(self) -> Pair:
        """Weight [outputs, C] and bias [outputs] that predict in evaluation the same from the means themselves."""
        seen = dict(self.standardise.named_buffers())
        variance = seen["running_var"] + self.standardise.eps
        weight = self.predictor.weight * torch.rsqrt(self.predictor.in_features * variance)
        return weight, self.predictor.bias - weight @ seen["running_mean"]

    @torch.no_grad()
    def predict(self, weight: Tensor, bias: Tensor) -> None:
        """Score by weight [outputs, C] and bias [outputs] from now on."""
        self.predictor.weight.copy_(weight * self.predictor.in_features**0.5)
        self.predictor.bias.copy_(bias)


CONV_ATTRIBUTES = {"weight", "bias", *nn.Conv2d.__constants__} - {"training"}
"""What a model's forward may read from a convolution that it also calls."""


class Wrapper(nn.Module):
    """A module that stands in the place of another and holds it under the name `INNER`; reports call both alike."""

    INNER: ClassVar[str]

    def __getattr__(self, name: str) -> Any:
        if name in CONV_ATTRIBUTES:
            return getattr(super().__getattr__(self.INNER), name)
        return super().__getattr__(name)


class GatedConv(Wrapper):
    """A convolution, its batch normalisation if it has one, and the gate that scales their output channels.

    The gate multiplies after normalisation, so that a skipped channel is exactly zero for whatever reads it.
    """

    INNER = "conv"

    def __init__(self, conv: nn.Module, norm: nn.Module | None, gate: ChannelGate) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        scale, _ = decide(self.gate, x)
        y = self.conv(x)
        if self.norm is not None:
            y = self.norm(y)
        return y * scale[:, :, None, None].to(y.dtype)


class MaskedConv(Wrapper):
    """A convolution and the gate that prunes the map which it reads."""

    INNER = "conv"

    def __init__(self, conv: nn.Module, gate: InputGate) -> None:
        super().__init__()
        self.conv = conv
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        kept, _, _ = decide(self.gate, x)
        return self.conv(kept)


class Link:
    """What the entry of a block tells its exit within one forward pass, of each thread that runs the model."""

    def __init__(self) -> None:
        self.scales: dict[int, Tensor] = {}

    def leave(self, scale: Tensor) -> None:
        """Keep the scale [N] until this thread takes it."""
        self.scales[self._thread()] = scale

    def take(self) -> Tensor:
        """The scale [N] that the entry left; it is gone then."""
        scale = self.scales.pop(self._thread(), None)
        if scale is None:
            raise ThriftyError("a block's last layer ran before its first one: its layer gate has decided nothing.")
        return scale

    @staticmethod
    def _thread() -> int:
        return 0 if torch.compiler.is_compiling() else threading.get_ident()  # which the compiler can't trace

    def __getstate__(self) -> dict[str, Any]:
        return {"scales": {}}  # they belong to one forward pass and can't be copied


class LayerEntry(Wrapper):
    """The first module of a residual branch, and the gate that decides whether the branch runs."""

    INNER = "module"

    def __init__(self, module: nn.Module, gate: LayerGate, link: Link) -> None:
        super().__init__()
        self.module = module
        self.gate = gate
        self.link = link

    def forward(self, x: Tensor) -> Tensor:
        scale, _ = decide(self.gate, x)
        self.link.leave(scale)
        return self.module(x)


class LayerExit(Wrapper):
    """The last module of a residual branch, whose output the layer gate scales."""

    INNER = "module"

    def __init__(self, module: nn.Module, link: Link) -> None:
        super().__init__()
        self.module = module
        self.link = link

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return y * self.link.take().reshape(-1, *[1] * (y.ndim - 1)).to(y.dtype)


def layer_names(model: nn.Module) -> dict[str, str]:
    """For the path of each module the name under which reports know it: a wrapper's own for what it wraps."""
    names = {"": ""}
    modules = dict(model.named_modules())
    for path in modules:
        parent, _, child = path.rpartition(".")
        holder = modules.get(parent)
        if path and isinstance(holder, Wrapper) and child == holder.INNER:
            names[path] = names[parent]
        elif path:
            names[path] = f"{names[parent]}.{child}" if names[parent] else child
    return names


def gates_of(model: nn.Module) -> dict[str, Gate]:
    """A model's gates by the name of what each belongs to: a convolution, or a block for a layer gate."""
    names = layer_names(model)
    found: dict[str, Gate] = {}
    for path, module in model.named_modules():
        if isinstance(module, LayerGate):
            found[module.block] = module
        elif isinstance(module, Gate):
            found[names[path.rpartition(".")[0]]] = module
    return found
