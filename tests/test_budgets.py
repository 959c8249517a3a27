"""A compute budget at run time, and training for all budgets at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from randomised import randomise
from small_nets import NETS, SIZE
from torch import nn

import thrifty
from thrifty.benchmarking.subjects import without_gates
from thrifty.budgets import set_budget
from thrifty.converter import convert
from thrifty.dynamic import Dynamic
from thrifty.engine import Engine
from thrifty.errors import ThriftyError
from thrifty.lowering import lower
from thrifty.macs import count_macs
from thrifty.methods import FBS, AntiDote, LCNet, MethodConfig
from thrifty.methods.base import sampled_strength
from thrifty.strength import find_strength

METHODS = (FBS(density=0.3, max_overhead=9.0), AntiDote(channels=0.5, columns=0.7))


def network(method: MethodConfig) -> tuple[Dynamic, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 3, SIZE, SIZE)
    model = randomise(NETS["Functional"](), x).eval()
    return convert(model, method, x), model, x


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("between", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("percentile", [None, 95])
def test_cost_is_under_the_budget_and_near_it(method: MethodConfig, between: float, percentile: float | None) -> None:
    dynamic, _, x = network(method)
    method.set_strength(dynamic, 1.0)
    least = count_macs(dynamic, x).percentile(95) / dynamic.conversion.total_macs
    share = least + between * (1 - least)
    reached = set_budget(dynamic, share, x, percentile)
    count = count_macs(dynamic, x)
    cost = count.mean if percentile is None else count.percentile(percentile)
    assert reached == pytest.approx(cost / dynamic.conversion.total_macs)
    assert share - 0.12 < reached <= share  # a channel of a small layer is some percent of the whole


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_strength_zero_is_the_dense_model(method: MethodConfig) -> None:
    dynamic, model, x = network(method)
    assert not torch.allclose(dynamic(x), model(x), rtol=1e-3)
    method.set_strength(dynamic, 0.0)
    torch.testing.assert_close(dynamic(x), model(x), rtol=1e-4, atol=1e-4)


def test_wrong_budgets() -> None:
    dynamic, model, x = network(METHODS[0])
    before = count_macs(dynamic, x).mean
    with pytest.raises(ThriftyError, match="at least, more than the budget"):
        set_budget(dynamic, 0.01, x)
    assert count_macs(dynamic, x).mean == before
    with pytest.raises(ThriftyError, match="dense model"):
        set_budget(model, 0.5, x)  # type: ignore[arg-type]
    for share in (0.0, 1.5, True, "half"):
        with pytest.raises(ThriftyError, match="share of the dense MACs"):
            set_budget(dynamic, share, x)  # type: ignore[arg-type]


@settings(deadline=None, derandomize=True)
@given(st.floats(0.31, 1.0), st.floats(0.2, 3))
def test_strength_is_found_on_any_falling_cost(share: float, power: float) -> None:
    asked: list[float] = []

    def cost(strength: float) -> float:
        asked.append(strength)
        return 1 - 0.7 * strength**power

    reached = find_strength(cost, share)
    assert reached <= share
    assert cost(max(0.0, asked[-1] - 2**-11)) >= min(share, 1.0) or asked[-1] == 0
    assert len(asked) < 20


@pytest.mark.parametrize("method", [FBS(density=0.3, one_for_all=True, max_overhead=9.0), AntiDote(one_for_all=True)])
def test_training_for_all_budgets_visits_them_all(method: MethodConfig) -> None:
    dynamic, _, _ = network(method)
    densities = []
    for step in range(400):
        method.advance(dynamic, step / 400)
        densities.append(dynamic.density)
    assert max(densities) == 1.0
    method.advance(dynamic, 1.0)
    assert dynamic.density == min(densities)
    assert len({round(density, 6) for density in densities}) > 4
    strengths = [sampled_strength(step / 400) for step in range(400)]
    assert strengths == [sampled_strength(step / 400) for step in range(400)]
    assert 0.15 < strengths.count(0.0) / 400 < 0.35
    assert 0.15 < strengths.count(1.0) / 400 < 0.35


def sampled(method: MethodConfig) -> tuple[Dynamic, Engine, torch.Tensor]:
    dynamic, _, x = network(method)
    for gate in dynamic.gates().values():
        for parameter in gate.parameters():
            nn.init.normal_(parameter, 0.3, 0.3)
    return dynamic, thrifty.compile(dynamic, x, check=False), x


@pytest.mark.parametrize("method", [*METHODS, LCNet(max_overhead=9.0)], ids=lambda method: method.name)
def test_an_engine_keeps_to_the_budget_that_the_model_keeps_to(method: MethodConfig) -> None:
    dynamic, engine, x = sampled(method)
    least = float(engine.trace(x).macs.mean())
    dense = dynamic.conversion.total_macs
    share = 0.5 + 0.5 * least / dense if method.name != "lcnet" else 0.7 * least / dense
    reached = engine.set_budget(share, x)
    assert reached == pytest.approx(float(engine.trace(x).macs.mean()) / dense)
    assert share - 0.12 < reached <= share
    assert set_budget(dynamic, share, x) == pytest.approx(reached, abs=0.02)
    now = str(engine.program)
    with pytest.raises(ThriftyError, match="at least"):
        engine.set_budget(0.001, x)
    assert str(engine.program) == now
    assert without_gates(engine.program).macs() == engine.program.macs()


@pytest.mark.parametrize("method", [*METHODS, LCNet(max_overhead=9.0)], ids=lambda method: method.name)
@pytest.mark.parametrize("style", ["Functional", "Residual"])
def test_a_program_without_gates_is_dense(method: MethodConfig, style: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, SIZE, SIZE)
    model = randomise(NETS[style](), x).eval()
    dynamic = convert(model, replace(method, density=1.0) if isinstance(method, FBS) else method, x)
    dense = without_gates(lower(dynamic, x))
    assert not dense.gated
    assert all(operator.guard is None and operator.kind != "layer_gate" for operator in dense.operators)
    if not isinstance(method, FBS):  # whose scale is in the gate
        expected = model(x).detach().numpy()
        assert np.abs(Engine(dense)(x.numpy()) - expected).max() <= 1e-4 * np.abs(expected).max()
