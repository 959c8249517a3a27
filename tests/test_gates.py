"""Pure functions of gates, and the module that they are placed in."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.density import check_density, kept
from thrifty.errors import LoweringError, ThriftyError
from thrifty.gates import (
    ChannelGate,
    Gate,
    GatedConv,
    LoweredGate,
    MeanPredictor,
    mean_magnitude,
    strengths,
    top_k_mask,
)
from thrifty.methods import FBS, AntiDote, LCNet, MethodConfig
from thrifty.zoo.nets import resnet20

FEW_VALUES = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data(), st.integers(1, 3), st.integers(1, 12), st.integers(0, 14))
def test_winners_are_the_highest_and_ties_go_to_the_lowest_index(data: st.DataObject, n: int, c: int, k: int) -> None:
    rows = data.draw(st.lists(st.lists(FEW_VALUES, min_size=c, max_size=c), min_size=n, max_size=n))
    mask = top_k_mask(torch.tensor(rows), k)
    assert mask.dtype == torch.bool
    for row, winners in zip(rows, mask.tolist(), strict=True):
        best = sorted(range(c), key=lambda i: (-row[i], i))[:k]
        assert [i for i in range(c) if winners[i]] == sorted(best)


def test_k_may_be_a_tensor() -> None:
    scores = torch.randn(3, 7)
    assert torch.equal(top_k_mask(scores, torch.tensor(4)), top_k_mask(scores, 4))


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 100), st.integers(1, 600))
def test_kept_is_the_ceiling(percent: int, channels: int) -> None:
    exact = Fraction(percent, 100) * channels
    assert kept(percent / 100, channels) == max(1, -(-exact.numerator // exact.denominator))


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), "0.5", True, None])
def test_density_is_a_number_in_range(density: object) -> None:
    with pytest.raises(ThriftyError, match=r"must be a number in \(0, 1\]"):
        check_density(density)  # type: ignore[arg-type]


def test_whole_numbers_are_densities() -> None:
    assert check_density(1) == 1.0


def test_mean_magnitude() -> None:
    x = torch.tensor([[[[1.0, -3.0]], [[0.0, 2.0]]]])
    assert mean_magnitude(x).tolist() == [[2.0, 1.0]]


class Alternating(ChannelGate):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        decision = (torch.arange(self.channels) % 2 == 0).expand(len(x), -1)
        return 3.0 * decision, decision

    def lower(self, shape: tuple[int, int, int]) -> LoweredGate:
        raise LoweringError("it alternates")

    def overhead(self, shape: torch.Size) -> int:
        return shape[0]


def test_gated_conv_scales_behind_the_norm() -> None:
    conv, norm, x = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), torch.randn(2, 2, 5, 5)
    nn.init.uniform_(norm.bias)
    y = GatedConv(conv, norm, Alternating(4))(x)
    assert torch.equal(y[:, 0::2], 3 * norm(conv(x))[:, 0::2])
    assert (y[:, 1::2] == 0).all()
    assert torch.equal(GatedConv(conv, None, Alternating(4))(x)[:, 0::2], 3 * conv(x)[:, 0::2])


@pytest.mark.parametrize("method", [FBS(density=0.5), AntiDote(channels=0.4, columns=0.5), LCNet()])
def test_gates_decide_in_single_precision_where_layers_do_not(method: MethodConfig) -> None:
    torch.manual_seed(1)
    model = convert(resnet20().eval(), method, torch.zeros(1, 3, 16, 16))
    seen: list[tuple[str, Any, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda gate, inputs, output: seen.append((name, gate.decision(output), inputs[0]))

    hooks = [gate.register_forward_hook(note(name)) for name, gate in model.gates().items()]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    assert logits.dtype == torch.bfloat16
    assert {name for name, _, _ in seen} == set(model.gates())
    for name, decision, x in seen:
        assert x.dtype == torch.float32
        again = model.gates()[name]
        for axis, expected in vars(again.decision(again(x))).items():
            given = getattr(decision, axis)
            assert given is expected or torch.equal(given, expected), (name, axis)


def test_skipped_channels_are_exact_zeros_in_mixed_precision_too() -> None:
    gated = GatedConv(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), Alternating(4))
    with torch.autocast("cpu", torch.bfloat16):
        y = gated(torch.randn(2, 2, 5, 5))
    assert y.dtype == torch.bfloat16
    assert (y[:, 1::2] == 0).all()
    assert (y[:, 0::2] != 0).any()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_gates_of_another_precision_decide_in_theirs_in_mixed_precision(kind: torch.dtype) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = convert(resnet20().eval(), FBS(density=0.5), x).to(kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x.to(kind)).isfinite().all()


def test_magnitudes_of_large_maps_fit_half_precision() -> None:
    x = torch.full((1, 2, 112, 112), 6.0)
    assert torch.equal(mean_magnitude(x.half()), mean_magnitude(x).half())


def test_strengths_are_spread_alike_in_half_precision() -> None:
    assert torch.equal(strengths(512, torch.tensor(0.25)), strengths(512, torch.tensor(0.25, dtype=torch.bfloat16)))


def test_threads_may_share_a_model_with_layer_gates() -> None:
    images = torch.randn(8, 3, 32, 32)
    model = convert(resnet20().eval(), LCNet(), images)
    with torch.no_grad():
        expected = [model(image[None]) for image in images]

        def answer(place: int) -> bool:
            with torch.no_grad():
                return all(torch.equal(model(images[place][None]), expected[place]) for _ in range(5))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(answer, range(len(images))))


def test_gated_conv_shows_its_convolution() -> None:
    gated = GatedConv(nn.Conv2d(2, 4, 3, stride=2, groups=2), None, Alternating(4))
    assert gated.weight is gated.conv.weight
    assert (gated.stride, gated.groups, gated.out_channels) == ((2, 2), 2, 4)
    with pytest.raises(AttributeError, match="colour"):
        _ = gated.colour
    assert list(dict(gated.named_parameters())) == ["conv.weight", "conv.bias"]


def test_a_gate_must_define_itself() -> None:
    with pytest.raises(TypeError, match=r"forward.*overhead"):
        Gate()


class Scored(MeanPredictor, nn.Module):
    """The predictor of a gate, alone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.make_predictor(inputs, torch.randn(outputs))
        nn.init.normal_(self.predictor.weight)


