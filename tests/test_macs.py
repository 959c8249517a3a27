"""MACs per input, against what hooks find in the values themselves, against formulas, and one operator at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from randomised import randomise
from small_nets import NETS, SIZE
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.dynamic import Dynamic, decisions
from thrifty.errors import ThriftyError
from thrifty.gates import GatedConv
from thrifty.macs import MacCount, count_macs
from thrifty.methods.fbs import FBS
from thrifty.zoo.nets import build

M_CIFARNET = {1.0: 174.30, 0.9: 143.2, 0.8: 113.8, 0.7: 86.9, 0.6: 64.4, 0.5: 44.35, 0.4: 29.3, 0.3: 17.0}
"""M MACs by density, as METHODS states them; at density 1 of the dense network, else with gates."""


def dynamic_net(style: str, density: float, count: int = 5) -> tuple[Dynamic, Tensor]:
    x = torch.randn(count, 3, SIZE, SIZE, dtype=torch.float64) * 4 * torch.rand(count, 3, 1, 1, dtype=torch.float64)
    model = randomise(NETS[style](), x.float()).double()
    dynamic = convert(model, FBS(density=1.0, max_overhead=1e9), x)
    for gate in dynamic.gates().values():  # decide by input, and never scale a winner by zero
        nn.init.uniform_(gate.predictor.weight, 0, 4 / gate.predictor.in_features)
        nn.init.uniform_(gate.predictor.bias, 0.5, 1.5)
    dynamic.set_density(density)
    return dynamic, x


def observed(dynamic: Dynamic, x: Tensor) -> dict[str, list[int]]:
    """MACs by layer and input, from the zeros that each layer reads: whatever is not zero costs."""
    found: dict[str, list[int]] = {}

    def conv_cost(conv: nn.Conv2d, values: Tensor, decision: Tensor | None, output: Tensor) -> list[int]:
        costs = []
        for n in range(len(values)):
            cost = 0
            for o in range(conv.out_channels):
                if decision is not None and not decision[n, o]:
                    continue
                group = o // (conv.out_channels // conv.groups)
                width = conv.in_channels // conv.groups
                for i in range(group * width, (group + 1) * width):
                    if (values[n, i] != 0).any():
                        cost += conv.kernel_size[0] * conv.kernel_size[1] * output[n, o].numel()
            costs.append(cost)
        return costs

    def note(name: str, gated: GatedConv | None) -> Callable[..., None]:
        def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            values = inputs[0]
            if isinstance(layer, nn.Linear):
                costs = [int((row != 0).sum()) * layer.out_features for row in values]
            else:
                costs = conv_cost(layer, values, gated.gate(values)[1] if gated else None, output)
            rows = len(costs) // len(x)  # of each input: frames may be folded into the batch
            per_input = [sum(costs[i * rows : (i + 1) * rows]) for i in range(len(x))]
            found[name] = [a + b for a, b in zip(found.get(name, [0] * len(x)), per_input, strict=True)]

        return hook

    modules = dict(dynamic.named_modules())
    handles = []
    for name, module in modules.items():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.endswith(".predictor"):
            outer = name.removesuffix(".conv")
            gated = modules[outer] if outer != name and isinstance(modules[outer], GatedConv) else None
            handles.append(module.register_forward_hook(note(outer if gated else name, gated)))
    with torch.no_grad():
        dynamic(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("density", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("style", [name for name in NETS if name not in {"FunctionalConv", "WrittenView"}])
def test_count_equals_what_the_values_show(style: str, density: float) -> None:
    dynamic, x = dynamic_net(style, density)
    count = count_macs(dynamic, x)
    assert {name: part.tolist() for name, part in count.layers.items()} == observed(dynamic, x)
    assert torch.equal(count.total, sum(count.layers.values()) + count.gate_overhead)


def test_maps_of_which_a_view_was_written_to_count_as_active() -> None:
    """What is where can no longer be told: the count may be too high then, never too low."""
    dynamic, x = dynamic_net("WrittenView", 0.3)
    read = count_macs(dynamic, x).layers["c1.0"]
    dynamic.set_density({"c0.0": 1.0})
    assert torch.equal(read, count_macs(dynamic, x).layers["c1.0"])


@pytest.mark.parametrize("style", NETS)
def test_batch_equals_single_inputs(style: str) -> None:
    dynamic, x = dynamic_net(style, 0.5)
    together = count_macs(dynamic, x)
    alone = [count_macs(dynamic, row[None]) for row in x]
    assert together.total.tolist() == [count.total.item() for count in alone]
    for part in ("layers", "gates"):
        for name, costs in getattr(together, part).items():
            assert costs.tolist() == [getattr(count, part)[name].item() for count in alone]


def test_different_inputs_cost_differently() -> None:
    """Grouped convolutions read what the decisions left in each group: with a fixed k the cost still varies."""
    dynamic, x = dynamic_net("GroupedShuffle", 0.4, count=16)
    assert len(set(count_macs(dynamic, x).total.tolist())) > 2
    assert len({tuple(row.tolist()) for row in decisions(dynamic, x)["c0.0"].channels}) > 2


def test_dense_cost_of_a_gate_and_of_its_layer() -> None:
    dynamic, x = dynamic_net("NoNorm", 1.0)
    count = count_macs(dynamic, x)
    assert {name: set(cost.tolist()) for name, cost in count.layers.items()} == {
        "c1": {3 * 8 * 9 * 256}, "c2": {8 * 8 * 9 * 256}, "c3": {8 * 6 * 9 * 256}, "fc": {30},
    }  # fmt: skip
    assert {name: set(cost.tolist()) for name, cost in count.gates.items()} == {
        "c1": {3 * 256 + 3 * 8}, "c2": {8 * 256 + 8 * 8}, "c3": {8 * 256 + 8 * 6},
    }  # fmt: skip
    assert set(count.gate_overhead.tolist()) == {sum(cost[0].item() for cost in count.gates.values())}


@pytest.mark.parametrize(("density", "expected"), M_CIFARNET.items())
def test_m_cifarnet(density: float, expected: float) -> None:
    model, x = build("mcifarnet"), torch.randn(2, 3, 32, 32)
    if density == 1:
        assert count_macs(model, x).mean / 1e6 == pytest.approx(expected, abs=0.005)
    else:
        count = count_macs(convert(model, FBS(density=density), x), x)
        assert count.mean / 1e6 == pytest.approx(expected, rel=0.005)
        assert count.total.unique().numel() == 1  # k is fixed, and so is the cost


def test_loader_equals_batch() -> None:
    dynamic, x = dynamic_net("GroupedShuffle", 0.5, count=7)
    whole = count_macs(dynamic, x)
    labelled = count_macs(dynamic, [(x[:3], torch.zeros(3)), (x[3:], torch.zeros(4))])
    plain = count_macs(dynamic, iter([x[:6], x[6:]]))
    for count in (labelled, plain):
        assert torch.equal(count.total, whole.total)
        assert list(count.layers) == list(whole.layers)
        assert torch.equal(count.gate_overhead, whole.gate_overhead)


def test_distribution() -> None:
    totals = torch.arange(101) * 1000
    count = MacCount(totals, {}, {})
    assert count.mean == 50_000
    assert (count.percentile(5), count.percentile(50), count.percentile(95)) == (5000, 50_000, 95_000)
    assert count.gate_overhead.tolist() == [0] * 101
    assert "0.05 M MACs per input" in str(count)


def test_no_inputs() -> None:
    with pytest.raises(ThriftyError, match="no inputs"):
        count_macs(nn.Linear(2, 2), [])


@pytest.mark.parametrize("inputs", [torch.zeros(0, 3, SIZE, SIZE), [], [(torch.zeros(0, 3, SIZE, SIZE), None)]])
def test_empty_batches(inputs: Any) -> None:
    with pytest.raises(ThriftyError, match="no inputs"):
        count_macs(NETS["Functional"](), inputs)


def test_inputs_must_be_tensors() -> None:
    with pytest.raises(ThriftyError, match="torch tensors, not of ndarray"):
        count_macs(NETS["Functional"](), np.zeros((2, 3, SIZE, SIZE), np.float32))  # type: ignore[arg-type]


def test_model_is_left_as_it_was() -> None:
    dynamic, x = dynamic_net("Residual", 0.5)
    dynamic.train()
    dynamic.c1.norm.eval()
    before = {name: value.clone() for name, value in dynamic.state_dict().items()}
    modes = {name: module.training for name, module in dynamic.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in dynamic.named_modules()}
    count_macs(dynamic, x)
    assert all(torch.equal(value, before[name]) for name, value in dynamic.state_dict().items())
    assert modes == {name: module.training for name, module in dynamic.named_modules()}
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in dynamic.named_modules()}


def test_hooks_go_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(7, 2))
    with pytest.raises(RuntimeError):
        count_macs(model, torch.randn(1, 3, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Calls(nn.Module):
    """A gated map, an operation on it, and a convolution that reads the result."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.operation = nn.Conv2d(3, 8, 3, padding=1), nn.LazyConv2d(4, 1), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(self.first(x))).mean((2, 3))


