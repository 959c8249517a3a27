"""One operation of torch as rules see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thrifty.errors import LoweringError
from thrifty.lowering.nodes import Graph
from thrifty.lowering.values import Resolver, Tracked, Value


@dataclass
class Call:
    """One operation: its arguments by name, its output, and what is known of its tensors."""

    func: Any
    arguments: dict[str, Any]
    output: Any
    known: Callable[[Any], Tracked | None]
    resolver: Resolver

    @property
    def graph(self) -> Graph:
        """Where new nodes go."""
        return self.resolver.graph

    def first(self) -> Any:
        """The first argument."""
        return next(iter(self.arguments.values()))

    def value(self, argument: Any) -> Value:
        """What a tensor that depends on the input holds."""
        known = self.known(argument)
        if not isinstance(known, Value):
            raise LoweringError("takes a constant where only a map that depends on the input is supported")
        return known

    def constant(self, name: str) -> Tensor | None:
        """A tensor that does not depend on the input, or None where there is none."""
        argument = self.arguments.get(name)
        if argument is not None and self.known(argument) is not None:
            raise LoweringError(f"takes a {name} that depends on the input")
        return argument

    def weight(self, name: str) -> Tensor:
        """A tensor that does not depend on the input."""
        argument = self.constant(name)
        if argument is None:
            raise LoweringError(f"has no {name}")
        return argument

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or what torch takes where it is not given."""
        value = self.arguments.get(name)
        return default if value is None else value


Rule = Callable[[Call], Any]


def pair(values: Any) -> tuple[int, int]:
    """A setting for both directions, or (vertical, horizontal), as two numbers."""
    if isinstance(values, int):
        return values, values
    numbers = [int(value) for value in values]
    return (numbers[0], numbers[-1])
