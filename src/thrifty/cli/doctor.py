"""`thrifty doctor`."""

from __future__ import annotations

import platform
from typing import Any

import thrifty
from thrifty import machine
from thrifty.cli.options import Json
from thrifty.cli.show import console, print_json, table

NAME = "doctor"


def run(as_json: Json = False) -> None:
    """Versions, CPU features, which extras are there, and how to get what is missing."""
    report = examine()
    if as_json:
        print_json(report)
        return
    rows = [(key.replace("_", " "), str(value)) for key, value in report["versions"].items()]
    rows += [
        (key.replace("_", " "), ", ".join(v) if isinstance(v, list) else str(v)) for key, v in report["machine"].items()
    ]
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
    return {
        "versions": {
            "thrifty": thrifty.__version__,
            "python": platform.python_version(),
            **machine.versions(*machine.BASE),
        },
        "machine": machine.machine(),
        "extras": machine.extras(),
    }
