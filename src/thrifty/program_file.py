"""Programs on disk: one safetensors file with the weights and, in its metadata, everything else as JSON.

Reading needs NumPy and safetensors only, and executes nothing from the file.

A program that ships beside the model's own weights does without those of its tensors that are one of them times a scale
of each output, which is what folding a normalisation makes: of such a tensor it holds the scales, float64 [outputs].
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from thrifty.errors import ProgramError
from thrifty.files import replacing
from thrifty.program import Operator, Preprocessing, Program

FORMAT = 3
"""Version that is written, and the newest that is read.

Since 2: guards, gates that are not 'topk', layer_gate. Since 3: tensors that are scaled ones of another file.
"""
KEY = "thrifty-program"
SMALL = 1024
"""Values of a tensor that is always written whole."""
KINDS = (np.float16, np.float32)
"""Types of another file's tensors that may be scaled."""
MAX_OPERATORS = 100_000
MAX_TEXT = 1 << 24
"""Characters of the description; what JSON makes of them may take fifty times as many bytes."""


def save_program(program: Program, path: str | Path, weights: Mapping[str, np.ndarray] | None = None) -> None:
    """Write a program to one file, in one step: a crash leaves the old file or the new one.

    Args:
        program: what to write.
        path: of the file.
        weights: tensors of a file that will be at hand where this one is read; None: it is to stand alone.

    Raises:
        ThriftyError: the file cannot be written.
        ProgramError: a weight is NaN or infinite.
    """
    _check_finite(program.tensors, path)
    tensors, scaled = dict(program.tensors), {}
    for name, tensor in program.tensors.items():
        for other, values in (weights or {}).items():
            scale = _scale(tensor, values)
            if scale is not None:
                tensors[name], scaled[name] = scale, other
                break
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
    if scaled:
        description["scaled"] = scaled
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(description)})


def _scale(tensor: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """float64 [outputs] times which `other` is `tensor`; None where there is none such or the tensor is small."""
    if tensor.shape != other.shape or tensor.ndim < 2 or tensor.size < SMALL:
        return None
    wanted, given = (array.reshape(len(array), -1).astype(np.float64) for array in (tensor, other))
    power = (given * given).sum(1)
    scale = (wanted * given).sum(1) / np.where(power > 0, power, 1)
    close = np.abs(wanted - scale[:, None] * given).max() <= 1e-6 * np.abs(wanted).max()
    return scale if close else None


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


def load_program(path: str | Path, weights: str | Path | None = None) -> Program:
    """Read a program that `save_program` has written.

    Args:
        path: of the file.
        weights: safetensors file of the tensors that it was written without, if it was.

    Raises:
        ProgramError: there is no such file, or it is damaged, of a newer version, or not a valid program.
    """
    path = Path(path)
    try:
        if not os.path.isfile(path):  # unlike path.is_file() also false where no system has such a name
            raise ProgramError(f"{path} is no file." if os.path.exists(path) else f"there is no file {path}.")
        with safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise ProgramError(f"{path} was not written by thrifty's engine: it holds no program.")
            if len(text) > MAX_TEXT:
                raise ProgramError(f"{path} describes a program in {len(text)} characters; {MAX_TEXT} is the most.")
            description = _description(text, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if "scaled" in description:
            tensors |= _scaled(description["scaled"], tensors, path, weights)
        for array in tensors.values():
            array.flags.writeable = False
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


def _scaled(sources: Any, scales: Mapping[str, Any], path: Path, weights: str | Path | None) -> dict[str, Any]:
    """The tensors that the file at `path` holds the scales of."""
    if not isinstance(sources, dict) or not all(isinstance(source, str) for source in sources.values()):
        raise ProgramError("it names no tensors of another file where it should.")
    if weights is None:
        raise ProgramError(
            f"{path} holds no weights of its own, they are those of a zoo model. Load the model by its name, and save "
            "it to get a file that stands alone."
        )
    found = {}
    with safe_open(weights, "numpy") as file:
        for name, source in sources.items():
            scale, tensor = scales[name], file.get_tensor(source)
            if scale.dtype != np.float64 or scale.shape != tensor.shape[:1] or tensor.dtype not in KINDS:
                raise ProgramError(f"the scales of {name} do not fit {source} in {weights}.")
            found[name] = (tensor * scale.reshape(-1, *[1] * (tensor.ndim - 1))).astype(np.float32)
    return found


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
