"""Timing several runners side by side: in turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thrifty.benchmarking.peers import Runner

BLOCK = 0.03
"""Seconds of timed calls in a turn, if one call doesn't take longer."""

PAUSE = 0.02
"""Seconds between turns: by then the worker threads of the last runner have stopped spinning."""

SETTLE = 0.005
"""Seconds of calls at the start of a turn that are not timed, one at least: caches and worker threads come back."""

ROUNDS = 5
"""Turns that every runner gets at least."""

LIMIT = 3
"""Times what was foreseen, after which a turn ends, and turns altogether: on a busy machine calls take longer."""


@dataclass(frozen=True)
class Timing:
    """Times of single calls in seconds, float64 [calls]."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        """Median in milliseconds."""
        return self.percentile(50)

    def percentile(self, share: float) -> float:
        """Milliseconds that `share` percent of the calls stay under."""
        return float(np.percentile(self.seconds, share)) * 1e3


def interleave(
    runners: Sequence[Runner], batches: Sequence[np.ndarray], seconds: float = 1.5, pause: float = PAUSE
) -> list[Timing]:
    """Time every runner in turns, one after the other, round after round.

    Args:
        runners: what to time.
        batches: inputs [N, C, H, W]; each call takes the next, in the same order for every runner.
        seconds: of timed calls for each runner, about; a runner gets `ROUNDS` turns at least.
        pause: seconds between turns.
    """
    costs = [_warm_up(runner, batches) for runner in runners]
    calls = [max(1, round(BLOCK / cost)) for cost in costs]
    settling = [max(1, round(SETTLE / cost)) for cost in costs]
    turn = max(count * cost for count, cost in zip(calls, costs, strict=True))
    rounds = max(ROUNDS, round(seconds / turn))
    found: list[list[float]] = [[] for _ in runners]
    for number in range(rounds):
        for index, runner in enumerate(runners):
            if number >= ROUNDS and sum(found[index]) > LIMIT * seconds:
                continue
            time.sleep(pause)
            runner.begin()
            for _ in range(settling[index]):
                runner(batches[number % len(batches)])
            deadline = time.perf_counter() + LIMIT * max(BLOCK, costs[index])
            for call in range(number * calls[index], (number + 1) * calls[index]):
                x = batches[call % len(batches)]
                start = time.perf_counter()
                runner(x)
                end = time.perf_counter()
                found[index].append(end - start)
                if end > deadline:
                    break
    return [Timing(np.array(times)) for times in found]


def _warm_up(runner: Runner, batches: Sequence[np.ndarray]) -> float:
    """Seconds of a call once memory is planned and caches are warm."""
    runner.begin()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.1 and len(times) < 100):
        start = time.perf_counter()
        runner(batches[len(times) % len(batches)])
        times.append(time.perf_counter() - start)
    return min(times[1:])
