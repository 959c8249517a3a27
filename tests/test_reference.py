"""The reference executor against torch in double precision, operator by operator and over gated networks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_gates import randomly_gated
from randomised import randomise
from small_nets import NETS
from test_lowering import REFUSED
from test_program import small_program

from thrifty.decision import Decision
from thrifty.dynamic import decisions
from thrifty.errors import ThriftyError
from thrifty.lowering import lower
from thrifty.program import ACTIVATIONS, Operator, Program
from thrifty.reference import activate, run_reference

TORCH_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
}


def one_operator(kind: str, x: Any, shape: Any, attributes: Any, tensors: Any = (), more: int = 0) -> Any:
    """What a program of one operator makes of x; `more` further inputs are x itself."""
    arrays = {role: np.ascontiguousarray(array) for role, array in dict(tensors).items()}
    operator = Operator(kind, "it", (0,) * (1 + more), 1, attributes, {role: role for role in arrays})
    return run_reference(Program((x.shape[1:], shape), (operator,), 1, False, arrays), x).output


def assert_close(found: Any, expected: torch.Tensor) -> None:
    assert found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_every_activation() -> None:
    x = np.concatenate([np.linspace(-50, 50, 1001), [0.0, -0.0, 3.0, -3.0, 6.0, 700.0, -700.0]])
    assert set(TORCH_ACTIVATIONS) == set(ACTIVATIONS)
    for name, function in TORCH_ACTIVATIONS.items():
        assert_close(activate(x, name, 0.2), function(torch.from_numpy(x)))


SIDE = st.integers(1, 3)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data(), st.sampled_from([(1, 2, 3), (2, 1, 1), (3, 1, 2), (4, 1, 1)]), st.booleans())
def test_convolution(data: st.DataObject, channels: tuple[int, int, int], residual: bool) -> None:
    groups, inputs, outputs = channels
    kernel, stride, dilation = (data.draw(st.tuples(SIDE, SIDE)) for _ in range(3))
    padding = data.draw(st.tuples(*[st.integers(0, 2)] * 4))
    size = [data.draw(st.integers((k - 1) * d + 1, 9)) for k, d in zip(kernel, dilation, strict=True)]
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    x = rng.standard_normal((2, groups * inputs, *size))
    weight = rng.standard_normal((groups * outputs, inputs, *kernel)).astype(np.float32)
    bias = rng.standard_normal(groups * outputs).astype(np.float32)
    top, bottom, left, right = padding
    padded = F.pad(torch.from_numpy(x), (left, right, top, bottom))
    tensors = [torch.from_numpy(array).double() for array in (weight, bias)]
    expected = F.conv2d(padded, *tensors, stride, 0, dilation, groups)
    attributes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "activation": "tanh"}
    shape = tuple(expected.shape[1:])
    residual = residual and shape == x.shape[1:]
    found = one_operator("conv", x, shape, attributes, {"weight": weight, "bias": bias}, int(residual))
    assert_close(found, torch.tanh(expected + torch.from_numpy(x) if residual else expected))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data(), st.booleans(), st.booleans(), st.sampled_from([0, 5]))
def test_pooling(data: st.DataObject, ceil_mode: bool, include: bool, divisor: int) -> None:
    kernel, stride = (data.draw(st.tuples(SIDE, SIDE)) for _ in range(2))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    dilation = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    size = [data.draw(st.integers((k - 1) * d + 1, 9)) for k, d in zip(kernel, dilation, strict=True)]
    x = np.random.default_rng(data.draw(st.integers(0, 999))).standard_normal((2, 3, *size))
    common = {"kernel": kernel, "stride": stride, "padding": (padding[0],) * 2 + (padding[1],) * 2}
    expected = F.max_pool2d(torch.from_numpy(x), kernel, stride, padding, dilation, ceil_mode)
    found = one_operator("max_pool", x, tuple(expected.shape[1:]), {**common, "dilation": dilation})
    assert_close(found, expected)
    expected = F.avg_pool2d(torch.from_numpy(x), kernel, stride, padding, ceil_mode, include, divisor or None)
    attributes = {**common, "count_include_pad": int(include), "divisor": divisor}
    assert_close(one_operator("avg_pool", x, tuple(expected.shape[1:]), attributes), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (5, 7), (7, 11)])
def test_adaptive_pooling(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 7))
    for kind, function in (("avg", F.adaptive_avg_pool2d), ("max", F.adaptive_max_pool2d)):
        expected = function(torch.from_numpy(x), size)
        assert_close(one_operator(f"adaptive_{kind}_pool", x, (3, *size), {}), expected)


def test_the_rest() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    t = torch.from_numpy(x)
    weight, bias = np.array([1, -2, 3], np.float32), np.array([5, 0, 7], np.float32)
    w, b = (torch.from_numpy(array).double() for array in (weight, bias))
    found = one_operator("affine", x, (3, 4, 5), {}, {"scale": weight, "shift": bias})
    assert_close(found, t * w[:, None, None] + b[:, None, None])
    found = one_operator("layer_norm", x, (3, 4, 5), {"epsilon": 1e-3}, {"weight": weight, "bias": bias})
    assert_close(found, F.layer_norm(t.movedim(1, -1), (3,), w, b, 1e-3).movedim(-1, 1))
    index = np.array([2, -1, 0, 0], np.int32)
    found = one_operator("gather", x, (4, 4, 5), {}, {"index": index})
    assert_close(found, torch.stack([t[:, 2], torch.zeros_like(t[:, 0]), t[:, 0], t[:, 0]], 1))
    found = one_operator("pad", x, (3, 7, 12), {"padding": (1, 2, 3, 4), "value": -1.5})
    assert_close(found, F.pad(t, (3, 4, 1, 2), value=-1.5))
    assert_close(one_operator("flatten", x, (60, 1, 1), {}), t.flatten(1)[:, :, None, None])
    assert_close(one_operator("concat", x, (6, 4, 5), {}, more=1), torch.cat([t, t], 1))
    assert_close(one_operator("add", x, (3, 4, 5), {"activation": "relu"}, more=1), F.relu(t + t))
    assert_close(one_operator("mul", x, (3, 4, 5), {}, more=1), t * t)


@pytest.mark.parametrize("name", sorted(set(NETS) - set(REFUSED)))
def test_gated_networks_in_double_precision(name: str) -> None:
    """Decisions that are forced equal to torch's, and those that are free."""
    x = torch.randn(3, 3, 16, 16)
    dynamic = randomly_gated(randomise(NETS[name](), x), x).double()
    with torch.no_grad():
        expected = dynamic(x.double()).numpy()
    program = lower(dynamic, x.double())
    forced = {name: Decision(channels=d.channels.numpy()) for name, d in decisions(dynamic, x.double()).items()}
    for given_decisions in (forced, {}):
        result = run_reference(program, x.double().numpy(), given_decisions)
        # Folded weights are rounded to float32: that is all that differs.
        assert np.abs(result.output - expected).max() <= 3e-6 * np.abs(expected).max()
        assert all((result.decisions[name].channels == d.channels).all() for name, d in forced.items())


