"""A compute budget for a dynamic model at run time: the strength of its method at which it costs so much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any

from torch import Tensor

from thrifty.dynamic import Dynamic, hooked
from thrifty.errors import ThriftyError
from thrifty.macs import count_macs
from thrifty.strength import find_strength


def set_budget(model: Dynamic, share: float, inputs: Tensor | Iterable[Any], percentile: float | None = None) -> float:
    """Let a dynamic model prune as much as it takes to cost at most `share` of the dense MACs, and no more.

    Made for models that were trained for all budgets (`one_for_all`), or whose gates have thresholds (LC-Net, Gumbel);
    a model that was trained for one density loses accuracy at others.

    Args:
        model: a dynamic model; its gates are changed, no weight is.
        share: MACs per input over those of the dense model, in (0, 1]; the mean over the inputs, or their `percentile`.
        inputs: images [N, C, H, W] to measure the cost on, or a list or loader of batches or (batch, labels) pairs,
            which is read repeatedly.
        percentile: such as 95, for a bound that 95 % of the inputs stay under.

    Returns:
        The share that was reached.

    Raises:
        ThriftyError: the share or the percentile is out of range, nothing is gated, the inputs can be read but once or
            are of another size than the model was converted for, or the share is less than the model costs at its full
            strength; it stays as it was.
    """
    if percentile is not None and not (isinstance(percentile, Real) and 0 <= percentile <= 100):
        raise ThriftyError(f"percentile is {percentile!r}, but must be in [0, 100].")
    if not isinstance(model, Dynamic):
        raise ThriftyError(f"{type(model).__name__} is a dense model and has no budget. Convert it first.")
    if not model.gates():
        raise ThriftyError(f"no layer of this {type(model).__name__} is gated: its `conversion` says why.")
    if isinstance(inputs, Iterator):
        raise ThriftyError("inputs are read repeatedly: give a list or a loader, not an iterator.")
    if not isinstance(inputs, (Tensor, Iterable)):
        raise ThriftyError(f"inputs is {type(inputs).__name__}, but must be images, or a list or loader of batches.")
    dense = model.conversion.total_macs
    buffers = [buffer for gate in model.gates().values() for buffer in gate.buffers()]
    before = [buffer.clone() for buffer in buffers]

    def cost(strength: float) -> float:
        model.method.set_strength(model, strength)
        found = count_macs(model, inputs)
        return (found.mean if percentile is None else found.percentile(percentile)) / dense

    try:
        with hooked([model.register_forward_pre_hook(lambda _model, x: model.conversion.check_shape(x[0]))]):
            return find_strength(cost, share)
    except BaseException:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        raise
