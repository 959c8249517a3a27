"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass

START = 1 / 25
"""Share of the peak rate at which warm-up starts."""


@dataclass(frozen=True)
class LearningRate:
    """Rate relative to the peak, by step.

    Attributes:
        kind: `cosine`, `onecycle` or `constant`.
        steps: of the whole run.
        warmup: steps in which the rate rises to the peak.

    `cosine` falls from 1 to 0 along half a cosine after `warmup` steps of linear rise; `onecycle` rises along a cosine
    and falls along one (Smith, Topin, 'Super-Convergence', arXiv 1708.07120, without the momentum cycle);
    `constant` stays at 1 after warm-up.
    """

    kind: str
    steps: int
    warmup: int

    def __call__(self, step: int) -> float:
        """Rate of `step`, counted from 0, as a share of the peak rate, in [0, 1]."""
        if step < self.warmup:
            rise = (step + 1) / self.warmup
            if self.kind == "onecycle":
                rise = (1 - math.cos(math.pi * rise)) / 2
            return START + (1 - START) * rise
        if self.kind == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2
