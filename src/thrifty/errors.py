"""Errors that users see: each says what was wrong, with the value, and what to do next."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTRAS = {
    "torch": ("torch", "torchvision", "accelerate", "pydantic", "yaml", "PIL", "tensorboard"),
    "timm": ("timm",),
    "bench": ("onnx", "onnxruntime", "openvino"),
    "onnx": ("onnx",),
    "demo": ("PIL", "onnx", "onnxruntime"),
    "report": ("matplotlib",),
}
"""Optional dependencies: name of the extra -> the modules that it brings."""


class ThriftyError(Exception):
    """Base of every error that thrifty raises on purpose; the command line prints it in one line."""


class ConversionError(ThriftyError):
    """The model as a whole cannot be converted (a single layer that cannot is only reported)."""


class RecipeError(ThriftyError):
    """A training recipe is not valid."""


class DataError(ThriftyError):
    """Images or labels are missing, unreadable or of the wrong shape."""


class CheckpointError(ThriftyError):
    """A checkpoint or a weights file is missing, damaged or belongs to something else."""


class ProgramError(ThriftyError):
    """A program, or the file that holds it, is not valid."""


class LoweringError(ThriftyError):
    """A model does something that programs cannot express."""


class NonFiniteError(ThriftyError):
    """Training met NaN or infinity."""


class MissingExtraError(ThriftyError, ImportError):
    """A part of thrifty was used whose optional dependency is not installed."""


def extra_of(module: str) -> str | None:
    """Name of the extra that brings `module`, or None where no extra does."""
    top = module.partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if top in modules), None)


def require(module: str, purpose: str, extra: str | None = None) -> ModuleType:
    """Import `module`, or raise `MissingExtraError` that names the line which installs it (see `missing_extra`)."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_extra(error, purpose, extra) from error


def missing_extra(error: ModuleNotFoundError, purpose: str, extra: str | None = None) -> MissingExtraError:
    """The error to show for a module that is not installed.

    Args:
        error: what the import raised.
        purpose: what needs the module, such as "the demo".
        extra: the extra to install; if not given, the first that brings the module.
    """
    name = error.name or "a dependency"
    extra = extra or extra_of(name)
    how = f"pip install 'thrifty[{extra}]'" if extra else f"pip install {name}"
    return MissingExtraError(f"{purpose} needs {name}, which is not installed. Run: {how}")
