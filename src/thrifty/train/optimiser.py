"""The optimiser's groups of parameters, and the moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from thrifty.gates import Gate
from thrifty.train.recipe import OptimiserSection


def make_optimiser(model: nn.Module, section: OptimiserSection) -> torch.optim.Optimizer:
    """SGD over the trainable parameters of `model`.

    Weight decay falls on parameters of two and more dimensions outside gates: norms, biases and gates have none. Each
    group's `scale` is its learning rate as a multiple of the run's.
    """
    gates = {id(p) for module in model.modules() if isinstance(module, Gate) for p in module.parameters()}
    decayed: list[Tensor] = []
    undecayed: list[Tensor] = []
    gated: list[Tensor] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in gates:
            gated.append(parameter)
        else:
            (decayed if parameter.ndim > 1 else undecayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "scale": 1.0},
        {"params": undecayed, "weight_decay": 0.0, "scale": 1.0},
        {"params": gated, "weight_decay": 0.0, "scale": section.gate_learning_rate},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        momentum=section.momentum,
        nesterov=section.nesterov,
        weight_decay=section.weight_decay,
    )


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` that follows its weights: average = decay * average + (1 - decay) * weights at each update.

    The first update copies. Floating-point buffers are averaged too; counts, such as a gate's number of winners, are
    taken over as they are.
    """

    @torch.no_grad()
    def update(averages: Any, values: Any, _count: Tensor | int) -> None:
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
