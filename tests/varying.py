"""A model whose cost varies with the photograph, for the tests of commands: LC-Net with gates of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thrifty.converter import convert
from thrifty.data import sources
from thrifty.data.augment import normalise
from thrifty.gates import LayerGate
from thrifty.methods.lcnet import LCNet
from thrifty.zoo.store import load_model, save_model


@torch.no_grad()
def write_varying(path: Path) -> Path:
    """The zoo's dense ResNet-20 with gates, some of which skip layers and channels of some photographs."""
    model, card = load_model("resnet20-cifar10")
    images = sources.load("sample").images(torch.arange(0, 1000, 20))
    x = normalise(images, card.mean, card.std)
    method = LCNet(max_overhead=9.0)
    dynamic = convert(model, method, x[:1]).eval()
    generator = torch.Generator().manual_seed(0)

    def spread(gate: Any, inputs: tuple[Tensor, ...]) -> None:
        seen = gate.features(inputs[0])
        weight = torch.randn(gate.predictor.weight.shape, generator=generator)
        weight *= 0.4 / (seen @ weight.T).std()
        centre = 0.5 if isinstance(gate, LayerGate) else 0.4
        gate.predict(weight, centre - weight @ seen.mean(0))

    handles = [gate.register_forward_pre_hook(spread) for gate in dynamic.gates().values()]
    dynamic(x)
    for handle in handles:
        handle.remove()
    save_model(path, dynamic, card.__class__(**(vars(card) | {"method": method.settings()})))
    return path
