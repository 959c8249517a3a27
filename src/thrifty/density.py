"""What a density means: shares kept, by layer, and how many channels that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Real

from thrifty.errors import ThriftyError

Density = float | Mapping[str, float]
"""One share for all layers, or shares by pattern of names: the first that fits counts."""


def check_density(density: float) -> float:
    """`density` as a float, or an error where it is not in (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, Real) or not 0 < density <= 1:
        raise ThriftyError(f"density is {density!r}, but must be a number in (0, 1].")
    return float(density)


def kept(density: float, channels: int) -> int:
    """Channels kept of `channels` at `density` in (0, 1]: ceil(density * channels), and at least one.

    The product is lowered by 1e-9 before rounding up, so that 0.55 * 100 = 55.00000000000001 keeps 55.
    """
    check_density(density)
    return max(1, math.ceil(density * channels - 1e-9))


def kept_at(strength: float, least: int, channels: int) -> int:
    """Channels kept of `channels` at the share `strength` of the way from all of them to `least`."""
    return kept(1 - (1 - least / channels) * strength, channels)


def density_for(density: Density, name: str) -> float | None:
    """The density of the layer `name`, None where no pattern fits."""
    if not isinstance(density, Mapping):
        return density
    return next((value for pattern, value in density.items() if fnmatchcase(name, pattern)), None)


def densities_of(density: Density, names: Iterable[str]) -> dict[str, float]:
    """The density of each of the gated layers `names` that it says one for.

    Raises:
        ThriftyError: a value is no density, a pattern fits none of the layers, or there are none.
    """
    names = tuple(names)
    check_patterns(density, names)
    if not names:
        raise ThriftyError("no layer is gated, so that none has a density: the model's `conversion` says why.")
    found = {name: density_for(density, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def check_patterns(density: Density, names: Iterable[str]) -> None:
    """Every value must be a density, and every pattern fit one of the gated layers `names`."""
    for value in density.values() if isinstance(density, Mapping) else (density,):
        check_density(value)
    names = tuple(names)
    for pattern in density if isinstance(density, Mapping) else ():
        if not isinstance(pattern, str):
            raise ThriftyError(f"{pattern!r} is no pattern of names: give a string, such as 'layer*'.")
        if not any(fnmatchcase(name, pattern) for name in names):
            layers = f"They are: {', '.join(names)}." if names else "There is none: the model's `conversion` says why."
            raise ThriftyError(f"{pattern!r} fits the name of no gated layer. {layers}")
