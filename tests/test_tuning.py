"""Sweeps of networks whose layers' importance is known, and what is proposed from them."""

from __future__ import annotations

import csv
import dataclasses
import errno
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.dynamic import Dynamic, decisions
from thrifty.errors import DataError, ThriftyError
from thrifty.macs import count_macs
from thrifty.methods import FBS, AntiDote, LCNet, MethodConfig, method_config
from thrifty.tuning import COUNTED, Row, Sensitivity, groups_of, patterns_of, tune

PNG = b"\x89PNG\r\n\x1a\n"
RATIOS = (0.25, 0.5, 0.75)
SIZE = 8


class Block(nn.Module):
    def __init__(self, matters: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        if not matters:
            nn.init.zeros_(self.conv2.weight)
            nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


class Toy(nn.Module):
    """Three residual blocks, of which the middle one adds nothing, whatever it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(True), Block(False), Block(True))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


METHODS: dict[str, MethodConfig] = {
    "antidote": AntiDote(channels=0.5, columns=0.5),
    "fbs": FBS(density=1.0, where="blocks*"),
}


def toy(method: str = "antidote") -> tuple[Dynamic, nn.Module, list[tuple[Tensor, Tensor]]]:
    """A dynamic model, the dense one, and inputs that the dense one classifies without an error."""
    torch.manual_seed(5)
    model = Toy().eval()
    x = torch.randn(80, 3, SIZE, SIZE)
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)
        labels = model(x).argmax(1)
    assert len(labels.unique()) > 2
    batches = [(x[i : i + 40], labels[i : i + 40]) for i in (0, 40)]
    return convert(model, METHODS[method], x[:1]), model, batches


def blocks(dynamic: Dynamic) -> dict[str, tuple[str, ...]]:
    names = list(dynamic.gates())
    return {f"block {i}": tuple(name for name in names if name.startswith(f"blocks.{i}.")) for i in range(3)}


@pytest.mark.parametrize("method", METHODS)
def test_the_block_that_does_not_matter_is_pruned_hardest(method: str) -> None:
    dynamic, _, batches = toy(method)
    sensitivity = tune(dynamic, batches, blocks(dynamic), RATIOS)
    assert sensitivity.accuracy == 1
    assert all(row.accuracy == 1 for row in sensitivity.rows if row.group == "block 1")
    assert any(row.accuracy < 1 for row in sensitivity.rows if row.group != "block 1")
    least = sensitivity.propose(1e-6, floor=0.0)
    assert least.chosen["channels", "block 1"] == 0.75
    assert least.lost == 0
    assert not least.reached
    for target in (0.95, 0.85, 0.7):
        chosen = sensitivity.propose(target, floor=1.0).chosen
        assert chosen["channels", "block 1"] == max(chosen.values())


@pytest.mark.parametrize("method", METHODS)
def test_points_are_those_of_a_model_set_by_hand(method: str) -> None:
    dynamic, _, batches = toy(method)
    axes = ("channels", "columns") if method == "antidote" else ("channels",)
    groups = blocks(dynamic)
    seen: list[Row] = []
    sensitivity = tune(dynamic, iter(batches), groups, RATIOS, axes, seen.append)
    assert tuple(seen) == sensitivity.rows
    assert len(seen) == len(axes) * len(groups) * len(RATIOS)
    assert sensitivity.inputs == 80
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    for row in seen:
        for name, gate in dynamic.gates().items():
            ratio = row.ratio if name in groups[row.group] else 0.0
            if isinstance(dynamic.method, AntiDote):
                by_axis = (ratio, 0.0) if row.axis == "channels" else (0.0, ratio)
                gate.set_ratios(*by_axis)  # type: ignore[operator]
            else:
                gate.set_density(1 - ratio)  # type: ignore[operator]
        assert row.accuracy == pytest.approx((dynamic(x).argmax(1) == y).double().mean().item())
        assert row.macs == count_macs(dynamic, x[:COUNTED]).mean


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_is(method: str) -> None:
    dynamic, _, batches = toy(method)
    dynamic.set_density(0.6)
    before = {name: tensor.clone() for name, tensor in dynamic.state_dict().items()}
    made = decisions(dynamic, batches[0][0])
    sensitivity = tune(dynamic, batches, blocks(dynamic), RATIOS)
    sensitivity.propose(0.8, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dynamic.state_dict().items())
    for name, decision in decisions(dynamic, batches[0][0]).items():
        assert torch.equal(decision.channels, made[name].channels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [0.9, 0.65])
def test_a_proposal_costs_what_it_says_and_is_what_a_recipe_makes_of_it(method: str, target: float) -> None:
    dynamic, model, batches = toy(method)
    axes = ("channels", "columns") if method == "antidote" else ("channels",)
    sensitivity = tune(dynamic, batches, groups_of(dynamic, batches[0][0], "layer"), RATIOS, axes)
    proposal = sensitivity.propose(target, floor=1.0)
    assert proposal.reached
    x = torch.cat([b[0] for b in batches])[:COUNTED]
    proposal.apply(dynamic)
    counted = count_macs(dynamic, x)
    assert proposal.macs == counted.mean <= target * dynamic.conversion.total_macs
    assert proposal.share == proposal.macs / dynamic.conversion.total_macs
    from_recipe = yaml.safe_load(proposal.recipe)["method"]
    assert from_recipe == proposal.settings
    fresh = convert(model, method_config(from_recipe.pop("name"), from_recipe), x[:1])
    torch.testing.assert_close(count_macs(fresh, x).total, counted.total, rtol=0, atol=0)
    torch.testing.assert_close(fresh(x), dynamic(x), rtol=0, atol=0)


def test_a_recipe_keeps_the_other_settings_of_the_method() -> None:
    _, model, batches = toy()
    method = AntiDote(channels=0.5, columns=0.5, straight_through=True, sparsity=0.05, ascent=(0.0, 0.1))
    dynamic = convert(model, method, batches[0][0][:1])
    proposal = tune(dynamic, batches, blocks(dynamic), RATIOS).propose(0.8, floor=1.0)
    recipe = yaml.safe_load(proposal.recipe)["method"]
    assert recipe.pop("name") == "antidote"
    made = method_config("antidote", recipe)
    assert (made.straight_through, made.sparsity, made.ascent) == (True, 0.05, (0.0, 0.1))


def synthetic(curves: list[list[tuple[float, float]]]) -> Sensitivity:
    """A sweep whose costs add up: of each group the points' (loss, share of the dense MACs saved)."""
    ratios = [round(0.1 * (i + 1), 1) for i in range(9)]
    names = {f"g{i}": (f"layer{i}",) for i in range(len(curves))}
    saved: dict[tuple[str, float], float] = {}
    rows = []
    for group, points in zip(names, curves, strict=True):
        total = 0.0
        for ratio, (loss, part) in zip(ratios, points, strict=False):
            total += part
            saved[names[group][0], ratio] = total
            rows.append(Row("channels", group, ratio, 0.9 - loss, 1000 * (1 - total)))

    def count(by_layer: Mapping[str, Mapping[str, float]]) -> float:
        return 1000 * (1 - sum(saved[item] for item in by_layer.get("channels", {}).items()))

    def described(chosen: Mapping[tuple[str, str], float]) -> dict[str, Any]:
        return {"name": "fbs", "density": {group: 1 - ratio for (_, group), ratio in chosen.items()}}

    return Sensitivity("fbs", names, tuple(rows), 0.9, 1000, 1000, 100, described, count)


CURVE = st.lists(st.tuples(st.floats(-0.02, 0.3), st.floats(0, 0.03)), min_size=1, max_size=9)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(CURVE, min_size=1, max_size=4), st.floats(0.05, 1), st.floats(0, 0.5))
def test_proposals_keep_the_floor_and_stop_at_the_target(
    curves: list[list[tuple[float, float]]], target: float, floor: float
) -> None:
    sensitivity = synthetic(curves)
    proposal = sensitivity.propose(target, floor)
    assert proposal.lost <= floor + 1e-9
    assert proposal.reached == (proposal.macs <= 1000 * target)
    assert proposal.macs == sensitivity.count(proposal.ratios)
    worst = {}
    for (axis, group), ratio in proposal.chosen.items():
        worst[group] = max(0.0, *(0.9 - r.accuracy for r in sensitivity.curves()[axis, group] if r.ratio <= ratio))
    assert proposal.lost == pytest.approx(sum(worst.values()), abs=1e-9)
    easier = sensitivity.propose(min(1.0, target + 0.05), floor)
    assert easier.macs >= proposal.macs
    assert easier.lost <= proposal.lost + 1e-9
    if not proposal.reached:  # no first step further is within the floor
        for (axis, group), rows in sensitivity.curves().items():
            at = proposal.chosen.get((axis, group), 0.0)
            lost = max([0.0, *(0.9 - row.accuracy for row in rows if row.ratio <= at)])
            macs = min([1000.0, *(row.macs for row in rows if row.ratio <= at)])
            after = next((row for row in rows if row.ratio > at and row.macs < macs), None)
            if after is not None:
                reached = max([lost, *(0.9 - row.accuracy for row in rows if row.ratio <= after.ratio)])
                assert proposal.lost + reached - lost > floor


