"""AntiDote against its definition, written out in NumPy in float64, and its costs against the values that are read."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from randomised import no_initialisation, randomise, torchvision_cnn
from small_nets import NETS, SIZE
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.dynamic import Dynamic, decisions
from thrifty.errors import LoweringError, ThriftyError
from thrifty.gates import MaskedConv
from thrifty.lowering import lower
from thrifty.macs import count_macs
from thrifty.methods.antidote import AntiDote, AttentionGate
from thrifty.methods.fbs import FBS
from thrifty.methods.lcnet import LCNet
from thrifty.zoo.resolve import build_net

PRUNABLE = ("Functional", "Residual", "Concat", "SqueezeExcite", "GroupedShuffle", "NoNorm")
"""Networks of small_nets with maps that may be pruned, in several styles."""


def network(style: str = "Functional", **options: Any) -> tuple[Dynamic, nn.Module, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64)
    model = randomise(NETS[style]().double(), x).eval()
    return convert(model, AntiDote(**({"channels": 0.4, "columns": 0.6} | options)), x), model, x


def highest(scores: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
    kept = np.zeros(len(scores), bool)
    kept[sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]] = True
    return kept


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7), st.floats(0, 0.95), st.floats(0, 0.95), st.booleans())
def test_masks_keep_the_highest_attention(
    channels: int, height: int, width: int, ratio: float, column_ratio: float, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(channels * 100 + height * 10 + width)
    x = torch.randn(3, channels, height, width, generator=generator, dtype=torch.float64)
    x = x.sign() if ties else x
    gate = AttentionGate(torch.Size((channels, height, width)))
    gate.set_ratios(ratio, column_ratio)
    kept, _, _ = gate(x)
    values = np.abs(x.numpy())
    for n in range(3):
        by_channel = highest(values[n].mean((1, 2)), max(1, int(np.ceil((1 - ratio) * channels - 1e-9))))
        positions = max(1, int(np.ceil((1 - column_ratio) * height * width - 1e-9)))
        # means of float64 in another order differ in the last bits: keep those from deciding
        by_column = highest(np.round(values[n].mean(0).reshape(-1), 12), positions).reshape(height, width)
        if not ties or channels in (1, 2, 4, 8):
            np.testing.assert_array_equal(kept[n].numpy(), x[n].numpy() * by_channel[:, None, None] * by_column)
        assert (kept[n].numpy() != 0).any(0).sum() <= positions


def gate_of(criterion: Any = "attention", *, straight_through: bool) -> AttentionGate:
    gate = AttentionGate(torch.Size((6, 5, 7)), criterion, straight_through=straight_through)
    gate.set_ratios(0.5, 0.6)
    return gate.train()


def test_a_straight_through_gradient_changes_nothing_else() -> None:
    x = torch.rand(4, 6, 5, 7, dtype=torch.float64)
    for training in (True, False):
        plain, steered = (gate_of(straight_through=on).train(training)(x) for on in (False, True))
        for a, b in zip(plain, steered, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_a_map_of_one_position_keeps_it_in_training() -> None:
    gate = AttentionGate(torch.Size((6, 1, 1)), "attention", straight_through=True).train()
    gate.set_ratios(channels=0.5, columns=0.5)
    kept, _, columns = gate(torch.rand(2, 6, 1, 1))
    assert kept.isfinite().all()
    assert columns.all()


@pytest.mark.parametrize(("criterion", "sign"), [("attention", -1), ("inverse", 1), ("random", 0)])
def test_a_loss_that_wants_more_lets_dropped_columns_come_back(criterion: str, sign: int) -> None:
    """Descent moves the attention of what was dropped towards being kept: up, or for the inverse criterion down."""
    for on in (False, True):
        gate = gate_of(criterion, straight_through=on)
        gate.set_ratios(channels=0.0)
        x = (torch.rand(2, 6, 5, 7, dtype=torch.float64) + 0.1).requires_grad_()
        kept, _, columns = gate(x)
        kept.sum().neg().backward()
        assert x.grad is not None
        assert columns is not None
        dropped = x.grad[~columns[:, None].expand(x.shape)]
        assert dropped.numel()
        assert (dropped.sign() == (sign if on else 0)).all()


def test_the_price_of_sparsity_is_the_share_of_attention_that_is_dropped() -> None:
    """Against sums over sorted attention; only what is dropped is pushed down, each value by the same in its row."""
    gate = AttentionGate(torch.Size((6, 5, 7)), sparse=True).train()
    gate.set_ratios(0.5, 0.6)
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64).relu().requires_grad_()
    _, channels, columns = gate(x)
    assert gate.penalty is not None
    values = x.detach().numpy()
    expected = 0.0
    for attention, kept in ((values.sum((2, 3)), 3), (values.sum(1).reshape(3, 35), 14)):
        ordered = np.sort(attention, 1)[:, ::-1]
        expected += float((ordered[:, kept:].sum(1) / ordered.sum(1)).mean())
    assert gate.penalty.item() == pytest.approx(expected, rel=1e-5)
    gate.penalty.backward()
    assert x.grad is not None
    kept_by_both = (channels[:, :, None, None] & columns[:, None]).expand(x.shape)
    assert (x.grad[kept_by_both] == 0).all()
    assert (x.grad[~kept_by_both & (x > 0)] > 0).all()


def test_sparsity_changes_the_loss_alone() -> None:
    dynamic, _, x = network()
    sparse, _, _ = network(sparsity=0.5)
    for training in (True, False):  # what is charged is of the pass in training
        outputs = []
        for each in (dynamic, sparse):
            each.train(training)
            outputs.append(each(x))
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
    assert dynamic.regularization() == 0
    penalties = [gate.penalty.item() for gate in sparse.gates().values()]
    assert min(penalties) > 0
    assert sparse.regularization().item() == pytest.approx(0.5 * sum(penalties))
    copy.deepcopy(sparse)  # as for an average of the weights: what the backward pass still needs is not in the way


@pytest.mark.parametrize("style", PRUNABLE)
def test_nothing_pruned_is_the_dense_model(style: str) -> None:
    dynamic, model, x = network(style)
    assert dynamic.gates()
    assert not torch.allclose(dynamic(x), model(x))
    for gate in dynamic.gates().values():
        gate.set_ratios(0, 0)
    torch.testing.assert_close(dynamic(x), model(x), rtol=0, atol=0)
    assert torch.equal(count_macs(dynamic, x).total, count_macs(model, x).total)
    assert all(d.channels is None and d.columns is None for d in decisions(dynamic, x).values())


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "densenet121"])
def test_pruned_convolutions_are_fused_like_dense_ones(name: str) -> None:
    """All of their outputs are computed: normalisation, residual sum and activation belong to them as before."""
    x = torch.randn(1, 3, 32, 32)
    with no_initialisation():
        model = randomise(build_net(name), x).eval()
    dynamic = convert(model, AntiDote(channels=0.5, columns=0.5), x)
    programs = [lower(each, x) for each in (model, dynamic)]
    kinds = [[operator.kind for operator in program.operators] for program in programs]
    assert any(operator.gated for operator in programs[1].operators)
    assert kinds[1] == kinds[0]


@pytest.mark.parametrize("style", PRUNABLE)
def test_count_equals_the_products_with_values_that_are_kept(style: str) -> None:
    """Each product of a tap with a kept value of the map, one by one."""
    dynamic, _, x = network(style)
    counted = count_macs(dynamic, x)
    seen: dict[str, list[int]] = {}

    def note(name: str, gate: AttentionGate) -> Any:
        def hook(conv: nn.Conv2d, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            seen[name] = [products(conv, image) for image in inputs[0].numpy()]

        return hook

    for name, module in dynamic.named_modules():
        if isinstance(module, MaskedConv):
            module.conv.register_forward_hook(note(name, module.gate))
    with torch.no_grad():
        dynamic(x)
    assert seen
    for name, expected in seen.items():
        assert counted.layers[name].tolist() == expected, name
        assert (
            counted.gates[name].tolist()
            == [dynamic.gates()[name].overhead(torch.Size((1, *shape_of(dynamic, name))))] * 4
        )


def shape_of(dynamic: Dynamic, name: str) -> torch.Size:
    gate: Any = dynamic.gates()[name]
    return torch.Size((gate.channels, gate.positions, 1))


def products(conv: nn.Conv2d, image: NDArray[np.float64]) -> int:
    """Pairs of a weight and a value that is not zero, for a convolution of one image [C, H, W]."""
    _, height, width = image.shape
    (kh, kw), (sy, sx) = conv.kernel_size, conv.stride
    (py, px), (dy, dx) = conv.padding, conv.dilation  # type: ignore[misc]
    out_height = (height + 2 * py - dy * (kh - 1) - 1) // sy + 1  # type: ignore[operator]
    out_width = (width + 2 * px - dx * (kw - 1) - 1) // sx + 1  # type: ignore[operator]
    total = 0
    for i, j, row, column in itertools.product(range(kh), range(kw), range(out_height), range(out_width)):
        y, x = row * sy + i * dy - py, column * sx + j * dx - px  # type: ignore[operator]
        if 0 <= y < height and 0 <= x < width:
            total += int((image[:, y, x] != 0).sum()) * conv.out_channels // conv.groups
    return total


@pytest.mark.parametrize(
    ("net", "options", "channels", "columns", "cut", "unrounded"),
    [
        ("vgg16", {}, (0.2, 0.2, 0.6, 0.9, 0.9), 0.0, 0.546, 0.551),
        ("vgg16", {"classes": 100}, (0.2, 0.2, 0.2, 0.8, 0.9), 0.0, 0.399, 0.404),
        ("resnet56", {}, (0.3, 0.3, 0.6), 0.6, 0.380, 0.386),
    ],
)
def test_settings_of_the_paper(
    net: str, options: dict[str, Any], channels: Any, columns: float, cut: float, unrounded: float
) -> None:
    """The cuts that README states, and near to what they would be if kept numbers were not rounded up."""
    x = torch.randn(2, 3, 32, 32)
    dynamic = convert(build_net(net, **options).eval(), AntiDote(channels=channels, columns=columns), x)
    found = 1 - count_macs(dynamic, x).mean / dynamic.conversion.total_macs
    assert found == pytest.approx(cut, abs=0.0015)
    assert found == pytest.approx(unrounded, abs=0.0075)


@pytest.mark.slow
def test_settings_of_the_paper_at_224() -> None:
    x = torch.randn(1, 3, 224, 224)
    with no_initialisation():
        model = torchvision.models.vgg16(num_classes=100).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    dynamic = convert(model, AntiDote(channels=(0.1, 0, 0, 0, 0.2), columns=0.5), x, inplace=True)
    assert 1 - count_macs(dynamic, x).mean / dynamic.conversion.total_macs == pytest.approx(0.509, abs=0.0015)


def test_residual_networks_are_pruned_inside_blocks_only() -> None:
    x = torch.randn(1, 3, 64, 64)
    basic = convert(torchvision.models.resnet18().eval(), AntiDote(), x).conversion
    bottleneck = convert(torchvision.models.resnet50().eval(), AntiDote(), x).conversion
    assert {place.name.split(".")[-1] for place in basic.places if place.gated} == {"conv2"}
    assert {place.name.split(".")[-1] for place in bottleneck.places if place.gated} == {"conv2", "conv3"}
    notes = {place.name: place.note for place in basic.places}
    assert notes["conv1"] == "it reads the network's input"
    assert notes["layer1.0.conv1"] == "the map that it reads is a shortcut too"
    assert notes["layer2.0.downsample.0"] == "it reads a sum with a shortcut"


@pytest.mark.parametrize(
    "name", ["vgg11", "densenet121", "googlenet", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x1_0"]
)
def test_any_network_can_be_pruned(name: str) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = randomise(torchvision_cnn(name), x).eval()
    dynamic = convert(model, AntiDote(channels=0.3, columns=0.3), x)
    assert dynamic.conversion.coverage > 0.1
    with torch.no_grad():
        assert dynamic(x).shape == (2, 1000)
    assert count_macs(dynamic, x).mean < dynamic.conversion.total_macs


@pytest.mark.parametrize("criterion", ["random", "inverse"])
def test_other_criteria_keep_as_much(criterion: Any) -> None:
    dynamic, _, x = network(criterion=criterion)
    attention, _, _ = network()
    by_attention = decisions(attention, x)
    for name, decision in decisions(dynamic, x).items():
        assert torch.equal(decision.channels.sum(1), by_attention[name].channels.sum(1))
        assert torch.equal(decision.columns.sum((1, 2)), by_attention[name].columns.sum((1, 2)))
    first = next(iter(by_attention))
    assert not torch.equal(decisions(dynamic, x)[first].columns, by_attention[first].columns)
    with pytest.raises(LoweringError, match="comparison"):
        dynamic.gates()[first].lower((3, 4, 4))


def test_dropout_in_training() -> None:
    for dropout, same in (("targeted", True), ("random", False)):
        dynamic, _, x = network(dropout=dropout)
        gate: Any = next(iter(dynamic.gates().values()))
        y = torch.randn(4, gate.channels, SIZE, SIZE, dtype=torch.float64)
        trained, evaluated = gate.train()(y), gate.eval()(y)
        assert torch.equal(trained[1], evaluated[1]) is same
        assert torch.equal(trained[1].sum(1), evaluated[1].sum(1))
    dynamic, model, x = network(dropout="none")
    torch.testing.assert_close(dynamic.train()(x), copy.deepcopy(model).train()(x))
    assert not torch.allclose(dynamic.eval()(x), model(x))


def test_gradients_flow_through_what_is_kept_only() -> None:
    gate = AttentionGate(torch.Size((5, 4, 4)))
    gate.set_ratios(0.5, 0.5)
    x = torch.randn(2, 5, 4, 4, requires_grad=True)
    kept, channels, columns = gate.train()(x)
    kept.sum().backward()
    assert torch.equal(x.grad, (channels[:, :, None, None] & columns[:, None]).float())


@settings(deadline=None, derandomize=True)
@given(st.floats(0.0, 0.95), st.sampled_from(["steps", "linear", "none"]), st.floats(0, 1), st.floats(0, 1))
def test_ratio_ascends_to_its_target(target: float, schedule: Any, early: float, late: float) -> None:
    method = AntiDote(schedule=schedule)
    early, late = sorted((early, late))
    assert 0 <= method.ratio_at(early, target) <= method.ratio_at(late, target) <= target
    assert method.ratio_at(1.0, target) == target


def test_steps() -> None:
    method = AntiDote(ascent=(0.0, 0.5), start=0.1, step=0.2)
    assert [method.ratio_at(p, 0.6) for p in (0.0, 0.17, 0.34, 0.5, 1.0)] == pytest.approx([0.3, 0.5, 0.6, 0.6, 0.6])


def test_ratios_by_stage_and_by_name() -> None:
    x = torch.randn(1, 3, 32, 32)
    dynamic = convert(
        build_net("resnet20").eval(), AntiDote(channels={"layer1.*": 0.5, "*": 0.25}, columns=(0, 0.5, 0)), x
    )
    kept = {name: (int(g.kept_channels), int(g.kept_columns)) for name, g in dynamic.gates().items()}
    assert kept["layer1.0.conv2"] == (8, 1024)
    assert kept["layer2.1.conv2"] == (24, 128)
    assert kept["layer3.2.conv2"] == (48, 64)
    dynamic.set_density({"layer1.*": 1.0})
    assert decisions(dynamic, x)["layer1.0.conv2"].channels is None
    assert dynamic.density == pytest.approx((3 * 1 + 3 * 0.75 * 0.5 + 3 * 0.75) / 9)
    with pytest.raises(ThriftyError, match="3 sizes"):
        convert(build_net("resnet20").eval(), AntiDote(channels=(0.1, 0.2)), x)
    with pytest.raises(ThriftyError, match="layer9"):
        convert(build_net("resnet20").eval(), AntiDote(channels={"layer9.*": 0.1}), x)


@pytest.mark.parametrize(("first", "then"), [(64, 32), (32, 64), (48, 32)])
def test_weights_of_another_image_size_keep_the_same_shares(first: int, then: int) -> None:
    """As the error about inputs of another size advises: convert anew and load the state."""
    model, method = build_net("resnet20").eval(), AntiDote(channels=0.3, columns=0.6)
    trained, fresh = (convert(model, method, torch.zeros(1, 3, size, size)) for size in (first, then))
    expected = {name: (int(g.kept_channels), int(g.kept_columns)) for name, g in fresh.gates().items()}
    fresh.set_density(0.9, columns=0.9)
    fresh.load_state_dict(trained.state_dict())
    for name, gate in fresh.gates().items():
        channels, columns = expected[name]
        assert int(gate.kept_channels) == channels
        assert columns <= int(gate.kept_columns) <= columns + max(1, then * then / first / first)  # rounded up twice
    fresh.load_state_dict(fresh.state_dict())  # its own now
    assert 0.4 <= min(int(g.kept_columns) / g.positions for g in fresh.gates().values()) < 0.43


def test_counts_that_are_no_part_of_a_map_are_not_loaded() -> None:
    dynamic, _, _ = network()
    for name, wrong in (("kept_channels", 0), ("kept_channels", 9), ("kept_columns", -3), ("kept_columns", 10**6)):
        state = dynamic.state_dict()
        state[f"c2.gate.{name}"] = torch.tensor(wrong)
        before = {key: value.clone() for key, value in dynamic.state_dict().items()}
        with pytest.raises(RuntimeError, match=rf"c2.gate.{name} is {wrong}, but must be in \[1, "):
            dynamic.load_state_dict(state)
        assert torch.equal(dynamic.state_dict()[f"c2.gate.{name}"], before[f"c2.gate.{name}"])
    old = {key: value for key, value in dynamic.state_dict().items() if not key.endswith("of_positions")}
    dynamic.load_state_dict(old)


def test_layers_that_attention_would_make_dearer_stay_dense() -> None:
    x = torch.randn(1, 3, 96, 96)
    model = torchvision.models.mobilenet_v2(num_classes=10).eval()
    places = convert(model, AntiDote(channels=0.4, columns=0.5), x).conversion.places
    strided = [place for place in places if place.name.endswith("conv.1.0") and "89%" in place.note]
    assert len(strided) == 4
    assert all(place.note == "its gate would cost 89% of its MACs" and not place.gated for place in strided)
    assert all(place.gate_macs <= 0.5 * place.macs for place in places)
    gated = convert(model, AntiDote(channels=0.4, columns=0.5, max_overhead=0.9), x).gates()
    assert {place.name for place in strided} <= set(gated)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_columns_that_padding_mirrors_cost_what_is_read(mode: str) -> None:
    x = torch.randn(3, 8, 9, 7, dtype=torch.float64)
    conv = nn.Conv2d(8, 6, 3, padding=1, padding_mode=mode, dtype=torch.float64)
    dynamic = convert(nn.Sequential(nn.Conv2d(8, 8, 1, dtype=torch.float64), nn.ReLU(), conv), AntiDote(columns=0.6), x)
    seen: list[Tensor] = []
    handle = dynamic.get_submodule("2.conv").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    count = count_macs(dynamic, x).layers["2"]
    handle.remove()
    padded = nn.functional.pad(seen[-1], (1, 1, 1, 1), mode=mode)
    bare = nn.Conv2d(8, 6, 3)
    masked = decisions(dynamic, x)["2"]
    kept = nn.functional.pad(
        (masked.channels[:, :, None, None] & masked.columns[:, None]).double(), (1, 1, 1, 1), mode=mode
    )
    assert ((padded != 0) <= (kept != 0)).all()
    assert count.tolist() == [products(bare, image) for image in kept.detach().numpy()]


def test_attention_of_columns_in_half_precision() -> None:
    gate = AttentionGate(torch.Size((2048, 4, 4))).eval()
    gate.set_ratios(columns=0.5)
    x = torch.full((1, 2048, 4, 4), 33.0)
    x[:, :, 3] = 60.0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kept, _, columns = gate(x.to(dtype))
        assert kept.dtype == dtype
        assert columns[0].sum(1).tolist() == [4, 0, 0, 4]


def test_ratios_that_keep_everything_are_named() -> None:
    _, model, x = network()
    with pytest.raises(ThriftyError, match=r"leaves no layer gated. Those that .*its ratios keep everything"):
        convert(model, AntiDote(channels=0.0, where="c*"), x)


@pytest.mark.parametrize("progress", [float("nan"), -0.1, 1.5, "half", True])
def test_progress_is_a_share(progress: Any) -> None:
    dynamic, model, x = network()
    for each in (dynamic, convert(model, FBS(max_overhead=9.0), x), convert(model, LCNet(max_overhead=9.0), x)):
        with pytest.raises(ThriftyError, match="must be the share of training that is done"):
            each.method.advance(each, progress)


def test_shares_of_both_axes_are_set_together_or_not_at_all() -> None:
    dynamic, model, x = network("Residual")
    dynamic.set_density(np.float32(0.5), columns={"*": 0.25})
    before = {key: value.clone() for key, value in dynamic.state_dict().items()}
    kept = {(int(g.kept_channels) / g.channels, int(g.kept_columns) / g.positions) for g in dynamic.gates().values()}
    assert kept == {(0.5, 0.25)}
    for wrong in ({"density": 0.4, "columns": {"nowhere": 0.5}}, {"density": 2.0, "columns": 0.5}):
        with pytest.raises(ThriftyError):
            dynamic.set_density(**wrong)
    assert all(torch.equal(dynamic.state_dict()[key], value) for key, value in before.items())
    with pytest.raises(ThriftyError, match="fbs skips no columns"):
        convert(model, FBS(), x).set_density(columns=0.5)
    with pytest.raises(ThriftyError, match="no layer is gated"):
        convert(model, AntiDote(channels=0.0, columns=0.0), x).set_density(0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": 1.0}, {"channels": -0.1}, {"columns": (0.1, 2.0)}, {"channels": {"a": 1.0}}, {"criterion": "loud"},
        {"dropout": "all"}, {"schedule": "cosine"}, {"step": 0}, {"start": 1.0}, {"ascent": (0.5, 0.1)},
        {"columns": True}, {"sparsity": -1.0}, {"sparsity": float("nan")}, {"step": "a"}, {"ascent": 0.5},
        {"ascent": (0.1, None)}, {"straight_through": "no"}, {"one_for_all": 1}, {"max_overhead": -1.0},
        {"straight_through": True, "criterion": "random"}, {"straight_through": True, "dropout": "random"},
        {"sparsity": 0.1, "dropout": "none"}, {"one_for_all": True, "dropout": "none"},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ThriftyError):
        AntiDote(**wrong)


def test_copies_files_and_export() -> None:
    dynamic, _, x = network("Residual")
    expected = dynamic(x)
    for twin in (copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):  # noqa: S301 (our own bytes)
        assert torch.equal(twin(x), expected)
    fresh, _, _ = network("Residual", channels=0.1, columns=0.1)
    fresh.load_state_dict(dynamic.state_dict())
    assert torch.equal(fresh(x), expected)
    torch.testing.assert_close(torch.export.export(dynamic, (x,)).module()(x), expected)


@pytest.mark.parametrize("axis", ["channels", "columns"])
def test_weights_bring_the_axes_that_they_prune(axis: str) -> None:
    ratios = {"channels": 0.0, "columns": 0.0} | {axis: 0.5}
    dynamic, _, x = network("Residual", **ratios)
    dynamic.set_density(0.4, columns=0.6)
    fresh, _, _ = network("Residual", **ratios)
    fresh.load_state_dict(dynamic.state_dict())
    assert torch.equal(fresh(x), dynamic(x))
    assert torch.equal(count_macs(fresh, x).total, count_macs(dynamic, x).total)


def test_maps_of_other_sizes_keep_the_same_share() -> None:
    gate = AttentionGate(torch.Size((4, 8, 8)))
    gate.set_ratios(0.5, 0.75)
    _, channels, columns = gate(torch.randn(2, 4, 5, 7))
    assert channels.sum(1).tolist() == [2, 2]
    assert columns.sum((1, 2)).tolist() == [9, 9]  # a quarter of 35, rounded up
