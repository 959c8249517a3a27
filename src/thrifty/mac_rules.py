"""What each operation costs and which of its outputs are active: the rules of the MAC counter, and the table of them.

An activity is a bool tensor of the shape of the values that it is of: false where a gate left a value out, and where a
value is zero because of that. None: all are active.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclass
class Call:
    """One operation, with what is known of its arguments' activity.

    Attributes:
        func, args, kwargs, output: the operation and what it returned.
        activity: that of an argument.
        count: inputs in the batch.
        computed: output channels that a gate lets a convolution compute, bool [N, C]; None: all.
        by_columns: whether a gate decides which positions a convolution reads.
        macs: int64 [count], set by the rule of an operation that costs some.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    activity: Callable[[Any], Tensor | None]
    count: int
    computed: Tensor | None = None
    by_columns: bool = False
    macs: Tensor | None = None


def _convolution(call: Call) -> None:
    x, weight, *_ = call.args
    transposed, groups = call.args[6], call.args[8]
    y = call.output
    positions = x[0, 0].numel() if transposed else y[0, 0].numel()
    inputs = _per_group(_channels(call.activity(x)), len(x), x.shape[1], groups)
    outputs = _per_group(call.computed, len(x), y.shape[1], groups)
    products: Any = weight[0, 0].numel() * positions
    active = call.activity(x)
    if call.by_columns and active is not None:
        products = _products(active.any(1), weight, *call.args[3:6])
    by_group = inputs * outputs
    if len(x) == 1 and groups % call.count == 0:  # filters of each input's own, in groups of one row
        by_group = by_group.reshape(call.count, -1)
    call.macs = per_input(products * by_group.sum(1), call.count)


