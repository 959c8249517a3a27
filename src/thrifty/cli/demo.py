"""`thrifty demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

import thrifty
from thrifty.cli.options import Json
from thrifty.cli.output import console, millions, number, percent, print_json, table
from thrifty.errors import ThriftyError, require

if TYPE_CHECKING:
    from thrifty.benchmarking.peers import Runner
    from thrifty.benchmarking.timing import Timing
    from thrifty.zoo import Record

EXTRA = "demo"
NAME = "demo"
EXTREMES = 3
BATCH = 100


@dataclass(frozen=True)
class _Photographs:
    """The sample as the networks take it: float32 [N, 3, H, W], its labels int64 [N] and its names."""

    x: np.ndarray
    labels: np.ndarray
    names: list[str]


def run(
    as_json: Json = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time of measured calls for each row.")] = 1.5,
) -> None:
    """Classify the 1,000 photographs that ship with thrifty: dense in ONNX Runtime, dense and dynamic in thrifty.

    Prints accuracy, MACs and milliseconds of a photograph by itself, and which photographs cost least and most. The
    engines take turns, photograph by photograph, on as many threads.
    """
    for module in ("PIL", "onnx", "onnxruntime"):
        require(module, "the demo", EXTRA)
    records = thrifty.zoo.records()
    dense = {record.net: record for record in records if record.method is None}
    if not dense:
        raise ThriftyError("this copy of thrifty has no zoo models. Install it anew.")
    results: list[dict[str, Any]] = []
    for net, record in sorted(dense.items()):
        dynamic = [other for other in records if other.net == net and other.method is not None]
        results += _measure(record, sorted(dynamic, key=lambda other: -other.macs), threads, seconds)
    if as_json:
        print_json(results)
        return
    _print(results, threads)


def _measure(dense: Record, dynamic: list[Record], threads: int, seconds: float) -> list[dict[str, Any]]:
    """One network's rows."""
    from thrifty.benchmarking.peers import OnnxRuntime, Ours  # noqa: PLC0415 (other commands need no engine)
    from thrifty.benchmarking.timing import interleave  # noqa: PLC0415
    from thrifty.engine import Engine  # noqa: PLC0415
    from thrifty.onnx_export import to_onnx  # noqa: PLC0415
    from thrifty.program_file import load_program  # noqa: PLC0415
    from thrifty.zoo.programs import find_program  # noqa: PLC0415

    records = [dense, *dynamic]
    programs = [load_program(find_program(record.name)) for record in records]
    photographs = _photographs(programs[0])
    ours = [Ours(Engine(program, threads=threads)) for program in programs]
    runners: list[Runner] = [OnnxRuntime(to_onnx(programs[0]).SerializeToString(), threads), *ours]
    timings = interleave(runners, [photographs.x[i : i + 1] for i in range(len(photographs.x))], seconds)
    batches = np.array_split(photographs.x, max(1, len(photographs.x) // BATCH))
    traces = [[runner.engine.trace(x) for x in batches] for runner in ours]
    macs = [np.concatenate([trace.macs for trace in parts]) for parts in traces]
    logits = [np.concatenate([runner(x) for x in batches]) for runner in runners]
    measured = zip([dense, *records], runners, timings, [macs[0], *macs], logits, strict=True)
    return [_result(photographs, *row) for row in measured]


def _photographs(program: Any) -> _Photographs:
    from thrifty.data.files import SAMPLE, listing, normalised, read_files  # noqa: PLC0415 (needs Pillow)

    paths, labels, classes = listing(SAMPLE)
    if classes != program.classes:
        raise ThriftyError(f"the program's classes ({', '.join(program.classes)}) are not the sample's.")
    pixels = read_files(paths, program.buffers[0][1])
    names = [str(path.relative_to(SAMPLE)) for path in paths]
    return _Photographs(normalised(pixels, program.preprocessing.mean, program.preprocessing.std), labels, names)


def _result(
    photographs: _Photographs, record: Record, runner: Runner, timing: Timing, macs: np.ndarray, logits: np.ndarray
) -> dict[str, Any]:
    order = macs.argsort(kind="stable").tolist()
    constant = bool(macs.min() == macs.max())

    def costs(indices: list[int]) -> list[dict[str, Any]]:
        return [] if constant else [{"photograph": photographs.names[i], "macs": int(macs[i])} for i in indices]

    return {
        "model": record.name,
        "engine": runner.name,
        "photographs": len(photographs.names),
        "accuracy": float((logits.argmax(1) == photographs.labels).mean()),
        "macs": float(macs.mean()),
        "macs_p5": float(np.percentile(macs, 5)),
        "macs_p95": float(np.percentile(macs, 95)),
        "dense_macs": record.dense_macs,
        "ms": timing.median,
        "ms_p10": timing.percentile(10),
        "ms_p90": timing.percentile(90),
        "constant_cost": constant,
        "cheapest": costs(order[:EXTREMES]),
        "dearest": costs(order[: -EXTREMES - 1 : -1]),
    }


def _print(results: list[dict[str, Any]], threads: int) -> None:
    rows = [
        (
            result["model"],
            result["engine"],
            percent(result["accuracy"]),
            millions(result["macs"]),
            f"{result['macs'] / result['dense_macs']:.3f}",
            number(result["ms"]),
            f"{number(result['ms_p10'])} – {number(result['ms_p90'])}",
        )
        for result in results
    ]
    columns = ("model", "engine", "accuracy", "MACs, mean", "of dense", "ms each", "10th – 90th")
    count = results[0]["photographs"]
    console.print()
    table(columns, rows, title=f"{count:,} photographs, one at a time, {threads} thread{'s' * (threads > 1)}")
    for result in results:
        if result["engine"] != "thrifty":
            continue
        if result["constant_cost"]:
            console.print(f"{result['model']}: every photograph costs the same, {millions(result['macs'])} MACs.")
            continue
        for kind in ("cheapest", "dearest"):
            shown = ", ".join(f"{item['photograph']} ({millions(item['macs'])})" for item in result[kind])
            console.print(f"{result['model']}, {kind}: {shown}", highlight=False)
    console.print(
        "\nThe sample is a tenth of the test photographs; `thrifty zoo` has the figures on all 10,000.", highlight=False
    )
