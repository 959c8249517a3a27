"""FBS: feature boosting and suppression, dynamic gating of convolutions' output channels.

Gao, Zhao, Dudziak, Mullins, Xu, 'Dynamic Channel Pruning: Feature Boosting and Suppression', ICLR 2019,
arXiv 1810.05331.

A gated layer computes pi(x) * (norm(conv(x)) + beta), followed by the network's own activation; norm is batch
normalisation without its scale, which pi replaces, so a suppressed channel is exactly zero. The gate is
pi(x) = wta_k(g(x)) with k = ceil(density * C_out), g(x) = ReLU(ss(x) phi + rho) and ss(x) the mean of |x| per input
channel. Gradients flow through the winners' values only.

Differs from the paper in
- `init='preserve'` (the default), which starts from exactly the dense model: phi = 0, rho = |gamma| and the sign of
  gamma kept as the normalisation's fixed scale. Where |gamma| is under `FLOOR` of the layer's mean, rho is that floor
  instead and the normalisation's scale of the layer is learned; else beta / rho would be huge. `init='paper'` starts
  as the paper does: phi by He initialisation, rho = 1, gamma dropped.
- convolutions without batch normalisation, which are gated as pi(x) * (conv(x) + bias) with rho = 1.
- layers whose gate would cost more than `max_overhead` of the convolution, which stay dense.
- `schedule='linear'`, a continuous descent of the density beside the paper's steps of 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from thrifty.conversion import Place
from thrifty.density import Density, check_density, check_patterns, densities_of, density_for, kept, kept_at
from thrifty.gates import (
    ChannelGate,
    LoweredGate,
    Pair,
    PenalisedGate,
    Predictor,
    SpreadGate,
    mean_magnitude,
    predictor_macs,
    sum_of_penalties,
    top_k_mask,
)
from thrifty.graph import ConvSite, Sites, gate_outputs
from thrifty.methods.base import NOT_SELECTED, MethodConfig, check_progress, on_the_way, spread_budgets

if TYPE_CHECKING:
    from thrifty.dynamic import Dynamic

FLOOR = 0.1
"""Smallest rho of the preserving start, as a share of the layer's mean |gamma|."""

Init = Literal["preserve", "paper"]
Schedule = Literal["none", "steps", "linear"]


@dataclass(frozen=True, kw_only=True)
class FBS(MethodConfig):
    """Settings of feature boosting and suppression (see the module's text for the method and its source).

    Attributes:
        density: share of output channels kept, in (0, 1]: one number for all layers, or by pattern of names, where
            the first pattern that fits counts and layers that none fits keep everything.
        l1: weight of the regularisation, the sum over layers of the batch mean of ||g(x)||_1.
        init: 'preserve' starts from the dense model's function, 'paper' from the paper's random gates.
        schedule: how the density descends from `start` to `density` in training: 'steps' of `step`, 'linear', or
            'none', which trains at `density` from the first step on.
        start: density at which training starts.
        step: size of a step down.
        descent: shares of the training run at which the descent starts and ends.
        one_for_all: train one set of weights for all densities from 1 to `density`: every image of a batch gets
            another one (AntiDoteX's idea, IEEE TCAD 41(11), 2022; not the FBS paper's). `schedule` then has no part.
        max_overhead: a convolution is gated only if its gate's MACs are at most this share of its own.
    """

    name: ClassVar[str] = "fbs"
    version: ClassVar[int] = 1

    density: Density = 0.5
    l1: float = 1e-8
    init: Init = "preserve"
    schedule: Schedule = "steps"
    start: float = 1.0
    step: float = 0.1
    descent: tuple[float, float] = (0.1, 0.6)
    one_for_all: bool = False
    max_overhead: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in self.density.values() if isinstance(self.density, Mapping) else (self.density,):
            check_density(value)
        check_density(self.start)
        self.check_choice("init", get_args(Init))
        self.check_choice("schedule", get_args(Schedule))
        self.check_number("step", "in (0, 1]", lambda step: 0 < step <= 1)
        self.check_span("descent")
        self.check_flags("one_for_all")
        for field in ("l1", "max_overhead"):
            self.check_number(field, "a finite number, 0 or more", lambda value: value >= 0)

    def place(self, model: nn.Module, sites: Sites) -> tuple[Place, ...]:
        """Gate every site that can take it."""
        places = []
        for site in sites:
            reason, gate_macs = self._refusal(site)
            places.append(Place(site.name, not reason, reason or site.limit, site.macs, 0 if reason else gate_macs))
        check_patterns(self.density, [place.name for place in places if place.gated])
        for site, place in zip(sites, places, strict=True):  # after the check: an error leaves the model untouched
            if place.gated:
                self._gate(model, site)
        return tuple(places)

    def regularization(self, model: Dynamic) -> Tensor:
        """l1 times the sum over layers of the batch mean of ||g(x)||_1, before winners are taken."""
        return self.l1 * sum_of_penalties(_gates(model).values())

    def set_density(self, model: Dynamic, density: Density) -> None:
        """Change the density of all layers, or of those whose names a pattern fits; others keep theirs."""
        gates = _gates(model)
        for name, value in densities_of(density, gates).items():
            gates[name].set_density(value)

    def density_of(self, model: Dynamic) -> float:
        """Mean density over the gated layers, 1 where none is gated."""
        densities = [gate.density for gate in _gates(model).values()]
        return sum(densities) / len(densities) if densities else 1.0

    def set_strength(self, model: Dynamic, strength: float) -> None:
        """Put every layer that share of the way from density 1 to its target."""
        for name, gate in _gates(model).items():
            least = kept(self.density_for(name), gate.channels)
            gate.set_density(kept_at(strength, least, gate.channels) / gate.channels)

    def advance(self, model: Dynamic, progress: float) -> None:
        """Put the schedule's density for this share of the run into every gate."""
        check_progress(progress)
        if self.one_for_all:
            spread_budgets(_gates(model).values(), progress)
            return
        for name, gate in _gates(model).items():
            gate.set_density(self.density_at(progress, self.density_for(name)))

    def density_for(self, name: str) -> float:
        """The target density of the layer `name`."""
        value = density_for(self.density, name)
        return 1.0 if value is None else value

    def density_at(self, progress: float, target: float) -> float:
        """Density on the way to `target` when the share `progress` in [0, 1] of training is done."""
        if self.schedule == "none" or self.start <= target:
            return target
        return on_the_way(self.start, target, progress, self.schedule, self.step, self.descent)

    def _refusal(self, site: ConvSite) -> tuple[str, int]:
        if site.conv is None or site.blocked:
            return site.blocked, 0
        if not self.selects(site.name, site.conv):
            return NOT_SELECTED, 0
        overhead = predictor_macs(site.input_shape, site.conv.out_channels)  # type: ignore[arg-type]
        if overhead > self.max_overhead * site.macs:
            return f"its gate would cost {overhead / site.macs:.0%} of its MACs", overhead
        return "", overhead

    def _gate(self, model: nn.Module, site: ConvSite) -> None:
        conv: Any = site.conv
        gate = FBSGate(conv.in_channels, conv.out_channels, self.density_for(site.name))
        gated = gate_outputs(model, site, gate)
        self._initialise(gate, gated.norm)
        if gated.norm is not None:
            _freeze_signs(gated)
            gated.register_load_state_dict_post_hook(_freeze_signs)

    @torch.no_grad()
    def _initialise(self, gate: FBSGate, norm: Any) -> None:
        phi, rho = gate.predictor.weight, gate.predictor.bias
        if self.init == "paper":
            nn.init.kaiming_normal_(phi, nonlinearity="relu")
        else:
            phi.zero_()
        rho.fill_(1)
        if norm is None or norm.weight is None:
            return
        gamma = norm.weight
        if self.init == "paper":
            gamma.fill_(1)
        else:
            magnitude = gamma.abs()
            floor = FLOOR * magnitude.mean()
            rho.copy_(torch.where(magnitude > floor, magnitude, floor if floor > 0 else torch.ones_like(floor)))
            if norm.bias is not None:
                norm.bias.div_(rho)
            gamma.copy_(torch.where(magnitude > floor, gamma.sign(), gamma / rho))


