"""Rules for convolutions, linear layers and normalisations."""

from __future__ import annotations

import torch
from torch import Tensor

from thrifty.errors import LoweringError
from thrifty.lowering.call import Call, pair
from thrifty.lowering.nodes import Node
from thrifty.lowering.pointwise import affine
from thrifty.lowering.values import IMAGES, Refused, Tracked, Value, wrapped


def convolution(call: Call) -> Value:
    """A 2-d convolution with constant weights."""
    weight, bias = call.constant("weight"), call.constant("bias")
    x = call.value(call.arguments["input"])
    if weight is None or weight.ndim != 4 or call.get("transposed", False):
        kind = (
            "a transposed" if call.get("transposed", False) else f"a {weight.ndim - 2 if weight is not None else 0}-d"
        )
        raise LoweringError(f"is {kind} convolution")
    vertical, horizontal = pair(call.arguments["padding"])
    bias = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias
    node = call.graph.add(
        "conv",
        [call.resolver.map(x)],
        call.output.shape[1:],
        {"weight": weight, "bias": bias},
        stride=pair(call.arguments["stride"]),
        padding=(vertical, vertical, horizontal, horizontal),
        dilation=pair(call.arguments["dilation"]),
        groups=int(call.arguments["groups"]),
    )
    return wrapped(node, call.output.shape)


def addmm(call: Call) -> Value:
    """bias + x @ weight."""
    if call.get("beta", 1) != 1 or call.get("alpha", 1) != 1:
        raise LoweringError("scales its operands (alpha, beta)")
    return _product(call, call.arguments["mat1"], call.weight("mat2"), call.constant("self"))


def mm(call: Call) -> Value:
    """x @ weight."""
    return _product(call, call.arguments["self"], call.weight("mat2"), None)


def _product(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Value:
    """x [rows, K] by weight [K, M]."""
    return _linear_node(call, call.resolver.rows(call.value(x)), weight.t(), bias)


def linear(call: Call) -> Value:
    """x @ weight.T + bias over the last dimension."""
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


def batch_norm(call: Call) -> list[Tracked]:
    """Normalisation by running statistics: an affine map."""
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
    y = affine(call, x, scale.reshape(shape), shift.reshape(shape))
    return [y, Refused("statistics of a batch"), Refused("statistics of a batch")]


def layer_norm(call: Call) -> list[Tracked]:
    """Normalisation over the last dimension, which must be the channels."""
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
