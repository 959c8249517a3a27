"""`thrifty bench`."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.cli.options import (
    Channels,
    Json,
    MeasuredMethod,
    MethodSettings,
    Several,
    check_has_density,
    picture_files,
    settings_of,
)
from thrifty.cli.output import console, millions, number, print_json, table
from thrifty.errors import ThriftyError, require
from thrifty.files import check_writable, replacing
from thrifty.machine import machine, native_features, versions

if TYPE_CHECKING:
    from thrifty.benchmarking.bench import LayerRow, Report, Row

NAME = "bench"
COMMAND = Several

LIBRARIES = ("thrifty", "numpy", "onnxruntime", "openvino", "torch")
"""Whose versions stand beside the figures."""


def run(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL…",
            help="A zoo model or network, a name of torchvision or timm (with random weights; 'torchvision:vgg16' "
            "where the zoo has the same name), module:function of your own, or a .thrifty file.",
        ),
    ],
    image: Annotated[
        int | None, typer.Option(min=1, help="Height and width in pixels; 32 for zoo networks, 224 for others.")
    ] = None,
    method: MeasuredMethod = None,
    changes: MethodSettings = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Share of channels kept; several may follow. [default: 0.5, or as trained]"),
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Gate only layers whose names fit this pattern; repeatable.")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Threads; several may follow. [default: 1]")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images in a call; several may follow. [default: 1]")
    ] = None,
    peers: Annotated[
        list[str] | None, typer.Option(help="onnxruntime, openvino, torch, or none. [default: all three]")
    ] = None,
    photographs: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Measure a trained model on these photographs, or on the 'sample' that ships, one after the other: "
            "what its gates decide, and so its time, depends on them. [default: random images]",
        ),
    ] = None,
    channels: Channels = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also time each of our layers.")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time of measured calls for each row.")] = 1.5,
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option("--csv", help="Write the rows, machine and versions to a file.")
    ] = None,
) -> None:
    """Time a network, dense and dynamic, beside other engines, and set the time saved beside the work saved.

    All engines run interleaved in one process, on as many threads, with denormals flushed, on float32. Nothing is
    timed before their answers on the dense network agree with ours.

    Efficiency is the speed-up over the fastest other engine, divided by dense MACs / MACs: at 1, time falls as the
    work falls. Scaling is the rate per thread beside that of one thread at batch 1.
    """
    from thrifty.benchmarking import bench  # noqa: PLC0415 (needs the native part)
    from thrifty.benchmarking.peers import PEERS  # noqa: PLC0415
    from thrifty.benchmarking.subjects import IMAGES, find_subject  # noqa: PLC0415
    from thrifty.benchmarking.subjects import photographs as read_photographs  # noqa: PLC0415

    if not math.isfinite(seconds):
        raise ThriftyError(f"--seconds is {seconds}, but must be finite.")
    if output is not None:
        check_writable(output)
    wanted = [] if peers == ["none"] else list(peers or PEERS)
    bench.check_peers(wanted)
    files = None if photographs is None else _files(photographs)
    batches = batch or [1]
    if density:
        check_has_density(method)
    settings = settings_of(changes or ())
    subjects = [
        find_subject(
            name, image, method, where or (), images=max(IMAGES, *batches), settings=settings, channels=channels
        )
        for name in models
    ]
    for subject in subjects:
        if density and subject.dynamic is None:
            raise ThriftyError(f"--density was given, but {subject.name} is measured dense only.")
        if "torch" in (peers or ()) and subject.module is None:
            raise ThriftyError(f"--peers torch was given, but {subject.name} is a program, which torch can't run.")
    inputs = [None if files is None else read_photographs(files, subject) for subject in subjects]
    reports: list[Report] = []
    for subject, images in zip(subjects, inputs, strict=True):
        densities: list[float | None] = [*density] if density else [None if subject.own_density else 0.5]
        report = bench.run_bench(subject, densities, threads or [1], batches, wanted, layers, seconds, images)
        reports.append(report)
        if not as_json:
            _print(report)
            if "torch" in wanted and subject.module is None:
                console.print("torch: left out, for it can't run a program", highlight=False)
    rows = bench.as_records(row for report in reports for row in report.rows)
    beside = {**machine(), **versions(*LIBRARIES), "instructions": native_features().get("isa")}
    if output is not None:
        write_csv(output, rows, beside)
    if as_json:
        by_layer = bench.as_records(row for report in reports for row in report.layers)
        print_json({"machine": beside, "rows": rows, "layers": by_layer})


def _files(photographs: str) -> list[Path]:
    require("PIL", "reading photographs", "demo")
    from thrifty.data.files import SAMPLE  # noqa: PLC0415 (needs Pillow)

    return picture_files([SAMPLE if photographs == "sample" else Path(photographs)])


def write_csv(path: Path, rows: list[dict[str, Any]], beside: dict[str, Any]) -> None:
    """Rows with machine and versions in every line, in one step; what only some rows have is empty in the others."""
    lines = [{**row, **{key: _text(value) for key, value in beside.items()}} for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _text(value: Any) -> Any:
    return " ".join(value) if isinstance(value, list) else value


def _print(report: Report) -> None:
    first = report.rows[0]
    for threads, batch in dict.fromkeys((row.threads, row.batch) for row in report.rows):
        part = [row for row in report.rows if (row.threads, row.batch) == (threads, batch)]
        title = f"{first.model}, {first.image} px, batch {batch}, {threads} thread{'s' * (threads > 1)}"
        columns = ("engine", "ms", "10th – 90th", "images/s", "MACs", "of dense", "speed-up", "efficiency", "scaling")
        table(columns, [_cells(row) for row in part], title=title)
        _print_layers([row for row in report.layers if (row.threads, row.batch) == (threads, batch)])
    if first.fastest:
        console.print(
            "speed-up: over the fastest other engine; efficiency: speed-up / (dense MACs / MACs)", highlight=False
        )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        describe(row.engine, row.method, row.density) + (f" ({row.setting})" if row.setting else ""),
        number(row.ms),
        f"{number(row.ms_p10)} – {number(row.ms_p90)}",
        number(row.images_per_second),
        millions(row.macs),
        f"{row.mac_ratio:.3f}",
        *("" if value is None else f"{value:.2f}" for value in (row.speed_up, row.efficiency, row.scaling)),
    )


def describe(engine: str, method: str, density: float | None) -> str:
    """A row's name: the engine, and what runs in it."""
    if not method:
        return f"{engine}, dense"
    return f"{engine}, {method}" if density is None else f"{engine}, {method} {density:g}"


def _print_layers(rows: list[LayerRow]) -> None:
    for method, density in dict.fromkeys((row.method, row.density) for row in rows):
        part = [row for row in rows if (row.method, row.density) == (method, density)]
        total = sum(row.ms for row in part)
        cells = [
            (
                row.layer,
                row.kind,
                number(row.ms),
                f"{100 * row.ms / total:.1f} %",
                millions(row.macs) if row.macs else "",
                f"{row.gate_ms:.3f}" if row.gate_macs else "",
                f"{row.gate_macs / 1e3:,.1f} k" if row.gate_macs else "",
                f"{row.rate:.1f}" if row.macs else "",
            )
            for row in part
        ]
        columns = ("layer", "kind", "ms", "share", "MACs", "gate ms", "gate MACs", "GMAC/s")
        table(columns, cells, title=describe("thrifty", method, density))
