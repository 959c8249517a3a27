"""Sampled layer gates, and what they share with LC-Net."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from randomised import randomise
from small_nets import SIZE
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.dynamic import Dynamic, decisions
from thrifty.errors import ThriftyError
from thrifty.macs import count_macs
from thrifty.methods import method_config
from thrifty.methods.gumbel import ALMOST_ONE, START, Gumbel, SampledLayer
from thrifty.zoo.nets import CifarResNet


def network(**settings: Any) -> tuple[Dynamic, nn.Module, Tensor]:
    x = torch.randn(8, 3, SIZE, SIZE)
    model = randomise(CifarResNet(8, 5), x)
    return convert(model, Gumbel(**({"max_overhead": 9.0} | settings)), x), model, x


def gates(dynamic: Dynamic) -> list[SampledLayer]:
    return [gate for gate in dynamic.gates().values() if isinstance(gate, SampledLayer)]


def test_evaluation_is_the_dense_model_at_first() -> None:
    dynamic, model, x = network()
    assert list(dynamic.gates()) == ["layer1.0", "layer2.0", "layer3.0"]
    assert torch.equal(dynamic(x), model(x))


def test_draws_follow_the_probability() -> None:
    gate = gates(network()[0])[0].train()
    x = torch.zeros(20_000, 16, 1, 1)
    for logit in (START, 0.0, -1.0):
        nn.init.constant_(gate.predictor.bias, logit)
        scale, decided = gate(x)
        assert torch.equal(scale, decided.float())
        assert decided.float().mean().item() == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=0.02)


def test_draws_come_from_torchs_generator() -> None:
    gate = gates(network()[0])[0].train()
    nn.init.zeros_(gate.predictor.bias)
    torch.manual_seed(3)
    first = gate(torch.zeros(64, 16, 1, 1))[1]
    torch.manual_seed(3)
    assert torch.equal(gate(torch.zeros(64, 16, 1, 1))[1], first)
    assert 0 < first.sum() < 64


def test_the_gradient_is_that_of_the_relaxed_sample() -> None:
    gate = gates(network(temperature=0.7)[0])[0].double().train()
    nn.init.normal_(gate.predictor.weight)
    x = torch.randn(8, 16, 3, 3, dtype=torch.float64)
    torch.manual_seed(1)
    scale, _ = gate(x)
    scale.sum().backward()
    torch.manual_seed(1)
    uniform = torch.rand(8, dtype=torch.float64)
    means = x.mean((2, 3))
    standard = (means - means.mean(0)) / (means.var(0, correction=0) + 1e-4).sqrt()
    logits = standard @ gate.predictor.weight[0] / 4 + gate.predictor.bias
    relaxed = torch.sigmoid((logits + uniform.log() - (1 - uniform).log()) / 0.7)
    expected = torch.autograd.grad(relaxed.sum(), gate.predictor.bias)[0]
    assert gate.predictor.bias.grad is not None
    torch.testing.assert_close(gate.predictor.bias.grad, expected)


def test_programs_decide_alike_and_do_not_scale() -> None:
    """value = clip(w mean(x) + b, 0, 1) where that is above the threshold."""
    dynamic, _, _ = network()
    gate = gates(dynamic)[0].eval()
    nn.init.normal_(gate.predictor.weight)
    nn.init.zeros_(gate.predictor.bias)
    for threshold in (0.0, 0.3):
        dynamic.method.set_threshold(dynamic, threshold)  # type: ignore[attr-defined]
        lowered = gate.lower((16, 3, 3))
        assert lowered.kind == "layer_gate"
        x = torch.randn(100, 16, 3, 3)
        score = (x.mean((2, 3)) @ lowered.tensors["weight"].T + lowered.tensors["bias"])[:, 0].clamp(0, 1)
        scale, decided = gate(x)
        assert lowered.attributes["threshold"] == ALMOST_ONE == torch.tensor(ALMOST_ONE).item() < 1
        assert torch.equal(score > ALMOST_ONE, decided)
        assert torch.equal(torch.where(score > ALMOST_ONE, score, 0.0), scale)
        probability = gate.predicted(x)[:, 0].sigmoid()
        assert torch.equal(decided, probability > (1 + threshold) / 2)


def test_skipped_blocks_cost_nothing() -> None:
    dynamic, _, x = network()
    nn.init.constant_(gates(dynamic)[1].predictor.bias, -1.0)
    cost, decided = count_macs(dynamic, x), decisions(dynamic, x)
    assert [bool(decided[f"layer{stage}.0"].layer.all()) for stage in (1, 2, 3)] == [True, False, True]
    assert (cost.layers["layer2.0.conv1"] == 0).all()
    assert (cost.layers["layer1.0.conv1"] > 0).all()


def test_settings() -> None:
    method = method_config("gumbel", {"target": 0.6, "temperature": 0.5})
    assert method == Gumbel(target=0.6, temperature=0.5)
    with pytest.raises(ThriftyError, match="temperature is 0"):
        Gumbel(temperature=0)
    with pytest.raises(ThriftyError, match="temperature is nan"):
        Gumbel(temperature=math.nan)
