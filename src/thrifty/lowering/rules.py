"""From torch's operations to nodes: one small function for each kind of operation.

A rule takes a call and returns the value of its output, or a list of values where there are several outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thrifty.errors import LoweringError
from thrifty.lowering.nodes import Graph, Node
from thrifty.lowering.values import IMAGES, ZERO, Refused, Resolver, Scale, Tracked, Value, squeezed, wrapped

aten = torch.ops.aten


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


# ------------------------------------------------------------------------------------------------------ weighted layers


def _convolution(call: Call) -> Value:
    weight, bias = call.constant("weight"), call.constant("bias")
    x = call.value(call.arguments["input"])
    if weight is None or weight.ndim != 4 or call.get("transposed", False):
        kind = (
            "a transposed" if call.get("transposed", False) else f"a {weight.ndim - 2 if weight is not None else 0}-d"
        )
        raise LoweringError(f"is {kind} convolution")
    vertical, horizontal = _pair(call.arguments["padding"])
    bias = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias
    node = call.graph.add(
        "conv",
        [call.resolver.map(x)],
        call.output.shape[1:],
        {"weight": weight, "bias": bias},
        stride=_pair(call.arguments["stride"]),
        padding=(vertical, vertical, horizontal, horizontal),
        dilation=_pair(call.arguments["dilation"]),
        groups=int(call.arguments["groups"]),
    )
    return wrapped(node, call.output.shape)


def _addmm(call: Call) -> Value:
    if call.get("beta", 1) != 1 or call.get("alpha", 1) != 1:
        raise LoweringError("scales its operands (alpha, beta)")
    return _product(call, call.arguments["mat1"], call.weight("mat2"), call.constant("self"))


def _mm(call: Call) -> Value:
    return _product(call, call.arguments["self"], call.weight("mat2"), None)


def _product(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Value:
    """x [rows, K] by weight [K, M]."""
    return _linear_node(call, call.resolver.rows(call.value(x)), weight.t(), bias)


def _linear(call: Call) -> Value:
    weight, x = call.weight("weight"), call.value(call.arguments["input"])
    return _linear_node(call, call.resolver.along(x, -1), weight, call.constant("bias"))


def _linear_node(call: Call, x: Node, weight: Tensor, bias: Tensor | None) -> Value:
    """weight [M, K] at every position of x; the output has its M features last."""
    outputs = len(weight)
    if bias is None:
        bias = torch.zeros(outputs, dtype=weight.dtype)
    if bias.numel() != outputs:
        if bias.numel() != 1:
            raise LoweringError(f"adds a constant of shape {list(bias.shape)} to {outputs} features")
        bias = bias.expand(outputs)
    tensors = {"weight": weight, "bias": bias.reshape(-1)}
    if x.positions == 1:
        node = call.graph.add("linear", [x], (outputs, 1, 1), tensors)
    else:
        tensors["weight"] = weight[:, :, None, None]
        ones, sides = (1, 1), (0, 0, 0, 0)
        shape = (outputs, *x.shape[1:])
        node = call.graph.add("conv", [x], shape, tensors, stride=ones, padding=sides, dilation=ones, groups=1)
    order = torch.arange(IMAGES * node.size).reshape(IMAGES, outputs, -1).transpose(1, 2)
    return Value(node, tuple(call.output.shape), order.reshape(call.output.shape))


def _batch_norm(call: Call) -> list[Tracked]:
    if call.get("training", False):
        raise LoweringError("normalises by the batch's own statistics; give the layer running statistics")
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (call.constant(name) for name in names)
    if mean is None or variance is None:
        raise LoweringError("normalises by the batch's own statistics; give the layer running statistics")
    scale = 1 / torch.sqrt(variance.double() + call.arguments["eps"])
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    shift = shift if bias is None else shift + bias.double()
    x = call.value(call.arguments["input"])
    shape = (1, -1, *[1] * (len(x.shape) - 2))
    y = _affine(call, x, scale.reshape(shape), shift.reshape(shape))
    return [y, Refused("statistics of a batch"), Refused("statistics of a batch")]


def _layer_norm(call: Call) -> list[Tracked]:
    weight, bias, x = call.constant("weight"), call.constant("bias"), call.value(call.arguments["input"])
    sizes = list(call.arguments["normalized_shape"])
    if len(sizes) != 1:
        raise LoweringError(f"normalises over {len(sizes)} dimensions {sizes}; only the channels (last) is supported")
    node = call.resolver.along(x, -1)
    tensors = {
        "weight": torch.ones(sizes) if weight is None else weight,
        "bias": torch.zeros(sizes) if bias is None else bias,
    }
    norm = call.graph.add("layer_norm", [node], node.shape, tensors, epsilon=float(call.arguments["eps"]))
    return [wrapped(norm, x.shape, -1), Refused("a mean of values"), Refused("a deviation of values")]


# ---------------------------------------------------------------------------------------------------------- elementwise


def _activation(kind: str, fills_zeros: bool = False) -> Rule:
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


def _leaky_relu(call: Call) -> Value:
    return _activated(call, "leaky_relu", slope=float(call.get("negative_slope", 0.01)))


def _gelu(call: Call) -> Value:
    return _activated(call, "gelu_tanh" if call.get("approximate", "none") == "tanh" else "gelu")


def _clamp(call: Call) -> Value:
    low, high = (call.arguments.get(a, call.arguments.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low != 0 or high not in {None, 6, math.inf}:
        raise LoweringError(f"limits values to [{low}, {high}]; only [0, inf) and [0, 6] are supported")
    return _activated(call, "relu6" if high == 6 else "relu")


def _affine(call: Call, x: Value, scale: Tensor | None, shift: Tensor | None) -> Value:
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


def _numbers(call: Call, argument: Any, factor: float = 1) -> Tensor:
    """A number or a constant tensor as float64."""
    if isinstance(argument, Tensor):
        return argument.detach().cpu().double() * factor
    if isinstance(argument, complex):
        raise LoweringError("computes with complex numbers")
    return torch.tensor(float(argument) * factor, dtype=torch.float64)


def _add(call: Call) -> Value:
    return _sum(call, call.arguments["self"], call.arguments["other"], 1, call.get("alpha", 1))


def _sub(call: Call) -> Value:
    return _sum(call, call.arguments["self"], call.arguments["other"], 1, -call.get("alpha", 1))


def _rsub(call: Call) -> Value:
    return _sum(call, call.arguments["other"], call.arguments["self"], 1, -call.get("alpha", 1))


def _sum(call: Call, left: Any, right: Any, sign: float, factor: float) -> Value:
    """left * sign + right * factor, of which one at least depends on the input."""
    left_known, right_known = call.known(left), call.known(right)
    if right_known is None:
        scale = None if sign == 1 else _numbers(call, sign)
        return _affine(call, call.value(left), scale, _numbers(call, right, factor))
    if left_known is None:
        return _sum(call, right, left, factor, sign)
    a, b = call.value(left), call.value(right)
    if factor != 1:
        b = _affine(call, b, _numbers(call, factor), None)
    return _combined(call, "add", a, b)


def _mul(call: Call) -> Value:
    left, right = call.arguments["self"], call.arguments["other"]
    left_known, right_known = call.known(left), call.known(right)
    if isinstance(left_known, Scale):
        left, right, left_known, right_known = right, left, right_known, left_known
    if isinstance(right_known, Scale):
        return _gated(call, call.value(left), right_known)
    if right_known is None:
        return _affine(call, call.value(left), _numbers(call, right), None)
    if left_known is None:
        return _affine(call, call.value(right), _numbers(call, left), None)
    return _combined(call, "mul", call.value(left), call.value(right))


def _square(call: Call) -> Value:
    x = call.value(call.first())
    return _combined(call, "mul", x, x)


def _pow(call: Call) -> Value:
    if call.arguments["exponent"] != 2:
        raise LoweringError(f"raises to the power {call.arguments['exponent']}; only squares are supported")
    return _square(call)


def _neg(call: Call) -> Value:
    return _affine(call, call.value(call.first()), _numbers(call, -1), None)


def _div(call: Call) -> Value:
    divisor = call.arguments["other"]
    if call.known(divisor) is not None or call.get("rounding_mode"):
        raise LoweringError("divides by values that depend on the input, or rounds")
    return _affine(call, call.value(call.arguments["self"]), 1 / _numbers(call, divisor), None)


def _gated(call: Call, y: Value, scale: Scale) -> Value:
    """A map [N, C, H, W] times a gate's scale."""
    node = call.resolver.map(y)
    if tuple(scale.shape) != (IMAGES, node.shape[0], 1, 1):
        raise LoweringError(f"multiplies {list(y.shape)} with the scale of the gate {scale.name} as {scale.shape}")
    try:
        lowered = scale.gate.lower()
    except LoweringError as error:
        raise LoweringError(f"is gated by {scale.name}, which cannot be lowered: {error}") from error
    tensors = {f"gate_{role}": tensor for role, tensor in lowered.tensors.items()}
    reads = call.resolver.map(scale.x)
    gate = call.graph.add("gate", [node, reads], node.shape, tensors, gate=lowered.kind, **lowered.attributes)
    return wrapped(gate, y.shape)


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


