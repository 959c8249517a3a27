"""`thrifty doctor`."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Annotated, Any

import typer

import thrifty
from thrifty import machine
from thrifty.cli.options import Channels, Json, MeasuredMethod, MethodSettings, check_has_density, settings_of
from thrifty.cli.output import console, millions, number, print_json, table
from thrifty.errors import ThriftyError

NAME = "doctor"


def run(
    model: Annotated[
        str | None, typer.Argument(help="Also: why this model is not faster. As `thrifty bench` takes it.")
    ] = None,
    image: Annotated[int | None, typer.Option(min=1, help="Height and width in pixels, as in `bench`.")] = None,
    channels: Channels = None,
    method: MeasuredMethod = None,
    changes: MethodSettings = None,
    density: Annotated[float | None, typer.Option(help="Share of channels kept, in (0, 1].")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine, 1 unless told.")] = None,
    as_json: Json = False,
) -> None:
    """Versions, CPU, instruction set in use, which extras are there, and how to get what is missing.

    With a model: the share of its time outside gated layers, layers whose kernels run far from the peak, and gates that
    cost more than they save, each with what to do about it.
    """
    if model is not None:
        _diagnose(model, image, channels, method, settings_of(changes or ()), density, threads or 1, as_json)
        return
    if any(given is not None for given in (image, channels, method, changes, density, threads)):
        raise ThriftyError("these options are for a model's diagnosis: give a MODEL too.")
    report = examine()
    if as_json:
        print_json(report)
        return
    rows = [(key.replace("_", " "), str(value)) for key, value in report["versions"].items()]
    for part in ("machine", "engine"):
        rows += [(f"{key.replace('_', ' ')}", _text(value)) for key, value in report[part].items()]
    table(("", ""), rows, title="thrifty doctor")
    for name, extra in report["extras"].items():
        found = ", ".join(f"{module} {version}" for module, version in extra["found"].items())
        if extra["missing"]:
            missing = f"extra {name}: missing {', '.join(extra['missing'])}. Run: {extra['install']}"
            console.print(missing, style="yellow", markup=False, highlight=False)
        else:
            console.print(f"extra {name}: {found}", highlight=False)


def examine() -> dict[str, Any]:
    """What `thrifty doctor` prints, as plain values."""
    native = machine.native_features()
    return {
        "versions": {
            "thrifty": thrifty.__version__,
            "python": platform.python_version(),
            **machine.versions(*machine.BASE),
        },
        "machine": machine.machine(),
        "engine": {
            "instructions_in_use": native.get("isa", "the native part is not built: run pip install . again"),
            "threads_by_default": 1,
            "threads_at_most": machine.cores(),
        },
        "extras": machine.extras(),
    }


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _diagnose(
    model: str,
    image: int | None,
    channels: int | None,
    method: str | None,
    settings: dict[str, Any],
    density: float | None,
    threads: int,
    as_json: bool,
) -> None:
    from thrifty.benchmarking.diagnosis import diagnose  # noqa: PLC0415 (needs the native part)
    from thrifty.benchmarking.subjects import find_subject  # noqa: PLC0415

    if density is not None:
        check_has_density(method)
    subject = find_subject(
        model, image, method, density=0.5 if density is None else density, settings=settings, channels=channels
    )
    found = diagnose(subject, density, threads)
    if as_json:
        values = {
            **asdict(found),
            "speed_up": found.speed_up,
            "efficiency": found.efficiency,
            "outside": found.outside,
            "slow": [layer.name for layer in found.slow],
            "futile": [layer.name for layer in found.futile],
            "lost_ms": found.lost(),
            "verdict": found.verdict(),
            "findings": found.findings(),
        }
        print_json(values)
        return
    rows = [
        (
            layer.name,
            "gated" if layer.gated else layer.kind,
            number(layer.dense_ms),
            number(layer.ms),
            millions(layer.macs + layer.gate_macs) if layer.macs else "",
            f"{(layer.macs + layer.gate_macs) / layer.dense_macs:.3f}" if layer.dense_macs else "",
            f"{layer.dense_rate:.1f}" if layer.macs else "",
            f"{layer.rate:.1f}" if layer.macs else "",
        )
        for layer in found.layers
    ]
    columns = ("layer", "", "dense ms", "ms", "MACs", "of dense", "dense GMAC/s", "GMAC/s")
    table(columns, rows, title=f"{model}, batch 1, {threads} thread{'s' * (threads > 1)}")
    console.print(f"{model}: {found.verdict()}", highlight=False, markup=False)
    for finding in found.findings():
        console.print(finding, highlight=False, markup=False)