PATH = st.lists(st.sampled_from(["a", "b", "conv", "layer1", "0", "1"]), min_size=1, max_size=4).map(".".join)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.sets(PATH, min_size=1, max_size=8), st.sets(PATH, max_size=8))
def test_patterns_fit_their_names_and_no_other(names: set[str], others: set[str]) -> None:
    patterns = patterns_of(sorted(names), others)
    fitted = {name for name in names | others if any(fnmatchcase(name, pattern) for pattern in patterns)}
    assert fitted == names
    assert len(patterns) <= len(names)


def test_stages_are_named_by_patterns() -> None:
    from thrifty.zoo.nets import build

    x = torch.zeros(1, 3, 32, 32)
    antidote = convert(build("resnet20").eval(), AntiDote(channels=0.5), x)
    assert list(groups_of(antidote, x)) == [f"layer{i}.*.conv2" for i in (1, 2, 3)]
    fbs = convert(build("resnet20").eval(), FBS(density=1.0, where="layer*"), x)
    assert [len(names) for names in groups_of(fbs, x).values()] == [6, 6, 6]
    vgg = convert(build("vgg16").eval(), AntiDote(channels=0.5), x)
    assert [len(names) for names in groups_of(vgg, x).values()] == [2, 2, 3, 3, 2]
    assert list(groups_of(vgg, x, "layer")) == list(vgg.gates())


