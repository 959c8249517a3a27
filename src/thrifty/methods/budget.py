"""What methods share that learn how much to spend: the MACs that gates leave, as a function of them, and a target.

How the budget is met is this project's own: by a price. Each gate's scores are lowered by it; it rises while inputs
cost more than the goal and falls while they cost less, at every step by `rate` times the difference of the batch mean
of executed over dense MACs and the goal. So the loss is the network's alone, scores are learned by what they do for
it, and the price decides how many of them pay. In the first part `relax` of training the goal descends from 1 to the
target, and layer gates pay a share of the price that rises from 0 to 1, so that whole blocks close last. Channels pay
by the root of the MACs that one of them costs, over the mean of all gates of channels: dear ones close earlier. (By the
MACs themselves whole layers close, those with few and dear channels; without regard to them many cheap channels do.)

For each input the executed MACs are a sum of products: of each layer its dense MACs times the open share of its
outputs, of its inputs and of its block. Which gates a layer depends on is measured at conversion by closing one gate at
a time. Evaluation has no batch statistics, so the same gates may leave more there: after training the threshold is
raised until photographs that were held out cost the target.

The sum of products is exact where a layer reads maps of one gate, or of several side by side. Where a sum makes a
map active that several gates could leave, it is linear in each of them.
"""

from __future__ import annotations

import logging
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thrifty.blocks import Block, block_input, gate_block
from thrifty.budgets import set_budget
from thrifty.conversion import Place
from thrifty.dynamic import decisions, hooked
from thrifty.errors import ThriftyError
from thrifty.gates import Gate, LayerGate, MeanPredictor, Pair, predictor_macs
from thrifty.macs import MacCount, count_macs
from thrifty.methods.base import NOT_SELECTED, MethodConfig, check_progress
from thrifty.strength import HIGHEST_THRESHOLD

if TYPE_CHECKING:
    from thrifty.dynamic import Dynamic
    from thrifty.graph import ConvSite, Sites

log = logging.getLogger(__name__)

AT_A_TIME = 64
"""Photographs in a batch when the threshold is set."""

PROBE_VALUES = 8 * 3 * 224 * 224
"""Values of the inputs that are probed at a time."""


class Costs:
    """Executed MACs over dense MACs as a polynomial of the gates' open shares, and where training stands.

    Attributes:
        factors: int64 [terms, factors]: numbers of gates; that behind the last stands for 1.
        weights: float32 [terms], shares of the dense MACs.
        progress: share of training done, in [0, 1].
    """

    def __init__(self, terms: Iterable[tuple[float, tuple[int, ...]]], gates: int) -> None:
        terms = [term for term in terms if term[0]]
        width = max((len(indices) for _, indices in terms), default=0)
        rows = [[*indices, *[gates] * (width - len(indices))] for _, indices in terms]
        self.factors = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)
        self.weights = torch.tensor([weight for weight, _ in terms], dtype=torch.float32)
        self.progress = 1.0

    def of(self, gate: int) -> float:
        """Share of the dense MACs that depends on the gate of this number."""
        return float(self.weights[(self.factors == gate).any(1)].sum())

    def ratio(self, shares: Tensor) -> Tensor:
        """Executed over dense MACs, [N], of inputs that leave `shares` [N, gates] open."""
        shares = torch.cat([shares, torch.ones_like(shares[:, :1])], 1)
        product = self.weights.to(shares)[None]
        for column in self.factors.T.to(shares.device):
            product = product * shares[:, column]
        return product.sum(1)