# ------------------------------------------------------------------------------------------------------------- movement


def _moved(call: Call) -> Any:
    """Elements are moved: their places move alike."""
    known = call.known(call.first())
    others = [name for name, argument in list(call.arguments.items())[1:] if _depends(call, argument)]
    if others:
        raise LoweringError(f"is told by values ({', '.join(others)}) what to move")
    if isinstance(known, Scale):
        return Scale(known.gate, known.name, known.x, tuple(call.output.shape))
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


def _reshaped(call: Call) -> Tracked:
    """The same elements in the same order, in another shape."""
    known = call.known(call.first())
    shape = tuple(call.output.shape)
    if isinstance(known, Scale):
        return Scale(known.gate, known.name, known.x, shape)
    value = call.value(call.first())
    if math.prod(shape) != math.prod(value.shape):
        raise LoweringError(f"reads {list(value.shape)} as {list(shape)}")
    return Value(value.node, shape, None if value.places is None else value.places.reshape(shape))


def _restrided(call: Call) -> Value:
    """Other strides for the same values, as pooling to one position sets them."""
    value, output = call.value(call.first()), call.output
    order = torch.arange(output.numel()).as_strided(output.shape, output.stride(), output.storage_offset())
    if tuple(output.shape) != value.shape or not value.in_order or bool((order.flatten().diff() != 1).any()):
        raise LoweringError("reads memory by strides")
    return value