def test_curves_are_written(tmp_path: Path) -> None:
    dynamic, _, batches = toy()
    sensitivity = tune(dynamic, batches, blocks(dynamic), RATIOS, ("channels", "columns"))
    sensitivity.to_csv(tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len(sensitivity.rows)
    for line, row in zip(lines, sensitivity.rows, strict=True):
        assert (line["axis"], line["group"], float(line["ratio"])) == (row.axis, row.group, row.ratio)
        assert float(line["accuracy"]) == row.accuracy
        assert float(line["accuracy_lost"]) == pytest.approx(sensitivity.accuracy - row.accuracy)
        assert float(line["share_of_dense"]) == pytest.approx(row.macs / dynamic.conversion.total_macs)
        assert line["layers"].split() == list(sensitivity.groups[row.group])
    for name, proposal in (("a", None), ("b", sensitivity.propose(0.7, 1.0))):
        sensitivity.plot(tmp_path / f"{name}.png", proposal)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "s.csv"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full(_figure: Figure, path: Path, **_options: Any) -> None:
        path.write_bytes(PNG)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(ThriftyError, match="No space left"):
        synthetic([[(0.0, 0.1)]]).plot(tmp_path / "s.png")
    assert list(tmp_path.iterdir()) == []


def test_hostile_arguments() -> None:
    dynamic, model, batches = toy()
    groups = blocks(dynamic)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"dynamic": model}, "is a dense model"),
        ({"groups": {}}, "no groups"),
        ({"groups": {"a": ()}}, "no layers"),
        ({"groups": {"a": ("stem",)}}, "'stem', which is not gated"),
        ({"groups": {"a": ("blocks.0.conv2",), "b": ("blocks.0.conv2",)}}, "in two groups"),
        ({"ratios": ()}, "no ratios"),
        ({"ratios": (0.5, 1.0)}, "a ratio is 1.0"),
        ({"ratios": (0.0,)}, "a ratio is 0.0"),
        ({"ratios": (float("nan"),)}, "a ratio is nan"),
        ({"axes": ()}, "choose of: channels, columns"),
        ({"axes": ("rows",)}, "axes are rows"),
    ]
    for changed, words in cases:
        with pytest.raises(ThriftyError, match=words):
            tune(**({"dynamic": dynamic, "batches": batches, "groups": groups} | changed))
    with pytest.raises(DataError, match="no photographs"):
        tune(dynamic, [], groups)
    fbs, _, _ = toy("fbs")
    lcnet = convert(model, LCNet(target=0.5), batches[0][0])
    with pytest.raises(ThriftyError, match="no ratios to tune"):
        tune(lcnet, batches, blocks(dynamic))
    with pytest.raises(ThriftyError, match="does not prune columns"):
        tune(fbs, batches, blocks(fbs), axes=("columns",))
    sensitivity = synthetic([[(0.0, 0.1)]])
    for target, floor in ((0, 0.1), (1.1, 0.1), (-1, 0.1), (float("nan"), 0.1), (0.5, -0.1), (0.5, 2), (True, 0.1)):
        with pytest.raises(ThriftyError, match="must be"):
            sensitivity.propose(target, floor)
    with pytest.raises(ThriftyError, match="by 'row'"):
        groups_of(dynamic, batches[0][0], "row")  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        sensitivity.accuracy = 1.0  # type: ignore[misc]
