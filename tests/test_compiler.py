"""compile: from a torch model to an engine that is checked against it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from random_gates import randomly_gated
from randomised import randomise
from small_nets import NETS
from torch import Tensor, nn

import thrifty
from thrifty.errors import ConversionError, LoweringError, ThriftyError
from thrifty.program import Preprocessing


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_models_of_half_precision_compile_to_engines_of_single(dtype: torch.dtype) -> None:
    x = torch.randn(3, 3, 16, 16)
    model = randomise(NETS["Residual"](), x)
    engine = thrifty.compile(model.to(dtype), x.to(dtype))
    expected = model.float()(x)
    assert (engine(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_dense_and_dynamic(dtype: torch.dtype) -> None:
    x = torch.randn(3, 3, 16, 16)
    dense = randomise(NETS["Residual"](), x)
    for model in (dense, randomly_gated(dense, x)):
        model.to(dtype)
        engine = thrifty.compile(model, x.to(dtype), threads=2)
        assert engine.threads == 2
        expected = model(x.to(dtype)).float()
        answer = engine(x)
        assert isinstance(answer, Tensor)
        assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()
        model.float()


def test_photographs() -> None:
    model = NETS["Functional"]().eval()
    x = torch.randn(1, 3, 16, 16)
    engine = thrifty.compile(
        model, x, preprocessing=Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), classes=list("abcde")
    )
    assert engine.program.classes == ("a", "b", "c", "d", "e")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    inputs = (pixels / 255 - (0.5, 0.4, 0.3)) / (0.2, 0.3, 0.4)
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs).float().permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(engine(pixels), expected, rtol=1e-4, atol=1e-5)


def test_an_engine_that_differs_from_its_model_is_refused() -> None:
    calls: list[None] = []

    def changing(x: Tensor) -> Tensor:
        calls.append(None)
        return x * len(calls)

    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(LoweringError, match=r"off by 5.0e-01 of the model's largest output.*check=False"):
        thrifty.compile(Written(changing), x)
    engine = thrifty.compile(Written(changing), x, check=False)
    assert torch.equal(engine(x), 3 * x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x[0, 0, 0].tolist()[0],
        lambda x: x * float(x.detach().numpy().std()),
        lambda x: x / x.shape[0],
        lambda x: x if len(x) > 1 else 2 * x,
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_what_is_frozen_of_the_example_is_refused(function: Callable[[Tensor], Tensor], count: int) -> None:
    with pytest.raises(LoweringError, match="what left torch"):
        thrifty.compile(Written(function), torch.randn(count, 3, 16, 16))


def test_what_is_no_plain_module_is_refused_by_name() -> None:
    x = torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(nn.Conv2d(3, 4, 1))
    with pytest.raises(LoweringError, match="not the ScriptModule"):
        thrifty.compile(scripted, x)
    with pytest.raises(LoweringError, match="must be a list of names"):
        thrifty.compile(nn.Conv2d(3, 4, 1), x, classes="abcd")


def test_a_model_may_write_to_its_input() -> None:
    def centred(x: Tensor) -> Tensor:
        x -= 0.25
        return x.relu()

    x = torch.rand(2, 3, 4, 4)
    before = x.clone()
    engine = thrifty.compile(Written(centred), x)
    assert torch.equal(x, before)
    assert torch.equal(engine(x), (x - 0.25).relu())


def test_what_a_models_own_code_raises_is_told_as_it_is() -> None:
    def fails(x: Tensor) -> Tensor:
        return x * {"a": 1.0}["b"]

    with pytest.raises(LoweringError, match=r"does not take an example of shape .*'b'"):
        thrifty.compile(Written(fails), torch.rand(1, 3, 4, 4))
    with pytest.raises(ConversionError, match=r"does not take an example of shape .*'b'"):
        thrifty.convert(Written(fails), thrifty.FBS(), torch.rand(1, 3, 4, 4))


def test_preprocessing_is_of_its_own_type() -> None:
    with pytest.raises(LoweringError, match=r"must be a thrifty.Preprocessing\(mean, std\)"):
        thrifty.compile(Written(torch.relu), torch.rand(1, 3, 4, 4), preprocessing=((0.5,) * 3, (0.2,) * 3))  # type: ignore[arg-type]


def test_compiling_in_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(2, 3, 16, 16)
        engine = thrifty.compile(NETS["Residual"]().eval(), x)
    assert engine(x).shape == (2, 5)


def test_an_answer_of_another_shape_is_refused() -> None:
    weight = torch.randn(1, 1, 1, 1)
    with pytest.raises(LoweringError, match=r"but the model's is \[1, 1, 1, 3\]"):
        thrifty.compile(Written(lambda x: x.mean((2, 3)) * weight), torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("mode", ["bicubic", "nearest", "bilinear"])
def test_points_that_move_at_the_same_size_are_refused(mode: str) -> None:
    x = torch.randn(1, 3, 8, 8)
    moved = lambda x: nn.functional.interpolate(x, scale_factor=1.1, mode=mode)  # noqa: E731
    with pytest.raises(LoweringError, match="moves its points"):
        thrifty.compile(Written(moved), x)
    same = thrifty.compile(Written(lambda x: nn.functional.interpolate(x, size=8, mode=mode)), x)
    assert torch.equal(same(x), x)


def test_a_tensor_that_is_read_as_negated() -> None:
    engine = thrifty.compile(Written(lambda x: x * 2), torch.randn(1, 3, 16, 16))
    z = torch.randn(1, 3, 16, 16, dtype=torch.complex64)
    assert torch.equal(engine(z.conj().imag), -2 * z.imag)


def test_models_whose_answer_is_not_finite_are_refused() -> None:
    with pytest.raises(LoweringError, match="NaN or infinite"):
        thrifty.compile(Written(lambda x: x * float("inf")), torch.randn(1, 3, 16, 16))


def test_a_model_that_answers_zero_can_be_compiled() -> None:
    engine = thrifty.compile(Written(lambda x: x * 0.0), torch.randn(1, 3, 16, 16))
    assert not engine(torch.randn(2, 3, 16, 16)).any()


def test_errors_of_the_parts_come_through() -> None:
    with pytest.raises(LoweringError, match="_softmax"):
        thrifty.compile(nn.Softmax(1), torch.randn(1, 3, 16, 16))
    with pytest.raises(ThriftyError, match="threads"):
        thrifty.compile(nn.ReLU(), torch.randn(1, 3, 16, 16), threads=0)
