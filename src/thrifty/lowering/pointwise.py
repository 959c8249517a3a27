"""Rules for activations, sums and products, of maps and of constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from thrifty.errors import LoweringError
from thrifty.lowering.call import Call, Rule
from thrifty.lowering.gating import gated
from thrifty.lowering.nodes import Node
from thrifty.lowering.values import IMAGES, ZERO, Scale, Value, squeezed, wrapped


def activation(kind: str, fills_zeros: bool = False) -> Rule:
    """The rule for an activation without settings."""

    def rule(call: Call) -> Value:
        return _activated(call, kind, fills_zeros)

    return rule


def _activated(call: Call, kind: str, fills_zeros: bool = False, **attributes: Any) -> Value:
    value = _compact(call, call.value(call.first()), fills_zeros)
    node = call.graph.add("activation", [value.node], value.node.shape, activation=kind, **attributes)
    return Value(node, value.shape, value.places)


def _compact(call: Call, value: Value, fills_zeros: bool) -> Value:
    """A value on a node that holds nothing else; an elementwise operation may then be done on the node as it stands."""
    found = call.resolver.whole(value)
    if found is None and fills_zeros and bool((value.index() == ZERO).any()):
        raise LoweringError("takes zeros that were put between values")
    return found or value


def leaky_relu(call: Call) -> Value:
    """x, or slope * x where x is negative."""
    return _activated(call, "leaky_relu", slope=float(call.get("negative_slope", 0.01)))


def gelu(call: Call) -> Value:
    """GELU, exact or by tanh."""
    return _activated(call, "gelu_tanh" if call.get("approximate", "none") == "tanh" else "gelu")


def clamp(call: Call) -> Value:
    """Limits that are those of ReLU or ReLU6."""
    low, high = (call.arguments.get(a, call.arguments.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low != 0 or high not in {None, 6, math.inf}:
        raise LoweringError(f"limits values to [{low}, {high}]; only [0, inf) and [0, 6] are supported")
    return _activated(call, "relu6" if high == 6 else "relu")


def affine(call: Call, x: Value, scale: Tensor | None, shift: Tensor | None) -> Value:
    """x * scale + shift, by constants that broadcast to x's shape and do not vary over the positions of a map."""
    x = _compact(call, x, shift is not None)
    channels = x.node.shape[0]
    tensors = {"scale": torch.ones(channels, dtype=torch.float64) if scale is None else _per_channel(x, scale)}
    if shift is not None:
        tensors["shift"] = _per_channel(x, shift)
    node = call.graph.add("affine", [x.node], x.node.shape, tensors)
    return Value(node, x.shape, x.places)


def _per_channel(x: Value, constant: Tensor) -> Tensor:
    """A constant that is combined with x, as one float64 number for each channel of its node."""
    channels = x.node.shape[0]
    constant = constant.detach().cpu().double()
    if constant.numel() == 1:
        return constant.reshape(1).expand(channels)
    if torch.broadcast_shapes(constant.shape, x.shape) != torch.Size(x.shape):
        raise LoweringError(f"repeats a map of shape {list(x.shape)} for a constant of {list(constant.shape)}")
    along_channels = constant.ndim == len(x.shape) and constant.shape[1] == constant.numel()
    if x.places is None and along_channels and x.shape[1] == channels == constant.numel():
        return constant.reshape(-1)
    if not x.permuted:
        raise LoweringError("combines moved values with a constant that is not a single number")
    spread = torch.empty(IMAGES * x.node.size, dtype=torch.float64)
    spread[x.index().reshape(-1)] = constant.expand(x.shape).reshape(-1)
    spread = spread.reshape(IMAGES, channels, -1)
    numbers = spread[0, :, 0]
    if not bool((spread == numbers[None, :, None]).all()):
        raise LoweringError("combines a map with a constant that varies over its positions; only per-channel ones are")
    return numbers.clone()


def numbers(argument: Any, factor: float = 1) -> Tensor:
    """A number or a constant tensor as float64."""
    if isinstance(argument, Tensor):
        return argument.detach().cpu().double() * factor
    if isinstance(argument, complex):
        raise LoweringError("computes with complex numbers")
    return torch.tensor(float(argument) * factor, dtype=torch.float64)


def add(call: Call) -> Value:
    """self + alpha * other."""
    return _sum(call, call.arguments["self"], call.arguments["other"], 1, call.get("alpha", 1))