def shares(operation: Callable[[Tensor], Tensor], size: int = 8) -> tuple[float, float]:
    """Share of the second convolution's inputs that are counted, and that have other values than zero."""
    x = torch.rand(2, 3, size, size)
    model = Calls(operation)
    model(x)
    dynamic = convert(model, FBS(density=0.5, where="first", max_overhead=1e9), x)
    dense = count_macs(model, x).layers["second"].double()
    seen: list[Tensor] = []
    dynamic.second.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].flatten(2).ne(0).any(2)))
    counted = count_macs(dynamic, x).layers["second"].double()
    return (counted / dense).mean().item(), seen[-1].double().mean().item()


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": lambda x: F.relu6(x.abs() + x),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_min": lambda x: x.clamp(min=-0.1),
    "hardswish": F.hardswish,
    "hardswish by hand": lambda x: x * F.relu6(x + 3) / 6,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "mish": F.mish,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.2])),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replication": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "zeros around": lambda x: F.pad(x, (1, 1, 1, 1)),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "unbind": lambda x: torch.stack(x.unbind(1), 1),
    "split": lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "shuffle": lambda x: F.channel_shuffle(x, 4),
    "unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "mask": lambda x: x * torch.arange(8).lt(4)[:, None, None],
    "layer scale": lambda x: x * torch.full((8, 1, 1), 2.0),
    "sum with itself": lambda x: x + x.abs(),
    "difference": lambda x: 3 * x - x.relu(),
    "quotient": lambda x: x / 3,
    "in place": lambda x: x.mul_(2).relu_().add_(x),
    "addcmul": lambda x: torch.addcmul(x, x, x),
}

LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "number": lambda x: x + 1,
    "weight": lambda x: x + torch.ones(8, 1, 1),
    "shifted clamp": lambda x: x.clamp(min=1),
    "shifted hardtanh": lambda x: F.hardtanh(x, 1.0, 2.0),
    "from a number": lambda x: 1 - x,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(1),
    "mean of channels": lambda x: x - x.mean(1, keepdim=True),
    "batch norm": lambda x: F.batch_norm(x, torch.ones(8), torch.ones(8)),
    "group norm": lambda x: F.group_norm(x, 1),
    "padded with one": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "in place": lambda x: x.clone().add_(1),
    "filled": lambda x: x.clone().fill_(1),
    "unfilled map": lambda x: torch.where(x > 0, x, torch.ones_like(x)),
}


@pytest.mark.parametrize("name", KEPT)
def test_operators_that_keep_zeros(name: str) -> None:
    counted, real = shares(KEPT[name])
    if name == "mask":
        assert real <= counted == 0.5  # constants are not looked at
    else:
        assert counted == real == 0.5


@pytest.mark.parametrize("name", LOST)
def test_operators_that_lose_zeros(name: str) -> None:
    assert shares(LOST[name]) == (1.0, 1.0)


def test_union_of_two_maps() -> None:
    """A sum is active where either operand is, a product where both are."""
    assert shares(lambda x: x + x.flip(1))[0] == shares(lambda x: x + x.flip(1))[1] >= 0.5
    assert shares(lambda x: x * x.flip(1))[0] == shares(lambda x: x * x.flip(1))[1] <= 0.5


