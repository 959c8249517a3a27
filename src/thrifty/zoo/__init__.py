"""Trained models that come with the package: `records()` lists them, `load(name)` rebuilds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thrifty.errors import missing_extra
from thrifty.zoo.records import Record, record, records

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Record", "load", "record", "records"]


def load(name: str) -> nn.Module:
    """The trained model `name`, in evaluation mode; a dynamic one can be trained on.

    Raises:
        CheckpointError: there is no such model, or its file is not the one that its record describes.
        MissingExtraError: torch is not installed.
    """
    try:
        from thrifty.zoo.store import load_model  # noqa: PLC0415 (listing the zoo needs no torch)
    except ModuleNotFoundError as error:
        raise missing_extra(error, "loading a zoo model") from error
    record(name)
    model, _ = load_model(name)
    return model
