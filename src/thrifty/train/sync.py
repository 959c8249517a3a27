"""Batch normalisation over the batches of all processes, on any device.

torch's SyncBatchNorm runs on accelerators only. Without it, two processes with half a batch each train another model
than one process with the whole batch.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

log = logging.getLogger(__name__)


class _Total(torch.autograd.Function):
    """Sum over all processes. Each process's loss depends on the sum, so gradients are summed too."""

    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Total.forward(None, gradient)


def _total(x: Tensor) -> Tensor:
    return cast(Tensor, _Total.apply(x))


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the global batch; every process must hold as many inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [N, C, H, W]: by the statistics of all processes in training, by the running ones else."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        kind = x.dtype
        x = x.to(torch.promote_types(kind, torch.float32))  # half precision can't hold sums over a batch
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _total(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _total(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach(), count)
        y = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(kind)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if not self.track_running_stats:
            return
        batches = cast(Tensor, self.num_batches_tracked).add_(1)
        share = 1 / float(batches) if self.momentum is None else self.momentum
        cast(Tensor, self.running_mean).lerp_(mean, share)
        cast(Tensor, self.running_var).lerp_(variance * count / max(1, count - 1), share)


class GlobalBatchNormAct2d(GlobalBatchNorm2d):
    """The same for timm's normalisation that holds the activation behind it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [N, C, H, W], then activate it."""
        return cast(Tensor, self.act(self.drop(super().forward(x))))


def synchronise_batch_norm(model: nn.Module) -> None:
    """Make the batch normalisations of `model` share statistics over processes, in place; parameters stay the same.

    Those of kinds that are not known keep the statistics of their own process, and a warning names them.
    """
    left = []
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
        elif type(module).__name__ == "BatchNormAct2d":
            module.__class__ = GlobalBatchNormAct2d
        elif isinstance(module, _BatchNorm) and not isinstance(module, GlobalBatchNorm2d):
            left.append(f"{name} ({type(module).__name__})")
    if left:
        log.warning("these normalise each process's part of a batch by itself: %s", ", ".join(left))