def test_transposed_convolution() -> None:
    model = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
    assert count_macs(model, torch.randn(2, 6, 5, 5)).total.tolist() == [6 * 2 * 9 * 25] * 2


def test_attention_and_matrix_products() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, 2)
            return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0] @ v.transpose(1, 2)

    count = count_macs(Attention(), torch.randn(3, 5, 8))
    assert count.total.tolist() == [5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 5] * 3


def test_unknown_operator_is_warned_about_once() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(torch.fft.fft2(x).real).real

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = count_macs(Odd(), torch.randn(2, 3, 8, 8))
    told = [str(warning.message) for warning in caught]
    assert len(told) == len(set(told)) >= 1
    assert all("count_macs does not know aten." in text for text in told)
    assert count.total.tolist() == [0, 0]


def test_unknown_operator_makes_everything_active() -> None:
    with pytest.warns(UserWarning, match="does not know aten.*cumprod"):
        assert shares(lambda x: (x + 1).cumprod(1)) == (1.0, 1.0)
    with pytest.warns(UserWarning, match="does not know"):
        assert shares(lambda x: x.clone().erfinv_() + 1)[0] == 1.0


def batches(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(2)


def test_generator_of_batches() -> None:
    x = torch.randn(5, 3, 8, 8)
    assert count_macs(nn.Conv2d(3, 2, 3), batches(x)).total.tolist() == [3 * 2 * 9 * 36] * 5


class FilterOfEachInput(nn.Module):
    """A convolution whose filters follow from the input, as conditional convolutions compute it."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        filters = torch.ones(n, 5, c, 3, 3) * x.mean((2, 3))[:, None, :, None, None]
        return F.conv2d(x.reshape(1, n * c, h, w), filters.reshape(n * 5, c, 3, 3), groups=n).reshape(
            n, 5, h - 2, w - 2
        )


@pytest.mark.parametrize("count", [1, 2, 7])
def test_filters_of_each_inputs_own_cost_each_input_its_own(count: int) -> None:
    assert count_macs(FilterOfEachInput(), torch.randn(count, 4, 9, 8)).total.tolist() == [5 * 4 * 9 * 7 * 6] * count


@pytest.mark.parametrize("density", [None, 0.5])
def test_costs_are_the_same_in_inference_mode(density: float | None) -> None:
    x = torch.randn(3, 3, 32, 32)
    model: nn.Module = build("resnet8")
    if density is not None:
        model = convert(model, FBS(density=density), x)
    expected = count_macs(model, x)
    with torch.inference_mode():
        assert torch.equal(count_macs(model, torch.randn(3, 3, 32, 32)).total, expected.total)


def test_a_model_that_writes_to_its_input_leaves_the_callers_alone() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            return self.conv(x).mean((2, 3))

    x = torch.ones(2, 3, 8, 8)
    count_macs(Centred(), x)
    convert(Centred(), FBS(density=0.5, max_overhead=10.0), x)
    assert torch.equal(x, torch.ones_like(x))
    with torch.inference_mode():
        count_macs(Centred(), torch.ones(2, 3, 8, 8))
