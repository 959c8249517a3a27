"""How hard a method prunes, as one number from 0 (as little as it can) to 1 (all that it is set to), by its cost."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

from thrifty.errors import ThriftyError

HALVINGS = 12
"""Of the range of strengths: a step of the last one changes no channel of the usual layers."""

HIGHEST_THRESHOLD = 1 - 2**-20
"""Of scores, which is where strength 1 puts it."""


def find_strength(cost: Callable[[float], float], share: float, full: str = "at its full strength") -> float:
    """Call `cost` last at the lowest strength in [0, 1] at which it is at most `share`, and return that cost.

    Args:
        cost: takes a strength, sets it, and returns the share of the dense MACs that it leaves; falls with strength.
        share: of the dense MACs, in (0, 1].
        full: where strength 1 is, for the error.

    Raises:
        ThriftyError: the share is out of range, or at strength 1 it still costs more.
    """
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
        raise ThriftyError(f"budget is {share!r}, but must be a share of the dense MACs in (0, 1].")
    reached = cost(0.0)
    if reached <= share:
        return reached
    least = cost(1.0)
    if least > share:
        raise ThriftyError(
            f"the model costs {least:.3f} of its dense MACs at least, {full}: more than the budget of {share}."
        )
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= share else (middle, high)
    return cost(high)
