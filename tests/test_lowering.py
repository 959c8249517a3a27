"""Lowering of small networks: what operators come out, under which names, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_gates import randomly_gated
from randomised import randomise
from small_nets import NETS
from torch import Tensor, nn

import thrifty
from thrifty.converter import convert
from thrifty.decision import Decision
from thrifty.dynamic import decisions
from thrifty.errors import LoweringError
from thrifty.gates import ChannelGate, LoweredGate
from thrifty.lowering import lower
from thrifty.lowering.rules import RULES
from thrifty.lowering.values import Tracked
from thrifty.macs import count_macs
from thrifty.methods.antidote import AntiDote
from thrifty.methods.fbs import FBSGate
from thrifty.program import Preprocessing, Program
from thrifty.reference import run_reference

REFUSED = {
    "OddNorms": "native_group_norm in b3 .*small_nets.py:[0-9]+. is not supported",
    "Upsampled": r"upsample_nearest2d in the model .*resizes a map from \[4, 4\] to \[8, 8\]",
    "Branching": "abs in part .*is not supported",
    "WrittenView": "convolution in c1.0 .*a tensor of which a part was changed in place",
    "Frames": "convolution in c0.0 .*mixes the images of a batch",
}


class Written(nn.Module):
    """A network whose forward is a function of itself and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.conv, self.deep = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.point, self.norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(4)
        self.bn, self.fc, self.ln = nn.BatchNorm2d(4), nn.Linear(4, 7), nn.LayerNorm(4, eps=1e-3)
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 0.0, 2.0]).reshape(4, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def then(value: Any, function: Callable[[Any], Any]) -> Any:
    return function(value)


def check(net: nn.Module, x: Tensor, kinds: str | None = None) -> Program:
    """Lowered, it computes what it computed before, with the MACs that are counted, in operators of these kinds."""
    randomise(net, x)
    with torch.no_grad():
        expected = net.double()(x.double()).numpy()
    program = lower(net, x.double())
    result = run_reference(program, x.double().numpy())
    assert result.output.shape == expected.shape
    # Folded weights are rounded to float32: that is all that differs.
    assert np.abs(result.output - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.abs(expected).max() > 0
    counted: dict[str, Any] = {}
    for name, macs in result.macs.items():
        plain = re.sub("#.*", "", name).replace("model", "")
        counted[plain] = counted.get(plain, 0) + macs
    layers = count_macs(net, x.double()).layers
    assert {name: macs.tolist() for name, macs in counted.items()} == {n: m.tolist() for n, m in layers.items()}
    if kinds is not None:
        assert " ".join(operator.kind for operator in program.operators) == kinds
    return program


CASES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "batch norm folds": (lambda m, x: F.relu(m.norm(m.conv(x))), "conv"),
    "a norm before its convolution does not": (lambda m, x: m.conv(F.relu(m.norm(x))), "affine conv"),
    "a norm beside another reader": (lambda m, x: then(m.conv(x), lambda y: m.norm(y) * y), "conv affine mul"),
    "norm of norm": (lambda m, x: m.norm(m.bn(x)), "affine"),
    "numbers": (lambda m, x: 1 - (2 * x + 1) / 4, "affine"),
    "negation and subtraction": (lambda m, x: -m.conv(x) - x * 3, "affine conv"),
    "residual": (lambda m, x: F.relu(m.norm(m.conv(x)) + x), "conv"),
    "residual, in place, convolution second": (lambda m, x: F.relu_(x.clone().add_(m.conv(x))), "conv"),
    "two convolutions: the later one adds": (lambda m, x: m.conv(x) + m.deep(F.relu(x)), "conv activation conv"),
    "a sum with itself": (lambda m, x: then(m.conv(x), lambda y: y + y), "conv add"),
    "layer scale": (lambda m, x: m.conv(x) * m.scale + x, "conv"),
    "squeeze and excite": (lambda m, x: x * torch.sigmoid(m.conv(x.mean((2, 3), True))), "adaptive_avg_pool conv mul"),
    "... expanded": (
        lambda m, x: x * F.hardsigmoid(m.conv(F.adaptive_avg_pool2d(x, 1))).expand_as(x),
        "adaptive_avg_pool conv mul",
    ),
    "... by a vector": (
        lambda m, x: torch.sigmoid(m.fc(x.mean((2, 3))))[:, :4, None, None].contiguous() * x,
        "adaptive_avg_pool linear gather mul",
    ),
    "attention over positions": (lambda m, x: x * torch.sigmoid(m.point(x)[:, 2:3]), "conv gather activation mul"),
    "channels last": (lambda m, x: m.fc(m.ln(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2), "layer_norm conv"),
    "... with a scale": (
        lambda m, x: (m.fc(x.movedim(1, -1))[..., :4] * m.scale.flatten()).movedim(-1, 1),
        "conv gather affine",
    ),
    "... pooled": (lambda m, x: m.fc(m.ln(x.permute(0, 2, 3, 1)).mean((1, 2))), "layer_norm adaptive_avg_pool linear"),
    "... a sum of both": (lambda m, x: x + m.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "layer_norm add"),
    "positions in a row": (lambda m, x: m.fc(x.flatten(2).transpose(1, 2)).mean(1), "conv adaptive_avg_pool"),
    "mean over rows, then columns": (lambda m, x: x.mean(3).mean(2), "adaptive_avg_pool adaptive_avg_pool"),
    "sum over positions": (lambda m, x: m.conv(x).sum((2, 3)), "conv adaptive_avg_pool affine"),
    "maximum over positions": (lambda m, x: m.fc(x.amax((2, 3))), "adaptive_max_pool linear"),
    "flatten": (lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), "adaptive_avg_pool linear"),
    "a map as features": (lambda m, x: x.flatten(1), "flatten"),
    "a map as features, channels last": (lambda m, x: x.permute(0, 2, 3, 1).flatten(1), "flatten gather"),
    "shuffle": (lambda m, x: m.conv(F.channel_shuffle(m.conv(x), 2)), "conv gather conv"),
    "slices, chunks, index": (
        lambda m, x: torch.cat([x[:, 1:3], x.chunk(2, 1)[1], x.index_select(1, torch.tensor([3, 0])), x[:, [2]]], 1),
        "gather gather gather gather concat",
    ),
    "split and joined": (
        lambda m, x: m.conv(torch.cat(x.split(1, 1), 1)),
        "gather gather gather gather concat conv",
    ),
    "stack, then a view": (lambda m, x: torch.stack([x, m.conv(x)], 1).flatten(1, 2), "conv concat"),
    "stack, interleaved": (lambda m, x: torch.stack([x, m.conv(x)], 2).flatten(1, 2), "conv concat gather"),
    "padding for one convolution": (lambda m, x: m.conv(F.pad(x, (1, 0, 2, 1))), "conv"),
    "padding for two readers": (lambda m, x: then(F.pad(x, (1, 0, 2, 1)), lambda y: m.conv(y) + y), "pad conv"),
    "padding with ones": (lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), value=1.0)), "pad conv"),
    "padding of channels": (lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2)), "gather"),
    "padding of a pool": (lambda m, x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 2), "max_pool"),
    "zeros beside": (lambda m, x: torch.cat([x, torch.zeros_like(x[:, :2])], 1), "gather"),
    "option A": (lambda m, x: F.pad(m.conv(x)[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)), "conv max_pool gather"),
    "strides of odd sizes": (lambda m, x: x[:, :, ::3, ::2], "max_pool"),
    "pools": (
        lambda m, x: F.avg_pool2d(F.max_pool2d(x, 3, 2, 1, ceil_mode=True), 2, 1, 1, True, False),
        "max_pool avg_pool",
    ),
    "a pool that changes nothing": (lambda m, x: m.conv(F.adaptive_avg_pool2d(x, x.shape[2:])), "conv"),
    "activations": (
        lambda m, x: F.gelu(F.silu(F.hardswish(F.relu6(F.leaky_relu(torch.tanh(m.conv(x)), 0.3)))), approximate="tanh"),
        "conv activation activation activation activation activation",
    ),
    "clamps": (lambda m, x: m.conv(x).clamp(0, 6) + F.hardtanh(x, 0, 6), "conv activation add"),
    "dropout": (lambda m, x: F.dropout2d(F.dropout(m.conv(x), 0.5, m.training), 0.5, m.training), "conv"),
    "constants are folded": (lambda m, x: F.conv2d(x, (m.conv.weight - m.conv.weight.mean()) * 2, m.conv.bias), "conv"),
    "matrix product": (lambda m, x: x.mean((2, 3)) @ m.fc.weight.t(), "adaptive_avg_pool linear"),
    "dead ends": (lambda m, x: (m.conv(x), m.deep(x))[1] if m.point(x) is not None else None, "conv"),
    "square": (lambda m, x: x**2 + x * x, "mul mul add"),
    "an in-place change of a view of everything": (
        lambda m, x: then(m.conv(x), lambda y: F.relu_(y.view(-1)) is None or y),
        "conv",
    ),
    "... of half of it, which alone is read": (
        lambda m, x: then(m.conv(x).chunk(2, 1), lambda a: (F.relu_(a[0]), a[1])[1]), "conv gather",
    ),
    "... both halves": (
        lambda m, x: then(m.conv(x).chunk(2, 1), lambda a: torch.cat([F.relu_(a[0]), a[1]], 1)),
        "conv gather activation gather concat",
    ),
    "nothing": (lambda m, x: x, "activation"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_small_networks(case: str) -> None:
    function, kinds = CASES[case]
    net = Written(function)
    x = torch.randn(3, 4, 7, 6)
    if case == "dead ends":
        assert [o.name for o in lower(net, x).operators] == ["deep"]
    else:
        check(net, x, kinds)


@pytest.mark.parametrize("name", sorted(set(NETS) - set(REFUSED)))
def test_styles(name: str) -> None:
    check(NETS[name](), torch.randn(3, 3, 16, 16))


@pytest.mark.parametrize("name", sorted(set(NETS) - set(REFUSED)))
@torch.no_grad()
def test_gated_styles(name: str) -> None:
    """Output, decisions, and executed MACs of layers and gates."""
    x = torch.randn(3, 3, 16, 16)
    dynamic = randomly_gated(randomise(NETS[name](), x), x)
    program = lower(dynamic, x)
    assert set(program.gated) == set(dynamic.gates())
    forced = {name: Decision(channels=d.channels.numpy()) for name, d in decisions(dynamic, x).items()}
    result = run_reference(program, x.numpy(), forced)
    expected = dynamic(x).numpy()
    assert np.abs(result.output - expected).max() <= 1e-5 * np.abs(expected).max()
    count = count_macs(dynamic, x)
    assert {name: macs.tolist() for name, macs in result.gate_macs.items()} == {
        name: macs.tolist() for name, macs in count.gates.items()
    }
    layers: dict[str, Any] = {}
    for layer, macs in result.macs.items():
        plain = re.sub("#.*", "", layer).replace("model", "")
        layers[plain] = layers.get(plain, 0) + macs
    assert {name: macs.tolist() for name, macs in layers.items()} == {n: m.tolist() for n, m in count.layers.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_styles(name: str) -> None:
    with pytest.raises(LoweringError, match=f"{REFUSED[name]}(.|\n)*Supported are: conv2d, linear"):
        lower(NETS[name](), torch.randn(2, 3, 16, 16))


REFUSED_CASES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "branches": (lambda m, x: x if x[0, 0, 0, 0] > 0 else -x, "gt in the model .*is not supported"),
    "item": (lambda m, x: x * x.mean((2, 3))[0, 0].item(), "_local_scalar_dense .*must not depend on values"),
    "mixes images by mean": (lambda m, x: x - x.mean(0, keepdim=True), "mean .*mixes the images"),
    "mixes images by order": (lambda m, x: m.conv(x.flip(0)), "convolution in conv .*mixes the images"),
    "mixes images by a view": (lambda m, x: m.conv(x.reshape(-1, 4, 7, 12)), "mixes the images"),
    "batch statistics": (lambda m, x: F.batch_norm(x, None, None, training=True), "batch's own statistics"),
    "softmax": (lambda m, x: x.softmax(1), "_softmax .*is not supported"),
    "weights from the input": (lambda m, x: F.conv2d(x, x[:1]), "takes a weight that depends on the input"),
    "transposed": (lambda m, x: F.conv_transpose2d(x, m.conv.weight), "is a transposed convolution"),
    "one dimension": (lambda m, x: F.conv1d(x.mean(3), m.conv.weight[..., 0]), "is a 1-d convolution"),
    "constant over positions": (lambda m, x: x + torch.arange(6.0), "varies over its positions"),
    "written into a constant": (lambda m, x: torch.zeros(2, 8, 7, 6)[:, :4].copy_(x), "copy_ .*is not supported"),
    "a constant in place": (lambda m, x: torch.zeros(x.shape).add_(x), "into a constant"),
    "integers": (lambda m, x: x.int(), "turns values into torch.int32"),
    "crop": (lambda m, x: m.conv(x[:, :, 1:, 1:]), "cropped"),
    "space to depth": (lambda m, x: m.conv(F.pixel_shuffle(x, 2).expand(-1, 4, -1, -1)), "moved between channels"),
    "limits": (lambda m, x: x.clamp(-1, 1), r"limits values to \[-1, 1\]"),
    "dropout that is always on": (lambda m, x: F.dropout(x), "draws at random, .* training=self.training"),
    "noise": (lambda m, x: x + torch.randn_like(x), "randn_like .*draws at random"),
    "powers": (lambda m, x: x**3, "power 3"),
    "indices of maxima": (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1] * 1.0, "indices of maxima"),
    "quotients": (lambda m, x: x / (x * x + 1), "divides by values"),
    "a stale view": (lambda m, x: then(m.conv(x), lambda y: (F.relu_(y[:, :2]), m.deep(y))[1]), "changed in place"),
}


