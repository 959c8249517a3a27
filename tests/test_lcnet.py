"""LC-Net against its equations, and its objective against what is really executed."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from randomised import no_initialisation, randomise, torchvision_cnn
from small_nets import NETS, SIZE
from torch import Tensor, nn

from thrifty.budgets import set_budget
from thrifty.converter import convert
from thrifty.dynamic import Dynamic, decisions
from thrifty.errors import ThriftyError
from thrifty.gates import GatedConv, LayerGate
from thrifty.macs import count_macs
from thrifty.methods.budget import Costs, budgeted, open_shares
from thrifty.methods.lcnet import LCNet, _Clip
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
        means, norm = inputs[0].mean((2, 3)), gate.standardise
        norm.running_mean.copy_(means.mean(0) + 0.1 * torch.randn(means.shape[1], generator=generator))
        norm.running_var.copy_(means.var(0) * torch.empty(means.shape[1]).uniform_(0.5, 2, generator=generator))
        seen = gate.features(inputs[0])
        weight = torch.randn(gate.predictor.weight.shape, generator=generator).to(seen)
        weight *= 0.5 / ((seen - seen.mean(0)) @ weight.T).abs().mean().clamp(min=1e-3)
        bias = torch.empty(len(weight)).uniform_(-0.3, 0.5, generator=generator)
        gate.predict(weight, bias - weight @ seen.mean(0))

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
        weight, bias, seen = arrays(gate.predictor.weight, gate.predictor.bias, inputs[name])
        mean, variance = arrays(gate.standardise.running_mean, gate.standardise.running_var)
        standard = (seen.mean((2, 3)) - mean) / np.sqrt(variance + 1e-4)
        scores = np.clip(standard @ weight.T / np.sqrt(len(mean)) + bias, 0, 1)
        scale, decided = outputs[name]
        np.testing.assert_allclose(scale.detach().numpy().reshape(scores.shape), scores, atol=1e-12)
        assert np.array_equal(decided.numpy().reshape(scores.shape), scores > 0)
        closed[name] = 1 - decided.double().mean().item()
    assert sum(0 < share < 1 for share in closed.values()) >= 3


def test_a_threshold_closes_more_and_leaves_the_rest() -> None:
    dynamic, _, x = small()
    open_at_random(dynamic)
    gate: Any = dynamic.gates()["layer1.0.conv1"]
    norm = gate.standardise
    x = (norm.running_mean + norm.running_var.sqrt() * torch.randn(8, 16))[:, :, None, None].expand(-1, -1, SIZE, SIZE)
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
    decided = [found[name] for name in dynamic.gates()]
    shares = [d.layer.float() if d.channels is None else d.channels.float().mean(1) for d in decided]
    return costs_of(dynamic).ratio(torch.stack(shares, 1)).double()


@pytest.mark.parametrize(
    ("z", "gradient", "passed"),
    [
        (0.5, 0.2, 0.2),
        (0.5, -0.2, -0.2),
        (1.0, -0.2, -0.2),
        (1.5, 0.2, 0.0),
        (1.5, -0.2, 0.0),
        (-0.5, -0.2, -0.1),
        (-0.5, 0.2, 0.0),
        (0.5, 7.0, 1.0),
        (0.5, -7.0, -1.0),
    ],
)
def test_the_gradient_outside_can_only_open(z: float, gradient: float, passed: float) -> None:
    value = torch.tensor([[z]], requires_grad=True)
    _Clip.apply(value, torch.tensor(0.0), 0.5).backward(torch.tensor([[gradient]]))
    assert value.grad is not None
    assert value.grad.item() == pytest.approx(passed)


def test_a_closed_gate_opens_again_where_the_budget_allows() -> None:
    dynamic, _, x = small(target=1.0, rate=2.0)
    for gate in budgeted(dynamic).values():
        gate.price.fill_(4.1)
    dynamic.train()
    for _ in range(60):
        dynamic.method.advance(dynamic, 1.0)
        dynamic(x)
        dynamic.regularization()
    assert count_macs(dynamic, x).mean > 0.98 * dynamic.conversion.total_macs


def test_the_report_has_linear_layers_that_are_skipped_with_their_block() -> None:
    x = torch.randn(1, 3, 32, 32)
    dynamic = convert(network("torchvision convnext_tiny", x), LCNet(channels=False), x)
    dense = count_macs(dynamic, x).layers
    report = dynamic.conversion
    skipped = {name for gate in budgeted(dynamic).values() for name in gate.members}
    assert {place.name for place in report.places if place.gated} == skipped
    assert sum("block.3" in name for name in skipped) == 18
    assert report.coverage == pytest.approx(sum(float(dense[name]) for name in skipped) / report.total_macs)


def test_channels_pay_by_the_root_of_what_one_costs() -> None:
    dynamic, _, x = small()
    saved = {}
    for name, gate in budgeted(dynamic).items():
        if isinstance(gate, LayerGate):
            assert gate.toll == 1
            continue
        dense = count_macs(dynamic, x).mean
        bias = gate.predictor.bias
        with torch.no_grad():
            bias[0] -= 9
            saved[name] = dense - count_macs(dynamic, x).mean
            bias[0] += 9
    assert len(set(saved.values())) > 1
    mean = sum(saved.values()) / len(saved)
    for name, cost in saved.items():
        assert budgeted(dynamic)[name].toll ** 2 == pytest.approx(cost / mean, rel=1e-5)


def test_the_price() -> None:
    """Each step adds rate * (ratio - goal), never below 0; blocks pay a share that rises over `relax`."""
    dynamic, _, x = small(target=0.4, rate=0.2, relax=0.5)
    gates = budgeted(dynamic)
    for gate in gates.values():
        nn.init.constant_(gate.predictor.bias, 3.0)  # type: ignore[union-attr, arg-type]
    price = 0.0
    for progress in (0.0, 0.25, 0.5, 1.0, 1.0):
        dynamic.method.advance(dynamic, progress)
        dynamic.train()(x)
        assert dynamic.regularization().item() == 0
        done = min(1.0, progress / 0.5)
        dense = sum(costs_of(dynamic).weights.tolist())
        price = max(0.0, price + 0.2 * (dense - (1 - 0.6 * done)))
        dynamic.method.advance(dynamic, progress)
        for gate in gates.values():
            assert float(gate.price) == pytest.approx(price, abs=1e-6)
            paid = done if isinstance(gate, LayerGate) else gate.toll
            assert float(gate.charged) == pytest.approx(price * paid, abs=1e-6)
        before = price
        dynamic.regularization()  # of no new pass
        assert float(next(iter(gates.values())).price) == pytest.approx(before, abs=1e-6)
    assert dynamic.density == 1.0
    for gate in gates.values():
        gate.price.fill_(0.01)
    dynamic.method.advance(dynamic, 0.0)
    for gate in gates.values():
        nn.init.constant_(gate.predictor.bias, -1.0)  # type: ignore[union-attr, arg-type]
    dynamic(x)
    dynamic.regularization()
    assert {float(gate.price) for gate in gates.values()} == {0.0}
    assert dynamic.density == 0.0


def costs_of(dynamic: Dynamic) -> Costs:
    costs = next(iter(budgeted(dynamic).values())).costs
    assert costs is not None
    return costs


def toy(settings: dict[str, Any], target: float, steps: int = 200) -> Dynamic:
    """Trained on which quarter of an image is bright."""
    torch.manual_seed(0)
    x = torch.randn(64, 3, SIZE, SIZE)
    model = randomise(CifarResNet(8, 4), x)
    dynamic = convert(model, LCNet(max_overhead=9.0, target=target, **settings), x[:1]).train()
    gates = [p for gate in dynamic.gates().values() for p in gate.parameters()]
    others = [p for p in dynamic.parameters() if all(p is not gate for gate in gates)]
    optimiser = torch.optim.SGD([{"params": others}, {"params": gates}], lr=0.02, momentum=0.9)
    for step in range(steps):
        dynamic.method.advance(dynamic, step / steps)
        for group, scale in zip(optimiser.param_groups, (0.02, 0.005), strict=True):
            group["lr"] = scale * 2 * min(0.5, 1 - step / steps)
        x, y = examples()
        loss = nn.functional.cross_entropy(dynamic(x), y) + dynamic.regularization()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    dynamic.method.advance(dynamic, 1.0)
    return dynamic.eval()


def examples(count: int = 32) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(count, 3, SIZE, SIZE), torch.randint(4, (count,))
    half = SIZE // 2
    for image, quarter in zip(x, y.tolist(), strict=True):
        image[:, quarter // 2 * half :, quarter % 2 * half :][:, :half, :half] += 1
    return x, y


@pytest.mark.parametrize("settings", [{}, {"layers": False}])
def test_training_ends_at_the_target(settings: dict[str, bool]) -> None:
    dynamic = toy(settings, 0.6)
    x, _ = examples(512)
    dynamic.method.finish(dynamic, x)
    ratio = count_macs(dynamic, x).mean / dynamic.conversion.total_macs
    assert ratio == pytest.approx(0.6, rel=0.02)


def test_set_budget() -> None:
    dynamic, _, x = small()
    open_at_random(dynamic)
    dense, before = dynamic.conversion.total_macs, count_macs(dynamic, x).mean
    share = 0.8 * before / dense
    assert set_budget(dynamic, share, x) == pytest.approx(count_macs(dynamic, x).mean / dense)
    assert 0.9 * share < count_macs(dynamic, x).mean / dense <= share
    set_budget(dynamic, share, [(x, None)], percentile=95)
    assert count_macs(dynamic, x).percentile(95) / dense <= share
    restored = small()[0]
    restored.load_state_dict(dynamic.state_dict())
    assert torch.equal(count_macs(restored, x).total, count_macs(dynamic, x).total)
    assert set_budget(dynamic, 1.0, x) == pytest.approx(before / dense)
    with pytest.raises(ThriftyError, match="at least"):
        set_budget(dynamic, 0.001, x)
    assert count_macs(dynamic, x).mean == before


def test_a_budget_never_lowers_the_threshold_that_gates_learned_with() -> None:
    dynamic, _, x = small(threshold=0.3)
    open_at_random(dynamic)
    before = count_macs(dynamic, x).total
    set_budget(dynamic, 1.0, x)
    assert torch.equal(count_macs(dynamic, x).total, before)


def test_training_goes_on_at_the_threshold_that_gates_learn_with() -> None:
    dynamic, _, _ = small(threshold=0.1)
    dynamic.method.set_threshold(dynamic, 0.4)  # type: ignore[attr-defined]
    dynamic.eval()
    dynamic.method.advance(dynamic, 0.5)
    assert all(float(gate.threshold) == pytest.approx(0.4) for gate in budgeted(dynamic).values())
    dynamic.train()
    dynamic.method.advance(dynamic, 0.5)
    assert all(float(gate.threshold) == pytest.approx(0.1) for gate in budgeted(dynamic).values())


class Chunked(nn.Module):
    """A block whose first convolution reads another map than the block does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 5)
        self.c1, self.c2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = self.norm(x).chunk(2, 1)
        x = x + self.c2(torch.cat([self.c1(a).relu(), b], 1))
        return self.fc(x.mean((2, 3)))


