"""Random weights under which a network computes something worth comparing.

Every scale is random, negative, nearly zero or zero; every statistic is random; and yet values neither explode nor fade
on their way, so that an error in any layer shows at the logits and rounding does not drown it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SKIPPED_INITS = ("kaiming_normal_", "kaiming_uniform_", "trunc_normal_", "normal_", "uniform_", "xavier_uniform_")

TORCHVISION_CNNS = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not name.startswith(("vit", "swin", "maxvit"))
]
"""Every classification network of torchvision but the transformers."""


def torchvision_cnn(name: str) -> nn.Module:
    """A network of torchvision, without sensible weights."""
    options: dict[str, Any] = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    with no_initialisation():
        return torchvision.models.get_model(name, weights=None, **options)


@contextmanager
def no_initialisation() -> Iterator[None]:
    """Builds nets faster: what is randomised afterwards needs no first values."""
    kept = {name: getattr(nn.init, name) for name in SKIPPED_INITS}
    for name in SKIPPED_INITS:
        setattr(nn.init, name, lambda tensor, *_args, **_kwargs: tensor)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(nn.init, name, function)


@torch.no_grad()
def randomise(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Random weights, scales, biases and statistics; `model` comes back in evaluation mode.

    Batch normalisations get random means and, times a random factor, the second moment of what reaches them for x as
    variance: that keeps values in range. True means and variances would do so too, but a deep network whose layers all
    remove what inputs have in common is chaotic: its own rounding errors grow to more than the bound of these tests.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            _fill(module, name, parameter, generator)
    handles = random_statistics(model, generator)
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return model


def random_statistics(model: nn.Module, generator: torch.Generator) -> list[Any]:
    """From now on, each normalisation takes random statistics that suit what reaches it; ends with the handles."""
    norms = [module for module in model.modules() if _has_statistics(module)]
    return [norm.register_forward_pre_hook(_random_statistics(generator)) for norm in norms]


def _fill(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    mixes = isinstance(module, (nn.Conv2d, nn.Linear))
    if name == "bias":
        parameter.uniform_(-0.1, 0.1, generator=generator)
    elif mixes and name == "weight":
        bound = math.sqrt(6 / parameter[0].numel())
        parameter.uniform_(-bound, bound, generator=generator)
    elif not mixes and name == "weight" and parameter.ndim == 1:
        random_scales(parameter, generator)
    else:  # layer scales, gains, positions
        parameter.uniform_(0.5, 1.5, generator=generator)


def random_scales(scales: Tensor, generator: torch.Generator) -> None:
    """Scales of both signs, a tenth of them nearly zero and a twentieth zero."""
    signs = torch.where(torch.rand(scales.shape, generator=generator) < 0.5, -1.0, 1.0)
    scales.uniform_(0.5, 1.5, generator=generator).mul_(signs)
    kind = torch.rand(scales.shape, generator=generator)
    scales[kind < 0.15] *= 1e-4
    scales[kind < 0.05] = 0


def _has_statistics(module: nn.Module) -> bool:
    known = isinstance(module, _BatchNorm) or type(module).__name__.startswith("FrozenBatchNorm")
    return known and module.running_mean is not None


def _random_statistics(generator: torch.Generator) -> Any:
    def hook(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1)
        power = x.square().mean().clamp(min=1e-6)
        size = norm.running_mean.shape
        norm.running_mean.copy_(0.3 * power.sqrt() * torch.randn(size, generator=generator))
        norm.running_var.copy_(power * (0.5 + 1.5 * torch.rand(size, generator=generator)))

    return hook
