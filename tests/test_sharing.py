"""Whether threads share short calls: what the engine chooses, by times that are simulated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import _native

MILLISECOND = 1e-3


def simulate(
    together: Callable[[float], float], alone: float, seconds: float, disturb: float = 0.0
) -> tuple[float, float, float]:
    """Time of calls one after the other, and what the better way would have taken each time, and the share of calls.

    Args:
        together: seconds of a call that threads share, by the time at which it begins.
        alone: seconds of a call by one thread.
        seconds: to simulate.
        disturb: share of calls that take ten times as long.

    Returns:
        Seconds of a call on average, the same had each been done in the faster way, and the share that was shared.
    """
    rng = np.random.default_rng(0)
    sharing = _native.Sharing()
    now, spent, best, shared, calls = 1000.0, 0.0, 0.0, 0, 0
    while now < 1000.0 + seconds:
        ways = together(now - 1000), alone
        factor = 10 if rng.random() < disturb else 1
        took = ways[0 if sharing.shares else 1] * factor
        shared += sharing.shares
        calls += 1
        spent += took
        best += min(ways) * factor
        now += took
        sharing.took(took, now)
    return spent / calls, best / calls, shared / calls


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.floats(0.05, 1.2), st.floats(0.3, 3), st.floats(0, 0.05))
def test_the_faster_way_is_found_and_kept(alone: float, ratio: float, disturb: float) -> None:
    spent, best, _ = simulate(lambda _: ratio * alone * MILLISECOND, alone * MILLISECOND, 2.0, disturb)
    if max(1, ratio) * alone < 2:
        assert spent < 1.07 * best


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.floats(1, 3), st.floats(0.5, 0.8), st.floats(1.3, 2.5))
def test_it_follows_a_machine_that_changes(period: float, good: float, bad: float) -> None:
    alone = 0.3 * MILLISECOND

    def together(time: float) -> float:
        return alone * (good if time // period % 2 == 0 else bad)

    spent, best, shared = simulate(together, alone, 6 * period)
    assert 0.1 < shared < 0.9
    # A second thread that is free again is noticed after 0.8 seconds at most.
    assert spent < best * 1.05 + alone * (1 - good) * 0.8 / period


def test_long_calls_are_always_shared() -> None:
    assert simulate(lambda _: 5 * MILLISECOND, 3 * MILLISECOND, 2.0)[2] == 1.0


def test_calls_that_get_long_are_shared_again() -> None:
    sharing = _native.Sharing()
    now = 0.0
    for _ in range(100):
        took = 1 * MILLISECOND if sharing.shares else 0.5 * MILLISECOND
        now += took
        sharing.took(took, now)
    assert not sharing.shares
    for _ in range(20):
        now += 10 * MILLISECOND
        sharing.took(10 * MILLISECOND, now)
    assert sharing.shares