def test_scores_are_of_standardised_means() -> None:
    """In training by the batch's own statistics, which evaluation has as running ones; a lone input has none."""
    scored = Scored(6, 4).double()
    x = torch.randn(16, 6, 5, 7, dtype=torch.float64) * 3 + 1
    means = x.mean((2, 3)).numpy()
    standard = (means - means.mean(0)) / np.sqrt(means.var(0) + scored.standardise.eps)
    weight, bias = (p.detach().numpy() for p in (scored.predictor.weight, scored.predictor.bias))
    expected = standard @ weight.T / np.sqrt(6) + bias
    np.testing.assert_allclose(scored.predicted(x).detach().numpy(), expected, atol=1e-12)
    kept = dict(scored.standardise.named_buffers())["running_mean"].clone()
    alone = scored.predicted(x[:1])
    assert torch.equal(dict(scored.standardise.named_buffers())["running_mean"], kept)
    torch.testing.assert_close(scored.eval().predicted(x[:1]), alone, rtol=1e-12, atol=1e-12)
    folded, shifted = scored.of_means()
    torch.testing.assert_close(x.mean((2, 3)) @ folded.T + shifted, scored.predicted(x), rtol=1e-9, atol=1e-9)


def test_nan_comes_last_and_infinity_does_not() -> None:
    scores = torch.tensor([[float("nan"), 1.0, -2.0, float("nan"), float("inf")]])
    assert top_k_mask(scores, 3).tolist() == [[False, True, True, False, True]]
    assert top_k_mask(scores, 4).tolist() == [[True, True, True, False, True]]
