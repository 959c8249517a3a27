"""Why a dynamic network is not as much faster as its MACs are fewer: where the time goes, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thrifty.benchmarking.bench import LayerRow, layer_rows
from thrifty.benchmarking.peers import Ours
from thrifty.benchmarking.subjects import IMAGES, Subject, random_images
from thrifty.benchmarking.timing import interleave
from thrifty.engine import Engine
from thrifty.errors import ThriftyError
from thrifty.program import Program

GOOD = 0.85
"""Efficiency from which on a network is as fast as its MACs promise."""

FAR = 0.5
"""Share of the peak rate under which a kernel runs far from it."""

LARGE = 0.01
"""Share of the dense MACs from which on a layer's rate may be the peak."""

NOTICED = 0.02
"""Share of the time from which on a layer is worth a word."""


@dataclass(frozen=True)
class LayerCost:
    """One operator in the dense network and in the dynamic one.

    Attributes:
        name, kind, gated: which it is, and whether it has a gate, whose time is part of its own.
        dense_ms, ms: time dense and dynamic, mean of an image.
        dense_macs, macs, gate_macs: mean of an image.
        block: name of the layer gate that decides whether it runs, or empty.
    """

    name: str
    kind: str
    gated: bool
    dense_ms: float
    ms: float
    dense_macs: float
    macs: float
    gate_macs: float
    block: str = ""

    @property
    def outside(self) -> bool:
        """Whether it takes the same time whatever gates decide."""
        return not self.gated and not self.block

    @property
    def rate(self) -> float:
        """GMAC/s, gate included; 0 for what has no MACs."""
        return (self.macs + self.gate_macs) / self.ms / 1e6 if self.ms else 0.0

    @property
    def dense_rate(self) -> float:
        """GMAC/s of the dense layer."""
        return self.dense_macs / self.dense_ms / 1e6 if self.dense_ms else 0.0


@dataclass(frozen=True)
class Diagnosis:
    """What was found of one network.

    Attributes:
        model, method, density, threads: what ran, at batch 1.
        dense_ms, ms: median time of the dense and of the dynamic network, without tracing.
        dense_macs, macs: mean of an image, gates included.
        peak: GMAC/s of the fastest dense layer of those that hold `LARGE` of the MACs at least, if there are such.
        layers: every operator.
    """

    model: str
    method: str
    density: float | None
    threads: int
    dense_ms: float
    ms: float
    dense_macs: float
    macs: float
    peak: float
    layers: tuple[LayerCost, ...]

    @property
    def speed_up(self) -> float:
        """Over our own dense network."""
        return self.dense_ms / self.ms

    @property
    def efficiency(self) -> float:
        """Speed-up over the ratio of dense MACs to MACs."""
        return self.speed_up * self.macs / self.dense_macs

    @property
    def outside(self) -> float:
        """Share of the dynamic network's time that is outside gated layers and blocks, in [0, 1]."""
        return sum(layer.ms for layer in self.layers if layer.outside) / self._total

    @property
    def slow(self) -> tuple[LayerCost, ...]:
        """Layers with MACs that run far from the peak and take a noticeable time, the longest first."""
        found = [
            layer
            for layer in self.layers
            if layer.macs and layer.rate < FAR * self.peak and layer.ms > NOTICED * self._total
        ]
        return tuple(sorted(found, key=lambda layer: -layer.ms))

    @property
    def futile(self) -> tuple[LayerCost, ...]:
        """Gated layers that take longer than dense, and layer gates whose blocks do, the worst first."""
        found = [layer for layer in self.layers if layer.gated and self._loss(layer) > 0]
        return tuple(sorted(found, key=lambda layer: -self._loss(layer)))

    def _loss(self, layer: LayerCost) -> float:
        """Milliseconds that a layer, and the block that it decides on, takes longer than dense."""
        return sum(part.ms - part.dense_ms for part in self.layers if layer.name in (part.name, part.block))

    @property
    def _wasted(self) -> tuple[LayerCost, ...]:
        """Layers that futile gates answer for, each once: their own and all of their blocks."""
        futile = {layer.name for layer in self.futile}
        return tuple(layer for layer in self.layers if futile & {layer.name, layer.block})

    @property
    def wasted(self) -> float:
        """Milliseconds that futile gates cost more than they save, together."""
        return sum(layer.ms - layer.dense_ms for layer in self._wasted)

    def lost(self) -> dict[str, float]:
        """Milliseconds by which each cause keeps the network from falling as its MACs fall.

        'outside' is what layers without a gate would save if they had shrunk as the whole did, 'kernels' what gated
        layers take beyond their share of MACs in the dense layer's time, 'gates' the loss of futile ones.
        """
        ratio = self.macs / self.dense_macs
        wasted = self._wasted
        lost = {"outside": 0.0, "kernels": 0.0, "gates": self.wasted}
        for layer in self.layers:
            if layer.outside:
                lost["outside"] += max(0.0, layer.ms - ratio * layer.dense_ms)
            elif layer.dense_macs and layer not in wasted:
                lost["kernels"] += max(0.0, layer.ms - layer.dense_ms * layer.macs / layer.dense_macs)
        return lost

    def verdict(self) -> str:
        """One sentence: what the time does, and the largest reason."""
        saved = (
            f"{self.speed_up:.2f} times as fast as dense with {self.macs / self.dense_macs:.2f} of the MACs "
            f"(efficiency {self.efficiency:.2f})"
        )
        if self.efficiency >= GOOD:
            return f"{saved}: time falls as the work falls."
        lost = self.lost()
        reasons = {
            "outside": "most is lost outside gated layers, whose time gates cannot reduce",
            "kernels": "most is lost in gated layers, whose kernels slow down as channels are skipped",
            "gates": "most is lost to gates that cost more than they save",
        }
        return f"{saved}: {reasons[max(lost, key=lambda cause: lost[cause])]}."

    def findings(self) -> list[str]:
        """A sentence for each of the three causes: what was found and what to do."""
        return [self._about_outside(), self._about_slow(), self._about_futile()]

    @property
    def _total(self) -> float:
        return sum(layer.ms for layer in self.layers)

    def _about_outside(self) -> str:
        most = sorted((layer for layer in self.layers if layer.outside), key=lambda layer: -layer.ms)[:3]
        named = ", ".join(f"{layer.name} {layer.ms / self._total:.0%}" for layer in most)
        text = f"outside gated layers: {self.outside:.0%} of the time" + (f" ({named})" if named else "")
        limit = f"; gates alone can make it {1 / self.outside:.1f} times as fast at most" if self.outside else ""
        if self.outside < 1 - GOOD:
            return f"{text}. Nothing to do."
        return f"{text}{limit}. Gate more layers: `thrifty convert` tells which stay dense and why."

    def _about_slow(self) -> str:
        peak = f"the fastest layer reaches {self.peak:.0f} GMAC/s"
        if not self.slow:
            return f"kernels: {peak}, and no layer that matters is below {FAR:.0%} of it. Nothing to do."
        share = sum(layer.ms for layer in self.slow) / self._total
        named = ", ".join(f"{layer.name} {layer.rate:.0f}" for layer in self.slow[:4])
        more = f" and {len(self.slow) - 4} more" if len(self.slow) > 4 else ""
        return (
            f"kernels: {peak}; {len(self.slow)} layers with {share:.0%} of the time stay below {FAR:.0%} of it "
            f"({named}{more}). Small maps, few or lone channels fill vectors badly: keep more channels there with "
            "density={pattern: …}, or leave them dense with where=."
        )

    def _about_futile(self) -> str:
        gated = sum(layer.gated for layer in self.layers)
        if not self.futile:
            return f"gates: each of {gated} saves more time than it costs. Nothing to do."
        named = ", ".join(layer.name for layer in self.futile[:4])
        more = f" and {len(self.futile) - 4} more" if len(self.futile) > 4 else ""
        return (
            f"gates: {len(self.futile)} of {gated} cost more than they save, {self.wasted:.2f} ms together "
            f"({named}{more}). "
            "Leave these layers dense with where=, or lower their density."
        )


