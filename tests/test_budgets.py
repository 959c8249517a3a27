"""A compute budget at run time, and training for all budgets at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from randomised import randomise
from small_nets import NETS, SIZE
from torch import nn

from thrifty.budgets import set_budget
from thrifty.converter import convert
from thrifty.dynamic import Dynamic
from thrifty.errors import ThriftyError
from thrifty.macs import count_macs
from thrifty.methods import FBS, AntiDote, MethodConfig
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
