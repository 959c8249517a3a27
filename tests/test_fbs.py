"""FBS against its equations, written out in NumPy in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from randomised import randomise
from small_nets import NETS, SIZE
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.density import kept
from thrifty.dynamic import Dynamic, decisions
from thrifty.errors import ThriftyError
from thrifty.gates import GatedConv
from thrifty.methods.fbs import FBS, FBSGate

Array = NDArray[np.float64]


class OneLayer(nn.Module):
    """A convolution between two others, so that it may be gated; what it gives is kept."""

    def __init__(self, norm: nn.Module | None = None, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3, padding=1, bias=bias)
        self.norm = nn.Identity() if norm is None else norm
        self.relu, self.head = nn.ReLU(), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.norm(self.conv(x))).mean((2, 3)))


def one_layer(
    init: str, density: float, norm: nn.Module | None = None, bias: bool = False
) -> tuple[Dynamic, OneLayer, Tensor]:
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64) * torch.rand(6, 3, 1, 1, dtype=torch.float64) * 4
    model = OneLayer(norm, bias).double()
    if norm is not None:
        randomise(model, x)
    model.eval()
    return convert(model, FBS(density=density, init=init, max_overhead=9.0), x), model, x  # type: ignore[arg-type]


def numpy_conv(x: Array, weight: Array, bias: Array | None) -> Array:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    y: Array = np.einsum("nchwij,ocij->nohw", windows, weight)
    return y if bias is None else y + bias[None, :, None, None]


def numpy_winners(g: Array, k: int) -> NDArray[np.bool_]:
    """The k largest of each row, the lowest index first where they are equal."""
    mask = np.zeros(g.shape, bool)
    for n, row in enumerate(g):
        for c in sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]:
            mask[n, c] = True
    return mask


def numpy_gate(x: Array, phi: Array, rho: Array) -> Array:
    return np.maximum(np.abs(x).mean((2, 3)) @ phi.T + rho, 0)


def arrays(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().numpy() for tensor in tensors]


@pytest.mark.parametrize("density", [0.3, 0.55, 1.0])
@pytest.mark.parametrize("init", ["preserve", "paper"])
def test_forward(init: str, density: float) -> None:
    """y = pi(x) (norm(conv(x)) + beta), with pi(x) = wta_k(ReLU(ss(x) phi + rho))."""
    dynamic, model, x = one_layer(init, density, nn.BatchNorm2d(10))
    gated: Any = dynamic.conv
    if init == "preserve":
        nn.init.normal_(gated.gate.predictor.weight, std=0.5)
    phi, rho, inputs = arrays(gated.gate.predictor.weight, gated.gate.predictor.bias, x)
    weight, beta, mean, var = arrays(
        model.conv.weight, gated.norm.bias, model.norm.running_mean, model.norm.running_var  # type: ignore[arg-type]
    )  # fmt: skip
    g = numpy_gate(inputs, phi, rho)
    pi = g * numpy_winners(g, math.ceil(density * 10))
    shape = (1, 10, 1, 1)
    normal = (numpy_conv(inputs, weight, None) - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + model.norm.eps)
    scale = arrays(gated.norm.weight)[0].reshape(shape)  # the fixed signs of the preserving start, else 1
    if init == "paper":
        assert (scale == 1).all()
    expected = pi[:, :, None, None] * (scale * normal + beta.reshape(shape))
    np.testing.assert_allclose(gated(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    assert np.array_equal(decisions(dynamic, x)["conv"].channels.numpy(), numpy_winners(g, math.ceil(density * 10)))


@pytest.mark.parametrize("bias", [False, True])
def test_without_norm(bias: bool) -> None:
    dynamic, model, x = one_layer("preserve", 0.4, bias=bias)
    gated: Any = dynamic.conv
    nn.init.normal_(gated.gate.predictor.weight)
    phi, rho, inputs, weight = arrays(gated.gate.predictor.weight, gated.gate.predictor.bias, x, model.conv.weight)
    g = numpy_gate(inputs, phi, rho)
    y = numpy_conv(inputs, weight, arrays(model.conv.bias)[0] if model.conv.bias is not None else None)
    expected = (g * numpy_winners(g, 4))[:, :, None, None] * y
    np.testing.assert_allclose(gated(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_paper_start() -> None:
    gate = one_layer("paper", 0.5, nn.BatchNorm2d(10))[0].conv.gate
    assert (gate.predictor.bias == 1).all()
    big = FBSGate(400, 500, 0.5)
    FBS(init="paper")._initialise(big, None)
    assert big.predictor.weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)


def test_preserving_start() -> None:
    """phi = 0, rho = |gamma|; the sign stays in the norm; near zero rho is a floor and the scale is learned."""
    norm = nn.BatchNorm2d(10)
    dynamic, model, _ = one_layer("preserve", 1.0, norm)
    gamma = model.norm.weight
    gated: Any = dynamic.conv
    floor = 0.1 * gamma.abs().mean()
    assert (gated.gate.predictor.weight == 0).all()
    assert torch.equal(gated.gate.predictor.bias, gamma.abs().clamp(min=floor))
    torch.testing.assert_close(gated.norm.weight * gated.gate.predictor.bias, gamma)
    torch.testing.assert_close(gated.norm.bias * gated.gate.predictor.bias, model.norm.bias)


@pytest.mark.parametrize(("gammas", "learned"), [([1.0, -2.0] * 5, False), ([1.0, 1e-6] * 5, True), ([0.0] * 10, True)])
def test_scales_are_fixed_signs_unless_some_gamma_is_tiny(gammas: list[float], learned: bool) -> None:
    model = OneLayer(nn.BatchNorm2d(10)).eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor(gammas))
        model.norm.bias.uniform_()
    x = torch.randn(4, 3, 8, 8)
    dynamic = convert(model, FBS(density=1.0, max_overhead=9.0), x)
    scale = dynamic.conv.norm.weight
    assert scale.requires_grad is learned
    torch.testing.assert_close(dynamic(x), model(x), rtol=1e-5, atol=1e-6)
    if learned:  # a channel that was dead can live again
        dynamic.train()(x).square().sum().backward()
        dead = torch.tensor(gammas).abs() < 1e-3
        assert (scale.grad[dead] != 0).any()
    restored = convert(OneLayer(nn.BatchNorm2d(10)).eval(), FBS(density=1.0, max_overhead=9.0), x)
    restored.load_state_dict(dynamic.state_dict())
    assert restored.conv.norm.weight.requires_grad is learned


def test_what_the_user_froze_stays_frozen() -> None:
    model = NETS["Residual"]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[0] = 1e-6  # a scale that would be learned
    model.requires_grad_(False)
    dynamic = convert(model, FBS(density=0.5, max_overhead=10.0), torch.randn(1, 3, SIZE, SIZE))
    dynamic.load_state_dict(dynamic.state_dict())
    inside = {parameter for gate in dynamic.gates().values() for parameter in gate.parameters()}
    assert not [name for name, value in dynamic.named_parameters() if value.requires_grad and value not in inside]


def test_gradients_flow_through_the_winners_values_only() -> None:
    dynamic, _, x = one_layer("preserve", 0.4, nn.BatchNorm2d(10))
    gated: Any = dynamic.conv
    nn.init.normal_(gated.gate.predictor.weight)
    scale, decision = gated.gate(x)
    scale.retain_grad()
    seed = torch.randn_like(scale)
    (scale * seed).sum().backward()
    s = x.abs().mean((2, 3))
    alive = (s @ gated.gate.predictor.weight.T + gated.gate.predictor.bias).detach() > 0
    through = seed * decision * alive
    torch.testing.assert_close(gated.gate.predictor.bias.grad, through.sum(0))
    torch.testing.assert_close(gated.gate.predictor.weight.grad, through.T @ s)


def test_taking_winners_leaves_the_saliency_alone() -> None:
    """The regularisation is over all channels, also those that lost."""
    dynamic, _, x = one_layer("paper", 0.2, nn.BatchNorm2d(10))
    dynamic.train()(x)
    gated: Any = dynamic.conv
    phi, rho, inputs = arrays(gated.gate.predictor.weight, gated.gate.predictor.bias, x)
    norms = np.abs(numpy_gate(inputs, phi, rho)).sum(1)
    assert dynamic.regularization().item() == pytest.approx(1e-8 * norms.mean(), rel=1e-12)


def network(density: Any = 0.5, **settings: Any) -> tuple[Dynamic, Tensor]:
    x = torch.randn(4, 3, SIZE, SIZE)
    return convert(randomise(NETS["Residual"](), x), FBS(density=density, max_overhead=9.0, **settings), x), x


def test_regularisation_is_a_sum_over_layers() -> None:
    dynamic, x = network(l1=0.25)
    seen: list[Tensor] = []
    for gate in dynamic.gates().values():
        gate.predictor.register_forward_hook(lambda _m, _i, out: seen.append(out.relu().sum(1).mean()))  # type: ignore
    dynamic.train()(x)
    assert len(seen) == 5
    torch.testing.assert_close(dynamic.regularization(), 0.25 * sum(seen))
    dynamic.regularization().backward()
    assert all(gate.predictor.bias.grad is not None for gate in dynamic.gates().values())


def test_regularisation_belongs_to_training() -> None:
    dynamic, x = network()
    assert dynamic.eval().regularization() == 0
    dynamic.train()(x)
    value = dynamic.regularization().item()
    dynamic.eval()(x * 10)
    assert dynamic.regularization().item() == value > 0
    assert copy.deepcopy(dynamic).regularization() == 0


def test_density_by_name() -> None:
    dynamic, _ = network({"c1": 0.25, "c[12]": 0.5, "c3": 1.0})
    assert {name: gate.density for name, gate in dynamic.gates().items()} == {
        "c0.0": 1.0, "c1": 0.25, "c2": 0.5, "c3": 1.0, "c4.0": 1.0,
    }  # fmt: skip


def test_set_density() -> None:
    dynamic, x = network()
    assert {int(d.channels.sum(1).unique()) for n, d in decisions(dynamic, x).items() if n in {"c1", "c2"}} == {4}
    dynamic.set_density(0.7)
    assert dynamic.density == pytest.approx(0.7)
    assert {n: int(d.channels.sum(1).unique()) for n, d in decisions(dynamic, x).items()} == {
        "c0.0": 6, "c1": 6, "c2": 6, "c3": 10, "c4.0": 5,
    }  # fmt: skip
    dynamic.set_density({"c?": 0.25})
    assert [gate.density for gate in dynamic.gates().values()] == [0.7, 0.25, 0.25, 0.25, 0.7]
    for wrong in ({"c1": 0.5, "c9": 0.5}, {"c1": 0.9, "c2": 1.5}, 0.0):
        with pytest.raises(ThriftyError):
            dynamic.set_density(wrong)  # type: ignore[arg-type]
    assert [gate.density for gate in dynamic.gates().values()] == [0.7, 0.25, 0.25, 0.25, 0.7]


def test_density_travels_with_the_weights() -> None:
    dynamic, x = network()
    other, _ = network(1.0)
    dynamic.set_density({"c1": 0.25, "c2": 0.75})
    other.load_state_dict(dynamic.state_dict())
    assert torch.equal(other.eval()(x), dynamic.eval()(x))
    assert other.gates()["c1"].density == 0.25
    assert other.density == pytest.approx(dynamic.density, abs=0.05)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 40), st.floats(0.01, 1))
def test_k_is_the_ceiling(channels: int, density: float) -> None:
    gate = FBSGate(2, channels, density)
    _, decision = gate(torch.randn(3, 2, 4, 4))
    assert decision.sum(1).tolist() == [kept(density, channels)] * 3


def test_ties_go_to_the_lowest_index() -> None:
    gate = FBSGate(2, 6, 0.5)
    nn.init.zeros_(gate.predictor.weight)
    with torch.no_grad():
        gate.predictor.bias.copy_(torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, -1.0]))
    assert gate(torch.randn(2, 2, 3, 3))[1].tolist() == [[True, True, False, False, True, False]] * 2


def test_batch_equals_single_inputs() -> None:
    dynamic, _model, x = one_layer("paper", 0.5, nn.BatchNorm2d(10))
    together = decisions(dynamic, x)["conv"].channels
    assert torch.equal(together, torch.cat([decisions(dynamic, row[None])["conv"].channels for row in x]))
    assert together.unique(dim=0).shape[0] > 1
    torch.testing.assert_close(dynamic(x), torch.cat([dynamic(row[None]) for row in x]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 1.0), (0.099, 1.0), (0.1, 0.9), (0.15, 0.9), (0.25, 0.8), (0.35, 0.7), (0.45, 0.6), (0.55, 0.5), (1.0, 0.5)],
)
def test_steps(progress: float, expected: float) -> None:
    assert FBS(descent=(0.1, 0.6)).density_at(progress, 0.5) == pytest.approx(expected)


@settings(deadline=None, derandomize=True)
@given(st.floats(0.05, 1), st.sampled_from(["steps", "linear"]), st.floats(0, 1), st.floats(0, 1))
def test_density_descends_to_its_target(target: float, schedule: Any, early: float, late: float) -> None:
    method = FBS(schedule=schedule)
    early, late = sorted((early, late))
    assert 1 >= method.density_at(early, target) >= method.density_at(late, target) >= target - 1e-12
    assert method.density_at(1.0, target) == pytest.approx(target)
    assert method.density_at(0.0, target) == 1.0


def test_linear_and_constant_schedules() -> None:
    linear = FBS(schedule="linear", descent=(0.2, 0.6))
    assert [linear.density_at(p, 0.5) for p in (0.1, 0.2, 0.4, 0.6, 0.9)] == pytest.approx([1, 1, 0.75, 0.5, 0.5])
    assert FBS(schedule="none").density_at(0.0, 0.5) == 0.5
    assert FBS(start=0.4).density_at(0.0, 0.6) == 0.6


def test_advance_sets_every_gate() -> None:
    dynamic, _ = network({"c1": 0.25, "*": 0.5}, schedule="linear", descent=(0.0, 1.0))
    dynamic.method.advance(dynamic, 0.5)
    assert [gate.density for gate in dynamic.gates().values()] == [0.75, 0.625, 0.75, 0.75, 0.75]


@pytest.mark.parametrize(
    "wrong",
    [
        {"density": 0.0}, {"density": 1.5}, {"density": {"c": 2.0}}, {"start": 0}, {"init": "zeros"}, {"l1": -1.0},
        {"schedule": "cosine"}, {"step": 0.0}, {"descent": (0.6, 0.1)}, {"descent": (0.1,)}, {"max_overhead": -1.0},
        {"l1": math.nan}, {"step": math.nan}, {"step": "a"}, {"descent": 0.5}, {"descent": (0.1, "a")},
        {"descent": (math.nan, 0.5)}, {"max_overhead": math.inf}, {"max_overhead": None}, {"l1": True},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ThriftyError):
        FBS(**wrong)


def test_a_normalisation_without_bias_starts_from_the_dense_function() -> None:
    x = torch.randn(2, 3, 8, 8)
    norm = nn.BatchNorm2d(10)
    norm.weight.data.normal_()
    norm.bias = None
    model = OneLayer(norm).eval()
    torch.testing.assert_close(convert(model, FBS(density=1.0), x)(x), model(x))


def test_gates_that_cost_too_much_are_refused() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = OneLayer(nn.BatchNorm2d(10)).eval()
    place = convert(model, FBS(max_overhead=0.001), x).conversion.places[0]
    assert (place.gated, place.note) == (False, "its gate would cost 1% of its MACs")
    place = convert(model, FBS(), x).conversion.places[0]
    assert (place.gated, place.gate_macs) == (True, 3 * 64 + 3 * 10)


def test_training_step_keeps_winners_and_moves_gates() -> None:
    dynamic, x = network()
    optimiser = torch.optim.SGD(dynamic.parameters(), 0.1)
    before = {name: gate.predictor.weight.clone() for name, gate in dynamic.gates().items()}
    (dynamic.train()(x).square().sum() + dynamic.regularization()).backward()
    optimiser.step()
    for name, gate in dynamic.gates().items():
        assert not torch.equal(gate.predictor.weight, before[name]), name
        assert isinstance(dynamic.get_submodule(name), GatedConv)
