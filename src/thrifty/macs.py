"""Multiply-accumulates of convolutions and linear layers per input, as the decisions of each input leave them.

The model runs once, under a mode that sees every tensor operation. Beside each tensor goes its activity: which of its
values a gate left in place (None where all are). Operations that move values move the activity with them, sums unite
it, products intersect it, and a convolution costs, for each input and group, taps x positions x active inputs x
computed outputs. Where a gate prunes the positions that a convolution reads, the products of taps with kept positions
count instead of taps x positions, and layers that a layer gate skips cost nothing. An operation that mixes values and
is not in the table is warned about and makes everything active.

How it counts, and where that differs from other counters, is told in the README under 'How MACs are counted'.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from thrifty.decision import Decision
from thrifty.dynamic import evaluating, hooked
from thrifty.errors import ThriftyError
from thrifty.gates import Gate, GatedConv, InputGate, LayerExit, LayerGate, MaskedConv, layer_names

aten = torch.ops.aten


@dataclass(frozen=True)
class MacCount:
    """MACs of N inputs.

    Attributes:
        total: int64 [N], of all layers and gates.
        layers: int64 [N] for each convolution and linear layer, by name, in the order of execution.
        gates: int64 [N] for each gate, by name of the layer or block that it gates.
    """

    total: Tensor
    layers: dict[str, Tensor]
    gates: dict[str, Tensor]

    @property
    def mean(self) -> float:
        """Mean MACs of an input."""
        return self.total.double().mean().item()

    def percentile(self, share: float) -> float:
        """MACs that `share` percent of the inputs stay under, linearly interpolated."""
        return torch.quantile(self.total.double(), share / 100).item()

    @property
    def gate_overhead(self) -> Tensor:
        """int64 [N]: MACs of all gates, which `total` includes."""
        return torch.stack(list(self.gates.values())).sum(0) if self.gates else torch.zeros_like(self.total)

    def __str__(self) -> str:
        return (
            f"{self.mean / 1e6:,.2f} M MACs per input (5th to 95th percentile {self.percentile(5) / 1e6:,.2f} to "
            f"{self.percentile(95) / 1e6:,.2f} M, gates {self.gate_overhead.double().mean().item() / 1e6:,.2f} M)"
        )


def count_macs(model: nn.Module, inputs: Tensor | Iterable[Any]) -> MacCount:
    """Count the MACs of a dense or dynamic model, in evaluation mode, for each input by itself.

    Args:
        model: any module that takes a batch as its one argument; it need not be traceable.
        inputs: a batch [N, …], or a loader of batches or of (batch, labels) pairs.

    Raises:
        ThriftyError: there is no input.
    """
    batches = [inputs] if isinstance(inputs, Tensor) else inputs
    counts = [_count_batch(model, batch if isinstance(batch, Tensor) else batch[0]) for batch in batches]
    if not counts or not sum(len(count.total) for count in counts):
        raise ThriftyError("there are no inputs to count MACs for. Give at least one.")
    return MacCount(
        torch.cat([count.total for count in counts]), *(_joined(counts, part) for part in ("layers", "gates"))
    )


def _joined(counts: list[MacCount], part: str) -> dict[str, Tensor]:
    names = dict.fromkeys(name for count in counts for name in getattr(count, part))
    return {
        name: torch.cat([getattr(count, part).get(name, torch.zeros_like(count.total)) for count in counts])
        for name in names
    }


def _count_batch(model: nn.Module, x: Tensor) -> MacCount:
    counter = _Counter(len(x))
    handles = []
    names = layer_names(model)
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(counter.entering(names[path]), prepend=True))
        handles.append(module.register_forward_hook(counter.leaving, always_call=True))
    with hooked(handles), evaluating(model), counter:
        model(x)
    counter.skip_layers()
    total = torch.zeros(len(x), dtype=torch.int64)
    for part in (*counter.layers.values(), *counter.gates.values()):
        total = total + part
    return MacCount(total, counter.layers, counter.gates)


@dataclass
class _Frame:
    """A module that is being executed."""

    name: str
    module: nn.Module
    decision: Decision | None = None


@dataclass
class _Call:
    """One operation with what is known of its arguments' activity (None: everything is active)."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    activity: Callable[[Any], Tensor | None]
    count: int
    holder: _Frame | None
    macs: Tensor | None = field(default=None)

    @property
    def computed(self) -> Tensor | None:
        """Output channels that a gate lets the convolution compute, bool [N, C]; None: all."""
        if self.holder is None or self.holder.decision is None or not isinstance(self.holder.module, GatedConv):
            return None
        return self.holder.decision.channels

    @property
    def by_columns(self) -> bool:
        """Whether a gate decides which positions the convolution reads."""
        return self.holder is not None and self.holder.decision is not None and self.holder.decision.columns is not None


