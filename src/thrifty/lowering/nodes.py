"""What a recorded network is made of before it becomes a program: nodes that refer to the nodes that they read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from thrifty.program import Shape

MOVEMENT = frozenset({"gather", "flatten", "max_pool"})
"""Kinds of which two with the same inputs and settings are one."""


@dataclass(eq=False)
class Node:
    """One operator that is still being changed. Shapes are per image, [C, H, W].

    Attributes:
        kind: of the operator (see `thrifty.program`), or 'input', or 'gate': inputs[0] scaled by a gate on inputs[1],
            or 'pruned': inputs[0] with zeros where a gate prunes it.
        scope: name of the module that was executed.
        whole: whether that module is made of no others.
        place: file and line of the user's code.
        guard: the layer gate that decides whether it is computed, or None where it always is.
    """

    kind: str
    inputs: list[Node]
    shape: Shape
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scope: str = ""
    whole: bool = False
    place: str = ""
    guard: Node | None = None

    @property
    def size(self) -> int:
        """Number of values per image."""
        channels, height, width = self.shape
        return channels * height * width

    @property
    def positions(self) -> int:
        """Number of values per channel."""
        return self.shape[1] * self.shape[2]


class Graph:
    """The nodes of a network in the order of execution; the first is the input."""

    def __init__(self, shape: Shape) -> None:
        self.nodes = [Node("input", [], shape)]
        self.scope = ""
        self.whole = False
        self.place = ""
        self._known: dict[Any, Node] = {}

    def add(
        self, kind: str, inputs: Iterable[Node], shape: Iterable[int], tensors: dict[str, Tensor] | None = None,
        **attributes: Any,
    ) -> Node:  # fmt: skip
        """A new node behind all others, or one that moves the same values in the same way already."""
        channels, height, width = shape
        size = (channels, height, width)
        node = Node(kind, list(inputs), size, attributes, tensors or {}, self.scope, self.whole, self.place)
        if kind in MOVEMENT:
            index = node.tensors.get("index")
            key = (kind, *map(id, node.inputs), node.shape, *sorted(attributes.items()), _values(index))
            if key in self._known:
                return self._known[key]
            self._known[key] = node
        self.nodes.append(node)
        return node


def _values(index: Tensor | None) -> bytes:
    return b"" if index is None else index.numpy().tobytes()
