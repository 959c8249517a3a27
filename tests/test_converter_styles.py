"""Conversion of small networks that are written in every style, layer by layer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from randomised import randomise
from small_nets import NETS, SIZE
from torch import Tensor, fx, nn

from thrifty.converter import convert
from thrifty.dynamic import Dynamic
from thrifty.errors import ThriftyError
from thrifty.gates import GatedConv
from thrifty.methods import FBS, AntiDote, LCNet, MethodConfig
from thrifty.zoo.nets import resnet20

ALL = FBS(density=1.0, max_overhead=1e9)

GATED = {
    "Functional": "c1 c2",
    "Rearranged": "c0.0 c1.0 c2.0",
    "FlattenedMap": "c.0",
    "Residual": "c0.0 c1 c2 c3 c4.0",
    "PaddedOnly": "c0.0 c1.0",
    "Concat": "c0.0 left.0 right.0 after.0",
    "SqueezeExcite": "c0.0 down up c1.0",
    "GroupedShuffle": "c0.0 c1.0 deep.0 c2.0 wide",
    "Split": "c0.0 c1.0 c2.0",
    "PreActivation": "c0 c1 c2",
    "NoNorm": "c1 c2 c3",
    "OddNorms": "c1 c2 c3 c4 c5 c6",
    "TwoReaders": "c0 c1.0 c2.0",
    "Shared": "c0.0 c1.0",
    "FunctionalConv": "c0.0 c1.0",
    "ConvHead": "c0.0",
    "Upsampled": "c0.0 low.0 high.0 c1.0",
    "Auxiliary": "c0.0 c1.0",
    "Alias": "c0 c1.0",
    "TiedNorms": "c0 c1",
    "ReadsAttributes": "c0 c1.0",
    "Branching": "c0.0 c1.0",
    "WrittenView": "c0.0 c1.0",
    "Frames": "c0.0 c1.0",
    "Sequential": "0.0 1.0",
}
"""The convolutions of each network that take a gate; all others stay dense."""

DENSE = {
    "Shared": ("twice", "its weights are used at several places"),
    "FunctionalConv": ("conv2d", "called as a function: make it an nn.Conv2d to gate it"),
    "ConvHead": ("head", "its channels are the model's outputs"),
    "Auxiliary": ("aux.0", "evaluation does not reach it"),
    "Branching": ("part.c.0", "torch.fx cannot trace Part, which holds it"),
}

LIMITED = {
    "SqueezeExcite": {"up": "sigmoid"},
    "PreActivation": {"c0": "BatchNorm2d", "c1": "", "c2": "BatchNorm2d"},
    "OddNorms": {"c1": "", "c2": "", "c3": "GroupNorm", "c4": "", "c5": "LayerNorm", "c6": ""},
    "TwoReaders": {"c0": "BatchNorm2d", "c1.0": ""},
    "TiedNorms": {"c0": "BatchNorm2d", "c1": "BatchNorm2d"},
    "Branching": {"c0.0": "Part", "c1.0": ""},
    "Residual": dict.fromkeys(("c0.0", "c1", "c2", "c3", "c4.0"), ""),
    "GroupedShuffle": dict.fromkeys(("c0.0", "c1.0", "deep.0", "c2.0", "wide"), ""),
    "Concat": dict.fromkeys(("c0.0", "left.0", "right.0", "after.0"), ""),
    "Upsampled": dict.fromkeys(("c0.0", "low.0", "high.0", "c1.0"), ""),
}
"""What stands behind a gate and keeps its readers from skipping ('' where nothing does)."""


def small(style: str) -> tuple[nn.Module, Tensor]:
    x = torch.randn(4, 3, SIZE, SIZE)
    return randomise(NETS[style](), x), x


def converted(style: str, density: float = 1.0) -> tuple[Dynamic, nn.Module, Tensor]:
    model, x = small(style)
    dynamic = convert(model, ALL, x)
    dynamic.set_density(density)
    return dynamic, model, x


def error(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("style", NETS)
def test_function_is_preserved(style: str) -> None:
    dynamic, model, x = converted(style)
    with torch.no_grad():
        assert error(dynamic(x), model(x)) <= 1e-5
        dynamic, model = dynamic.double(), model.double()
        assert error(dynamic(x.double()), model(x.double())) <= 2e-6  # the scales were divided in float32


@pytest.mark.parametrize("style", NETS)
def test_function_is_preserved_exactly_in_float64(style: str) -> None:
    model, x = small(style)
    model, x = model.double(), x.double()
    with torch.no_grad():
        assert error(convert(model, ALL, x)(x), model(x)) <= 1e-13


@pytest.mark.parametrize("style", NETS)
def test_function_is_preserved_in_training(style: str) -> None:
    """Batch statistics in place of running ones, and the same running ones after the step."""
    dynamic, model, x = converted(style)
    for module in (*dynamic.modules(), *model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given, expected = dynamic.train()(x), model.train()(x)
    for left, right in zip(given, expected, strict=True) if isinstance(given, tuple) else [(given, expected)]:
        assert error(left, right) <= 1e-5
    old = {name: value for name, value in model.named_buffers() if name.endswith("running_mean")}
    new = [value for name, value in dynamic.named_buffers() if name.endswith("running_mean")]
    assert len(new) == len(old)


@pytest.mark.parametrize("style", NETS)
def test_which_layers_are_gated(style: str) -> None:
    dynamic, model, _ = converted(style)
    assert list(dynamic.gates()) == GATED[style].split()
    places = {place.name: place for place in dynamic.conversion.places}
    assert [name for name, place in places.items() if place.gated] == list(dynamic.gates())
    for name, place in places.items():
        expected = LIMITED.get(style, {}).get(name)
        if place.gated and expected is not None:
            assert place.note == (f"skips its own work only: {expected} follows" if expected else "")
    if style in DENSE:
        name, reason = DENSE[style]
        assert (places[name].gated, places[name].note) == (False, reason)
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert set(convs) <= set(places)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("style", NETS)
def test_skipped_channels_are_zero(style: str, training: bool) -> None:
    dynamic, _, x = converted(style, density=0.4)
    checked = []

    def check(gated: GatedConv, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, decision = gated.gate(*inputs)
        assert decision.sum(1).eq(-(-4 * gated.gate.channels // 10)).all()
        assert (output[~decision] == 0).all()
        checked.append(gated)

    for module in dynamic.modules():
        if isinstance(module, GatedConv):
            module.register_forward_hook(check)
    dynamic.train(training)(x)
    assert len(checked) == len(dynamic.gates())


@pytest.mark.parametrize("style", NETS)
def test_batch_equals_single_inputs(style: str) -> None:
    dynamic, _, x = converted(style, density=0.5)
    with torch.no_grad():
        together = dynamic(x)
        alone = torch.cat([dynamic(x[i : i + 1]) for i in range(len(x))])
    assert error(together, alone) <= 1e-6


@pytest.mark.parametrize("style", NETS)
def test_gradients_reach_every_parameter_that_they_reached(style: str) -> None:
    dynamic, model, x = converted(style)
    for net in (model, dynamic):
        output = net.train()(x)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
    had = {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in dynamic.named_parameters():
        plain = name.replace(".conv.", ".") if name not in had else name
        if parameter.requires_grad and (plain in had or ".gate." in name):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_a_copy_is_independent() -> None:
    dynamic, _, x = converted("Residual", density=0.5)
    twin = copy.deepcopy(dynamic)
    twin.set_density(1.0)
    assert (dynamic.density, twin.density) == (pytest.approx(0.5, abs=0.02), 1.0)
    with torch.no_grad():
        assert error(twin(x), dynamic(x)) > 1e-2


class Named(nn.Module):
    """Calls a convolution with its map by name, and another with a factor beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), Scaled(8, 8, 3)
        self.d, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(input=torch.relu(self.a(x))))
        return self.fc(self.d(torch.relu(self.c(x, 2.0))).mean((2, 3)))


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return factor * super().forward(x)


