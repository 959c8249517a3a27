"""A compute budget at run time, and training for all budgets at once."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

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
from thrifty.density import kept
from thrifty.dynamic import Dynamic, hooked
from thrifty.engine import Engine
from thrifty.errors import ThriftyError
from thrifty.gates import strengths
from thrifty.lowering import lower
from thrifty.macs import count_macs
from thrifty.methods import FBS, AntiDote, LCNet, MethodConfig
from thrifty.methods.base import sampled_offset
from thrifty.strength import find_strength
from thrifty.zoo.nets import build

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
    with pytest.raises(ThriftyError, match="at least, at its full strength: more than the budget"):
        set_budget(dynamic, 0.01, x)
    assert count_macs(dynamic, x).mean == before
    for images, percentile in ((x, 950), (x, "most"), (x[:, :1], None), (None, None), (3, None)):
        with pytest.raises(ThriftyError):
            set_budget(dynamic, 0.6, images, percentile)  # type: ignore[arg-type]
        assert count_macs(dynamic, x).mean == before
    with pytest.raises(ThriftyError, match="dense model"):
        set_budget(model, 0.5, x)  # type: ignore[arg-type]
    with pytest.raises(ThriftyError, match="not an iterator"):
        set_budget(dynamic, 0.5, iter([x]))
    with pytest.raises(ThriftyError, match=r"no layer of this .* is gated"):
        set_budget(convert(model, FBS(max_overhead=0.0), x), 0.5, x)
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


FOR_ALL = (
    FBS(density=0.3, one_for_all=True, max_overhead=9.0),
    AntiDote(channels=0.5, columns=0.7, one_for_all=True),
)


@pytest.mark.parametrize("method", FOR_ALL, ids=lambda method: method.name)
def test_training_for_all_budgets_gives_every_image_its_own(method: MethodConfig) -> None:
    dynamic, *_ = network(method)
    images = 64
    x = torch.randn(images, 3, SIZE, SIZE)
    least = count_macs(dynamic.eval(), x).total
    method.advance(dynamic.train(), 0.4)
    offset = sampled_offset(0.4)
    wanted = [min(1.0, max(0.0, 2 * math.modf(offset + i * (5**0.5 - 1) / 2)[0] - 0.5)) for i in range(images)]
    decided = {}

    def note(name: str) -> Any:
        return lambda gate, _inputs, output: decided.update({name: gate.decision(output)})

    with hooked([gate.register_forward_hook(note(name)) for name, gate in dynamic.gates().items()]):
        dynamic(x)
    assert decided
    for name, decision in decided.items():
        ratios = (1 - 0.3, None) if method.name == "fbs" else (0.5, 0.7)
        for mask, ratio in zip((decision.channels, decision.columns), ratios, strict=True):
            if mask is not None:
                size = mask[0].numel()
                assert mask.flatten(1).sum(1).tolist() == [kept(1 - s * ratio, size) for s in wanted], name
    method.advance(dynamic, 0.6)
    assert sampled_offset(0.6) != offset
    now = count_macs(dynamic.eval(), x).total
    torch.testing.assert_close(now, least, rtol=0.01, atol=0)  # what is set; statistics have moved, so columns may
    method.advance(dynamic.train(), 1.0)
    torch.testing.assert_close(count_macs(dynamic, x).total, least, rtol=0.01, atol=0)
    assert set(copy.deepcopy(dynamic).state_dict()) == set(dynamic.state_dict())


def test_strengths_are_those_of_all_budgets() -> None:
    for images in (1, 7, 128, 1000):
        for offset in (0.0, 0.3, 0.999):
            found = strengths(images, torch.tensor(offset))
            assert found.shape == (images, 1)
            assert 0 <= found.min() <= found.max() <= 1
            for end in (0.0, 1.0):
                assert abs((found == end).float().mean() - 0.25) < 2 / images + 0.01
    assert sampled_offset(0.25) == sampled_offset(0.25) != sampled_offset(0.26)


def test_statistics_mix_all_budgets_in_training() -> None:
    """Whatever the step, they are those of all budgets: evaluation normalises as training did."""
    method = FOR_ALL[0]
    dynamic, _, _ = network(method)
    x = torch.randn(256, 3, SIZE, SIZE)
    means = {name: [] for name, norm in dynamic.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    for step in range(6):
        for norm in dynamic.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
                norm.momentum = 1.0
        method.advance(dynamic.train(), step / 6)
        dynamic(x)
        for name, found in means.items():
            found.append(dynamic.get_submodule(name).running_mean.clone())
    for name, found in means.items():
        stacked = torch.stack(found)
        assert (stacked.std(0) < 0.1 * stacked.abs().mean() + 1e-3).all(), name


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
    assert set_budget(dynamic, np.float32(share), x) == pytest.approx(reached, abs=1e-6)
    operators = lower(dynamic, x).operators
    for name, place in engine.program.gated.items():
        assert operators[place].attributes == engine.program.operators[place].attributes, name
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


def test_inputs_of_another_size_than_the_conversions_are_refused() -> None:
    dynamic = convert(build("resnet20"), FBS(density=0.5, one_for_all=True), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ThriftyError, match=r"\[3, 36, 36\], but the model was converted for \[3, 32, 32\]"):
        set_budget(dynamic, 0.6, torch.randn(2, 3, 36, 36))
