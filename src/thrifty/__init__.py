"""thrifty: convolutional networks that spend compute per input.

`import thrifty` needs neither torch nor any other extra; a name that does is imported when it is first used, and says
what to install where that is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from thrifty import zoo
from thrifty.decision import Decision
from thrifty.errors import ThriftyError, missing_extra

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thrifty.budgets import set_budget
    from thrifty.compiler import compile  # noqa: A004 (read as thrifty.compile)
    from thrifty.conversion import Conversion
    from thrifty.converter import convert
    from thrifty.dynamic import Dynamic, decisions
    from thrifty.engine import Engine, Trace, load
    from thrifty.evaluation import Evaluation, evaluate
    from thrifty.lowering import lower
    from thrifty.macs import MacCount, count_macs
    from thrifty.methods import FBS, AntiDote, Gumbel, LCNet
    from thrifty.program import Preprocessing, Program

_PLACES = {
    "AntiDote": "thrifty.methods",
    "Conversion": "thrifty.conversion",
    "Dynamic": "thrifty.dynamic",
    "Engine": "thrifty.engine",
    "Evaluation": "thrifty.evaluation",
    "FBS": "thrifty.methods",
    "Gumbel": "thrifty.methods",
    "LCNet": "thrifty.methods",
    "MacCount": "thrifty.macs",
    "Preprocessing": "thrifty.program",
    "Program": "thrifty.program",
    "Trace": "thrifty.engine",
    "compile": "thrifty.compiler",
    "convert": "thrifty.converter",
    "count_macs": "thrifty.macs",
    "decisions": "thrifty.dynamic",
    "evaluate": "thrifty.evaluation",
    "load": "thrifty.engine",
    "lower": "thrifty.lowering",
    "set_budget": "thrifty.budgets",
}

__all__ = [
    "FBS",
    "AntiDote",
    "Conversion",
    "Decision",
    "Dynamic",
    "Engine",
    "Evaluation",
    "Gumbel",
    "LCNet",
    "MacCount",
    "Preprocessing",
    "Program",
    "ThriftyError",
    "Trace",
    "compile",
    "convert",
    "count_macs",
    "decisions",
    "evaluate",
    "load",
    "lower",
    "set_budget",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'thrifty' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"thrifty.{name}") from error
    globals()[name] = value  # over the submodule of the same name, which importing has put there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
