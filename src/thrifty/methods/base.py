"""What every method's config has in common."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from thrifty.errors import ThriftyError

if TYPE_CHECKING:
    from thrifty.conversion import Place
    from thrifty.dynamic import Dynamic
    from thrifty.gates import SpreadGate
    from thrifty.graph import Sites

Where = Callable[[str, nn.Module], bool] | str | tuple[str, ...] | None


NOT_SELECTED = "not selected by where="
"""What reports say of layers that `where` leaves out."""


def check_progress(progress: float) -> None:
    """An error where `progress` is no share of training."""
    if isinstance(progress, bool) or not isinstance(progress, Real) or not 0 <= progress <= 1:
        raise ThriftyError(f"progress is {progress!r}, but must be the share of training that is done, in [0, 1].")


def sampled_offset(progress: float) -> float:
    """For `thrifty.gates.strengths` in the training step at `progress` in [0, 1], in [0, 1).

    It depends on `progress` alone, so that a resumed run draws what the unbroken one does.
    """
    return random.Random(repr(progress)).random()


def spread_budgets(gates: Iterable[SpreadGate], progress: float) -> None:
    """Give every image of the step at `progress` a budget of its own, the same ones to all gates; at 1 no longer."""
    for gate in gates:
        gate.spread_from(sampled_offset(progress) if progress < 1 else None)


def on_the_way(
    start: float, target: float, progress: float, schedule: str, step: float, span: tuple[float, float]
) -> float:
    """A setting between `start` and `target`, in whichever direction, when the share `progress` of training is done.

    It begins to move at the first share of `span` and is there at the last: by 'steps' of `step`, or 'linear'.
    """
    first, last = span
    if progress < first:
        return start
    if progress >= last:
        return target
    share = (progress - first) / (last - first)
    if schedule == "linear":
        return start + (target - start) * share
    steps = math.ceil(abs(target - start) / step - 1e-9)
    taken = min(steps, 1 + math.floor(share * steps))
    reached = round(start + math.copysign(taken * step, target - start), 9)
    return max(target, reached) if target < start else min(target, reached)


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """All settings of a method. Subclasses add fields and say where gates go and how they are trained.

    Attributes:
        where: which convolutions may be gated: a function of name and module, or one or several patterns of names
            ('layer*.conv?'); None takes all.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    where: Where = None

    def __post_init__(self) -> None:
        patterns = self.where if isinstance(self.where, (tuple, list)) else (self.where,)
        if not (callable(self.where) or self.where is None or all(isinstance(pattern, str) for pattern in patterns)):
            raise ThriftyError(
                f"where is {self.where!r}, but must be patterns of names or a function of name and module."
            )

    def check_number(self, field: str, wanted: str, fits: Callable[[float], bool]) -> None:
        """An error where the setting is not a finite number that fits; `wanted` says what does."""
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not fits(float(value)):
            raise ThriftyError(f"{type(self).__name__} {field} is {value!r}, but must be {wanted}.")

    def check_choice(self, field: str, known: Iterable[str]) -> None:
        """An error where the setting is not one of those."""
        if getattr(self, field) not in (known := tuple(known)):
            value = getattr(self, field)
            raise ThriftyError(f"{type(self).__name__} {field} is {value!r}; choose one of: {', '.join(known)}.")

    def check_flags(self, *names: str) -> None:
        """An error where one of these settings is neither True nor False."""
        for name in names:
            if not isinstance(value := getattr(self, name), bool):
                raise ThriftyError(f"{type(self).__name__} {name} is {value!r}, but must be True or False.")

    def check_span(self, field: str) -> None:
        """An error where the setting is not two shares of training, one after the other."""
        span = getattr(self, field)
        numbers = isinstance(span, (tuple, list)) and len(span) == 2 and all(isinstance(share, Real) for share in span)
        if not numbers or not 0 <= span[0] <= span[1] <= 1:
            raise ThriftyError(f"{type(self).__name__} {field} is {span!r}, but must be two rising shares in [0, 1].")

    def selects(self, name: str, module: nn.Module) -> bool:
        """Whether `where` picks the module of this name."""
        if self.where is None:
            return True
        if callable(self.where):
            return bool(self.where(name, module))
        patterns = (self.where,) if isinstance(self.where, str) else self.where
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def settings(self) -> dict[str, Any]:
        """The config as plain values under its `name` and `version`, for recipes and files.

        Raises:
            ThriftyError: `where` is a function, which cannot be written down.
        """
        if callable(self.where):
            raise ThriftyError("where= is a function, which can't be saved. Give patterns of names, such as 'layer*'.")
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"name": self.name, "version": self.version, **values}

    @abstractmethod
    def place(self, model: nn.Module, sites: Sites) -> tuple[Place, ...]:
        """Put gates into `model` and say for each site what was done."""

    def measure(self, model: Dynamic, example: Tensor) -> None:  # noqa: B027 (most methods need nothing)
        """Learn from one input [1, C, H, W] what training needs to know of the converted model; nothing by default."""

    def finish(self, model: Dynamic, x: Tensor) -> None:  # noqa: B027 (most methods need nothing)
        """Set after training what depends on images x [N, C, H, W] that were held out; nothing by default."""

    @abstractmethod
    def regularization(self, model: Dynamic) -> Tensor:
        """The method's loss term for the latest forward pass in training mode, a scalar."""

    @abstractmethod
    def set_density(self, model: Dynamic, density: float | Mapping[str, float]) -> None:
        """Change the share that is kept."""

    @abstractmethod
    def density_of(self, model: Dynamic) -> float:
        """Mean density over the gated layers, 1 where none is gated."""

    @abstractmethod
    def set_strength(self, model: Dynamic, strength: float) -> None:
        """Go the share `strength` in [0, 1] of the way from computing everything to what the settings ask for."""

    @abstractmethod
    def advance(self, model: Dynamic, progress: float) -> None:
        """Set what the method's schedule asks for when the share `progress` in [0, 1] of training is done."""
