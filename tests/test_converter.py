"""What convert promises about the model that it takes and the one that it gives back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from randomised import randomise
from small_nets import NETS, SIZE, Net, act, conv
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.dynamic import Dynamic, decisions
from thrifty.errors import ConversionError, ThriftyError
from thrifty.gates import GatedConv
from thrifty.methods import FBS, AntiDote, LCNet

METHOD = FBS(density=0.5, max_overhead=9.0)


class Model(Net):
    """At module level, where pickle finds it."""

    def __init__(self) -> None:
        super().__init__(c0=conv(3, 8), b0=nn.BatchNorm2d(8), c1=conv(8, 8), b1=nn.BatchNorm2d(8), fc=nn.Linear(8, 5))

    def features(self, x: Tensor) -> Tensor:
        x = act(self.b0(self.c0(x)))
        return act(self.b1(self.c1(x)) + x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def net() -> tuple[Any, Tensor]:
    x = torch.randn(3, 3, SIZE, SIZE)
    return randomise(Model(), x), x


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_original_is_untouched() -> None:
    model, x = net()
    model.train()
    model.b1.eval()
    model.c1.weight.requires_grad_(False)
    before, modules = state(model), dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    dynamic = convert(model, METHOD, x)
    assert type(model) is Model
    assert dict(model.named_modules()) == modules
    assert same(state(model), before)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in dynamic.parameters()}


def test_inplace_keeps_identity() -> None:
    model, x = net()
    c0, weight, fc, norm = model.c0, model.c0.weight, model.fc, model.b0
    dynamic = convert(model, METHOD, x, inplace=True)
    assert dynamic is model
    assert isinstance(model, Model)
    assert isinstance(model, Dynamic)
    assert model.fc is fc
    assert model.c0.conv is c0
    assert model.c0.conv.weight is weight
    assert model.c0.norm is norm


def test_names_of_what_is_not_touched() -> None:
    model, x = net()
    dynamic = convert(model, FBS(where="c1", max_overhead=9.0), x)
    kept = {name for name in model.state_dict() if not name.startswith(("c1", "b1"))}
    assert kept <= set(dynamic.state_dict())
    assert all(torch.equal(dynamic.state_dict()[name], model.state_dict()[name]) for name in kept)


def test_modes_of_each_module() -> None:
    """A frozen normalisation in a network that trains stays frozen."""
    model, x = net()
    model.train()
    model.b0.eval()
    dynamic = convert(model, METHOD, x)
    assert [m.training for m in (dynamic, dynamic.c0, dynamic.c0.conv, dynamic.c0.gate, dynamic.c1.norm)] == [True] * 5
    assert [m.training for m in (dynamic.c0.norm, dynamic.b0)] == [False, False]
    before = dynamic.c0.norm.running_mean.clone()
    dynamic(x)
    assert torch.equal(dynamic.c0.norm.running_mean, before)
    assert not any(module.training for module in convert(model.eval(), METHOD, x).modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    model, x = net()
    model, x = model.to(dtype), x.to(dtype)
    dynamic = convert(model, FBS(density=1.0, max_overhead=9.0), x)
    assert {p.dtype for p in dynamic.parameters()} == {dtype}
    output = dynamic(x)
    assert output.dtype == dtype
    bound = 1e-13 if dtype == torch.float64 else 0.1
    assert ((output - model(x)).abs().max() / model(x).abs().max()).item() < bound


def test_device() -> None:
    """No second device need be there: shapes on the meta device show where tensors are made."""
    model, x = net()
    dynamic = convert(model, METHOD, x).to("meta")
    assert dynamic(x.to("meta")).device.type == "meta"
    assert {p.device.type for p in dynamic.parameters()} == {"meta"}


def test_hooks_fire_once() -> None:
    model, x = net()
    fired: list[str] = []
    for name in ("", "c0", "b0", "c1", "b1", "fc"):
        model.get_submodule(name).register_forward_hook(lambda _m, _i, _o, name=name: fired.append(name))
    dynamic = convert(model, METHOD, x)
    fired.clear()
    dynamic(x)
    assert sorted(fired) == ["", "b0", "b1", "c0", "c1", "fc"]


def test_pickles_and_copies() -> None:
    model, x = net()
    dynamic = convert(model, METHOD, x)
    dynamic.train()(x)  # leaves a loss term behind, which belongs to this pass alone
    dynamic.eval().set_density({"c0": 0.25, "c1": 0.75})
    buffer = io.BytesIO()
    torch.save(dynamic, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic)), torch.load(buffer, weights_only=False)]  # noqa: S301
    for twin in twins:
        assert isinstance(twin, Model)
        assert isinstance(twin, Dynamic)
        assert (twin.method, twin.conversion) == (dynamic.method, dynamic.conversion)
        assert same(state(twin), state(dynamic))
        assert torch.equal(twin(x), dynamic(x))
        assert [gate.density for gate in twin.gates().values()] == [0.25, 0.75]
        twin.set_density(1.0)
    assert [gate.density for gate in dynamic.gates().values()] == [0.25, 0.75]


@pytest.mark.parametrize("style", ["Residual", "Concat", "SqueezeExcite", "OddNorms"])
def test_export(style: str) -> None:
    x = torch.randn(3, 3, SIZE, SIZE)
    dynamic = convert(randomise(NETS[style](), x), METHOD, x).eval()
    program = torch.export.export(dynamic, (x,))
    other = torch.randn_like(x)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), dynamic(other), rtol=1e-6, atol=1e-6)


def test_state_dict_round_trip() -> None:
    model, x = net()
    dynamic = convert(model, METHOD, x)
    dynamic.set_density({"c0": 0.25})
    other = convert(net()[0], FBS(density=1.0, init="paper", max_overhead=9.0), x)
    result = other.load_state_dict(dynamic.state_dict(), strict=True)
    assert not (result.missing_keys)
    assert not (result.unexpected_keys)
    with torch.no_grad():
        assert torch.equal(other(x), dynamic(x))


def test_training_heads_of_googlenet() -> None:
    x = torch.randn(2, 3, 64, 64)
    model = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True)
    output = convert(model, FBS(density=0.5), x).train()(x)
    assert output.logits.shape == output.aux_logits1.shape == output.aux_logits2.shape == (2, 1000)
    sum(part.square().mean() for part in output).backward()


def test_where() -> None:
    model, x = net()
    for where in ("c1", ("c1", "nothing"), lambda name, module: name == "c1" and isinstance(module, nn.Conv2d)):
        dynamic = convert(model, FBS(where=where, max_overhead=9.0), x)
        assert list(dynamic.gates()) == ["c1"]
        assert dynamic.conversion.places[0].note == "not selected by where="
    assert list(convert(model, FBS(where="c?", max_overhead=9.0), x).gates()) == ["c0", "c1"]


def test_density_that_names_no_layer() -> None:
    model, x = net()
    for inplace in (False, True):
        with pytest.raises(ThriftyError, match=r"'c7' fits the name of no gated layer.*They are: c0, c1"):
            convert(model, FBS(density={"c0": 0.5, "c7": 0.5}, max_overhead=9.0), x, inplace=inplace)
    assert type(model) is Model
    assert not any(isinstance(module, GatedConv) for module in model.modules())


def test_report() -> None:
    model, x = net()
    conversion = convert(model, FBS(where="c1", max_overhead=9.0), x).conversion
    cost = 8 * 8 * 9 * SIZE * SIZE
    total = 3 * 8 * 9 * SIZE * SIZE + cost + 8 * 5
    assert conversion.total_macs == total
    assert conversion.coverage == pytest.approx(cost / total)
    text = str(conversion)
    assert "not selected by where=" in text
    assert f"{cost:,}" in text
    assert conversion.summary() == f"fbs: 1 of 2 layers gated, {cost / total:.1%} of {total / 1e6:,.2f} M MACs"


class Untraceable(Net):
    def __init__(self) -> None:
        super().__init__(c0=conv(3, 8), fc=nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.c0(x)
        if x.sum() > 0:
            x = -x
        return self.fc(x.mean((2, 3)))


class Clashing(Model):
    def gates(self) -> None:
        """A meaning of its own."""


def broken(model: Any) -> Any:
    with torch.no_grad():
        model.c1.weight[0, 0, 0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (lambda: broken(Model()), torch.randn(1, 3, 16, 16), "c1.weight of the model has NaN"),
        (Model, torch.randn(3, 16, 16), r"must be a batch of inputs \[N, C, H, W\], not \(3, 16, 16\)"),
        (Model, [1, 2], r"must be a batch of inputs \[N, C, H, W\], not list"),
        (Model, torch.randn(0, 3, 16, 16), "empty batch"),
        (Model, torch.randn(1, 4, 16, 16), r"does not take an example of shape \(1, 4, 16, 16\)"),
        (lambda: "resnet18", torch.randn(1, 3, 16, 16), "takes a torch.nn.Module, not a str"),
        (Untraceable, torch.randn(1, 3, 16, 16), "torch.fx cannot trace Untraceable"),
        (Clashing, torch.randn(1, 3, 16, 16), "members of its own named gates"),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3)), torch.randn(1, 3, 16, 16), "has no values yet"),
    ],
)
def test_errors(model: Any, example: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(model(), METHOD, example)


@pytest.mark.parametrize("method", ["fbs", None, FBS], ids=str)
def test_a_method_must_be_a_config(method: Any) -> None:
    with pytest.raises(ConversionError, match="must be a method's config, such as"):
        convert(Model(), method, torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("method", [FBS(where="layr*"), LCNet(where=["c9", "layr*"]), AntiDote(where="layr*")], ids=str)
def test_patterns_that_select_nothing(method: Any) -> None:
    with pytest.raises(ConversionError, match=r"where=.*layr.* leaves no layer gated"):
        convert(Model(), method, torch.randn(1, 3, 16, 16))


def test_compiled_models_are_refused() -> None:
    with pytest.raises(ConversionError, match="convert the model before"):
        convert(torch.compile(Model(), backend="eager"), METHOD, torch.randn(1, 3, 16, 16))


class MixedLast(Model):
    """Its last convolution is read by what mixes channels, called as a function or a method."""

    def __init__(self, mix: Any) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(super().features(x), self.fc)


MIXERS = {
    "mm": lambda x, fc: torch.mm(x.mean((2, 3)), fc.weight.t()),
    "addmm": lambda x, fc: torch.addmm(fc.bias, x.mean((2, 3)), fc.weight.t()),
    "addmm method": lambda x, fc: fc.bias[None].addmm(x.mean((2, 3)), fc.weight.t()),
    "baddbmm": lambda x, fc: torch.baddbmm(x.new_zeros(1, 1, 1), x.flatten(2).transpose(1, 2), fc.weight.t()[None]),
    "conv_transpose2d": lambda x, fc: F.conv_transpose2d(x, fc.weight.t()[:, :, None, None]),
}


@pytest.mark.parametrize("mix", MIXERS.values(), ids=MIXERS)
def test_layers_before_what_mixes_channels_are_gated(mix: Any) -> None:
    x = torch.randn(1, 3, SIZE, SIZE)
    dynamic = convert(randomise(MixedLast(mix), x), METHOD, x)
    assert list(dynamic.gates()) == ["c0", "c1"]


class WithOptions(Model):
    def forward(self, x: Tensor, features: bool = False, scale: float | None = None) -> Tensor:  # type: ignore[override]
        y = super().forward(x)
        if features:
            return y
        return y if scale is None else y * scale


def test_options_of_forward_stay_at_their_defaults() -> None:
    model, x = WithOptions().eval(), torch.randn(2, 3, 16, 16)
    dynamic = convert(model, FBS(density=1.0, max_overhead=9.0), x)
    assert list(dynamic.gates()) == ["c0", "c1"]
    torch.testing.assert_close(dynamic(x), model(x))


def test_twice() -> None:
    model, x = net()
    with pytest.raises(ConversionError, match=r"dynamic already \(fbs\)"):
        convert(convert(model, METHOD, x), METHOD, x)


def test_dense_models_decide_nothing() -> None:
    model, x = net()
    with pytest.raises(ThriftyError, match="Model is a dense model"):
        decisions(model, x)