def sub(call: Call) -> Value:
    """self - alpha * other."""
    return _sum(call, call.arguments["self"], call.arguments["other"], 1, -call.get("alpha", 1))


def rsub(call: Call) -> Value:
    """other - alpha * self."""
    return _sum(call, call.arguments["other"], call.arguments["self"], 1, -call.get("alpha", 1))


def _sum(call: Call, left: Any, right: Any, sign: float, factor: float) -> Value:
    """left * sign + right * factor, of which one at least depends on the input."""
    left_known, right_known = call.known(left), call.known(right)
    if right_known is None:
        scale = None if sign == 1 else numbers(sign)
        return affine(call, call.value(left), scale, numbers(right, factor))
    if left_known is None:
        return _sum(call, right, left, factor, sign)
    a, b = call.value(left), call.value(right)
    if factor != 1:
        b = affine(call, b, numbers(factor), None)
    return _combined(call, "add", a, b)


def mul(call: Call) -> Value:
    """A product, also that with the scale of a gate."""
    left, right = call.arguments["self"], call.arguments["other"]
    left_known, right_known = call.known(left), call.known(right)
    if isinstance(left_known, Scale):
        left, right, left_known, right_known = right, left, right_known, left_known
    if isinstance(right_known, Scale):
        return gated(call, call.value(left), right_known)
    if right_known is None:
        return affine(call, call.value(left), numbers(right), None)
    if left_known is None:
        return affine(call, call.value(right), numbers(left), None)
    return _combined(call, "mul", call.value(left), call.value(right))


def square(call: Call) -> Value:
    """x * x."""
    x = call.value(call.first())
    return _combined(call, "mul", x, x)


def power(call: Call) -> Value:
    """Squares."""
    if call.arguments["exponent"] != 2:
        raise LoweringError(f"raises to the power {call.arguments['exponent']}; only squares are supported")
    return square(call)


def neg(call: Call) -> Value:
    """-x."""
    return affine(call, call.value(call.first()), numbers(-1), None)


def div(call: Call) -> Value:
    """Division by a constant."""
    divisor = call.arguments["other"]
    if call.known(divisor) is not None or call.get("rounding_mode"):
        raise LoweringError("divides by values that depend on the input, or rounds")
    return affine(call, call.value(call.arguments["self"]), 1 / numbers(divisor), None)


def _combined(call: Call, kind: str, a: Value, b: Value) -> Value:
    """The sum or product of two values."""
    if a.shape == b.shape == tuple(call.output.shape) and a.node.shape == b.node.shape and a.permuted:
        same = a.in_order and b.in_order
        if same or bool((a.index() == b.index()).all()):
            return Value(call.graph.add(kind, [a.node, b.node], a.node.shape), a.shape, a.places)
    shape = tuple(call.output.shape)
    if len(shape) == 2:
        return _broadcast(call, kind, a, b, 1)
    try:
        return _broadcast(call, kind, a, b, 1)
    except LoweringError as error:
        try:
            return _broadcast(call, kind, a, b, -1)
        except LoweringError:
            raise error from None


def _broadcast(call: Call, kind: str, a: Value, b: Value, axis: int) -> Value:
    """Two maps of which one may be the same over the positions, or, in a product, over the channels."""
    shape = tuple(call.output.shape)
    left, right = (_operand(call, value, axis, len(shape)) for value in (a, b))
    if left.size < right.size:
        left, right = right, left
    channels, height, width = left.shape
    allowed = {(channels, height, width), (channels, 1, 1)}
    if kind == "mul":
        allowed.add((1, height, width))
    expected = (shape[axis], math.prod(shape) // shape[0] // shape[axis])
    if right.shape not in allowed or (channels, left.positions) != expected:
        raise LoweringError(f"combines maps of {list(left.shape)} and {list(right.shape)} channels and positions")
    return wrapped(call.graph.add(kind, [left, right], left.shape), shape, axis)


def _operand(call: Call, value: Value, axis: int, rank: int) -> Node:
    if len(value.shape) != rank or value.shape[0] != IMAGES:
        raise LoweringError(f"combines tensors of different ranks, one of shape {list(value.shape)}")
    if rank == 4 and axis == -1:  # channels last: as a map, then back
        index = value.index().permute(0, 3, 1, 2)
        value = Value(value.node, tuple(index.shape), index)
    if rank == 4:
        return call.resolver.map(squeezed(value))
    return call.resolver.along(value, axis)
