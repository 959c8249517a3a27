"""LC-Net against its equations, and its objective against what is really executed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from randomised import no_initialisation, randomise, torchvision_cnn
from small_nets import SIZE
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.dynamic import Dynamic, decisions
from thrifty.errors import ThriftyError
from thrifty.gates import LayerGate
from thrifty.macs import count_macs
from thrifty.methods.budget import budgeted
from thrifty.methods.lcnet import LCNet
from thrifty.zoo.nets import CifarResNet

Array = NDArray[np.float64]

NETWORKS = [
    "torchvision resnet18", "torchvision resnet50", "torchvision resnext50_32x4d", "torchvision regnet_y_400mf",
    "torchvision mobilenet_v2", "torchvision mobilenet_v3_small", "torchvision efficientnet_b0",
    "torchvision convnext_tiny", "timm resnetv2_50", "timm seresnet18", "timm convnextv2_atto", "timm res2net50_26w_4s",
]  # fmt: skip


def network(name: str, x: Tensor) -> nn.Module:
    library, name = name.split()
    if library == "torchvision":
        return randomise(torchvision_cnn(name), x)
    with no_initialisation():
        return randomise(timm.create_model(name), x)


def small(**settings: Any) -> tuple[Dynamic, nn.Module, Tensor]:
    x = torch.randn(8, 3, SIZE, SIZE)
    model = randomise(CifarResNet(8, 5), x)
    return convert(model, LCNet(**({"max_overhead": 9.0} | settings)), x), model, x


@torch.no_grad()
def open_at_random(dynamic: Dynamic, seed: int = 0) -> Dynamic:
    """Scores that depend on the input, some of them 0, some 1."""
    generator = torch.Generator().manual_seed(seed)

    def hook(gate: Any, inputs: tuple[Tensor, ...]) -> None:
        weight, bias = gate.predictor.weight, gate.predictor.bias
        weight.normal_(generator=generator)
        answer = (inputs[0].mean((2, 3)) - inputs[0].mean((0, 2, 3))) @ gate.weight().T
        weight.mul_(0.5 / answer.abs().mean().clamp(min=1e-3))
        bias.uniform_(-0.3, 0.5, generator=generator).sub_(gate.weight() @ inputs[0].mean((0, 2, 3)))

    handles = [gate.register_forward_pre_hook(hook) for gate in dynamic.gates().values()]
    like = next(dynamic.parameters())
    example = torch.randn(8, 3, SIZE, SIZE, dtype=like.dtype, generator=generator)
    dynamic.eval()(example)
    for handle in handles:
        handle.remove()
    return dynamic


def arrays(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().double().numpy() for tensor in tensors]


@pytest.mark.parametrize("settings", [{}, {"channels": False}, {"layers": False}])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_dense_models_at_first(name: str, settings: dict[str, bool]) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = network(name, x)
    with torch.no_grad():
        dense = model(x)
        dynamic = convert(model, LCNet(**settings, max_overhead=9.0), x, inplace=True)
        assert dynamic.gates()
        assert ((dynamic(x) - dense).abs().max() / dense.abs().max()).item() <= 1e-5
    kinds = {isinstance(gate, LayerGate) for gate in dynamic.gates().values()}
    if "layers" in settings:
        assert kinds == {False}
    if "channels" in settings:
        assert kinds == {True}
    assert all(gate.costs is not None for gate in budgeted(dynamic).values())


def test_gates_against_numpy() -> None:
    dynamic, _, x = small()
    open_at_random(dynamic.double())
    x = x.double()
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, gate in dynamic.gates().items():

        def hook(_gate: object, given: tuple[Tensor, ...], made: Any, name: str = name) -> None:
            inputs[name], outputs[name] = given[0], made

        gate.register_forward_hook(hook)
    dynamic(x)
    closed: dict[str, float] = {}
    for name, gate in budgeted(dynamic).items():
        weight, bias, seen = arrays(gate.weight(), gate.predictor.bias, inputs[name])
        scores = np.clip(seen.mean((2, 3)) @ weight.T + bias, 0, 1)
        scale, decided = outputs[name]
        np.testing.assert_allclose(scale.detach().numpy().reshape(scores.shape), scores, atol=1e-12)
        assert np.array_equal(decided.numpy().reshape(scores.shape), scores > 0)
        closed[name] = 1 - decided.double().mean().item()
    assert sum(0 < share < 1 for share in closed.values()) >= 3


def test_a_threshold_closes_more_and_leaves_the_rest() -> None:
    dynamic, _, x = small()
    open_at_random(dynamic)
    gate: Any = dynamic.gates()["layer1.0.conv1"]
    x = torch.randn(8, 16, SIZE, SIZE)
    before, _ = gate(x)
    dynamic.method.set_threshold(dynamic, 0.4)  # type: ignore[attr-defined]
    scale, decided = gate(x)
    assert torch.equal(decided, before > 0.4)
    assert torch.equal(scale, torch.where(before > 0.4, before, 0.0))
    assert 0 < decided.sum() < (before > 0).sum()
    with pytest.raises(ThriftyError, match=r"in \[0, 1\)"):
        dynamic.method.set_threshold(dynamic, 1.0)  # type: ignore[attr-defined]


def test_a_skipped_block_leaves_its_shortcut() -> None:
    dynamic, model, x = small(channels=False)
    for gate in dynamic.gates().values():
        nn.init.constant_(gate.predictor.bias, -1.0)  # type: ignore[union-attr, arg-type]
    layer: Any = dynamic
    stem = torch.relu(model.bn1(model.conv1(x)))  # type: ignore[operator]
    assert torch.equal(layer.layer1(stem), stem)
    cost = count_macs(dynamic, x)
    blocks = [name for name in cost.layers if name.startswith("layer")]
    assert len(blocks) == 6
    assert all((cost.layers[name] == 0).all() for name in blocks)


@pytest.mark.parametrize("settings", [{}, {"channels": False}, {"layers": False}])
def test_counted_macs_are_those_of_the_decisions(settings: dict[str, bool]) -> None:
    """ResNet-8: recounted from shapes; a block's input is whole unless zero-padded shortcuts were left alone."""
    dynamic, _, x = small(**settings)
    open_at_random(dynamic)
    cost = count_macs(dynamic, x)
    decided = decisions(dynamic, x)
    runs, kept = [], []
    for stage in (1, 2, 3):
        layer = decided.get(f"layer{stage}.0")
        channels = decided.get(f"layer{stage}.0.conv1")
        runs.append(np.ones(8, bool) if layer is None else layer.layer.numpy())
        kept.append(np.full(8, 8 * 2**stage) if channels is None else channels.channels.sum(1).numpy())
    inputs = np.full(8, 16)
    total = np.full(8, 3 * 9 * 16 * SIZE**2 + 64 * 5)
    for stage, (run, channels) in enumerate(zip(runs, kept, strict=True)):
        width, size = 16 * 2**stage, SIZE // 2**stage
        first = run * 9 * inputs * channels * size**2
        second = run * 9 * channels * width * size**2
        name = f"layer{stage + 1}.0"
        assert np.array_equal(cost.layers[f"{name}.conv1"].numpy(), first)
        assert np.array_equal(cost.layers[f"{name}.conv2"].numpy(), second)
        total = total + first + second
        inputs = np.where(run, width, inputs)
    total -= (64 - inputs) * 5
    assert np.array_equal((cost.total - cost.gate_overhead).numpy(), total)


