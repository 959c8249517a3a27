"""What an evaluation tells, against the same figures recomputed from raw arrays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from randomised import randomise
from test_lcnet import open_at_random, small
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.dynamic import decisions, evaluating
from thrifty.errors import DataError, ThriftyError
from thrifty.evaluation import Evaluation, evaluate
from thrifty.gates import LayerGate
from thrifty.macs import MacCount, count_macs
from thrifty.methods.antidote import AntiDote
from thrifty.zoo.nets import CifarResNet


def made(macs: list[int], correct: list[bool], labels: list[int] | None = None, classes: int = 3) -> Evaluation:
    y = torch.tensor(labels if labels is not None else [0] * len(macs))
    best = torch.where(torch.tensor(correct), y, (y + 1) % classes)
    probabilities = torch.nn.functional.one_hot(best, classes).float()
    return Evaluation(probabilities, y, MacCount(torch.tensor(macs), {}, {}))


@pytest.mark.parametrize("quantiles", [1, 2, 5, 7])
def test_accuracy_by_cost_against_numpy(quantiles: int) -> None:
    rng = np.random.default_rng(0)
    macs, correct = rng.permutation(1000) + 10**12, rng.random(1000) < 0.7
    groups = made(macs.tolist(), correct.tolist()).by_cost(quantiles)
    parts = np.array_split(np.argsort(macs), quantiles)
    assert len(groups) == quantiles
    if 1000 % quantiles == 0:
        for group, part in zip(groups, parts, strict=True):
            assert group.photographs == len(part)
            assert group.accuracy == pytest.approx(correct[part].mean())
            assert group.macs == pytest.approx(macs[part].mean())
            assert (group.lowest, group.highest) == (macs[part].min(), macs[part].max())
    assert sum(group.photographs for group in groups) == 1000
    assert sum(group.accuracy * group.photographs for group in groups) == pytest.approx(correct.sum())
    sizes = [group.photographs for group in groups]
    assert max(sizes) - min(sizes) <= 1


def test_equal_costs_stay_together_whatever_their_order() -> None:
    rng = np.random.default_rng(1)
    macs, correct = rng.integers(0, 7, 200), rng.random(200) < 0.5
    groups = made(macs.tolist(), correct.tolist()).by_cost(5)
    order = rng.permutation(200)
    assert made(macs[order].tolist(), correct[order].tolist()).by_cost(5) == groups
    assert all(before.highest < after.lowest for before, after in pairwise(groups))
    for group in groups:
        inside = (macs >= group.lowest) & (macs <= group.highest)
        assert group.photographs == inside.sum()
        assert group.accuracy == pytest.approx(correct[inside].mean())


def test_a_constant_cost_is_one_group() -> None:
    evaluation = made([5] * 9, [True] * 6 + [False] * 3)
    assert evaluation.constant_cost
    (group,) = evaluation.by_cost()
    assert (group.photographs, group.macs, group.lowest, group.highest) == (9, 5.0, 5, 5)
    assert group.accuracy == pytest.approx(2 / 3)
    assert not made([5, 5, 6], [True] * 3).constant_cost
    assert [g.photographs for g in made([5, 5, 6], [True] * 3).by_cost()] == [2, 1]


@pytest.mark.parametrize("quantiles", [0, -1, 2.0, True, "5", None])
def test_quantiles_that_are_none(quantiles: Any) -> None:
    with pytest.raises(ThriftyError, match="quantiles is"):
        made([1, 2], [True, False]).by_cost(quantiles)


def test_cost_by_class() -> None:
    evaluation = made([1, 2, 3, 6], [True, False, True, True], [0, 0, 2, 2])
    assert evaluation.class_macs() == [1.5, None, 4.5]
    assert evaluation.class_accuracy() == [0.5, None, 1.0]


class Counting(nn.Module):
    """Passes maps on and counts the calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x)


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def test_one_pass_gives_logits_costs_and_shares() -> None:
    dynamic, _, _ = small()
    open_at_random(dynamic)
    x, y = torch.randn(10, 3, 32, 32), torch.arange(10) % 5
    dynamic.train()
    wrapped = Counting(dynamic)
    assert evaluate(wrapped, batches(x, y, 4)).shares.keys()
    assert wrapped.calls == 3
    result = evaluate(dynamic, batches(x, y, 4))
    assert dynamic.training
    assert not dynamic._forward_hooks
    assert not any(gate._forward_hooks for gate in dynamic.gates().values())
    with evaluating(dynamic):
        parts = [dynamic(part).softmax(1) for part in x.split(4)]
    assert torch.equal(result.probabilities, torch.cat(parts))
    count = count_macs(dynamic, x.split(4))
    assert torch.equal(result.macs.total, count.total)
    assert not result.constant_cost