class FBSGate(ChannelGate, SpreadGate, PenalisedGate, Predictor):
    """pi(x) = wta_k(ReLU(ss(x) phi + rho)) for maps x [N, C_in, H, W]."""

    CENTRE = 1.0

    winners: Tensor

    def __init__(self, inputs: int, channels: int, density: float) -> None:
        super().__init__(channels)
        self.predictor = nn.Linear(inputs, channels)
        # A tensor, so that it travels with the weights and a change of density compiles nothing anew.
        self.register_buffer("winners", torch.tensor(kept(density, channels)))
        self._density = self._least = density
        self.prepare_spread()

    def forward(self, x: Tensor) -> Pair:
        saliency = torch.relu(self.predictor(self.features(x)))
        if self.training:
            self.penalty = saliency.sum(1).mean()
        winners = top_k_mask(saliency, self.counts(self.winners, 1 - self._least, self.channels, len(x)))
        return saliency * winners.to(saliency.dtype), winners

    def features(self, x: Tensor) -> Tensor:
        """ss(x), [N, C_in]."""
        return mean_magnitude(x)

    @torch.no_grad()
    def predict(self, weight: Tensor, bias: Tensor) -> None:
        """Take weight [C, C_in] as phi and bias [C] as rho."""
        self.predictor.weight.copy_(weight)
        self.predictor.bias.copy_(bias)

    def overhead(self, shape: torch.Size) -> int:
        """One MAC for each element that is pooled and one for each weight of phi."""
        return predictor_macs(shape[1:], self.channels)

    def lower(self, shape: tuple[int, int, int]) -> LoweredGate:
        """The gate as programs have it: the winners of linear saliencies of mean magnitudes."""
        weights = {"weight": self.predictor.weight, "bias": self.predictor.bias}
        return LoweredGate("topk", {"winners": int(self.winners)}, weights)

    @property
    def density(self) -> float:
        """Share of channels kept, in (0, 1]."""
        winners = int(self.winners)
        return self._density if kept(self._density, self.channels) == winners else winners / self.channels

    def set_density(self, density: float) -> None:
        """Keep ceil(density * channels) channels from now on."""
        self._density = check_density(density)
        self.winners.fill_(kept(density, self.channels))


def _gates(model: Dynamic) -> dict[str, FBSGate]:
    return {name: gate for name, gate in model.gates().items() if isinstance(gate, FBSGate)}


def _freeze_signs(gated: Any, _keys: object = None) -> None:
    """A scale of plain signs is no parameter of the method; one that stands in for tiny gammas is learned.

    What was frozen for other reasons stays so.
    """
    scale = gated.norm.weight
    if not isinstance(scale, nn.Parameter):
        return
    signs = bool((scale.abs() == 1).all())
    if signs and scale.requires_grad:
        scale.requires_grad_(False)
        gated.froze_signs = True
    elif not signs and getattr(gated, "froze_signs", False):
        scale.requires_grad_(True)
        gated.froze_signs = False
