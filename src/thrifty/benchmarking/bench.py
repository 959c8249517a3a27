"""The benchmark: a dense network in every engine and its dynamic form in ours, side by side, and what that means.

Efficiency is speed-up over the fastest peer, divided by the ratio of dense MACs to MACs: 1 means that time falls as
MACs fall, measured from the best dense engine there is and not from our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.benchmarking.peers import PEERS, OnnxRuntime, OpenVino, Ours, Runner, Torch
from thrifty.benchmarking.subjects import IMAGES, Subject, random_images
from thrifty.benchmarking.timing import Timing, interleave
from thrifty.engine import Engine
from thrifty.errors import ThriftyError
from thrifty.onnx_export import to_onnx

TOLERANCE = 1e-4
"""Normalised error of a peer's logits against ours beyond which nothing is timed."""


@dataclass(frozen=True)
class Row:
    """One engine with one network, batch and number of threads.

    Attributes:
        model, image, batch, threads: what ran: image is the height in pixels.
        engine: a peer's name, or thrifty.
        method: '' for the dense network.
        density: share of channels kept in gated layers; None for a dense network or a trained model's own.
        ms: median milliseconds of a call.
        ms_p10, ms_p90, ms_p95, ms_p99: its percentiles.
        calls: that were timed.
        images_per_second: at the median.
        macs: mean of an image, gates included.
        mac_ratio: `macs` over those of the dense network.
        fastest: the fastest peer in the same run, '' without peers.
        speed_up: the fastest peer's time over this one's.
        efficiency: `speed_up` times `mac_ratio`.
        scaling: images per second, over those of the same network in the same engine at one thread and batch 1, over
            the number of threads; None where those were not measured or are these.
        error: normalised error of the logits against our dense engine's, None for a dynamic network.
        setting: what was chosen for the engine, where there was a choice.
    """

    model: str
    image: int
    batch: int
    threads: int
    engine: str
    method: str
    density: float | None
    ms: float
    ms_p10: float
    ms_p90: float
    ms_p95: float
    ms_p99: float
    calls: int
    images_per_second: float
    macs: float
    mac_ratio: float
    fastest: str
    speed_up: float | None
    efficiency: float | None
    scaling: float | None
    error: float | None
    setting: str


@dataclass(frozen=True)
class LayerRow:
    """One operator of ours: mean milliseconds of a batch, its gate included, and mean MACs of an image."""

    model: str
    batch: int
    threads: int
    method: str
    density: float | None
    layer: str
    kind: str
    ms: float
    gate_ms: float
    macs: float
    gate_macs: float

    @property
    def rate(self) -> float:
        """GMAC/s, gates included."""
        return (self.macs + self.gate_macs) * self.batch / self.ms / 1e6 if self.ms else 0.0


@dataclass(frozen=True)
class Report:
    """All rows of a benchmark, and those of the layers where they were asked for."""

    rows: tuple[Row, ...]
    layers: tuple[LayerRow, ...]


def run_bench(
    subject: Subject,
    densities: Sequence[float | None],
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    peers: Sequence[str] = PEERS,
    layers: bool = False,
    seconds: float = 1.5,
    images: NDArray[np.float32] | None = None,
) -> Report:
    """Measure a network in all engines, for every number of threads and every size of batch.

    Args:
        subject: what to measure.
        densities: at which the dynamic network runs; None is its own.
        threads: numbers of threads; each engine gets as many.
        batches: numbers of images in a call.
        peers: other engines, of `PEERS`.
        layers: whether to time each of our layers too.
        seconds: of timed calls for each row.
        images: [N, C, H, W] to measure on, one after the other; random ones if not given. MACs are means over all, the
            times those of as many as `seconds` allow, in this order, from the first on again after the last.

    Raises:
        ThriftyError: there are fewer images than a batch has; an engine does not agree with ours on the dense network,
            or is not installed.
    """
    check_peers(peers)
    if images is None:
        images = random_images(max(IMAGES, *batches), subject.shape)
    elif len(images) < max(batches):
        raise ThriftyError(
            f"{len(images)} photographs don't fill a batch of {max(batches)}. Give more, or a smaller --batch."
        )
    found: list[Row] = []
    by_layer: list[LayerRow] = []
    for count in threads:
        ours = _ours(subject, densities, count)
        for batch in batches:
            inputs = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
            runners = [*_peers(subject, peers, count, inputs[0]), *ours]
            errors = _agree(runners, inputs[0], subject)
            timings = interleave(runners, inputs, seconds)
            macs = [_macs(runner, inputs, subject) for runner in runners]
            rows = [
                _row(subject, count, batch, *measured) for measured in zip(runners, timings, macs, errors, strict=True)
            ]
            found += _compared(rows)
            if layers:
                for runner in ours:
                    by_layer += layer_rows(subject, runner, count, batch, inputs[:IMAGES])
            del runners  # sessions of peers hold weights of their own
    return Report(tuple(_scaled(found)), tuple(by_layer))


def check_peers(peers: Iterable[str]) -> None:
    """Raise `ThriftyError` for a peer that there is not."""
    for peer in peers:
        if peer not in PEERS:
            raise ThriftyError(f"there is no peer {peer!r}. Choose among: {', '.join(PEERS)}.")