@pytest.mark.parametrize("case", REFUSED_CASES)
def test_refusals_name_operation_layer_and_place(case: str) -> None:
    function, message = REFUSED_CASES[case]
    with pytest.raises(LoweringError, match=message) as caught:
        lower(Written(function), torch.randn(1, 4, 7, 6))
    assert "test_lowering.py:" in str(caught.value)
    assert "Supported are: conv2d, linear" in str(caught.value)


def test_refusals_of_gates_name_layer_and_place() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 4, 3))
    x = torch.randn(1, 3, 9, 9)
    with pytest.raises(LoweringError, match=r"the gate in 2 \(.+\) takes values that were moved"):
        lower(convert(net, AntiDote(channels=0.5, where="2"), x), x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: (x, x), "returns a tuple, but programs return one tensor"),
        (lambda m, x: torch.zeros(2), "does not depend on its input"),
        (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1], "returns indices of maxima"),
        (lambda m, x: x.flatten(2), r"what the model returns takes a tensor of shape \['N', 4, 42\]"),
        (lambda m, x: m.point(m.point(x)), r"does not take an example of shape \(1, 4, 7, 6\)"),
    ],
)
def test_refused_outputs(function: Any, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        lower(Written(function), torch.randn(1, 4, 7, 6))


def test_a_rule_that_fails_is_not_laid_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_call: object) -> Tracked:
        raise KeyError("size")

    monkeypatch.setitem(RULES, torch.ops.aten.relu, broken)
    with pytest.raises(LoweringError, match=r"relu in the model \(.+\) made thrifty fail: KeyError: 'size'. This"):
        lower(nn.ReLU(), torch.randn(1, 4, 7, 6))


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (3, torch.zeros(1, 3, 8, 8), "takes a torch.nn.Module, not a int"),
        (nn.ReLU(), torch.zeros(3, 8, 8), "must be a batch of float images"),
        (nn.ReLU(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "must be a batch of float images"),
        (nn.ReLU(), np.zeros((1, 3, 8, 8)), "not ndarray"),
        (nn.ReLU(), torch.zeros(0, 3, 8, 8), "example is empty"),
    ],
)
def test_wrong_arguments(model: Any, example: Any, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        lower(model, example)


def test_a_gate_without_a_lowered_form_is_named() -> None:
    class Fixed(ChannelGate):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            decision = torch.ones(len(x), self.channels, dtype=torch.bool)
            return decision.float(), decision

        def overhead(self, shape: torch.Size) -> int:
            return 0

        def lower(self, shape: tuple[int, int, int]) -> LoweredGate:
            raise LoweringError("it is fixed")

    dynamic = randomly_gated(NETS["NoNorm"](), torch.randn(2, 3, 16, 16))
    dynamic.c2.gate = Fixed(8)
    with pytest.raises(LoweringError, match=r"mul in c2 .*gated by c2\.gate, which cannot be lowered: it is fixed"):
        lower(dynamic, torch.randn(1, 3, 16, 16))


def test_a_gate_on_other_things_than_a_convolution_is_refused() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(4, 4, 1), FBSGate(4, 4, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x)) * self.gate(x)[0][:, :, None, None]

    with pytest.raises(LoweringError, match="does not scale the output of a convolution"):
        lower(Late(), torch.randn(1, 4, 7, 6))