class ChannelsLast(nn.Module):
    """A block whose trunk has its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = nn.Conv2d(3, SIZE, 3, padding=1), nn.LayerNorm(SIZE), nn.Linear(SIZE, 5)
        self.conv = nn.Conv2d(SIZE, SIZE, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc(x.mean((1, 2)))


class Folded(nn.Module):
    """A network that sees two halves of every image as images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = CifarResNet(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat(x.chunk(2, 3))).unflatten(0, (2, x.shape[0])).mean(0)


def test_a_gate_is_made_for_the_map_that_its_block_reads() -> None:
    x = torch.randn(2, 3, SIZE, SIZE)
    dynamic = convert(Chunked(), LCNet(max_overhead=9.0), x)
    (gate,) = [gate for gate in dynamic.gates().values() if isinstance(gate, LayerGate)]
    assert gate.predictor.in_features == 16
    (cost,) = {place.gate_macs for place in dynamic.conversion.places if place.name == "c1"}
    assert cost >= gate.overhead(torch.Size((1, 16, SIZE, SIZE)))
    assert count_macs(dynamic, x).mean > 0


@pytest.mark.parametrize("model", [ChannelsLast(), Folded()])
def test_blocks_that_read_no_map_of_an_input_are_refused(model: nn.Module) -> None:
    x = torch.randn(2, 3, SIZE, SIZE)
    dynamic = convert(model, LCNet(max_overhead=9.0), x)
    assert not [gate for gate in dynamic.gates().values() if isinstance(gate, LayerGate)]
    assert torch.allclose(dynamic.eval()(x), model.eval()(x), atol=1e-5)
    if isinstance(model, Folded):
        assert not dynamic.gates()


