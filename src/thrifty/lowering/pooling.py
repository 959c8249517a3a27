"""Rules for pooling and for reductions over positions."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from thrifty.errors import LoweringError
from thrifty.lowering.call import Call, Rule, pair
from thrifty.lowering.nodes import Node
from thrifty.lowering.pointwise import affine, numbers
from thrifty.lowering.values import IMAGES, Refused, Value, wrapped


def max_pool(call: Call) -> Any:
    """Maximum over windows."""
    return _windows(call, "max_pool", dilation=pair(call.get("dilation", 1)))


def avg_pool(call: Call) -> Any:
    """Mean over windows."""
    padding = int(call.get("count_include_pad", True))
    return _windows(call, "avg_pool", count_include_pad=padding, divisor=int(call.get("divisor_override", 0)))


def _windows(call: Call, kind: str, **attributes: Any) -> Any:
    kernel = pair(call.arguments["kernel_size"])
    vertical, horizontal = pair(call.get("padding", 0))
    node = call.graph.add(
        kind,
        [_pooled_map(call)],
        _first_output(call).shape[1:],
        kernel=kernel,
        stride=pair(call.arguments.get("stride") or kernel),
        padding=(vertical, vertical, horizontal, horizontal),
        **attributes,
    )
    return _with_indices(call, node)


def adaptive(kind: str) -> Rule:
    """The rule for pooling to a given size."""

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


def reduced(kind: str, total: bool = False) -> Rule:
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
            value = affine(call, value, numbers(count), None)
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
