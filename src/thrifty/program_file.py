"""Programs on disk: one safetensors file with the weights and, in its metadata, everything else as JSON.

Reading needs NumPy and safetensors only, and executes nothing from the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from thrifty.errors import ProgramError
from thrifty.files import replacing
from thrifty.program import Operator, Preprocessing, Program

FORMAT = 2
"""Version that is written, and the newest that is read. Since 2: guards, gates that are not 'topk', layer_gate."""
KEY = "thrifty-program"
MAX_OPERATORS = 100_000
MAX_TEXT = 1 << 24
"""Characters of the description; what JSON makes of them may take fifty times as many bytes."""


def save_program(program: Program, path: str | Path) -> None:
    """Write a program to one file, in one step: a crash leaves the old file or the new one.

    Raises:
        ThriftyError: the file cannot be written.
        ProgramError: a weight is NaN or infinite.
    """
    _check_finite(program.tensors, path)
    description = {
        "format": FORMAT,
        "buffers": program.buffers,
        "operators": [_described(operator) for operator in program.operators],
        "output": program.output,
        "flat": program.flat,
        "classes": program.classes,
        "preprocessing": None
        if program.preprocessing is None
        else {"mean": program.preprocessing.mean, "std": program.preprocessing.std},
        "method": None if program.method is None else dict(program.method),
    }
    with replacing(path) as temporary:
        save_file(dict(program.tensors), temporary, metadata={KEY: json.dumps(description)})


def _described(operator: Operator) -> dict[str, Any]:
    described: dict[str, Any] = {
        "kind": operator.kind,
        "name": operator.name,
        "inputs": operator.inputs,
        "output": operator.output,
        "attributes": dict(operator.attributes),
        "tensors": dict(operator.tensors),
    }
    if operator.guard is not None:
        described["guard"] = operator.guard
    return described


def load_program(path: str | Path) -> Program:
    """Read a program that `save_program` has written.

    Raises:
        ProgramError: there is no such file, or it is damaged, of a newer version, or not a valid program.
    """
    path = Path(path)
    if not path.is_file():
        raise ProgramError(f"there is no file {path}.")
    try:
        with safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise ProgramError(f"{path} was not written by thrifty's engine: it holds no program.")
            if len(text) > MAX_TEXT:
                raise ProgramError(f"{path} describes a program in {len(text)} characters; {MAX_TEXT} is the most.")
            description = _description(text, path)
            tensors = {name: _read_only(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
        _check_finite(tensors, path)
        return _program(description, tensors)
    except ProgramError as error:
        message = _shown(str(error))
        raise ProgramError(message if str(path) in message else f"{path} is damaged: {message}") from error
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = _shown(_reason(error))
        raise ProgramError(f"{path} is not a program file or is damaged: {reason}. Get it anew.") from error


def _description(text: str, path: Path) -> dict[str, Any]:
    description = json.loads(text)
    if not isinstance(description, dict) or "format" not in description:
        raise ProgramError(f"{path} is damaged: its program has no format version.")
    version = description["format"]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ProgramError(f"{path} is damaged: its format version is {version!r}.")
    if version > FORMAT:
        raise ProgramError(
            f"{path} was written by a newer thrifty (format {version}; this one reads up to {FORMAT}). "
            "Upgrade to load it."
        )
    return description


def _program(values: dict[str, Any], tensors: dict[str, Any]) -> Program:
    if len(values["operators"]) > MAX_OPERATORS:
        raise ProgramError(f"it has {len(values['operators'])} operators; {MAX_OPERATORS} is the most.")
    preprocessing = values["preprocessing"]
    flat, classes, method = values["flat"], values["classes"], values["method"]
    if not isinstance(flat, bool) or not isinstance(classes, list) or not isinstance(method, (dict, type(None))):
        raise ProgramError("flat, classes or method is not of its type.")
    return Program(
        buffers=tuple(values["buffers"]),
        operators=tuple(
            Operator(
                item["kind"], item["name"], item["inputs"], item["output"], item["attributes"], item["tensors"],
                item.get("guard"),
            )
            for item in values["operators"]
        ),
        output=values["output"],
        flat=flat,
        tensors=tensors,
        preprocessing=None if preprocessing is None else Preprocessing(preprocessing["mean"], preprocessing["std"]),
        classes=tuple(classes),
        method=method,
    )  # fmt: skip


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def _check_finite(tensors: Any, path: str | Path) -> None:
    for name, array in tensors.items():
        if array.dtype == np.float32 and not _finite(array):
            raise ProgramError(f"{name} in {path} has NaN or infinite values.")


def _finite(array: Any) -> bool:
    # A sum is not finite if any part isn't, and takes no memory; where it overflows, each value is looked at.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum(dtype=np.float32))) or bool(np.isfinite(array).all())


def _shown(text: str) -> str:
    """Text of a file, fit to be printed."""
    return "".join(c if c.isprintable() else "?" for c in text[:1000]) + ("..." if len(text) > 1000 else "")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} {error}" if isinstance(error, (KeyError, AttributeError)) else str(error)