def test_what_the_program_says_of_the_model() -> None:
    x = torch.randn(1, 3, 16, 16)
    program = lower(NETS["Sequential"](), x, Preprocessing((0.5,) * 3, (0.2,) * 3), ("a", "b", "c", "d", "e"))
    assert [operator.name for operator in program.operators] == ["0.0", "1.0", "2", "4"]
    assert program.method is None
    assert program.classes == ("a", "b", "c", "d", "e")
    dynamic = thrifty.convert(NETS["Sequential"](), thrifty.FBS(density={"1.*": 0.5}, where=lambda *_: True), x)
    method = lower(dynamic, x).method
    assert method is not None
    assert (method["name"], method["density"], method["where"]) == ("fbs", {"1.*": 0.5}, None)
    assert lower(dynamic, x).operators[1].attributes["winners"] == 6


def test_the_model_is_left_as_it_was() -> None:
    net = randomise(NETS["Residual"](), torch.randn(2, 3, 16, 16)).train()
    net.c1.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    x = torch.randn(1, 3, 16, 16)
    kept = x.clone()
    program = lower(net, x)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(x, kept)
    with torch.no_grad():
        net.fc.weight.zero_()
    assert program.tensors["fc.weight"].any()


def test_shared_weights_are_stored_once() -> None:
    program = lower(Written(lambda m, x: m.deep(F.relu(m.deep(x)))), torch.randn(1, 4, 7, 6))
    assert [operator.name for operator in program.operators if operator.kind == "conv"] == ["deep", "deep#2"]
    assert set(program.tensors) == {"deep.weight", "deep.bias"}


def test_hooks_of_the_user_are_part_of_the_network() -> None:
    net = Written(lambda m, x: m.conv(x))
    net.conv.register_forward_hook(lambda _m, _i, output: output * 3)
    check(net, torch.randn(2, 4, 7, 6), "conv")