def _same(call: Call) -> Tracked:
    known = call.known(call.first())
    if not call.output.is_floating_point():
        raise LoweringError(f"turns values into {call.output.dtype}")
    if known is None:
        raise LoweringError("takes a constant")
    return known


def _identity_if_same_size(call: Call) -> Tracked:
    value = call.value(call.first())
    if tuple(call.output.shape) != value.shape:
        raise LoweringError(f"resizes a map from {list(value.shape[2:])} to {list(call.output.shape[2:])}")
    return value


def _padded(call: Call) -> Value:
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


def _concatenated(call: Call) -> Value:
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


# -------------------------------------------------------------------------------------------------------------- pooling


def _max_pool(call: Call) -> Any:
    kernel = _pair(call.arguments["kernel_size"])
    vertical, horizontal = _pair(call.get("padding", 0))
    node = call.graph.add(
        "max_pool",
        [_pooled_map(call)],
        _first_output(call).shape[1:],
        kernel=kernel,
        stride=_pair(call.arguments.get("stride") or kernel),
        padding=(vertical, vertical, horizontal, horizontal),
        dilation=_pair(call.get("dilation", 1)),
    )
    return _with_indices(call, node)


def _avg_pool(call: Call) -> Any:
    kernel = _pair(call.arguments["kernel_size"])
    vertical, horizontal = _pair(call.get("padding", 0))
    node = call.graph.add(
        "avg_pool",
        [_pooled_map(call)],
        _first_output(call).shape[1:],
        kernel=kernel,
        stride=_pair(call.arguments.get("stride") or kernel),
        padding=(vertical, vertical, horizontal, horizontal),
        count_include_pad=int(call.get("count_include_pad", True)),
        divisor=int(call.get("divisor_override", 0)),
    )
    return _with_indices(call, node)


def _adaptive(kind: str) -> Rule:
    def rule(call: Call) -> Any:
        x = _pooled_map(call)
        shape = tuple(_first_output(call).shape[1:])
        return _with_indices(call, x if x.shape == shape else call.graph.add(kind, [x], shape))

    return rule


def _pooled_map(call: Call) -> Node:
    x = call.value(call.first())
    if len(x.shape) != 4:
        raise LoweringError(f"pools a tensor of shape {list(x.shape)}; only [N, C, H, W] is supported")
    return call.resolver.map(x)


def _first_output(call: Call) -> Tensor:
    output: Tensor = call.output[0] if isinstance(call.output, tuple) else call.output
    return output


def _with_indices(call: Call, node: Node) -> Any:
    value = wrapped(node, _first_output(call).shape)
    return [value, Refused("indices of maxima")] if isinstance(call.output, tuple) else value


def _reduced(kind: str, total: bool = False) -> Rule:
    """Mean, sum or maximum over positions."""

    def rule(call: Call) -> Value:
        x = call.value(call.first())
        given = call.arguments.get("dim")
        given = [given] if isinstance(given, int) else given
        rank = len(x.shape)
        dims = sorted(dim % rank for dim in (given if given else range(rank)))
        if 0 in dims or x.shape[0] != IMAGES:
            raise LoweringError("mixes the images of a batch")
        node, count = _over(call, x, dims, kind)
        kept = [1 if i in dims else size for i, size in enumerate(x.shape)]
        value = wrapped(node, tuple(kept))
        if total:
            value = _affine(call, value, _numbers(call, count), None)
        return Value(value.node, tuple(call.output.shape))

    return rule


