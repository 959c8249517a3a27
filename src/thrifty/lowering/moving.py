"""Rules for views, slices, permutations, padding and concatenation: values are moved, not changed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thrifty.errors import LoweringError
from thrifty.lowering.call import Call
from thrifty.lowering.values import IMAGES, ZERO, Scale, Tracked, Value, wrapped

aten = torch.ops.aten


def moved(call: Call) -> Any:
    """Elements are moved: their places move alike."""
    known = call.known(call.first())
    others = [name for name, argument in list(call.arguments.items())[1:] if _depends(call, argument)]
    if others:
        raise LoweringError(f"is told by values ({', '.join(others)}) what to move")
    if isinstance(known, Scale):
        return replace(known, shape=tuple(call.output.shape))
    value = call.value(call.first())
    name, *rest = call.arguments.values()
    del name
    moved = _apply(call, value.index(), rest)
    if isinstance(moved, (list, tuple)):
        return [Value(value.node, tuple(part.shape), part) for part in moved]
    return Value(value.node, tuple(moved.shape), moved)


def _apply(call: Call, index: Tensor, rest: list[Any]) -> Any:
    names = list(call.arguments)[1:]
    keywords = {a.name for a in call.func._schema.arguments if a.kwarg_only}
    positional = [value for name, value in zip(names, rest, strict=True) if name not in keywords]
    named = {name: value for name, value in zip(names, rest, strict=True) if name in keywords}
    try:
        return call.func(index, *positional, **named)
    except RuntimeError:  # a view that the places' strides don't allow
        return call.func(index.contiguous(), *positional, **named)


def _depends(call: Call, argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(_depends(call, part) for part in argument)
    return isinstance(argument, Tensor) and call.known(argument) is not None


def reshaped(call: Call) -> Tracked:
    """The same elements in the same order, in another shape."""
    known = call.known(call.first())
    shape = tuple(call.output.shape)
    if isinstance(known, Scale):
        return replace(known, shape=shape)
    value = call.value(call.first())
    if math.prod(shape) != math.prod(value.shape):
        raise LoweringError(f"reads {list(value.shape)} as {list(shape)}")
    return Value(value.node, shape, None if value.places is None else value.places.reshape(shape))


def restrided(call: Call) -> Value:
    """Other strides for the same values, as pooling to one position sets them."""
    value, output = call.value(call.first()), call.output
    order = torch.arange(output.numel()).as_strided(output.shape, output.stride(), output.storage_offset())
    if tuple(output.shape) != value.shape or not value.in_order or bool((order.flatten().diff() != 1).any()):
        raise LoweringError("reads memory by strides")
    return value


def same(call: Call) -> Tracked:
    """The same values: copies, conversions between floating-point types, dropout in evaluation."""
    known = call.known(call.first())
    if not call.output.is_floating_point():
        raise LoweringError(f"turns values into {call.output.dtype}")
    if known is None:
        raise LoweringError("takes a constant")
    return known


def identity_if_same_size(call: Call) -> Tracked:
    """Resizing that changes nothing."""
    value = call.value(call.first())
    if tuple(call.output.shape) != value.shape:
        raise LoweringError(f"resizes a map from {list(value.shape[2:])} to {list(call.output.shape[2:])}")
    scales = call.get("scale_factors") or (call.get("scales_h"), call.get("scales_w"))
    if any(scale not in (None, 1) for scale in scales):
        raise LoweringError(f"resizes a map by {scales}, which moves its points though its size stays")
    return value


def padded(call: Call) -> Value:
    """Constants around a map, zero channels beside it."""
    x, pads, fill = call.value(call.first()), list(call.arguments["pad"]), float(call.get("value", 0))
    spatial = pads[:4] + [0] * (4 - len(pads[:4])) if len(x.shape) == 4 else []
    if any(spatial) and min(spatial) >= 0:
        left, right, top, bottom = spatial
        node = call.resolver.map(x)
        channels, height, width = node.shape
        size = (channels, height + top + bottom, width + left + right)
        node = call.graph.add("pad", [node], size, padding=(top, bottom, left, right), value=fill)
        x = wrapped(node, (IMAGES, *size))
        pads = [0] * 4 + pads[4:]
    if any(size > 0 for size in pads) and fill != 0:
        raise LoweringError(f"adds channels that are {fill}; only zeros can be added")
    moved = aten.constant_pad_nd(x.index(), pads, ZERO) if any(pads) else x.places
    return Value(x.node, tuple(call.output.shape), moved)


def concatenated(call: Call) -> Value:
    """Tensors that depend on the input, and zeros, side by side."""
    stacks, dim = call.func.overloadpacket is aten.stack, int(call.get("dim", 0))
    parts = [part for part in call.arguments["tensors"] if part.numel()]
    values = [None if _is_zero(call, part) else _whole(call, part) for part in parts]
    nodes = [value.node for value in values if value is not None]
    if len({node.shape[1:] for node in nodes}) != 1:
        raise LoweringError(f"joins maps of different sizes: {', '.join(str(list(node.shape)) for node in nodes)}")
    shape = (sum(node.shape[0] for node in nodes), *nodes[0].shape[1:])
    node = call.graph.add("concat", nodes, shape) if len(nodes) > 1 else nodes[0]
    if not stacks and dim % len(call.output.shape) == 1 and all(value and value.in_order for value in values):
        return wrapped(node, call.output.shape)
    indices, offset = [], 0
    for part, value in zip(parts, values, strict=True):
        if value is None:
            indices.append(torch.full(part.shape, ZERO))
            continue
        index = value.index()
        image = torch.div(index, value.node.size, rounding_mode="floor")
        indices.append(torch.where(index < 0, ZERO, image * node.size + offset + index % value.node.size))
        offset += value.node.size
    joined = torch.stack(indices, dim) if stacks else torch.cat(indices, dim)
    return Value(node, tuple(call.output.shape), joined)


def _whole(call: Call, part: Tensor) -> Value:
    value = call.value(part)
    return call.resolver.whole(value) or value


def _is_zero(call: Call, part: Tensor) -> bool:
    return call.known(part) is None and not bool(part.any())
