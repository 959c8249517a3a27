"""Accuracy of a model, and what its inputs cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thrifty.dynamic import evaluating
from thrifty.errors import DataError
from thrifty.macs import MacCount, count_macs


@dataclass(frozen=True)
class Evaluation:
    """What a model does on N labelled photographs.

    Attributes:
        probabilities: float32 [N, classes], softmax of the logits.
        labels: int64 [N].
        macs: MACs of each photograph.
    """

    probabilities: Tensor
    labels: Tensor
    macs: MacCount

    @property
    def correct(self) -> Tensor:
        """bool [N]: whether the most probable class is the labelled one."""
        return self.probabilities.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        """Share of photographs classified as labelled, in [0, 1]."""
        return self.correct.double().mean().item()

    def class_accuracy(self) -> list[float | None]:
        """Accuracy of each class, None for one without photographs."""
        classes = self.probabilities.shape[1]
        of_class = [self.correct[self.labels == index] for index in range(classes)]
        return [part.double().mean().item() if len(part) else None for part in of_class]


def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Classify every photograph of `loader` in evaluation mode and count its MACs.

    Raises:
        DataError: the loader is empty, or a label is not one of the model's classes.
    """
    probabilities: list[Tensor] = []
    labels: list[Tensor] = []
    device = _device(model)

    def classified() -> Iterator[Tensor]:  # batch by batch, for a large set doesn't fit in memory
        for batch, y in loader:
            x = batch.to(device)
            with evaluating(model):
                logits = model(x)
            beyond = y[(y < 0) | (y >= logits.shape[1])]
            if len(beyond):
                raise DataError(f"label {int(beyond[0])} is beyond the model's {logits.shape[1]} classes.")
            probabilities.append(logits.float().softmax(1).cpu())
            labels.append(y)
            yield x
        if not sum(len(part) for part in labels):
            raise DataError("there are no photographs to evaluate.")

    macs = count_macs(model, classified())
    return Evaluation(torch.cat(probabilities), torch.cat(labels), macs)


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
