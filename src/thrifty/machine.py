"""What this machine and installation are: versions, CPU, extras. Written beside every measured figure."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from thrifty.errors import EXTRAS, ThriftyError

DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow"}
"""Modules whose distribution has another name."""

FEATURES = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
"""Instruction sets that matter for speed, as Linux names them."""

BASE = ("numpy", "safetensors", "typer", "rich")


def versions(*modules: str) -> dict[str, str | None]:
    """Version of each module's distribution, None where it is not installed."""
    return {module: _version(module) for module in modules}


def machine() -> dict[str, Any]:
    """System, CPU, cores that this process may use, and the CPU's instruction sets."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": _cpu_model(),
        "cores": cores(),
        "features": _cpu_features(),
    }


def native_features() -> dict[str, Any]:
    """What the compiled part says of itself: the instruction set in use (`isa`) and what the CPU has; {} without it.

    Raises:
        ThriftyError: THRIFTY_ISA asks for an instruction set that there is not.
    """
    try:
        native: Any = importlib.import_module("thrifty._native")
    except ImportError:
        return {}
    try:
        return dict(native.features())
    except RuntimeError as error:  # the instruction set that is asked for is not there
        raise ThriftyError(str(error)) from None


def extras() -> dict[str, dict[str, Any]]:
    """What is found and what is missing of each extra, and the line that installs it."""
    return {name: _extra(name) for name in EXTRAS}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _extra(name: str) -> dict[str, Any]:
    found = versions(*EXTRAS[name])
    missing = [module for module, version in found.items() if version is None]
    return {
        "found": {module: version for module, version in found.items() if version is not None},
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


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or "unknown"


def _cpu_features() -> list[str]:
    present = set((_cpu_info("flags") or _cpu_info("Features")).split())
    return [feature for feature in FEATURES if feature in present]