class _Counter(TorchDispatchMode):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.layers: dict[str, Tensor] = {}
        self.gates: dict[str, Tensor] = {}
        self.blocks: list[tuple[LayerGate, Tensor]] = []
        self.active = WeakTensorKeyDictionary()
        self.frames: list[_Frame] = []
        self.warned: set[str] = set()

    def entering(self, name: str) -> Any:
        def hook(module: nn.Module, _inputs: object) -> None:
            self.frames.append(_Frame(name, module))

        return hook

    def leaving(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        frame = self.frames.pop()
        if output is None:
            return
        if isinstance(module, Gate):
            self._decided(module, inputs[0], output)
        elif isinstance(module, GatedConv) and frame.decision is not None:
            self.active[output] = _at_every_position(frame.decision.channels, output)
        elif isinstance(module, LayerExit):
            runs = self.blocks[-1][1].to(output.device).reshape(-1, *[1] * (output.ndim - 1))
            active = self.active.get(output)
            self.active[output] = runs.expand(output.shape) if active is None else active & runs

    def _decided(self, gate: Gate, x: Tensor, output: tuple[Any, ...]) -> None:
        """Note what a gate decided in the module that holds it, what that cost, and what it left of the map."""
        holder = self.frames[-1]
        holder.decision = decision = gate.decision(output)
        name = gate.block if isinstance(gate, LayerGate) else holder.name
        cost = _per_input(torch.full((len(x),), gate.overhead(x.shape), dtype=torch.int64), self.count)
        self.gates[name] = self.gates.get(name, 0) + cost
        if isinstance(gate, LayerGate):
            self.blocks.append((gate, decision.layer))
        elif isinstance(gate, InputGate):
            masks = [] if decision.channels is None else [_at_every_position(decision.channels, x)]
            masks += [] if decision.columns is None else [decision.columns[:, None].expand(x.shape)]
            active = self.active.get(x)
            for mask in masks:
                active = mask if active is None else active & mask
            if active is not None:
                self.active[output[0]] = active

    def skip_layers(self) -> None:
        """Take away what layers would have cost that a layer gate skipped."""
        for gate, runs in self.blocks:
            for part in (self.layers, self.gates):
                for name in set(gate.members) & set(part):
                    part[name] = part[name] * runs.cpu()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(isinstance(frame.module, Gate) for frame in self.frames):
            return output
        holder = next((f for f in reversed(self.frames) if isinstance(f.module, (GatedConv, MaskedConv))), None)
        call = _Call(func, args, kwargs or {}, output, self._activity, self.count, holder)
        rule = _RULES.get(func.overloadpacket)
        if rule is None:
            self._warn(func)
            rule = _everything
        activity = rule(call)  # the mode is off in here: what rules compute on activities is not counted
        if func._schema.is_mutable and rule is not _same:
            self._forget_views(output)
        if call.macs is not None:
            name = self._layer()
            self.layers[name] = self.layers.get(name, 0) + call.macs.cpu()
        if isinstance(output, Tensor):
            if activity is not None:
                self.active[output] = activity
            elif output in self.active:  # changed in place
                del self.active[output]
        elif isinstance(activity, (tuple, list)):
            for part, part_activity in zip(output, activity, strict=True):
                self.active[part] = part_activity
        return output

    def _layer(self) -> str:
        return self.frames[-1].name if self.frames else ""

    def _forget_views(self, changed: Any) -> None:
        """What shares its storage with a tensor that was written to has an activity that is no longer known."""
        if not isinstance(changed, Tensor):
            return
        storage = changed.untyped_storage()._cdata
        for tensor in [t for t in self.active if t.untyped_storage()._cdata == storage]:
            if tensor is not changed:
                del self.active[tensor]

    def _activity(self, value: Any) -> Tensor | None:
        return self.active.get(value) if isinstance(value, Tensor) else None

    def _warn(self, func: Any) -> None:
        name = str(func.overloadpacket)
        if name not in self.warned:
            self.warned.add(name)
            warnings.warn(
                f"count_macs does not know {name} and counts it as free, with all of its outputs active.", stacklevel=2
            )


# -------------------------------------------------------------------------- rules: from a call to the output's activity


def _convolution(call: _Call) -> None:
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
    call.macs = _per_input(products * (inputs * outputs).sum(1), call.count)


def _products(columns: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Pairs of a tap and an output position that read a kept position of the map, int64 [N] from bool [N, H, W]."""
    kept, taps = columns[:, None].double(), torch.ones_like(weight[:1, :1], dtype=torch.float64)
    return F.conv2d(kept, taps, None, stride, padding, dilation).sum((1, 2, 3)).round().long().cpu()


def _per_group(channels: Tensor | None, count: int, total: int, groups: int) -> Tensor:
    """Active channels of each group, int64 [count, groups], from bool [count, total]."""
    if channels is None:
        return torch.full((count, groups), total // groups, dtype=torch.int64)
    return channels.reshape(len(channels), groups, -1).sum(2).cpu()


def _per_input(costs: Tensor, count: int) -> Tensor:
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


def _at_every_position(channels: Tensor, like: Tensor) -> Tensor:
    """Active channels [N, C] as the activity of a map of the shape of `like` [N, C, …], the same at every position."""
    return channels.reshape(*channels.shape, *[1] * (like.ndim - 2)).expand(like.shape)


def _matrix_product(x_place: int, weight_place: int) -> Callable[[_Call], None]:
    """x [rows, K] by weight [K, M]; the rows of an input stand together, for the batch is the outermost dimension."""

    def rule(call: _Call) -> None:
        x, weight = call.args[x_place], call.args[weight_place]
        call.macs = _per_input(_active_in_rows(call, x) * weight.shape[-1], call.count)

    return rule


def _active_in_rows(call: _Call, x: Tensor) -> Tensor:
    """Active values in each row of x [..., K]: int64 [...]."""
    active = call.activity(x)
    return torch.full(x.shape[:-1], x.shape[-1], dtype=torch.int64) if active is None else active.sum(-1).cpu()


def _linear(call: _Call) -> None:
    x, weight = call.args[:2]
    call.macs = _per_input(_active_in_rows(call, x) * weight.shape[0], call.count)


def _attention(call: _Call) -> None:
    query, key, value = call.args[:3]
    rows = query.shape[:-1].numel() * key.shape[-2]
    call.macs = torch.full((call.count,), rows * (query.shape[-1] + value.shape[-1]) // call.count)


def _everything(call: _Call) -> None:
    """The output is active everywhere, and making it costs no MACs."""


def _same(call: _Call) -> Tensor | None:
    """Zero in, zero out, at the same place."""
    return call.activity(call.args[0])


def _moved(call: _Call) -> Any:
    """Values are moved: their activity moves alike."""
    active = call.activity(call.args[0])
    if active is None:
        return None
    rest = call.args[1:]
    try:
        return call.func(active, *rest, **call.kwargs)
    except RuntimeError:  # a view that the activity's strides don't allow
        return call.func(active.contiguous(), *rest, **call.kwargs)


def _reshaped(call: _Call) -> Tensor | None:
    """The same values in the same order, in another shape."""
    active = call.activity(call.args[0])
    if active is None or active.numel() != call.output.numel():
        return None
    return active.reshape(call.output.shape)


def _restrided(call: _Call) -> Tensor | None:
    """Other strides: what is where can be told only if the shape stays."""
    return _same(call) if call.output.shape == call.args[0].shape else None


def _padded(call: _Call) -> Tensor | None:
    value = call.args[2] if len(call.args) > 2 else call.kwargs.get("value", 0)
    active = call.activity(call.args[0])
    if active is None:
        active = torch.ones(call.args[0].shape, dtype=torch.bool, device=call.args[0].device)
        if not any(size > 0 for size in call.args[1]):
            return None
    return aten.constant_pad_nd(active, call.args[1], bool(value))


def _joined_channels(call: _Call) -> Tensor | None:
    parts = call.args[0]
    activities = [call.activity(part) for part in parts]
    if all(active is None for active in activities):
        return None
    filled = [
        torch.ones(part.shape, dtype=torch.bool, device=part.device) if active is None else active
        for part, active in zip(parts, activities, strict=True)
    ]
    return call.func(filled, *call.args[1:], **call.kwargs)


def _union(call: _Call) -> Tensor | None:
    """A sum is active where either operand is."""
    left, right = (call.activity(value) for value in call.args[:2])
    if left is None or right is None or not _is_map(call.args[1]):
        return None
    return (left | right).expand(call.output.shape)


def _intersection(call: _Call) -> Tensor | None:
    """A product is active where both operands are."""
    left, right = (call.activity(value) for value in call.args[:2])
    if left is None and right is None:
        return None
    if left is None or right is None:
        kept = left if right is None else right
        return kept.expand(call.output.shape) if kept is not None else None
    return (left & right).expand(call.output.shape)


def _quotient(call: _Call) -> Tensor | None:
    active = call.activity(call.args[0])
    return None if active is None else active.expand(call.output.shape)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _reduced(call: _Call) -> Tensor | None:
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


def _pooled(call: _Call) -> Tensor | None:
    """Pooling: a channel without any active position stays so; in the others every position is taken as active."""
    output = call.output[0] if isinstance(call.output, tuple) else call.output
    channels = _channels(call.activity(call.args[0]))
    if channels is None:
        return None
    active = _at_every_position(channels, output)
    return active if output is call.output else [active, active]  # type: ignore[return-value]


def _mirrored(call: _Call) -> Tensor | None:
    """Padding with the tensor's own values, behind the leading dimensions that the padding leaves alone."""
    channels = _channels(call.activity(call.args[0]))
    if channels is None:
        return None
    return _at_every_position(channels, call.output)


def _added_product(call: _Call) -> Tensor | None:
    """base + first * second."""
    base, first, second = (call.activity(value) for value in call.args[:3])
    if base is None or (first is None and second is None):
        return None
    products = [factor for factor in (first, second) if factor is not None]
    product = products[0] if len(products) == 1 else products[0] & products[1]
    return (base | product).expand(call.output.shape)


def _clamped(call: _Call) -> Tensor | None:
    limits = dict(zip(("min", "max"), call.args[1:3], strict=False)) | call.kwargs
    low, high = limits.get("min"), limits.get("max")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    zero_stays = (low is None or low <= 0) and (high is None or high >= 0)
    return _same(call) if zero_stays else None


def _hard_tanh(call: _Call) -> Tensor | None:
    low = call.args[1] if len(call.args) > 1 else -1
    high = call.args[2] if len(call.args) > 2 else 1
    return _same(call) if low <= 0 <= high else None


def _clamped_below(call: _Call) -> Tensor | None:
    low = call.args[1] if len(call.args) > 1 else call.kwargs.get("min")
    return _same(call) if isinstance(low, (int, float)) and low <= 0 else None


def _table() -> dict[Any, Callable[[_Call], Any]]:
    rules: dict[Any, Callable[[_Call], Any]] = {
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
        aten.as_strided: _restrided,
        aten.as_strided_: _restrided,
    }
    groups: dict[Callable[[_Call], Any], str] = {
        _same: "relu relu_ leaky_relu leaky_relu_ silu silu_ gelu hardswish hardswish_ elu elu_ celu "
        "mish mish_ tanh tanh_ prelu _prelu_kernel neg abs sqrt native_dropout dropout alias detach clone contiguous "
        "_to_copy lift_fresh lift_fresh_copy square",
        _reshaped: "view _unsafe_view reshape _reshape_alias flatten unflatten",
        _moved: "permute transpose t slice select split split_with_sizes chunk unbind expand repeat unsqueeze squeeze "
        "flip roll index_select channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle unfold movedim "
        "swapaxes",
        _mirrored: "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
        _union: "add add_ sub sub_ maximum minimum",
        _intersection: "mul mul_",
        _reduced: "mean sum amax amin max",
        _pooled: "max_pool2d max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d "
        "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d",
        _everything: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
        "batch_norm instance_norm native_layer_norm native_group_norm sigmoid sigmoid_ hardsigmoid hardsigmoid_ exp "
        "softplus _softmax softmax _log_softmax log rsqrt reciprocal pow var_mean var std std_mean zeros ones full eye "
        "empty zeros_like ones_like full_like empty_like new_zeros new_ones arange eq ne lt le gt ge logical_not "
        "argmax where sort topk copy_ fill_ zero_ rand rand_like randn bernoulli bernoulli_ _local_scalar_dense "
        "scalar_tensor sin cos erf linspace meshgrid im2col col2im index gather scatter cumsum rsub sym_size "
        "floor_divide remainder "
        "masked_fill native_dropout_backward logical_and logical_or bitwise_not "
        "bitwise_and bitwise_or linalg_vector_norm norm isfinite all any item",
    }
    for rule, names in groups.items():
        for name in names.split():
            if hasattr(aten, name):
                rules[getattr(aten, name)] = rule
    return rules


_RULES = _table()
