"""Which values of which node a tensor holds.

While the network runs, each tensor that depends on the input has a `Value`: a node and, for each of the tensor's
elements, its place in that node's buffer. Views, permutations, slices and shuffles change the places only. When an
operator needs a real map, `Resolver` finds the channels and positions in the places, or says that it can't.

The network is run on two images, whose buffers are thought of as standing end to end: an operation that mixes images
shows in the places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thrifty.errors import LoweringError
from thrifty.gates import Gate
from thrifty.lowering.nodes import Graph, Node

IMAGES = 2
"""Images that the network is run on."""

ZERO = -1
"""Place of an element that is zero whatever the input is."""


@dataclass
class Value:
    """What a tensor of `shape` holds: places int64 in the buffers of `node`; None where they are all in order."""

    node: Node
    shape: tuple[int, ...]
    places: Tensor | None = None
    resolved: dict[int, Node] = field(default_factory=dict)

    def index(self) -> Tensor:
        """The place of each element, int64 of the tensor's shape."""
        if self.places is None:
            return torch.arange(IMAGES * self.node.size).reshape(self.shape)
        return self.places

    @property
    def in_order(self) -> bool:
        """Whether it is the node's buffer as it stands."""
        return self.places is None or _is_range(self.places)

    @property
    def permuted(self) -> bool:
        """Whether it holds every value of the node exactly once."""
        if self.places is None:
            return True
        if self.places.numel() != IMAGES * self.node.size or bool((self.places < 0).any()):
            return False
        seen = torch.zeros(self.places.numel(), dtype=torch.bool)
        seen[self.places.reshape(-1)] = True
        return bool(seen.all())


@dataclass
class Scale:
    """The scale [N, C] that a channel gate gave, or [N] of a layer gate, in whatever shape.

    Attributes:
        node: of a layer gate, which stands before the layers that it decides on.
    """

    gate: Gate
    name: str
    x: Value
    shape: tuple[int, ...]
    node: Node | None = None


@dataclass
class Refused:
    """A tensor that must not be used, and why."""

    reason: str


Tracked = Value | Scale | Refused


