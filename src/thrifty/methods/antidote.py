"""AntiDote: attention-based pruning of the channels and columns that a convolution reads, trained by targeted dropout.

Yu, Liu, Wang, Wang, Chen, 'AntiDote: Attention-based Dynamic Optimization for Neural Network Runtime Efficiency',
DATE 2020, arXiv 2008.06543; extended as AntiDoteX, IEEE TCAD 41(11), 2022.

The map F [C, H, W] that a convolution is about to read has attention without parameters: of a channel the mean over
the positions, of a column (all channels at one position) the mean over the channels. The highest (1 - ratio) of each
are kept, the convolution reads F * M_channel * M_column, and all of its outputs are computed. In residual networks only
maps inside a block are pruned, so that the shortcut stays whole. Targeted dropout trains for it: what has the least
attention is dropped in training as in evaluation, at a ratio that ascends to the target in small steps.

Differs from the paper, of which no code is public, in
- attention by magnitude, mean |F|: the same after ReLU, and defined after activations that let negative values through.
- stages: a tuple of ratios is by the size of the map where it was made, before pooling, largest first.
- `criterion`, `dropout` and `schedule`, which also hold what the method is compared with.
- `straight_through`: what is kept is the loss's concern as well. Without it what is dropped gets no gradient and can't
  come back but by chance.
- `sparsity`: a price on attention that falls on what is dropped. Without it nothing keeps that small: dropping is then
  like noise, against which training makes maps ever more even, until ReLU cuts off little and all columns have about
  the same attention. With it maps become sparse where they are pruned, and pruning takes little away.

The last two are for training alone: masks, evaluation and cost are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from thrifty.conversion import Place
from thrifty.density import Density, check_patterns, densities_of, density_for, kept, kept_at
from thrifty.errors import LoweringError, ThriftyError
from thrifty.gates import (
    InputGate,
    LoweredGate,
    MaskedConv,
    PenalisedGate,
    SpreadGate,
    mean_magnitude,
    sum_of_penalties,
    top_k_mask,
)
from thrifty.graph import ConvSite, Sites, replace_module
from thrifty.methods.base import NOT_SELECTED, MethodConfig, check_progress, on_the_way, spread_budgets

if TYPE_CHECKING:
    from thrifty.dynamic import Dynamic

Ratio = float | tuple[float, ...] | Mapping[str, float]
"""Share pruned: one for all layers, one for each stage, or by pattern of names, of which the first that fits counts."""

Criterion = Literal["attention", "random", "inverse"]
Dropout = Literal["targeted", "random", "none"]
Schedule = Literal["none", "steps", "linear"]


@dataclass(frozen=True, kw_only=True)
class AntiDote(MethodConfig):
    """Settings of attention-based pruning (see the module's text for the method and its source).

    Attributes:
        channels: ratio of the channels that are pruned, in [0, 1).
        columns: ratio of the columns that are pruned, in [0, 1).
        criterion: what is kept: the highest attention, or for comparison the lowest ('inverse') or whatever chance
            says ('random').
        dropout: what is dropped in training: the same as in evaluation ('targeted'), as much of it at random
            ('random'), or nothing ('none': pruning at test time alone).
        schedule: how ratios ascend from `start` in training: 'steps' of `step`, 'linear', or 'none', which trains at
            the target from the first step on.
        start: ratio at which the ascent begins; targets under it are there from the beginning.
        step: size of a step up.
        ascent: shares of the training run at which the ascent starts and ends.
        straight_through: in training, let a gradient reach the attention too: that of the loss by what is kept, taken
            through a sigmoid about the limit between the lowest attention that is kept and the highest that is not.
        sparsity: weight of a penalty on attention that falls on what is dropped, as a share of all attention: the sum
            of these shares over layers and axes, each the mean of a batch. 0 for none.
        one_for_all: train one set of weights for all ratios from 0 to the targets: every image of a batch gets others
            (AntiDoteX). `schedule` then has no part.
        max_overhead: a map is pruned only if its gate's MACs are at most this share of the convolution that reads it.
    """

    name: ClassVar[str] = "antidote"
    version: ClassVar[int] = 1

    channels: Ratio = 0.5
    columns: Ratio = 0.0
    criterion: Criterion = "attention"
    dropout: Dropout = "targeted"
    schedule: Schedule = "steps"
    start: float = 0.1
    step: float = 0.05
    ascent: tuple[float, float] = (0.05, 0.6)
    straight_through: bool = False
    sparsity: float = 0.0
    one_for_all: bool = False
    max_overhead: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("channels", "columns"):
            for ratio in _values(getattr(self, field)):
                _check_ratio(field, ratio)
        _check_ratio("start", self.start)
        self.check_choice("criterion", get_args(Criterion))
        self.check_choice("dropout", get_args(Dropout))
        self.check_choice("schedule", get_args(Schedule))
        self.check_number("step", "in (0, 1)", lambda step: 0 < step < 1)
        self.check_span("ascent")
        for setting in ("sparsity", "max_overhead"):
            self.check_number(setting, "a finite number, 0 or more", lambda value: value >= 0)
        self.check_flags("straight_through", "one_for_all")
        if self.straight_through and "random" in (self.criterion, self.dropout):
            raise ThriftyError("AntiDote straight_through has no part where chance decides: leave it out.")
        for setting in ("straight_through", "sparsity", "one_for_all"):
            if self.dropout == "none" and getattr(self, setting):
                raise ThriftyError(f"AntiDote {setting} has no part where training drops nothing: leave it out.")

    def place(self, model: nn.Module, sites: Sites) -> tuple[Place, ...]:
        """Prune the map that each convolution reads, where that map is read inside a block only."""
        refused = {site.name: self._refusal(site) for site in sites}
        sizes = {site.name: site.map_size for site in sites if not refused[site.name]}
        channels = _ratios("channels", self.channels, sizes)
        columns = _ratios("columns", self.columns, sizes)
        places = []
        for site in sites:  # no error from here on: one that came before left the model untouched
            note = refused[site.name]
            gate, cost = None, 0
            if not note:
                gate = AttentionGate(
                    site.input_shape, self.criterion, self.dropout, self.straight_through, sparse=self.sparsity > 0
                )
                gate.map_size = site.map_size
                gate.target = (channels[site.name], columns[site.name])
                gate.set_ratios(*gate.target)
                cost = gate.overhead(torch.Size((1, *site.input_shape)))
                if not cost:
                    gate, note = None, "its ratios keep everything"
                elif cost > self.max_overhead * site.macs:
                    gate, note, cost = None, f"its gate would cost {cost / site.macs:.0%} of its MACs", 0
            if gate is not None:
                _prune(model, site, gate)
            places.append(Place(site.name, gate is not None, note, site.macs, cost))
        return tuple(places)

    def regularization(self, model: Dynamic) -> Tensor:
        """`sparsity` times the shares of attention that the last pass in training dropped; zero where it is 0."""
        return self.sparsity * sum_of_penalties(_gates(model).values())

    def set_density(self, model: Dynamic, density: Density) -> None:
        """Change the share of channels kept, 1 - ratio, of all layers or of those that a pattern fits; columns stay."""
        gates = _gates(model)
        for name, value in densities_of(density, gates).items():
            gates[name].set_ratios(channels=1 - value)

    def set_column_density(self, model: Dynamic, density: Density) -> None:
        """Change the share of columns kept, 1 - ratio, of all layers or of those that a pattern fits; channels stay."""
        gates = _gates(model)
        for name, value in densities_of(density, gates).items():
            gates[name].set_ratios(columns=1 - value)

    def density_of(self, model: Dynamic) -> float:
        """Mean share of the pruned maps that is kept, channels times columns; 1 where none is pruned."""
        shares = [gate.share for gate in _gates(model).values()]
        return sum(shares) / len(shares) if shares else 1.0

    def set_strength(self, model: Dynamic, strength: float) -> None:
        """Put every layer's ratios at that share of their targets."""
        for gate in _gates(model).values():
            sizes = (gate.channels, gate.positions)
            counts = (kept_at(strength, kept(1 - t, size), size) for t, size in zip(gate.target, sizes, strict=True))
            gate.set_ratios(*(1 - count / size for count, size in zip(counts, sizes, strict=True)))

    def advance(self, model: Dynamic, progress: float) -> None:
        """Put the schedule's ratios for this share of the run into every gate."""
        check_progress(progress)
        if self.one_for_all:
            spread_budgets(_gates(model).values(), progress)
            return
        for gate in _gates(model).values():
            gate.set_ratios(*(self.ratio_at(progress, target) for target in gate.target))

    def ratio_at(self, progress: float, target: float) -> float:
        """Ratio on the way to `target` when the share `progress` in [0, 1] of training is done."""
        if self.schedule == "none" or target <= self.start:
            return target
        return on_the_way(self.start, target, progress, self.schedule, self.step, self.ascent)

    def _refusal(self, site: ConvSite) -> str:
        if site.conv is None or site.unpruned:
            return site.unpruned or site.blocked
        return "" if self.selects(site.name, site.conv) else NOT_SELECTED


class AttentionGate(InputGate, SpreadGate, PenalisedGate):
    """Keeps the channels and columns of a map x [N, C, H, W] that have the most attention; ties to the lowest index.

    Attributes:
        map_size: positions of the map where it was made, before any pooling.
        target: ratios of channels and columns that training ascends to.
        sparse: whether its penalty is the shares of attention that it drops, means over the batch, of both axes.
    """

    kept_channels: Tensor
    kept_columns: Tensor
    of_positions: Tensor

    def __init__(
        self,
        shape: torch.Size,
        criterion: Criterion = "attention",
        dropout: Dropout = "targeted",
        straight_through: bool = False,
        *,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.positions = shape[0], shape[1:].numel()
        self.map_size = self.positions
        self.criterion, self.dropout, self.straight_through = criterion, dropout, straight_through
        self.sparse = sparse
        # Tensors, so that they travel with the weights and a change of ratios compiles nothing anew.
        self.register_buffer("kept_channels", torch.tensor(self.channels))
        self.register_buffer("kept_columns", torch.tensor(self.positions))
        self.register_buffer("of_positions", torch.tensor(self.positions))
        self.target = (0.0, 0.0)
        self.by_channels = self.by_columns = False
        self.prepare_spread()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        """Take counts that may be of maps of another size; the same share of the columns is kept."""
        of = int(state_dict.setdefault(prefix + "of_positions", torch.tensor(self.positions)))  # older files don't say
        for name, size in (("kept_channels", self.channels), ("kept_columns", of)):
            if not 1 <= int(state_dict.get(prefix + name, 1)) <= size:
                errors.append(f"{prefix}{name} is {int(state_dict[prefix + name])}, but must be in [1, {size}].")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if int(self.of_positions) != self.positions:
            self.kept_columns.copy_(-(-self.kept_columns * self.positions // self.of_positions))
            self.of_positions.fill_(self.positions)
        # What was saved may prune on an axis that this gate left alone so far.
        self.by_channels = self.by_channels or int(self.kept_channels) < self.channels
        self.by_columns = self.by_columns or int(self.kept_columns) < self.positions

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.training:
            self.penalty = None  # of the latest pass in training
            if self.dropout == "none":
                return x, None, None
        channels = columns = None
        kept_map = x
        if self.by_channels:
            count = self.counts(self.kept_channels, self.target[0], self.channels, len(x))
            channels, factors = self._decided(mean_magnitude(x), count)
            kept_map = kept_map * factors[:, :, None, None]
        if self.by_columns:
            attention = mean_magnitude(x, over=(1,))
            count = self.counts(self.kept_columns, self.target[1], self.positions, len(x))
            columns, factors = self._decided(attention.flatten(1), self._columns_of(count, attention.shape[1:].numel()))
            columns = columns.reshape(attention.shape)
            kept_map = kept_map * factors.reshape(attention.shape)[:, None]
        return kept_map, channels, columns

    def _decided(self, attention: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What attention [N, K] keeps, bool [N, K], and that as factors, in training with a gradient for it."""
        scores = self._scores(attention)
        mask = top_k_mask(scores, count)
        factors = mask.to(attention.dtype)
        if self.training and self.sparse:
            # Only what is dropped is pushed down: what is kept is for the network's own loss.
            share = (attention.where(~mask, 0).sum(1) / (attention.detach().sum(1) + 1e-6)).mean()
            self.penalty = share if self.penalty is None else self.penalty + share
        if not (self.training and self.straight_through):
            return mask, factors
        with torch.no_grad():
            lowest = torch.where(mask, scores, torch.inf).amin(1, keepdim=True)
            highest = torch.where(mask, -torch.inf, scores).amax(1, keepdim=True)
            limit = torch.where(highest.isfinite(), (lowest + highest) / 2, lowest)
            width = scores.std(1, keepdim=True, correction=0) / 2 + 1e-6
        soft = torch.sigmoid((scores - limit) / width)
        return mask, factors + soft - soft.detach()

    def _scores(self, attention: Tensor) -> Tensor:
        if self.criterion == "random" or (self.training and self.dropout == "random"):
            return torch.rand_like(attention)
        return -attention if self.criterion == "inverse" else attention

    def _columns_of(self, count: Tensor, positions: int) -> Any:
        """Columns kept of a map of so many positions: the share that `count` of `self.positions` is, rounded up."""
        return (count * positions + (self.positions - 1)) // self.positions

    def decides(self) -> tuple[bool, bool]:
        """Whether it prunes channels, and columns, at the ratios that are set."""
        return (
            self.by_channels and int(self.kept_channels) < self.channels,
            self.by_columns and int(self.kept_columns) < self.positions,
        )

    def set_ratios(self, channels: float | None = None, columns: float | None = None) -> None:
        """Prune so much of each from now on; None leaves it as it is."""
        if channels is not None:
            self.by_channels = self.by_channels or channels > 0
            self.kept_channels.fill_(kept(1 - channels, self.channels))
        if columns is not None:
            self.by_columns = self.by_columns or columns > 0
            self.kept_columns.fill_(kept(1 - columns, self.positions))

    @property
    def share(self) -> float:
        """Share of the map that is kept, in (0, 1]."""
        return int(self.kept_channels) / self.channels * int(self.kept_columns) / self.positions

    def overhead(self, shape: torch.Size) -> int:
        """One MAC for each element of the map and each axis that is decided on."""
        return sum(self.decides()) * shape[1:].numel()

    def lower(self, shape: tuple[int, int, int]) -> LoweredGate:
        """The gate as programs have it: so many channels and columns of the highest attention."""
        if self.criterion != "attention":
            raise LoweringError(f"pruning by the criterion {self.criterion!r} is for comparison in torch alone")
        by_channels, by_columns = self.decides()
        columns = int(self._columns_of(self.kept_columns, shape[1] * shape[2])) if by_columns else shape[1] * shape[2]
        kept_channels = int(self.kept_channels) if by_channels else self.channels
        return LoweredGate("attention", {"kept_channels": kept_channels, "kept_columns": columns}, {})


def _prune(model: nn.Module, site: ConvSite, gate: AttentionGate) -> None:
    conv: Any = site.conv
    gate.to(conv.weight.device)
    masked = MaskedConv(conv, gate)
    gate.train(conv.training)
    masked.training = conv.training
    replace_module(model, site.name, masked)


def _gates(model: Dynamic) -> dict[str, AttentionGate]:
    return {name: gate for name, gate in model.gates().items() if isinstance(gate, AttentionGate)}


def _values(ratio: Ratio) -> tuple[float, ...]:
    if isinstance(ratio, Mapping):
        return tuple(ratio.values())
    return tuple(ratio) if isinstance(ratio, (tuple, list)) else (ratio,)


def _check_ratio(field: str, ratio: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 <= ratio < 1:
        raise ThriftyError(f"AntiDote {field} is {ratio!r}, but a ratio must be a number in [0, 1).")


def _ratios(axis: str, ratio: Ratio, sizes: Mapping[str, int]) -> dict[str, float]:
    """The ratio of each layer, by name.

    Args:
        axis: 'channels' or 'columns', for errors.
        ratio: as given.
        sizes: positions of the map where it was made, by name of the layer that reads it.
    """
    if isinstance(ratio, Mapping):
        check_patterns({pattern: 1 - value for pattern, value in ratio.items()}, sizes)
        return {name: density_for(ratio, name) or 0.0 for name in sizes}
    if isinstance(ratio, (tuple, list)):
        stages = sorted(set(sizes.values()), reverse=True)
        if len(stages) != len(ratio):
            raise ThriftyError(
                f"AntiDote {axis} has {len(ratio)} ratios, but the network's maps that can be pruned come in "
                f"{len(stages)} sizes: {', '.join(map(str, stages))} positions."
            )
        return {name: float(ratio[stages.index(size)]) for name, size in sizes.items()}
    return dict.fromkeys(sizes, float(ratio))
