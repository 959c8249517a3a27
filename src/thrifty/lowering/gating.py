"""What gates become in a recorded network: nodes that fusion merges into the layers that they decide on."""

from __future__ import annotations

from torch import Tensor

from thrifty.errors import LoweringError
from thrifty.gates import Gate, InputGate, LayerGate, LoweredGate
from thrifty.lowering.call import Call
from thrifty.lowering.nodes import Node
from thrifty.lowering.values import IMAGES, Resolver, Scale, Value, wrapped


def pruned(resolver: Resolver, gate: InputGate, x: Value) -> Value:
    """The map x with zeros where the gate prunes it."""
    reads = resolver.map(x)
    lowered = _lowered(gate, reads, resolver.graph.scope)
    node = resolver.graph.add("pruned", [reads], reads.shape, None, gate=lowered.kind, **lowered.attributes)
    return wrapped(node, x.shape)


def layer_gate(resolver: Resolver, gate: LayerGate, x: Value) -> Node:
    """The node that decides whether the layers of a block run."""
    graph, reads = resolver.graph, resolver.map(x)
    lowered = _lowered(gate, reads, gate.block)
    scope, graph.scope = graph.scope, gate.block
    node = graph.add(lowered.kind, [reads], (1, 1, 1), lowered.tensors, **lowered.attributes)
    graph.scope = scope
    return node


def gated(call: Call, y: Value, scale: Scale) -> Value:
    """A tensor times a gate's scale."""
    if scale.node is not None:
        return _layer(call, y, scale, scale.node)
    node = call.resolver.map(y)
    if tuple(scale.shape) != (IMAGES, node.shape[0], 1, 1):
        raise LoweringError(f"multiplies {list(y.shape)} with the scale of the gate {scale.name} as {scale.shape}")
    reads = call.resolver.map(scale.x)
    lowered = _lowered(scale.gate, reads, scale.name)
    tensors: dict[str, Tensor] = {f"gate_{role}": tensor for role, tensor in lowered.tensors.items()}
    gate = call.graph.add("gate", [node, reads], node.shape, tensors, gate=lowered.kind, **lowered.attributes)
    return wrapped(gate, y.shape)


def _layer(call: Call, y: Value, scale: Scale, gate: Node) -> Value:
    """What a block's layers made, times one number for each image."""
    if tuple(scale.shape) != (IMAGES, *[1] * (len(y.shape) - 1)):
        raise LoweringError(f"multiplies {list(y.shape)} with the scale of the gate of {scale.name} as {scale.shape}")
    value = call.resolver.whole(y)
    if value is None:
        raise LoweringError("scales values that were moved between channels and positions by a layer gate")
    node = call.graph.add("mul", [value.node, gate], value.node.shape)
    return Value(node, value.shape, value.places)


def _lowered(gate: Gate, reads: Node, name: str) -> LoweredGate:
    try:
        return gate.lower(reads.shape)
    except LoweringError as error:
        raise LoweringError(f"is gated by {name}, which cannot be lowered: {error}") from error