def test_convolutions_that_are_called_otherwise_stay_dense() -> None:
    model, x = Named().eval(), torch.randn(2, 3, 16, 16)
    dynamic = convert(model, FBS(density=1.0, max_overhead=9), x)
    reasons = {place.name: place.note for place in dynamic.conversion.places if not place.gated}
    assert {name for name, reason in reasons.items() if "called otherwise" in reason} == {"b", "c"}
    torch.testing.assert_close(dynamic(x), model(x))


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps])
def test_a_traced_model_says_that_it_cannot_be_copied(copier: Callable[[Any], Any]) -> None:
    traced = fx.symbolic_trace(resnet20().eval())
    dynamic = convert(traced, FBS(density=0.5), torch.zeros(1, 3, 32, 32), inplace=True)
    with pytest.raises(ThriftyError, match=r"fx\.GraphModule"):
        copier(dynamic)


@pytest.mark.parametrize("method", [FBS(density=0.5), AntiDote(channels=0.5, columns=0.5), LCNet()])
def test_an_empty_batch_gives_an_empty_answer(method: MethodConfig) -> None:
    dynamic = convert(resnet20().eval(), method, torch.zeros(1, 3, 32, 32))
    with torch.no_grad():
        assert dynamic(torch.zeros(0, 3, 32, 32)).shape == (0, 10)
