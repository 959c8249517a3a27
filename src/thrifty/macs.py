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
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from thrifty.decision import Decision
from thrifty.dynamic import evaluating, hooked
from thrifty.errors import ThriftyError
from thrifty.gates import Gate, GatedConv, InputGate, LayerExit, LayerGate, MaskedConv, layer_names
from thrifty.mac_rules import RULES, Call, at_every_position, everything, per_input, same


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
    counts = []
    for batch in [inputs] if isinstance(inputs, Tensor) else inputs:
        x = batch if isinstance(batch, Tensor) else batch[0]
        if not isinstance(x, Tensor):
            raise ThriftyError(f"inputs must be a batch or batches of torch tensors, not of {type(x).__name__}.")
        if len(x):
            counts.append(_count_batch(model, x))
    if not counts:
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
    with torch.inference_mode(False):
        x = x.detach().clone()  # the model may write to what it is given
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
            self.active[output] = at_every_position(frame.decision.channels, output)
        elif isinstance(module, LayerExit):
            runs = self.blocks[-1][1].to(output.device).reshape(-1, *[1] * (output.ndim - 1))
            active = self.active.get(output)
            self.active[output] = runs.expand(output.shape) if active is None else active & runs

    def _decided(self, gate: Gate, x: Tensor, output: tuple[Any, ...]) -> None:
        """Note what a gate decided in the module that holds it, what that cost, and what it left of the map."""
        holder = self.frames[-1]
        holder.decision = decision = gate.decision(output)
        name = gate.block if isinstance(gate, LayerGate) else holder.name
        cost = per_input(torch.full((len(x),), gate.overhead(x.shape), dtype=torch.int64), self.count)
        self.gates[name] = self.gates.get(name, 0) + cost
        if isinstance(gate, LayerGate):
            self.blocks.append((gate, decision.layer))
        elif isinstance(gate, InputGate):
            masks = [] if decision.channels is None else [at_every_position(decision.channels, x)]
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
        call = Call(func, args, kwargs or {}, output, self._activity, self.count)
        if holder is not None and holder.decision is not None:
            call.computed = holder.decision.channels if isinstance(holder.module, GatedConv) else None
            call.by_columns = holder.decision.columns is not None
        rule = RULES.get(func.overloadpacket)
        if rule is None:
            self._warn(func)
            rule = everything
        activity = rule(call)  # the mode is off in here: what rules compute on activities is not counted
        if func._schema.is_mutable and rule is not same:
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
