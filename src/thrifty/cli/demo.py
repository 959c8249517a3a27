"""`thrifty demo`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

import thrifty
from thrifty.cli.options import Json
from thrifty.cli.output import console, millions, number, percent, print_json, table
from thrifty.cli.sheet import Section, Tile, check_free, draw
from thrifty.errors import ThriftyError, require

if TYPE_CHECKING:
    from thrifty.benchmarking.peers import Runner
    from thrifty.benchmarking.timing import Timing
    from thrifty.zoo import Record

EXTRA = "demo"
NAME = "demo"
BATCH = 100
NAMED, PICTURED = 3, 8
"""Of the cheapest and of the dearest photographs: how many are printed, and how many are in the report."""

REPORT = Path("thrifty-demo.png")


@dataclass(frozen=True)
class _Photographs:
    """The sample as the networks take it: float32 [N, 3, H, W], its labels int64 [N] and names, those of the classes.

    They are in an order of chance, always the same: part of them, and those of equal cost, are of all classes.
    """

    x: np.ndarray
    labels: np.ndarray
    names: list[str]
    classes: tuple[str, ...]


def run(
    as_json: Json = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time of measured calls for each row.")] = 1.5,
    report: Annotated[
        Path | None,
        typer.Option(help=f"FILE.png for the cheapest and dearest photographs; {REPORT}, or none with --json."),
    ] = None,
) -> None:
    """Classify the 1,000 photographs that ship with thrifty: dense in ONNX Runtime, dense and dynamic in thrifty.

    Prints accuracy, MACs and milliseconds of a photograph by itself, and which photographs cost least and most; a
    report shows these as pictures where costs differ. The engines take turns, photograph by photograph, on as many
    threads. An earlier report is overwritten, any other file is not.
    """
    for module in ("PIL", "onnx", "onnxruntime"):
        require(module, "the demo", EXTRA)
    path = report if report is not None or as_json else REPORT
    if path is not None:
        check_free(path)
    networks = _networks(thrifty.zoo.records())
    if not networks:
        raise ThriftyError("this copy of thrifty has no zoo models. Install it anew.")
    results = [row for dense, dynamic in networks for row in _measure(dense, dynamic, threads, seconds)]
    sections = _sections(results)
    if path is not None and sections:
        draw(f"The cheapest and the dearest of {results[0]['photographs']:,} photographs", sections, path)
    if as_json:
        print_json(results)
        return
    _print(results, threads)
    if sections:
        console.print(f"The cheapest and dearest photographs as pictures: {path}", highlight=False, soft_wrap=True)
    else:
        console.print("No photograph costs more than another in any model, so there is no report to draw.")
    console.print(
        "\nThe sample is a tenth of the test photographs; `thrifty zoo` has the figures on all 10,000.", highlight=False
    )


def _networks(records: Iterable[Record]) -> list[tuple[Record, list[Record]]]:
    """Of each network the dense model that was trained longest, and the dynamic ones, the dearest first."""
    records = list(records)
    dense: dict[str, Record] = {}
    for record in records:
        if record.method is None:
            longest = dense.setdefault(record.net, record)
            if record.total_epochs > longest.total_epochs:
                dense[record.net] = record
    dynamic = sorted((record for record in records if record.method is not None), key=lambda record: -record.macs)
    return [(dense[net], [record for record in dynamic if record.net == net]) for net in sorted(dense)]


def _measure(dense: Record, dynamic: list[Record], threads: int, seconds: float) -> list[dict[str, Any]]:
    """One network's rows."""
    from thrifty.benchmarking.peers import OnnxRuntime, Ours  # noqa: PLC0415 (other commands need no engine)
    from thrifty.benchmarking.timing import interleave  # noqa: PLC0415
    from thrifty.engine import Engine  # noqa: PLC0415
    from thrifty.onnx_export import to_onnx  # noqa: PLC0415
    from thrifty.zoo.programs import read_program  # noqa: PLC0415

    records = [dense, *dynamic]
    programs = [read_program(record.name) for record in records]
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
    order = np.random.default_rng(0).permutation(len(paths))
    paths = [paths[i] for i in order]
    pixels = read_files(paths, program.buffers[0][1])
    x = normalised(pixels, program.preprocessing.mean, program.preprocessing.std)
    return _Photographs(x, labels[order], [str(path.relative_to(SAMPLE)) for path in paths], classes)


def _result(
    photographs: _Photographs, record: Record, runner: Runner, timing: Timing, macs: np.ndarray, logits: np.ndarray
) -> dict[str, Any]:
    order = macs.argsort(kind="stable").tolist()
    constant = bool(macs.min() == macs.max())
    predicted = logits.argmax(1)

    def costs(indices: list[int]) -> list[dict[str, Any]]:
        return [
            {
                "photograph": photographs.names[i],
                "class": photographs.classes[photographs.labels[i]],
                "prediction": photographs.classes[predicted[i]],
                "macs": int(macs[i]),
            }
            for i in ([] if constant else indices)
        ]

    return {
        "model": record.name,
        "engine": runner.name,
        "photographs": len(photographs.names),
        "accuracy": float((predicted == photographs.labels).mean()),
        "macs": float(macs.mean()),
        "macs_p5": float(np.percentile(macs, 5)),
        "macs_p95": float(np.percentile(macs, 95)),
        "dense_macs": record.dense_macs,
        "ms": timing.median,
        "ms_p10": timing.percentile(10),
        "ms_p90": timing.percentile(90),
        "ms_p95": timing.percentile(95),
        "ms_p99": timing.percentile(99),
        "constant_cost": constant,
        "cheapest": costs(order[:PICTURED]),
        "dearest": costs(order[: -PICTURED - 1 : -1]),
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
            number(result["ms_p95"]),
            number(result["ms_p99"]),
        )
        for result in results
    ]
    columns = ("model", "engine", "accuracy", "MACs, mean", "of dense", "ms, p50", "p10 – p90", "p95", "p99")
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
            shown = ", ".join(f"{item['photograph']} ({millions(item['macs'])})" for item in result[kind][:NAMED])
            console.print(f"{result['model']}, {kind}: {shown}", highlight=False)


def _sections(results: Iterable[dict[str, Any]]) -> list[Section]:
    """What the report shows: models in which photographs differ in cost."""
    from thrifty.data.files import SAMPLE  # noqa: PLC0415 (needs Pillow)

    def tiles(items: list[dict[str, Any]], dense: int) -> list[Tile]:
        return [
            Tile(
                SAMPLE / item["photograph"],
                item["class"],
                item["prediction"],
                f"{millions(item['macs'])}, {100 * item['macs'] / dense:.0f} %",
            )
            for item in items
        ]

    return [
        Section(
            f"{result['model']}: {millions(result['macs'])} MACs on average, {millions(result['dense_macs'])} dense; "
            "below each photograph its MACs and their share of dense",
            tuple((kind, tiles(result[kind], result["dense_macs"])) for kind in ("cheapest", "dearest")),
        )
        for result in results
        if result["engine"] == "thrifty" and not result["constant_cost"]
    ]
