"""`thrifty doctor`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import thrifty
from thrifty.cli.options import Json
from thrifty.cli.show import console, print_json, table
from thrifty.errors import EXTRAS

NAME = "doctor"
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow"}
"""Modules whose distribution has another name."""

FEATURES = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
"""Instruction sets that matter for speed, as Linux names them."""


def run(as_json: Json = False) -> None:
    """Versions, CPU features, which extras are there, and how to get what is missing."""
    report = examine()
    if as_json:
        print_json(report)
        return
    machine = report["machine"]
    rows = [(key.replace("_", " "), str(value)) for key, value in report["versions"].items()]
    rows += [(key.replace("_", " "), ", ".join(v) if isinstance(v, list) else str(v)) for key, v in machine.items()]
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
    base = ("numpy", "safetensors", "typer", "rich")
    return {
        "versions": {
            "thrifty": thrifty.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in base},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "CPU": _cpu_model(),
            "cores": _cores(),
            "features": _cpu_features(),
        },
        "extras": {name: _extra(name) for name in EXTRAS},
    }


def _extra(name: str) -> dict[str, Any]:
    versions = {module: _version(module) for module in EXTRAS[name]}
    missing = [module for module, version in versions.items() if version is None]
    return {
        "found": {module: version for module, version in versions.items() if version is not None},
        "missing": missing,
        "install": f"pip install 'thrifty[{name}]'" if missing else None,
    }


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return metadata.version(DISTRIBUTIONS.get(module, module))
    except metadata.PackageNotFoundError:
        return "unknown version"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or "unknown"


def _cpu_features() -> list[str]:
    present = set((_cpu_info("flags") or _cpu_info("Features")).split())
    return [feature for feature in FEATURES if feature in present]
