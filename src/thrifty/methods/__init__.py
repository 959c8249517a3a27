"""The methods. Each is one file here and one line of `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from thrifty.errors import ThriftyError
from thrifty.methods.antidote import AntiDote
from thrifty.methods.base import MethodConfig
from thrifty.methods.fbs import FBS
from thrifty.methods.gumbel import Gumbel
from thrifty.methods.lcnet import LCNet

METHODS: dict[str, type[MethodConfig]] = {
    FBS.name: FBS,
    AntiDote.name: AntiDote,
    LCNet.name: LCNet,
    Gumbel.name: Gumbel,
}


def method_config(name: str, settings: Mapping[str, Any]) -> MethodConfig:
    """A method's config from plain values, as recipes and files hold them.

    Raises:
        ThriftyError: the method or a setting is unknown, or written by a newer version.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ThriftyError(f"there is no method {name!r}. Choose one of: {', '.join(METHODS)}.")
    kind = METHODS[name]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    version = values.pop("version", kind.version)
    if not isinstance(version, int) or version > kind.version:
        raise ThriftyError(f"{name} settings of version {version} need a newer thrifty, this one knows {kind.version}.")
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ThriftyError(f"{name} has no setting {', '.join(unknown)}. It has: {', '.join(known)}.")
    try:
        return kind(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ThriftyError(f"{name} settings {values} are not all of their types: {error}.") from error


__all__ = ["FBS", "METHODS", "AntiDote", "Gumbel", "LCNet", "MethodConfig", "method_config"]
