"""From the name of a network to the network: zoo definitions, torchvision, timm and a user's own code.

A name without a prefix is a zoo network, or else one of torchvision's or timm's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from thrifty.errors import ThriftyError, require
from thrifty.zoo.nets import NETS, build

ELSEWHERE = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "weights", "weights_backbone")
"""Arguments by which torchvision and timm fetch or read weights: here those come from recipes and model files."""

FORMS = "a zoo network, torchvision:NAME, timm:NAME or module:function"


def build_net(name: str, **arguments: Any) -> nn.Module:
    """A network with fresh weights from its name, which has one of `FORMS`.

    `module:function` imports and calls the user's own code. Among names without a prefix, zoo networks come first, then
    torchvision's, then timm's.

    Raises:
        ThriftyError: nothing of that name exists, it does not take the arguments or does not return a module.
    """
    prefix, colon, rest = name.partition(":")
    if not colon:
        if name in NETS:
            return build(name, **arguments)
        prefix, rest = _library(name), name
    fetching = [key for key in ELSEWHERE if key in arguments]
    if fetching and not is_own(name):
        raise ThriftyError(f"network {name!r} is made with fresh weights and takes no {', '.join(fetching)}.")
    builder: Callable[..., Any]
    if prefix == "torchvision":
        models = require("torchvision.models", f"network {name}")
        builder = lambda **rest_of: models.get_model(rest, weights=None, **rest_of)  # noqa: E731
    elif prefix == "timm":
        timm = require("timm", f"network {name}")
        if not timm.is_model(rest):
            raise ThriftyError(f"timm has no network {rest!r}. `timm.list_models()` names them.")
        builder = lambda **rest_of: timm.create_model(rest, pretrained=False, **rest_of)  # noqa: E731
    else:
        builder = _own(prefix, rest)
    try:
        model = builder(**arguments)
    except Exception as error:  # as may what makes the network
        raise ThriftyError(f"network {name!r} could not be made: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ThriftyError(f"{name!r} returned a {type(model).__name__}, but must return a torch.nn.Module.")
    return model


def usual_size(name: str) -> int:
    """Height and width in pixels of what a network of this name takes, if nothing else is said."""
    return 32 if name in NETS else 224


def is_own(name: str) -> bool:
    """Whether a network's name is that of a function of the user's own."""
    prefix, colon, _ = name.partition(":")
    return bool(colon) and prefix not in ("torchvision", "timm")


def _library(name: str) -> str:
    """Which library has a network of this name."""
    for library, names in (("torchvision", "torchvision.models"), ("timm", "timm")):
        if importlib.util.find_spec(library) and name in importlib.import_module(names).list_models():
            return library
    raise ThriftyError(f"there is no network {name!r}. Give {FORMS}; the zoo has: {', '.join(NETS)}.")


def _own(module: str, function: str) -> Callable[..., Any]:
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does, so that a file in the working directory is found
        sys.path.insert(0, here)
    if not module or not function:
        raise ThriftyError(f"{module}:{function} names no function of a module. Give {FORMS}.")
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a module of the user's own may raise anything
        raise ThriftyError(f"cannot import {module!r}: {type(error).__name__}: {error}. Give {FORMS}.") from error
    found = getattr(imported, function, None)
    if found is None:
        raise ThriftyError(f"module {module!r} has no {function!r}.")
    if not callable(found):
        raise ThriftyError(f"{module}:{function} is a {type(found).__name__}, but must be a function or a class.")
    return found
