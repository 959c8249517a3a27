"""Accuracy of a model, and what its inputs cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.decision import Decision
from thrifty.dynamic import evaluating, hooked
from thrifty.errors import DataError, ThriftyError
from thrifty.gates import Gate, LayerGate, gates_of
from thrifty.macs import MacCount, count_macs


@dataclass(frozen=True)
class Shares:
    """What gates left of a layer or block for each of N photographs; None on an axis that none decides on.

    Attributes:
        ran: float64 [N], 1 where it was executed, 0 where its block was skipped.
        channels: float64 [N], share of channels that were computed (or read), 0 where it did not run.
        columns: float64 [N], share of positions that were read, 0 where it did not run.
    """

    ran: Tensor | None = None
    channels: Tensor | None = None
    columns: Tensor | None = None

    def means(self) -> dict[str, float]:
        """Means over the photographs, by axis that is decided on."""
        return {axis: getattr(self, axis).mean().item() for axis in AXES if getattr(self, axis) is not None}


AXES = ("ran", "channels", "columns")
"""What `Shares` has, in this order."""


@dataclass(frozen=True)
class CostGroup:
    """Photographs of similar cost.

    Attributes:
        photographs: how many they are.
        macs: their mean MACs.
        lowest: MACs of the cheapest of them.
        highest: MACs of the dearest of them.
        accuracy: share of them that is classified as labelled, in [0, 1].
    """

    photographs: int
    macs: float
    lowest: int
    highest: int
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """What a model does on N labelled photographs.

    Attributes:
        probabilities: float32 [N, classes], softmax of the logits.
        labels: int64 [N].
        macs: MACs of each photograph.
        shares: what ran of gated blocks, their layers and gated layers, by name.
    """

    probabilities: Tensor
    labels: Tensor
    macs: MacCount
    shares: dict[str, Shares] = field(default_factory=dict)

    @property
    def correct(self) -> Tensor:
        """bool [N]: whether the most probable class is the labelled one."""
        return self.probabilities.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        """Share of photographs classified as labelled, in [0, 1]."""
        return self.correct.double().mean().item()

    @property
    def constant_cost(self) -> bool:
        """Whether every photograph costs the same."""
        return bool((self.macs.total == self.macs.total[0]).all())

    def class_accuracy(self) -> list[float | None]:
        """Accuracy of each class, None for one without photographs."""
        return self._by_class(self.correct)

    def class_macs(self) -> list[float | None]:
        """Mean MACs of each class, None for one without photographs."""
        return self._by_class(self.macs.total)

    def by_cost(self, quantiles: int = 5) -> list[CostGroup]:
        """Accuracy by cost, from the cheapest photographs to the dearest.

        Photographs of equal cost stay together, in the quantile that the middle one of them falls into. So groups may
        differ in size, and there are fewer of them where a quantile is left empty: one if all cost the same.

        Args:
            quantiles: into how many parts, as equal as can be, the photographs are divided.

        Raises:
            ThriftyError: `quantiles` is not an integer of at least 1.
        """
        if isinstance(quantiles, bool) or not isinstance(quantiles, int) or quantiles < 1:
            raise ThriftyError(f"quantiles is {quantiles!r}, but must be an integer of at least 1.")
        _, place, counts = self.macs.total.unique(return_inverse=True, return_counts=True)
        middle = 2 * counts.cumsum(0) - counts  # twice the number of those below it
        quantile = (quantiles * middle // (2 * len(self.labels)))[place]
        parts = [quantile == index for index in quantile.unique().tolist()]
        return [self._group(part) for part in parts]

    def _group(self, chosen: Tensor) -> CostGroup:
        macs = self.macs.total[chosen]
        right = self.correct[chosen].double().mean().item()
        return CostGroup(len(macs), macs.double().mean().item(), int(macs.min()), int(macs.max()), right)

    def _by_class(self, values: Tensor) -> list[float | None]:
        of_class = [values[self.labels == index] for index in range(self.probabilities.shape[1])]
        return [part.double().mean().item() if len(part) else None for part in of_class]


def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Classify every photograph of `loader` in evaluation mode and count its MACs, in one pass.

    Raises:
        DataError: the loader is empty, or a label is not one of the model's classes.
    """
    probabilities: list[Tensor] = []
    labels: list[Tensor] = []
    shares: list[dict[str, dict[str, Tensor]]] = []
    device = _device(model)
    gates = gates_of(model)
    outputs: list[Tensor] = []  # of the batch that was counted last, as are the decisions
    decided: dict[str, Decision] = {}

    def note_logits(_model: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs[:] = [output]

    def noting(name: str) -> Any:
        def hook(gate: Gate, _inputs: object, output: tuple[Any, ...]) -> None:
            decided[name] = gate.decision(output)

        return hook

    def counted() -> Iterator[Tensor]:  # batch by batch, for a large set doesn't fit in memory
        for x, y in loader:
            if not len(x):
                continue
            decided.clear()
            yield x.to(device)
            logits = outputs[0]
            beyond = y[(y < 0) | (y >= logits.shape[1])]
            if len(beyond):
                raise DataError(f"label {int(beyond[0])} is beyond the model's {logits.shape[1]} classes.")
            probabilities.append(logits.float().softmax(1).cpu())
            labels.append(y)
            shares.append(_shares(gates, decided))
        if not sum(len(part) for part in labels):
            raise DataError("there are no photographs to evaluate.")

    hooks = [gate.register_forward_hook(noting(name)) for name, gate in gates.items()]
    with hooked([*hooks, model.register_forward_hook(note_logits)]):
        macs = count_macs(model, counted())
    sizes = [len(part) for part in labels]
    return Evaluation(torch.cat(probabilities), torch.cat(labels), macs, _joined(shares, sizes))


def _shares(gates: Mapping[str, Gate], decided: Mapping[str, Decision]) -> dict[str, dict[str, Tensor]]:
    """What one batch's decisions leave of each layer and block, float64 [N] by name and axis."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, decision in decided.items():
        gate = gates[name]
        if isinstance(gate, LayerGate):
            ran = decision.layer.double().cpu()
            found.update({member: {"ran": ran} for member in (name, *gate.members)})
    for name, decision in decided.items():
        for axis in ("channels", "columns"):
            kept = getattr(decision, axis)
            if kept is not None:
                own = found.setdefault(name, {})
                own[axis] = kept.flatten(1).double().mean(1).cpu() * own.get("ran", 1)
    return found


def _joined(batches: list[dict[str, dict[str, Tensor]]], sizes: list[int]) -> dict[str, Shares]:
    """Batches of `sizes` put together; what a batch does not reach did not run in it."""
    axes = dict.fromkeys((name, axis) for batch in batches for name, own in batch.items() for axis in own)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, axis in axes:
        values = [
            batch.get(name, {}).get(axis, torch.zeros(size, dtype=torch.float64))
            for batch, size in zip(batches, sizes, strict=True)
        ]
        parts.setdefault(name, {})[axis] = torch.cat(values)
    return {name: Shares(**own) for name, own in parts.items()}


def accuracy(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Share of photographs classified as labelled, in [0, 1], without counting costs.

    Raises:
        DataError: the loader is empty.
    """
    correct = seen = 0
    with evaluating(model):
        for x, y in loader:
            correct += int((model(x.to(device)).argmax(1).cpu() == y).sum())
            seen += len(y)
    if not seen:
        raise DataError("there are no photographs to evaluate.")
    return correct / seen


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