class Budgeted(MeanPredictor, Gate):
    """A gate that tells what it leaves open, and whose predicted scores are lowered by what it is charged.

    Attributes:
        threshold: raised after training to meet a budget, a scalar buffer.
        price: the same for all gates, a scalar buffer that travels with the weights.
        charged: of the price, a scalar buffer.
        toll: what the gate pays in full, over the price.
        opened: of the latest forward pass in training, [N]: the share that was decided on; None once it was counted.
        share: its mean, 1 before any.
        costs: of the whole model, shared by its gates.
    """

    threshold: Tensor
    price: Tensor
    charged: Tensor
    toll: float = 1.0
    opened: Tensor | None = None
    share: float | Tensor = 1.0
    costs: Costs | None = None

    def prepare(self, inputs: int, bias: Tensor, threshold: float = 0.0) -> None:
        """Predict from `inputs` channels, with bias [outputs] and this threshold at first, and a price of 0."""
        self.make_predictor(inputs, bias)
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        self.register_buffer("price", torch.tensor(0.0))
        self.register_buffer("charged", torch.tensor(0.0))

    def predicted(self, x: Tensor) -> Tensor:
        """Scores [N, outputs], less what is charged."""
        return super().predicted(x) - self.charged

    def of_means(self) -> Pair:
        """Weight [outputs, C] and bias [outputs] of means, less what is charged."""
        weight, bias = super().of_means()
        return weight, bias - self.charged

    def predict(self, weight: Tensor, bias: Tensor) -> None:
        """Score by weight [outputs, C] and bias [outputs] from now on, whatever is charged."""
        super().predict(weight, bias + self.charged)

    def overhead(self, shape: torch.Size) -> int:
        """One MAC for each element that is pooled and one for each weight."""
        return predictor_macs(shape[1:], self.predictor.out_features)

    def open(self, decided: Tensor) -> None:
        """Note in training which share of each input [N] is left open."""
        self.opened, self.share = decided, decided.mean()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": None, "share": float(self.share)}  # they belong to one pass


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(MethodConfig, ABC):
    """Settings of a method that learns what to skip under a budget.

    Attributes:
        target: executed MACs over dense MACs, the mean of inputs, gates included, in (0, 1].
        rate: of the price, for each step and unit of the cost above the goal.
        relax: share of training in [0, 1] over which the goal descends and blocks are held open.
        max_overhead: a gate is placed only if its MACs are at most this share of what it can skip by itself.
    """

    target: float = 0.5
    rate: float = 0.1
    relax: float = 1 / 3
    max_overhead: float = 0.5

    @property
    def least_threshold(self) -> float:
        """The threshold that gates learn with."""
        return 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("target", "a share of MACs in (0, 1]", lambda target: 0 < target <= 1)
        self.check_number("relax", "a share of training in [0, 1]", lambda relax: 0 <= relax <= 1)
        for setting in ("rate", "max_overhead"):
            self.check_number(setting, "a finite number, 0 or more", lambda value: value >= 0)

    def measure(self, model: Dynamic, example: Tensor) -> None:
        """Measure how MACs depend on each gate."""
        gates = budgeted(model)
        if not gates:
            return
        costs = _measure(model, example)
        dear = {}
        for number, gate in enumerate(gates.values()):
            gate.costs = costs
            if not isinstance(gate, LayerGate):
                dear[gate] = costs.of(number) / gate.predictor.out_features
        total = sum(dear.values())
        for gate, cost in dear.items():
            gate.toll = (cost / total * len(dear)) ** 0.5 if total else 1.0

    def finish(self, model: Dynamic, x: Tensor) -> None:
        """Raise the threshold until x cost the target on average, should they cost more: evaluation is no batch.

        A run too short to part scores has none that brings the cost down so far: that is logged, and all stays.
        """
        if not budgeted(model):
            return
        if not len(x):
            log.warning("%s has no held out photographs to meet its target of %s by.", self.name, self.target)
            return
        try:
            set_budget(model, self.target, x.split(AT_A_TIME))
        except ThriftyError as error:
            log.warning("%s missed its target of %s: %s", self.name, self.target, error)

    def regularization(self, model: Dynamic) -> Tensor:
        """Zero; moves the price by what the latest forward pass in training mode cost; `advance` charges it."""
        gates = list(budgeted(model).values())
        reached = [gate.opened for gate in gates if gate.opened is not None]
        costs = gates[0].costs if gates else None
        if not reached or costs is None:
            return torch.zeros(())
        whole = torch.ones_like(reached[0])  # of gates that training does not reach
        shares = torch.stack([whole if gate.opened is None else gate.opened for gate in gates], 1)
        excess = costs.ratio(shares).mean() - self.goal_at(costs.progress)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(excess)
            excess = excess / torch.distributed.get_world_size()
        price = max(0.0, float(gates[0].price) + self.rate * float(excess))
        for gate in gates:
            gate.price.fill_(price)
            gate.opened = None
        return torch.zeros(())

    def _relaxed(self, progress: float) -> float:
        return min(1.0, progress / self.relax) if self.relax else 1.0

    def goal_at(self, progress: float) -> float:
        """Executed over dense MACs that are aimed at when the share `progress` in [0, 1] of training is done."""
        return 1 + (self.target - 1) * self._relaxed(progress)

    def advance(self, model: Dynamic, progress: float) -> None:
        """Put the goal where it is when the share `progress` in [0, 1] of training is done, and charge the price.

        In training mode gates get the threshold that they learn with.
        """
        check_progress(progress)
        done = self._relaxed(progress)
        for gate in budgeted(model).values():
            if gate.costs is not None:
                gate.costs.progress = progress
            if gate.training:  # what was set for a budget is not learned with
                gate.threshold.fill_(self.least_threshold)
            # Not when the price moves: the backward pass that follows then still needs what was charged.
            gate.charged.copy_(gate.price * gate.toll * (done if isinstance(gate, LayerGate) else 1))

    def set_density(self, model: Dynamic, density: float | Mapping[str, float]) -> None:
        """There is no density to set: gates decide by scores.

        Raises:
            ThriftyError: always.
        """
        raise ThriftyError(f"{self.name} has no density to set: gates decide by scores. Use set_budget instead.")

    def density_of(self, model: Dynamic) -> float:
        """Share of channels and layers that were open for the latest batch in training, mean over gates; 1 before."""
        shares = [float(gate.share) for gate in budgeted(model).values()]
        return sum(shares) / len(shares) if shares else 1.0

    def gate_layers(
        self,
        model: nn.Module,
        sites: Sites,
        blocks: tuple[Block, ...],
        make: Callable[[Block, int], LayerGate],
    ) -> GatedLayers:
        """Gate every block that can take it with what `make` gives for the block and its number of input channels."""
        gated = GatedLayers()
        for block in blocks:
            shape, macs = block_input(model, block, sites)
            reason = block.refused
            if not reason and shape is None:
                reason = f"the input of {block.entry} is not known"
            if not reason and not self.selects(block.name, _module(model, block)):
                reason = NOT_SELECTED
            if not reason and shape is not None and predictor_macs(shape, 1) > self.max_overhead * macs:
                reason = "its gate would cost too large a share of its MACs"
            if not reason and shape is not None:
                gate = make(block, shape[0])
                gated.overhead[next(site.name for site in sites if site.name in block.members)] = gate.overhead(
                    torch.Size((1, *shape))
                )
                gate_block(model, block, gate)
                gated.skipped.update(block.members)
            gated.notes.update(dict.fromkeys(block.members, f"block {block.name}: {reason or 'layer gate'}"))
        return gated

    def set_strength(self, model: Dynamic, strength: float) -> None:
        """Put every gate's threshold there: at 0 gates decide as they learned to, at 1 almost none opens."""
        self.set_threshold(model, min(max(strength, self.least_threshold), HIGHEST_THRESHOLD))

    def set_threshold(self, model: Dynamic, threshold: float) -> None:
        """Let every gate's threshold be that, in [0, 1), from now on; what it means is the method's."""
        check_threshold(threshold)
        for gate in budgeted(model).values():
            gate.threshold.fill_(threshold)