def _products(columns: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Pairs of a tap and an output position that read a kept position of the map, int64 [N] from bool [N, H, W]."""
    kept, taps = columns[:, None].double(), torch.ones_like(weight[:1, :1], dtype=torch.float64)
    return F.conv2d(kept, taps, None, stride, padding, dilation).sum((1, 2, 3)).round().long().cpu()


def _per_group(channels: Tensor | None, count: int, total: int, groups: int) -> Tensor:
    """Active channels of each group, int64 [count, groups], from bool [count, total]."""
    if channels is None:
        return torch.full((count, groups), total // groups, dtype=torch.int64)
    return channels.reshape(len(channels), groups, -1).sum(2).cpu()


def per_input(costs: Tensor, count: int) -> Tensor:
    """MACs int64 [count] from those of each row of an operand, whose outermost dimension is the batch.

    Several rows may belong to an input (frames or windows folded into the batch). Where rows cannot be shared out among
    the inputs, the work does not depend on the batch (weights made from weights) and is a cost of each.
    """
    costs = costs.reshape(-1)
    if costs.numel() % count:
        return costs.sum().expand(count)
    return costs.reshape(count, -1).sum(1)


def _channels(activity: Tensor | None) -> Tensor | None:
    """Channels [N, C] that have an active position."""
    return None if activity is None else activity.flatten(2).any(2) if activity.ndim > 2 else activity


def at_every_position(channels: Tensor, like: Tensor) -> Tensor:
    """Active channels [N, C] as the activity of a map of the shape of `like` [N, C, …], the same at every position."""
    return channels.reshape(*channels.shape, *[1] * (like.ndim - 2)).expand(like.shape)


def _matrix_product(x_place: int, weight_place: int) -> Callable[[Call], None]:
    """x [rows, K] by weight [K, M]; the rows of an input stand together, for the batch is the outermost dimension."""

    def rule(call: Call) -> None:
        x, weight = call.args[x_place], call.args[weight_place]
        call.macs = per_input(_active_in_rows(call, x) * weight.shape[-1], call.count)

    return rule


def _active_in_rows(call: Call, x: Tensor) -> Tensor:
    """Active values in each row of x [..., K]: int64 [...]."""
    active = call.activity(x)
    return torch.full(x.shape[:-1], x.shape[-1], dtype=torch.int64) if active is None else active.sum(-1).cpu()


def _linear(call: Call) -> None:
    x, weight = call.args[:2]
    call.macs = per_input(_active_in_rows(call, x) * weight.shape[0], call.count)


def _attention(call: Call) -> None:
    query, key, value = call.args[:3]
    rows = query.shape[:-1].numel() * key.shape[-2]
    call.macs = torch.full((call.count,), rows * (query.shape[-1] + value.shape[-1]) // call.count)


def everything(call: Call) -> None:
    """The output is active everywhere, and making it costs no MACs."""


def same(call: Call) -> Tensor | None:
    """Zero in, zero out, at the same place."""
    return call.activity(call.args[0])


def _moved(call: Call) -> Any:
    """Values are moved: their activity moves alike."""
    active = call.activity(call.args[0])
    if active is None:
        return None
    rest = call.args[1:]
    try:
        return call.func(active, *rest, **call.kwargs)
    except RuntimeError:  # a view that the activity's strides don't allow
        return call.func(active.contiguous(), *rest, **call.kwargs)


def _reshaped(call: Call) -> Tensor | None:
    """The same values in the same order, in another shape."""
    active = call.activity(call.args[0])
    if active is None or active.numel() != call.output.numel():
        return None
    return active.reshape(call.output.shape)


def _restrided(call: Call) -> Tensor | None:
    """Other strides: what is where can be told only if the shape stays."""
    return same(call) if call.output.shape == call.args[0].shape else None


def _padded(call: Call) -> Tensor | None:
    value = call.args[2] if len(call.args) > 2 else call.kwargs.get("value", 0)
    active = call.activity(call.args[0])
    if active is None:
        active = torch.ones(call.args[0].shape, dtype=torch.bool, device=call.args[0].device)
        if not any(size > 0 for size in call.args[1]):
            return None
    border = value not in (0, -math.inf)  # -inf is for maxima, which it never is
    return aten.constant_pad_nd(active, call.args[1], border)


def _power(call: Call) -> Tensor | None:
    exponent = call.args[1]
    return same(call) if isinstance(exponent, (int, float)) and exponent > 0 else None


def _joined_channels(call: Call) -> Tensor | None:
    parts = call.args[0]
    activities = [call.activity(part) for part in parts]
    if all(active is None for active in activities):
        return None
    filled = [
        torch.ones(part.shape, dtype=torch.bool, device=part.device) if active is None else active
        for part, active in zip(parts, activities, strict=True)
    ]
    return call.func(filled, *call.args[1:], **call.kwargs)


def _union(call: Call) -> Tensor | None:
    """A sum is active where either operand is."""
    left, right = (call.activity(value) for value in call.args[:2])
    if left is None or right is None or not _is_map(call.args[1]):
        return None
    return (left | right).expand(call.output.shape)


def _intersection(call: Call) -> Tensor | None:
    """A product is active where both operands are."""
    left, right = (call.activity(value) for value in call.args[:2])
    if left is None and right is None:
        return None
    if left is None or right is None:
        kept = left if right is None else right
        return kept.expand(call.output.shape) if kept is not None else None
    return (left & right).expand(call.output.shape)


def _quotient(call: Call) -> Tensor | None:
    active = call.activity(call.args[0])
    return None if active is None else active.expand(call.output.shape)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _reduced(call: Call) -> Tensor | None:
    """Mean, sum or maximum over dimensions: active where any of the values is."""
    active = call.activity(call.args[0])
    if active is None:
        return None
    dims = call.args[1] if len(call.args) > 1 and call.args[1] is not None else list(range(active.ndim))
    dims = [dims] if isinstance(dims, int) else list(dims)
    keep = call.args[2] if len(call.args) > 2 else call.kwargs.get("keepdim", False)
    for dim in sorted((d % active.ndim for d in dims), reverse=True):
        active = active.any(dim, keepdim=bool(keep))
    return active


def _pooled(call: Call) -> Tensor | None:
    """Pooling: a channel without any active position stays so; in the others every position is taken as active."""
    output = call.output[0] if isinstance(call.output, tuple) else call.output
    channels = _channels(call.activity(call.args[0]))
    if channels is None:
        return None
    active = at_every_position(channels, output)
    return active if output is call.output else [active, active]  # type: ignore[return-value]


def _mirrored(call: Call) -> Tensor | None:
    """Padding with the tensor's own values: their activity is moved alike."""
    active = call.activity(call.args[0])
    return None if active is None else call.func(active.float(), *call.args[1:], **call.kwargs) > 0


def _added_product(call: Call) -> Tensor | None:
    """base + first * second."""
    base, first, second = (call.activity(value) for value in call.args[:3])
    if base is None or (first is None and second is None):
        return None
    products = [factor for factor in (first, second) if factor is not None]
    product = products[0] if len(products) == 1 else products[0] & products[1]
    return (base | product).expand(call.output.shape)


def _clamped(call: Call) -> Tensor | None:
    limits = dict(zip(("min", "max"), call.args[1:3], strict=False)) | call.kwargs
    low, high = limits.get("min"), limits.get("max")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    zero_stays = (low is None or low <= 0) and (high is None or high >= 0)
    return same(call) if zero_stays else None


def _hard_tanh(call: Call) -> Tensor | None:
    low = call.args[1] if len(call.args) > 1 else -1
    high = call.args[2] if len(call.args) > 2 else 1
    return same(call) if low <= 0 <= high else None


def _clamped_below(call: Call) -> Tensor | None:
    low = call.args[1] if len(call.args) > 1 else call.kwargs.get("min")
    return same(call) if isinstance(low, (int, float)) and low <= 0 else None


def _table() -> dict[Any, Callable[[Call], Any]]:
    rules: dict[Any, Callable[[Call], Any]] = {
        aten.convolution: _convolution,
        aten.addmm: _matrix_product(1, 2),
        aten.mm: _matrix_product(0, 1),
        aten.bmm: _matrix_product(0, 1),
        aten.baddbmm: _matrix_product(1, 2),
        aten.linear: _linear,
        aten.scaled_dot_product_attention: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention: _attention,
        aten._scaled_dot_product_efficient_attention: _attention,
        aten.constant_pad_nd: _padded,
        aten.cat: _joined_channels,
        aten.stack: _joined_channels,
        aten.div: _quotient,
        aten.div_: _quotient,
        aten.clamp: _clamped,
        aten.clamp_: _clamped,
        aten.clamp_min: _clamped_below,
        aten.clamp_min_: _clamped_below,
        aten.hardtanh: _hard_tanh,
        aten.hardtanh_: _hard_tanh,
        aten.addcmul: _added_product,
        aten.pow: _power,
        aten.as_strided: _restrided,
        aten.as_strided_: _restrided,
    }
    groups: dict[Callable[[Call], Any], str] = {
        same: "relu relu_ leaky_relu leaky_relu_ silu silu_ gelu hardswish hardswish_ elu elu_ celu "
        "mish mish_ tanh tanh_ prelu _prelu_kernel neg abs sqrt native_dropout dropout alias detach clone contiguous "
        "_to_copy lift_fresh lift_fresh_copy square",
        _reshaped: "view _unsafe_view reshape _reshape_alias flatten unflatten",
        _moved: "permute transpose t slice select split split_with_sizes chunk unbind expand repeat unsqueeze squeeze "
        "flip roll index index_select gather channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle "
        "unfold movedim swapaxes",
        _mirrored: "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
        _union: "add add_ sub sub_ maximum minimum",
        _intersection: "mul mul_",
        _reduced: "mean sum amax amin max",
        _pooled: "max_pool2d max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d "
        "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d",
        everything: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
        "batch_norm instance_norm native_layer_norm native_group_norm sigmoid sigmoid_ hardsigmoid hardsigmoid_ exp "
        "softplus _softmax softmax _log_softmax log rsqrt reciprocal var_mean var std std_mean zeros ones full eye "
        "empty zeros_like ones_like full_like empty_like new_zeros new_ones arange eq ne lt le gt ge logical_not "
        "argmax where sort topk copy_ fill_ zero_ rand rand_like randn bernoulli bernoulli_ _local_scalar_dense "
        "scalar_tensor sin cos erf linspace meshgrid im2col col2im scatter cumsum rsub sym_size "
        "floor_divide remainder "
        "masked_fill native_dropout_backward logical_and logical_or bitwise_not "
        "bitwise_and bitwise_or linalg_vector_norm norm isfinite all any item",
    }
    for rule, names in groups.items():
        for name in names.split():
            if hasattr(aten, name):
                rules[getattr(aten, name)] = rule
    return rules


RULES = _table()