def test_shares_against_the_decisions() -> None:
    dynamic, _, _ = small()
    open_at_random(dynamic)
    x = torch.randn(10, 3, 32, 32)
    shares = evaluate(dynamic, batches(x, torch.zeros(10, dtype=torch.int64), 4)).shares
    found = decisions(dynamic, x)
    blocks = {name: gate for name, gate in dynamic.gates().items() if isinstance(gate, LayerGate)}
    assert shares.keys() == {*found, *(member for gate in blocks.values() for member in gate.members)}
    for name, gate in blocks.items():
        ran = found[name].layer.double().numpy()
        assert shares[name].channels is None
        assert shares[name].means() == {"ran": pytest.approx(ran.mean())}
        for member in gate.members:
            np.testing.assert_array_equal(shares[member].ran, ran)
            assert (shares[member].channels is not None) == (member in found)
    for name, decision in found.items():
        if decision.channels is not None:
            np.testing.assert_allclose(shares[name].channels, decision.channels.numpy().mean(1), rtol=1e-15)
    assert 0 < sum(shares[name].means()["ran"] for name in blocks) < len(blocks)


def test_shares_of_channels_and_columns_that_are_read() -> None:
    x = torch.randn(6, 3, 32, 32)
    dynamic = convert(randomise(CifarResNet(8, 5), x), AntiDote(channels=0.25, columns=0.5), x)
    shares = evaluate(dynamic, batches(x, torch.zeros(6, dtype=torch.int64), 5)).shares
    found = decisions(dynamic, x)
    assert shares.keys() == found.keys()
    for name, decision in found.items():
        for axis in ("channels", "columns"):
            kept = getattr(decision, axis)
            got = getattr(shares[name], axis)
            assert (kept is None) == (got is None)
            if kept is not None:
                np.testing.assert_allclose(got, kept.numpy().reshape(6, -1).mean(1), rtol=1e-15)
        assert shares[name].ran is None


def test_a_dense_model_has_no_shares_and_one_cost() -> None:
    result = evaluate(CifarResNet(8, 5), batches(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 4]), 2))
    assert result.shares == {}
    assert result.constant_cost


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_that_no_class_has(label: int) -> None:
    model = CifarResNet(8, 5)
    with pytest.raises(DataError, match=f"label {label} is beyond the model's 5 classes"):
        evaluate(model, [(torch.zeros(1, 3, 32, 32), torch.tensor([label]))])
    assert not model._forward_hooks
    with pytest.raises(DataError, match="no photographs"):
        evaluate(model, [])


def test_an_empty_batch_counts_for_nothing() -> None:
    dynamic, _, x = small()
    open_at_random(dynamic)
    y = torch.zeros(len(x), dtype=torch.int64)
    found = evaluate(dynamic, [(x[:5], y[:5]), (x[:0], y[:0]), (x[5:], y[5:])])
    whole = evaluate(dynamic, [(x, y)])
    assert torch.equal(found.macs.total, whole.macs.total)
    assert torch.allclose(found.probabilities, whole.probabilities, atol=1e-6)