def _over(call: Call, x: Value, dims: list[int], kind: str) -> tuple[Node, int]:
    """The node that pools over `dims` of x, and how many values it pools."""
    count = math.prod(x.shape[dim] for dim in dims)
    others = [dim for dim in range(1, len(x.shape)) if dim not in dims]
    if len(x.shape) == 4 and dims in ([2], [3]):
        node = call.resolver.map(x)
        channels, height, width = node.shape
        return call.graph.add(kind, [node], (channels, *((1, width) if dims == [2] else (height, 1)))), count
    index = x.index().permute(0, *others, *dims).reshape(IMAGES, -1, count)
    index = index.sort(2).values  # the order of positions does not matter
    node = call.resolver.along(Value(x.node, tuple(index.shape), index), 1)
    if node.positions != count:
        raise LoweringError(f"reduces dimensions {dims} of {list(x.shape)}; only the positions of a map are supported")
    return node if count == 1 else call.graph.add(kind, [node], (node.shape[0], 1, 1)), count


def _pair(values: Any) -> tuple[int, int]:
    if isinstance(values, int):
        return values, values
    numbers = [int(value) for value in values]
    return (numbers[0], numbers[-1])


# ---------------------------------------------------------------------------------------------------------------- table


def _value_dependent(_call: Call) -> None:
    raise LoweringError("reads a value that depends on the input: which way the network goes must not depend on values")


def _constant(_call: Call) -> None:
    """The output depends on the input's shape only."""


def _table() -> dict[Any, Rule]:
    groups: dict[Rule, str] = {
        _convolution: "convolution",
        _linear: "linear",
        _addmm: "addmm",
        _mm: "mm",
        _batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm",
        _layer_norm: "native_layer_norm",
        _activation("relu"): "relu relu_",
        _activation("silu"): "silu silu_",
        _activation("hardswish"): "hardswish hardswish_",
        _activation("sigmoid", True): "sigmoid sigmoid_",
        _activation("hardsigmoid", True): "hardsigmoid hardsigmoid_",
        _activation("tanh"): "tanh tanh_",
        _leaky_relu: "leaky_relu leaky_relu_",
        _gelu: "gelu gelu_",
        _clamp: "clamp clamp_ clamp_min clamp_min_ hardtanh hardtanh_",
        _add: "add add_",
        _sub: "sub sub_",
        _rsub: "rsub",
        _mul: "mul mul_",
        _div: "div div_",
        _neg: "neg neg_",
        _square: "square square_",
        _pow: "pow",
        _concatenated: "cat stack",
        _padded: "constant_pad_nd",
        _max_pool: "max_pool2d max_pool2d_with_indices",
        _avg_pool: "avg_pool2d",
        _adaptive("adaptive_avg_pool"): "_adaptive_avg_pool2d adaptive_avg_pool2d",
        _adaptive("adaptive_max_pool"): "adaptive_max_pool2d",
        _reduced("adaptive_avg_pool"): "mean",
        _reduced("adaptive_avg_pool", True): "sum",
        _reduced("adaptive_max_pool"): "amax",
        _same: "clone detach alias contiguous _to_copy lift_fresh dropout dropout_ feature_dropout",
        _restrided: "as_strided_",
        _reshaped: "view _unsafe_view reshape _reshape_alias flatten unflatten squeeze unsqueeze squeeze_ unsqueeze_",
        _moved: "permute transpose t slice select split split_with_sizes unsafe_split unsafe_split_with_sizes chunk "
        "unsafe_chunk unbind expand repeat index_select index channel_shuffle native_channel_shuffle flip roll "
        "pixel_shuffle pixel_unshuffle",
        _identity_if_same_size: "upsample_nearest2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d",
        _constant: "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty sym_size",
        _value_dependent: "_local_scalar_dense item is_nonzero nonzero equal",
    }
    return {
        getattr(aten, name): rule for rule, names in groups.items() for name in names.split() if hasattr(aten, name)
    }


RULES = _table()
"""Operation -> rule."""

SUPPORTED = (
    "conv2d, linear, batch_norm in evaluation mode, layer_norm over channels, relu, relu6, leaky_relu, silu, gelu, "
    "hardswish, sigmoid, hardsigmoid, tanh, add, sub, mul, division by constants, cat, stack, max_pool2d, avg_pool2d, "
    "adaptive pooling, mean, sum and amax over positions, zero padding, flatten, dropout, and views, slices, "
    "permutations and shuffles of channels"
)
"""What networks may be made of, for messages."""