def test_skipped_weights_are_not_read() -> None:
    """NaN in every weight that a decision skips: of skipped outputs, and of readers of skipped inputs."""
    program = small_program(preprocessing=None)
    x = np.random.default_rng(0).standard_normal((1, 3, 6, 6))
    decided = np.array([[True, False, False, True]])
    result = run_reference(program, x, {"a": Decision(channels=decided)})
    tensors = {name: array.copy() for name, array in program.tensors.items()}
    tensors["a.weight"][~decided[0]] = np.nan
    tensors["a.bias"][~decided[0]] = np.nan
    tensors["b.weight"][:, ~decided[0]] = np.nan
    poisoned = run_reference(dataclasses.replace(program, tensors=tensors), x, {"a": Decision(channels=decided)})
    assert np.array_equal(result.output, poisoned.output)
    assert result.macs["a"].tolist() == [2 * 27 * 36]
    assert result.macs["b"].tolist() == [4 * 18 * 36]
    assert result.gate_macs["a"].tolist() == [3 * 36 + 12]


def test_ties_go_to_the_lowest_index() -> None:
    program = small_program(preprocessing=None)
    tensors = dict(program.tensors)
    tensors["a.gate_weight"] = np.zeros((4, 3), np.float32)
    tensors["a.gate_bias"] = np.array([1, 2, 2, 2], np.float32)
    result = run_reference(dataclasses.replace(program, tensors=tensors), np.ones((1, 3, 6, 6)))
    assert result.decisions["a"].channels.tolist() == [[False, True, True, False]]
    assert result.saliencies["a"]["channels"].tolist() == [[1, 2, 2, 2]]


def test_photographs_are_normalised() -> None:
    program = small_program()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 6), dtype=np.uint8)
    expected = run_reference(program, (pixels / 255 - 0.5) / 0.2).output
    np.testing.assert_allclose(run_reference(program, pixels).output, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("x", "forced", "message"),
    [
        (np.zeros((1, 3, 6, 5)), {}, r"takes inputs of shape \['N', 3, 6, 6\], not \[1, 3, 6, 5\]"),
        (np.zeros((0, 3, 6, 6)), {}, "takes inputs"),
        (np.zeros((1, 3, 6, 6), np.uint8), {}, "no preprocessing"),
        (np.zeros((1, 3, 6, 6)), {"b": Decision(channels=np.ones((1, 4), bool))}, "no gated layer is named 'b'"),
        (np.zeros((1, 3, 6, 6)), {"a": Decision(channels=np.ones((2, 4), bool))}, r"must be bool \[1, 4\]"),
        (
            np.zeros((1, 3, 6, 6)),
            {"a": Decision(layer=np.ones(1, bool))},
            "says layer, but its gate decides on channels",
        ),
    ],
)
def test_wrong_inputs(x: Any, forced: Any, message: str) -> None:
    with pytest.raises(ThriftyError, match=message):
        run_reference(small_program(preprocessing=None), x, forced)
