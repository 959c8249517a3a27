"""A compute budget for a dynamic model at run time: the strength of its method at which it costs so much."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from thrifty.dynamic import Dynamic
from thrifty.errors import ThriftyError
from thrifty.macs import MacCount, count_macs

STEPS = 12
"""Halvings of the range of strengths: a step of the last one changes no channel of the usual layers."""


def set_budget(model: Dynamic, share: float, x: Tensor, percentile: float | None = None) -> float:
    """Let a dynamic model prune as much as it takes to cost at most `share` of the dense MACs, and no more.

    Made for models that were trained for all budgets (`one_for_all`), or whose gates have thresholds (LC-Net); a model
    that was trained for one density loses accuracy at others.

    Args:
        model: a dynamic model; its gates are changed, no weight is.
        share: MACs per input over those of the dense model, in (0, 1]; the mean over x, or its `percentile`.
        x: images [N, C, H, W] to measure the cost on.
        percentile: such as 95, for a bound that 95 % of the images stay under.

    Returns:
        The share that was reached.

    Raises:
        ThriftyError: the share is out of range, or less than the model costs at its full strength.
    """
    check_budget(share)
    if not isinstance(model, Dynamic):
        raise ThriftyError(f"{type(model).__name__} is a dense model and has no budget. Convert it first.")
    dense = model.conversion.total_macs

    def cost(strength: float) -> float:
        model.method.set_strength(model, strength)
        found: MacCount = count_macs(model, x)
        return (found.mean if percentile is None else found.percentile(percentile)) / dense

    return find_strength(cost, share)


def check_budget(share: float) -> None:
    """An error where a share of the dense MACs is not in (0, 1]."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ThriftyError(f"budget is {share!r}, but must be a share of the dense MACs in (0, 1].")


def find_strength(cost: Callable[[float], float], share: float) -> float:
    """Leave `cost` called last at the lowest strength in [0, 1] at which it is at most `share`; returns that cost.

    Raises:
        ThriftyError: at strength 1 it still costs more.
    """
    reached = cost(0.0)
    if reached <= share:
        return reached
    least = cost(1.0)
    if least > share:
        raise ThriftyError(f"the model costs {least:.3f} of its dense MACs at least, more than the budget of {share}.")
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= share else (middle, high)
    return cost(high)
