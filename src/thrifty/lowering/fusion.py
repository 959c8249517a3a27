"""Makes fewer and larger operators of a recorded network. What it computes, and which channels are zero, stays.

Weights are folded in float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from thrifty.errors import LoweringError
from thrifty.lowering.nodes import Graph, Node
from thrifty.program import ACTIVATED


def fuse(graph: Graph, output: Node) -> tuple[list[Node], Node]:
    """The nodes in the order of execution, without those that nobody needs, and the one that is returned."""
    nodes = _needed(graph.nodes, output)
    _guard_layers(nodes, output)
    _fold_padding(nodes, output)
    _fold_pruning(_needed(nodes, output))
    fusion = _Fusion(_needed(nodes, output), output)
    nodes = fusion.run()
    return nodes, fusion.now(output)


def _needed(nodes: list[Node], output: Node) -> list[Node]:
    needed, pending = set(), [output]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.inputs if node.guard is None else [*node.inputs, node.guard])
    return [node for node in nodes if node in needed or node.kind == "input"]


def _readers(nodes: list[Node], output: Node) -> dict[Node, int]:
    """How often each node is read."""
    count = dict.fromkeys(nodes, 0)
    for node in nodes:
        for read in node.inputs:
            count[read] += 1
    count[output] += 1
    return count


def _readers_of(nodes: list[Node]) -> dict[Node, list[Node]]:
    readers: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for read in node.inputs:
            readers[read].append(node)
    return readers


def _guard_layers(nodes: list[Node], output: Node) -> None:
    """What is computed for the sake of a product with a layer gate alone is guarded by that gate."""
    readers = _readers_of(nodes)
    for gate in nodes:
        if gate.kind != "layer_gate":
            continue
        products = readers[gate]
        if len(products) != 1 or products[0].kind != "mul" or products[0] is output:
            raise LoweringError(f"the layer gate of {gate.scope} ({gate.place}) does not scale one operand of a sum.")
        inside = {products[0]}
        for node in reversed(nodes):
            if node not in (output, gate) and readers[node] and all(reader in inside for reader in readers[node]):
                inside.add(node)
        for node in inside:
            if node.guard is not None or node.kind == "layer_gate":
                raise LoweringError(f"the block {gate.scope} ({gate.place}) holds another block with a layer gate.")
            node.guard = gate


def _fold_pruning(nodes: list[Node]) -> None:
    """A gate that prunes a map becomes that of the convolution which reads it."""
    readers = _readers_of(nodes)
    for node in nodes:
        if node.kind != "pruned":
            continue
        reader = readers[node][0] if len(readers[node]) == 1 else None
        if reader is None or reader.kind != "conv" or reader.inputs != [node] or "gate" in reader.attributes:
            raise LoweringError(
                f"the gate of {node.scope or 'the model'} ({node.place}) prunes a map that is not read by one "
                "convolution alone: it cannot be lowered."
            )
        reader.attributes |= node.attributes
        reader.inputs[0] = node.inputs[0]


def _fold_padding(nodes: list[Node], output: Node) -> None:
    """Padding becomes that of the convolutions or maximum pools which are all that read it."""
    readers = _readers_of(nodes)
    for node in nodes:
        if node.kind != "pad" or node is output or not readers[node]:
            continue
        reader_kind, fill = ("conv", 0) if node.attributes["value"] == 0 else ("max_pool", -math.inf)
        if node.attributes["value"] != fill or any(reader.kind != reader_kind for reader in readers[node]):
            continue
        for reader in readers[node]:
            sides = zip(node.attributes["padding"], reader.attributes["padding"], strict=True)
            reader.attributes["padding"] = tuple(outer + inner for outer, inner in sides)
            reader.inputs[0] = node.inputs[0]


class _Fusion:
    """One pass over the nodes in the order of execution; each is merged into a node before it, or kept."""

    def __init__(self, nodes: list[Node], output: Node) -> None:
        self.nodes = nodes
        self.readers = _readers(nodes, output)
        self.order = {node: place for place, node in enumerate(nodes)}
        self.merged: dict[Node, Node] = {}
        self.kept: dict[Node, None] = {}

    def now(self, node: Node) -> Node:
        """The node that computes what `node` did."""
        while node in self.merged:
            node = self.merged[node]
        return node

    def run(self) -> list[Node]:
        """The nodes that remain."""
        for node in self.nodes:
            node.inputs = [self.now(read) for read in node.inputs]
            into = self._merge(node)
            if into is None:
                self.kept[node] = None
            else:
                self.merged[node] = into
                self.readers[into] = self.readers[node]
        return list(self.kept)

    def _merge(self, node: Node) -> Node | None:
        """Merge a node into one that it reads: that one then computes the node's result."""
        if node.kind == "gate":
            return self._gate(node)
        if node.kind == "affine":
            return self._affine(node)
        if node.kind == "activation":
            return self._activation(node)
        if node.kind == "add":
            return self._residual(node)
        if node.kind == "mul" and node.inputs[1] is node.guard:
            return self._scale(node)
        return None

    def _open(self, node: Node, kinds: tuple[str, ...] | frozenset[str], into: Node | None = None) -> bool:
        """Whether something can be merged into the node: nobody else reads it, and nothing follows its sums yet.

        A guarded node gives zero where it is skipped: what stands outside of its block can follow a residual only.
        """
        plain = node.attributes.get("activation", "none") == "none"
        inside = into is None or into.guard is node.guard or (node.kind == "conv" and len(node.inputs) > 1)
        return node.kind in kinds and self.readers[node] == 1 and plain and inside

    def _gate(self, node: Node) -> Node:
        conv, x = node.inputs
        fits = self._open(conv, ("conv",)) and len(conv.inputs) == 1 and conv.inputs[0] is x
        if not fits or "gate" in conv.attributes:
            raise LoweringError(
                f"the gate of {node.scope or 'the model'} ({node.place}) does not scale the output of a convolution, "
                "or of its batch normalisation, that reads what the gate reads: it cannot be lowered."
            )
        conv.attributes |= node.attributes
        conv.tensors |= node.tensors
        self.readers[x] -= 1
        return conv

    def _affine(self, node: Node) -> Node | None:
        before = node.inputs[0]
        scale, shift = node.tensors["scale"], node.tensors.get("shift")
        if shift is None and bool((scale == 1).all()):
            self.readers[node] += self.readers[before] - 1
            return before
        if not self._open(before, ("conv", "linear", "affine"), node) or len(before.inputs) > 1:
            return None
        if before.kind == "affine":
            return _joined(before, scale, shift)
        if shift is not None and before.attributes.get("gate", "attention") != "attention":
            return None  # channels that its gate skips would have to become the shift; attention skips inputs
        before.tensors["weight"] = _scaled(before.tensors["weight"], scale)
        before.tensors["bias"] = _scaled(before.tensors["bias"], scale, shift)
        return before

    def _scale(self, node: Node) -> Node | None:
        """A product with the layer gate that guards a convolution is done by the convolution."""
        conv = node.inputs[0]
        if not self._open(conv, ("conv",), node) or len(conv.inputs) > 1:
            return None
        conv.attributes["scaled"] = 1
        return conv

    def _activation(self, node: Node) -> Node | None:
        before = node.inputs[0]
        if not self._open(before, ACTIVATED, node):
            return None
        before.attributes |= node.attributes
        return before

    def _residual(self, node: Node) -> Node | None:
        """A sum with a convolution's output is done by the convolution, the later one if there are two."""
        found = [
            read
            for read in node.inputs
            if self._open(read, ("conv",)) and len(read.inputs) == 1 and read.shape == node.shape
        ]
        same_shapes = node.inputs[0].shape == node.inputs[1].shape
        if not found or not same_shapes:
            return None
        conv = max(found, key=self.order.__getitem__)
        other = node.inputs[1] if node.inputs[0] is conv else node.inputs[0]
        conv.inputs.append(other)
        self.order[conv] = self.order[node]
        del self.kept[conv]  # it moves to here, behind everything that it reads now
        self.kept[conv] = None
        return conv


def _scaled(weight: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """weight [O, ...] * scale [O] + shift [O] in float64."""
    # NumPy does this on one thread: torch's would wait for each other where cores are busy.
    factor = scale.numpy().reshape(-1, *[1] * (weight.ndim - 1))
    given = weight.detach().cpu()
    if given.dtype == torch.bfloat16:  # which NumPy has not
        given = given.float()
    product = np.multiply(given.numpy(), factor, dtype=np.float64)
    return torch.from_numpy(product if shift is None else product + shift.numpy())


def _joined(first: Node, scale: Tensor, shift: Tensor | None) -> Node:
    """Two affine maps as one."""
    earlier = first.tensors.get("shift")
    first.tensors["scale"] = first.tensors["scale"] * scale
    if earlier is not None:
        first.tensors["shift"] = earlier * scale
    if shift is not None:
        first.tensors["shift"] = first.tensors.get("shift", torch.zeros_like(shift)) + shift
    return first