class Resolver:
    """Makes maps of values, with nodes that move channels or positions where that is needed."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def map(self, value: Value) -> Node:
        """The node that holds a tensor [N, C, H, W], [N, C] or [N] as a map, vectors as [C, 1, 1]."""
        if len(value.shape) not in {2, 4}:
            raise LoweringError(f"takes a tensor of shape {_shape(value)}, but only [N, C, H, W] and [N, C] are maps")
        node = self.along(value, 1)
        height, width = value.shape[2:] or (1, 1)
        if node.shape[1:] != (height, width):
            raise LoweringError(
                f"takes a map of {height} x {width} positions that was made of {node.shape[1]} x {node.shape[2]}"
            )
        return node

    def along(self, value: Value, axis: int) -> Node:
        """The node whose channels lie along `axis` of a tensor [N, ...], in the order of its other elements."""
        axis %= len(value.shape)
        if axis not in value.resolved:
            if axis == 0 or value.shape[0] != IMAGES:
                raise LoweringError(f"mixes the images of a batch: it takes a tensor of shape {_shape(value)}")
            if value.places is None and axis == 1 and value.shape[1] == value.node.shape[0]:
                return value.node
            index = value.index().movedim(axis, 1)
            spatial = (index.shape[2], index.shape[3]) if index.ndim == 4 else None
            value.resolved[axis] = self._find(value.node, index, spatial)
        return value.resolved[axis]

    def whole(self, value: Value) -> Value | None:
        """The same tensor as a value of a node that holds nothing else, or None where there is no such node."""
        if value.permuted:
            return value
        for axis in (1, -1):
            node = self._attempt(value, axis)
            if node is not None:
                return wrapped(node, value.shape, axis)
        return None

    def _attempt(self, value: Value, axis: int) -> Node | None:
        try:
            return self.along(value, axis)
        except LoweringError:
            return None

    def rows(self, value: Value) -> Node:
        """The node behind a matrix [N * positions, C] whose rows of an image stand together."""
        rows, channels = value.shape
        if rows % IMAGES:
            raise LoweringError("mixes the images of a batch: its rows cannot be shared out among them")
        index = value.index().reshape(IMAGES, rows // IMAGES, channels)
        return self._find(value.node, index.transpose(1, 2), None)

    def _find(self, node: Node, index: Tensor, spatial: tuple[int, int] | None) -> Node:
        """The node [C, ...] that holds the places `index`, [2, C, positions]."""
        index = index.reshape(IMAGES, index.shape[1], -1)
        first = _one_image(index, node)
        channels, positions = first.shape
        if _is_range(first) and first.numel() == node.size and channels == node.shape[0]:
            return node
        if positions == 1:
            return self._gathered(self._flattened(node), first[:, 0])
        if positions != node.positions or not _in_planes(first, node.positions):
            node, first = self._subsampled(node, first, spatial)
        return self._gathered(node, torch.where(first[:, 0] < 0, ZERO, first[:, 0] // node.positions))

    def _flattened(self, node: Node) -> Node:
        return node if node.positions == 1 else self.graph.add("flatten", [node], (node.size, 1, 1))

    def _gathered(self, node: Node, channels: Tensor) -> Node:
        if channels.numel() == node.shape[0] and _is_range(channels):
            return node
        shape = (channels.numel(), *node.shape[1:])
        return self.graph.add("gather", [node], shape, {"index": channels.to(torch.int32).contiguous()})

    def _subsampled(self, node: Node, first: Tensor, spatial: tuple[int, int] | None) -> tuple[Node, Tensor]:
        """Every second (third...) row and column, and the places in the smaller map."""
        _, height, width = node.shape
        if spatial is not None:
            for stride_y, stride_x in _strides(height, width, spatial):
                rows, columns = torch.arange(0, height, stride_y), torch.arange(0, width, stride_x)
                kept = (rows[:, None] * width + columns).reshape(-1)
                plane = torch.div(first, node.positions, rounding_mode="floor")
                inside = torch.where(first < 0, ZERO, plane * node.positions + kept)
                if bool((inside == first).all()) and _whole_planes(first, plane):
                    shape = (node.shape[0], *spatial)
                    stride = (stride_y, stride_x)
                    sides, ones = (0, 0, 0, 0), (1, 1)
                    smaller = self.graph.add(
                        "max_pool", [node], shape, kernel=ones, stride=stride, padding=sides, dilation=ones
                    )
                    order = torch.arange(smaller.positions)
                    return smaller, torch.where(first < 0, ZERO, plane * smaller.positions + order)
        raise LoweringError(
            "takes values that were moved between channels and positions, or cropped, in a way that programs don't have"
        )


def wrapped(node: Node, shape: tuple[int, ...], axis: int = 1) -> Value:
    """The value of a tensor of `shape` that holds the map of `node` with its channels along `axis`."""
    axis %= len(shape)
    if axis == 1:
        return Value(node, tuple(shape))
    order = [size for i, size in enumerate(shape) if i != axis]
    order.insert(1, shape[axis])
    places = torch.arange(IMAGES * node.size).reshape(order).movedim(1, axis)
    return Value(node, tuple(shape), places)


def squeezed(value: Value) -> Value:
    """A tensor [N, C, H, W] without what was repeated: [N, C, 1, 1] of a vector, [N, 1, H, W] of one channel."""
    if value.in_order or len(value.shape) != 4:
        return value
    index = value.index()
    if math.prod(value.shape[2:]) > 1 and bool((index == index[:, :, :1, :1]).all()):
        index = index[:, :, :1, :1]
    elif value.shape[1] > 1 and bool((index == index[:, :1]).all()):
        index = index[:, :1]
    return Value(value.node, tuple(index.shape), index)


def _one_image(index: Tensor, node: Node) -> Tensor:
    """Places of the first image, [C, positions]; those of the second must be the same."""
    first, second = index
    expected = torch.where(first < 0, first, first + node.size)
    if bool((first >= node.size).any()) or not bool((second == expected).all()):
        raise LoweringError("mixes the images of a batch")
    return first


def _in_planes(first: Tensor, positions: int) -> bool:
    """Whether each row of [C, positions] is one channel's plane, or zero."""
    start = first[:, :1]
    whole = torch.where(start < 0, ZERO, start + torch.arange(positions))
    aligned = bool(((start % positions == 0) | (start < 0)).all())
    return aligned and bool((first == whole).all())


def _whole_planes(first: Tensor, plane: Tensor) -> bool:
    return bool((plane == plane[:, :1]).all()) and bool(((first < 0) == (first[:, :1] < 0)).all())


def _strides(height: int, width: int, spatial: tuple[int, int]) -> list[tuple[int, int]]:
    """Strides that leave `spatial` of height x width positions."""
    return [
        (y, x)
        for y in range(1, height + 1)
        if -(-height // y) == spatial[0]
        for x in range(1, width + 1)
        if -(-width // x) == spatial[1]
    ]


def _is_range(index: Tensor) -> bool:
    flat = index.reshape(-1)
    return bool((flat == torch.arange(flat.numel())).all())


def _shape(value: Value) -> list[int | str]:
    return ["N" if i == 0 and size == IMAGES else size for i, size in enumerate(value.shape)]