@dataclass(frozen=True)
class GatedLayers:
    """What became of a model's residual blocks.

    Attributes:
        skipped: names of the layers that a layer gate may skip.
        notes: by name of the layer, whether its block is gated and why not.
        overhead: MACs of each layer gate, by name of its block's first convolution.
    """

    skipped: set[str] = field(default_factory=set)
    notes: dict[str, str] = field(default_factory=dict)
    overhead: dict[str, int] = field(default_factory=dict)

    def place(self, site: ConvSite, gated: bool, note: str = "", gate_macs: int = 0) -> Place:
        """The report of a convolution, given what is to be said of its own gate."""
        notes = "; ".join(filter(None, (self.notes.get(site.name, ""), note)))
        return Place(site.name, gated, notes, site.macs, gate_macs + self.overhead.get(site.name, 0))


def _module(model: nn.Module, block: Block) -> nn.Module:
    """The module of a block's name, or the first of its branch where there is none."""
    path = block.name if block.name in dict(model.named_modules()) else block.entry
    return model.get_submodule(path)


def check_threshold(threshold: float) -> None:
    """An error where a threshold is not in [0, 1)."""
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= threshold < 1:
        raise ThriftyError(f"a threshold of scores must be in [0, 1), not {threshold!r}.")


def budgeted(model: Dynamic) -> dict[str, Budgeted]:
    """The model's gates that tell what they leave open, by name."""
    return {name: gate for name, gate in model.gates().items() if isinstance(gate, Budgeted)}