def normalised_error(given: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference over the largest magnitude expected; infinite where shapes differ or something is NaN."""
    if given.shape != expected.shape:
        return float("inf")
    error = float(np.abs(given - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))
    return error if np.isfinite(error) else float("inf")


def layer_rows(
    subject: Subject, runner: Ours, threads: int, batch: int, inputs: Sequence[NDArray[np.float32]], repeats: int = 20
) -> list[LayerRow]:
    """Time of each operator: the median of each batch's traces, `repeats` in all or more, and the mean over batches."""
    runner.begin()
    for x in inputs[:2]:
        runner.engine.trace(x)
    rounds = -(-repeats // len(inputs))
    traces = [runner.engine.trace(x) for _ in range(rounds) for x in inputs]

    def of_batch(times: list[float]) -> float:
        return float(np.median(np.reshape(times, (rounds, len(inputs))), axis=0).mean())

    gated = bool(runner.engine.program.gated)
    return [
        LayerRow(
            model=subject.name,
            batch=batch,
            threads=threads,
            method=subject.method if gated else "",
            density=runner.density,
            layer=same[0].name,
            kind=same[0].kind,
            ms=of_batch([layer.ms for layer in same]),
            gate_ms=of_batch([layer.gate_ms for layer in same]),
            macs=float(np.mean([layer.macs for layer in same])),
            gate_macs=float(np.mean([layer.gate_macs for layer in same])),
        )
        for same in zip(*(trace.layers for trace in traces), strict=True)
    ]


def _ours(subject: Subject, densities: Sequence[float | None], threads: int) -> list[Ours]:
    """The dense network, and the dynamic one at each density: one engine for all densities that are set."""
    runners = [Ours(Engine(subject.dense, threads=threads))]
    if subject.dynamic is not None:
        own = [density for density in densities if density is None]
        given = [density for density in densities if density is not None]
        for part in (own, given):
            engine = Engine(subject.dynamic, threads=threads) if part else None
            runners += [Ours(engine, density) for density in part if engine is not None]
    return runners


def _peers(subject: Subject, peers: Sequence[str], threads: int, x: NDArray[np.float32]) -> Iterator[Runner]:
    if "onnxruntime" in peers or "openvino" in peers:
        model = to_onnx(subject.dense, batch=len(x)).SerializeToString()
    for peer in dict.fromkeys(peers):
        if peer == "onnxruntime":
            yield OnnxRuntime(model, threads)
        elif peer == "openvino":
            yield OpenVino(model, threads)
        elif subject.module is not None:  # a program alone has no form that torch could run
            yield Torch(subject.module, threads, x)


def _is_dense(runner: Runner) -> bool:
    return not (isinstance(runner, Ours) and runner.engine.program.gated)


def _agree(runners: Sequence[Runner], x: NDArray[np.float32], subject: Subject) -> list[float | None]:
    """Normalised error of every dense engine against ours.

    Raises:
        ThriftyError: one is too large: different networks would be timed.
    """
    (ours,) = (runner for runner in runners if isinstance(runner, Ours) and _is_dense(runner))
    expected = ours(x)
    errors: list[float | None] = []
    for runner in runners:
        if not _is_dense(runner):
            errors.append(None)
            continue
        runner.begin()
        error = normalised_error(runner(x), expected)
        if error > TOLERANCE:
            raise ThriftyError(
                f"{runner.name} and thrifty do not agree on dense {subject.name}: normalised error {error:.2g}, "
                f"{TOLERANCE:g} is allowed. Nothing was timed."
            )
        errors.append(error)
    return errors


def _macs(runner: Runner, inputs: Sequence[NDArray[np.float32]], subject: Subject) -> float:
    """Mean MACs of the images given, as the engine counts what it executes."""
    if not isinstance(runner, Ours) or _is_dense(runner):
        return float(sum(subject.dense.macs().values()))
    runner.begin()
    return float(np.mean([runner.engine.trace(x).macs.mean() for x in inputs]))


def _row(
    subject: Subject, threads: int, batch: int, runner: Runner, timing: Timing, macs: float, error: float | None
) -> Row:
    dense = _is_dense(runner)
    return Row(
        model=subject.name,
        image=subject.shape[1],
        batch=batch,
        threads=threads,
        engine=runner.name,
        method="" if dense else subject.method,
        density=runner.density if isinstance(runner, Ours) else None,
        ms=timing.median,
        ms_p10=timing.percentile(10),
        ms_p90=timing.percentile(90),
        ms_p95=timing.percentile(95),
        ms_p99=timing.percentile(99),
        calls=len(timing.seconds),
        images_per_second=batch / timing.median * 1e3,
        macs=macs,
        mac_ratio=macs / sum(subject.dense.macs().values()),
        fastest="",
        speed_up=None,
        efficiency=None,
        scaling=None,
        error=error,
        setting=runner.setting,
    )


def _compared(rows: list[Row]) -> list[Row]:
    """Rows of one run with speed-up and efficiency over its fastest peer."""
    peers = [row for row in rows if row.engine in PEERS]
    if not peers:
        return rows
    fastest = min(peers, key=lambda row: row.ms)
    return [
        replace(
            row,
            fastest=fastest.engine,
            speed_up=fastest.ms / row.ms,
            efficiency=fastest.ms / row.ms * row.mac_ratio,
        )
        for row in rows
    ]


def _scaled(rows: list[Row]) -> Iterator[Row]:
    """Rows with their rate per thread beside that of one thread at batch 1."""
    single = {
        (row.engine, row.method, row.density): row.images_per_second for row in rows if row.threads == row.batch == 1
    }
    for row in rows:
        base = single.get((row.engine, row.method, row.density))
        if base is None or row.threads == row.batch == 1:
            yield row
        else:
            yield replace(row, scaling=row.images_per_second / base / row.threads)


def as_records(rows: Iterable[Row | LayerRow]) -> list[dict[str, Any]]:
    """Rows as plain values, rounded to what was measured."""
    found = []
    for row in rows:
        values = asdict(row)
        if isinstance(row, LayerRow):
            values["gmacs_per_second"] = row.rate
        found.append({key: _rounded(value) for key, value in values.items()})
    return found


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) and abs(value) < 1e6 else value
