"""Gates whose decisions differ from input to input, in networks whose values stay in range."""

from __future__ import annotations

import torch
from randomised import random_statistics
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.dynamic import Dynamic
from thrifty.gates import mean_magnitude
from thrifty.methods.fbs import FBS, FBSGate

SHARE = 0.1
"""Mean size of what phi adds to a saliency, over that of rho. With more, deep networks amplify rounding errors."""


@torch.no_grad()
def randomly_gated(model: nn.Module, x: Tensor, density: float = 0.5, seed: int = 1) -> Dynamic:
    """A dynamic copy of the model whose saliencies depend on the input, by a random phi.

    Phi is scaled to what reaches each gate for x, and so are the statistics of normalisations, so that values neither
    explode nor fade on their way.
    """
    generator = torch.Generator().manual_seed(seed)
    dynamic = convert(model, FBS(density=density), x)

    def hook(gate: FBSGate, inputs: tuple[Tensor, ...]) -> None:
        phi, rho = gate.predictor.weight, gate.predictor.bias
        phi.normal_(generator=generator)
        answer = mean_magnitude(inputs[0]) @ phi.T
        phi.mul_(SHARE * rho.abs().mean() / answer.abs().mean().clamp(min=1e-6))

    handles = random_statistics(dynamic, generator)
    handles += [gate.register_forward_pre_hook(hook) for gate in dynamic.gates().values()]
    dynamic.eval()(x)
    for handle in handles:
        handle.remove()
    return dynamic