def test_open_shares() -> None:
    dynamic, _, x = small()
    open_at_random(dynamic)
    shares = open_shares(dynamic, [(x[:3], None), (x[3:], None)])
    assert shares.keys() == dynamic.gates().keys()
    for name, decision in decisions(dynamic, x).items():
        kept = decision.layer if decision.channels is None else decision.channels
        assert shares[name] == pytest.approx(kept.double().mean().item())


def test_copies_and_files_decide_alike() -> None:
    dynamic, _, x = small()
    dynamic.train()(x)
    open_at_random(dynamic)
    expected = dynamic(x)
    for other in (copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):  # noqa: S301 (our own bytes)
        assert torch.equal(other(x), expected)
        other.method.advance(other, 0.1)
        costs = [next(iter(budgeted(one).values())).costs for one in (other, dynamic)]
        assert costs[0] is not costs[1]
        assert [c.progress for c in costs if c is not None] == [0.1, 1.0]
        assert torch.isfinite(other.train()(x)).all()
        assert other.regularization() == 0


def test_export() -> None:
    dynamic, _, x = small()
    open_at_random(dynamic)
    program = torch.export.export(dynamic, (x,))
    torch.testing.assert_close(program.module()(x), dynamic(x))


def test_compiled_training_step() -> None:
    plain, _, x = small()
    plain.train()
    compiled = copy.deepcopy(plain)
    step = torch.compile(compiled, backend="aot_eager")
    for model, run in ((plain, plain), (compiled, step)):
        for progress in (0.2, 0.3):
            model.method.advance(model, progress)
            (run(x).square().mean() + model.regularization()).backward()
    for (name, first), second in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if first.grad is not None:
            torch.testing.assert_close(second.grad, first.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_the_report_names_the_gates() -> None:
    dynamic, _, x = small()
    places = {place.name: place for place in dynamic.conversion.places}
    assert places["layer1.0.conv1"].note == places["layer1.0.conv2"].note == "block layer1.0: layer gate"
    assert not places["conv1"].gated
    assert sum(place.gate_macs for place in places.values()) == count_macs(dynamic, x).gate_overhead[0]


def test_networks_without_blocks_take_channel_gates() -> None:
    x = torch.randn(2, 3, SIZE, SIZE)
    dynamic = convert(randomise(NETS["Functional"](), x), LCNet(max_overhead=9.0), x)
    assert list(dynamic.gates()) == ["c1", "c2"]
    assert all(isinstance(dynamic.get_submodule(name), GatedConv) for name in ("c1", "c2"))


def test_where_picks_blocks_and_convolutions() -> None:
    assert set(small(where="layer2*")[0].gates()) == {"layer2.0", "layer2.0.conv1"}
    assert list(small(where="*.conv1")[0].gates()) == [f"layer{stage}.0.conv1" for stage in (1, 2, 3)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 0.0}, "target is 0.0"),
        ({"relax": 1.5}, "relax is 1.5"),
        ({"rate": -1.0}, "rate is -1.0"),
        ({"rate": math.nan}, "rate is nan"),
        ({"max_overhead": math.nan}, "max_overhead is nan"),
        ({"leak": math.nan}, "leak is nan"),
        ({"target": "0.5"}, "target is '0.5'"),
        ({"leak": -1.0}, "leak is -1.0"),
        ({"threshold": 1.0}, r"in \[0, 1\)"),
        ({"layers": False, "channels": False}, "gates nothing"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ThriftyError, match=message):
        LCNet(**settings)


def test_there_is_no_density_to_set() -> None:
    with pytest.raises(ThriftyError, match="no density to set"):
        small()[0].set_density(0.5)