def open_shares(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Of each gate, by name, how often its layers ran, or the mean share of channels that it left open.

    Args:
        model: a dynamic model.
        batches: a batch [N, C, H, W], or a loader of batches or of (batch, labels) pairs.

    Raises:
        ThriftyError: the model is dense, or there is no input.
    """
    sums: dict[str, float] = {}
    count = 0
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        x = batch if isinstance(batch, Tensor) else batch[0]
        count += len(x)
        for name, decision in decisions(model, x).items():
            kept = decision.layer if decision.channels is None else decision.channels.double().mean(1)
            if kept is not None:
                sums[name] = sums.get(name, 0.0) + kept.double().sum().item()
    if not count:
        raise ThriftyError("there are no inputs to decide on. Give at least one.")
    return {name: total / count for name, total in sums.items()}


def _measure(model: Dynamic, example: Tensor) -> Costs:
    """How the MACs depend on each gate, from passes in which one gate after the other is closed, channels by half."""
    gates = model.gates()
    names = [name for name, gate in gates.items() if isinstance(gate, Budgeted)]
    closed: dict[str, float] = {}

    def forcing(gate: Gate, row: int | None) -> Any:
        name = next(name for name, other in gates.items() if other is gate)

        def hook(_gate: Gate, _inputs: object, output: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
            kept = torch.ones_like(output[1])
            if row is not None:
                kept[row] = False
                if kept.ndim > 1:
                    kept[row, : kept.shape[1] // 2] = True
                closed[name] = 1 - kept[row].double().mean().item()
            return kept.to(output[0].dtype), kept

        return hook

    def count(rows: dict[str, int], size: int) -> MacCount:
        handles = [gates[name].register_forward_hook(forcing(gates[name], rows.get(name))) for name in names]
        with hooked(handles):
            return count_macs(model, example[:1].expand(size, *example.shape[1:]).contiguous())

    dense = count({}, 1)
    chunk = max(1, PROBE_VALUES // example[0].numel())
    drops: dict[str, dict[str, float]] = {}
    for start in range(0, len(names), chunk):
        rows = {name: row for row, name in enumerate(names[start : start + chunk])}
        probed = count(rows, len(rows))
        for name, row in rows.items():
            drops[name] = {
                layer: (1 - macs[row].item() / dense.layers[layer].item()) / closed[name]
                for layer, macs in probed.layers.items()
                if dense.layers[layer]
            }
    number = {name: place for place, name in enumerate(names)}
    blocks = {gate.block: gate for gate in gates.values() if isinstance(gate, LayerGate)}
    terms: list[tuple[float, tuple[int, ...]]] = []
    for layer, macs in dense.layers.items():
        share = macs.item() / model.conversion.total_macs
        own = [name for name, gate in blocks.items() if layer in gate.members]
        own += [layer] if layer in number and layer not in blocks else []
        read = {name: drops[name].get(layer, 0.0) for name in names if name not in own}
        terms += _terms(share, [number[name] for name in own], {number[k]: v for k, v in read.items() if v > 1e-9})
    for name, macs in dense.gates.items():
        own = [block for block, gate in blocks.items() if name in gate.members and block in number]
        terms.append((macs.item() / model.conversion.total_macs, tuple(number[block] for block in own)))
    return Costs(terms, len(names))


def _terms(share: float, own: list[int], read: dict[int, float]) -> list[tuple[float, tuple[int, ...]]]:
    """A layer's cost `share` times the shares of the gates `own`, times that of its inputs which is left.

    Args:
        share: what it costs with all gates open.
        own: gates of the layer and of its block.
        read: by gate, which share of the inputs it can close.
    """
    total = sum(read.values())
    if total > 1 + 1e-6:  # each of them closes what others close too
        return [(share, (*own, *read))]
    inputs = [(share * part, (*own, gate)) for gate, part in read.items()]
    rest = 1 - total
    return [*inputs, (share * rest, tuple(own))] if rest > 1e-9 else inputs