def diagnose(subject: Subject, density: float | None = None, threads: int = 1, seconds: float = 1.0) -> Diagnosis:
    """Time the dense and the dynamic network side by side, whole and layer by layer, at batch 1.

    Args:
        subject: a network with a dynamic form.
        density: share of channels kept; None for the network's own.
        threads: of both.
        seconds: of timed calls for each.

    Raises:
        ThriftyError: the network has no gates.
    """
    if subject.dynamic is None:
        raise ThriftyError(f"{subject.name} has no gates: nothing could get faster. Give a dynamic model or --method.")
    images = random_images(IMAGES, subject.shape)
    inputs = [images[i : i + 1] for i in range(len(images))]
    dense, dynamic = (Ours(Engine(program, threads=threads)) for program in (subject.dense, subject.dynamic))
    dynamic.density = density
    timings = interleave([dense, dynamic], inputs, seconds)
    before, after = (layer_rows(subject, runner, threads, 1, inputs) for runner in (dense, dynamic))
    layers = _paired(before, after, subject.dynamic)
    dense_macs = sum(layer.dense_macs for layer in layers)
    large = [layer for layer in layers if layer.dense_macs >= LARGE * dense_macs] or layers
    return Diagnosis(
        subject.name,
        subject.method,
        density,
        threads,
        timings[0].median,
        timings[1].median,
        dense_macs,
        float(np.sum([layer.macs + layer.gate_macs for layer in layers])),
        max(layer.dense_rate for layer in large),
        layers,
    )


def _paired(dense: Sequence[LayerRow], dynamic: Sequence[LayerRow], program: Program) -> tuple[LayerCost, ...]:
    """Operators of both networks by name; one that only the dynamic network has took no time in the dense one."""
    before = {row.layer: row for row in dense}
    blocks = {operator.output: operator.name for operator in program.operators}
    costs = []
    for row, operator in zip(dynamic, program.operators, strict=True):
        same = before.get(row.layer)
        dense_ms, dense_macs = (same.ms, same.macs) if same else (0.0, 0.0)
        costs.append(
            LayerCost(
                row.layer, row.kind, operator.gated, dense_ms, row.ms, dense_macs, row.macs, row.gate_macs,
                "" if operator.guard is None else blocks[operator.guard],
            )
        )  # fmt: skip
    return tuple(costs)