@pytest.mark.parametrize("name", NETWORKS[:8])
def test_the_objective_sees_what_is_executed(name: str) -> None:
    x = torch.randn(4, 3, 64, 64)
    dynamic = convert(network(name, x), LCNet(max_overhead=9.0), x, inplace=True)
    close_some(dynamic)
    counted = count_macs(dynamic, x).total.double() / dynamic.conversion.total_macs
    torch.testing.assert_close(estimate(dynamic, x), counted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def close_some(dynamic: Dynamic) -> None:
    """Every gate stays as it is or closes half of its channels; every third block is left out."""
    layers = channels = 0
    for gate in dynamic.gates().values():
        bias = gate.predictor.bias  # type: ignore[union-attr]
        if isinstance(gate, LayerGate):
            layers += 1
            bias.fill_(1 - 2 * (layers % 3 == 0))
        else:
            channels += 1
            bias[: channels % 5] = -1


def estimate(dynamic: Dynamic, x: Tensor) -> Tensor:
    found = decisions(dynamic, x)
    shares = [d.layer.float() if d.channels is None else d.channels.float().mean(1) for d in found.values()]
    assert list(found) == list(dynamic.gates())
    costs = next(iter(budgeted(dynamic).values())).costs
    assert costs is not None
    return costs.ratio(torch.stack(shares, 1)).double()
