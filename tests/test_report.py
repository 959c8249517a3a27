"""What one input's decisions look like: numbers against a recomputation, and pictures that are really written."""

from __future__ import annotations

import errno
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from random_gates import randomly_gated
from randomised import randomise, torchvision_cnn
from small_nets import NETS, SIZE
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.decision import Decision
from thrifty.dynamic import Dynamic, decisions
from thrifty.errors import MissingExtraError, ThriftyError
from thrifty.gates import Gate, GatedConv, LayerEntry, LayerExit, LayerGate, Link, MaskedConv, layer_names
from thrifty.graph import replace_module
from thrifty.macs import count_macs
from thrifty.methods import AntiDote, LCNet
from thrifty.report import MAPS, Explanation, draw, explain, picked_layers
from thrifty.zoo.nets import build

STYLES = ("Functional", "Residual", "Concat", "SqueezeExcite", "GroupedShuffle", "NoNorm")
IMAGE = np.arange(SIZE * SIZE * 3, dtype=np.uint8).reshape(SIZE, SIZE, 3)


def gated(style: str, method: str) -> tuple[Dynamic, nn.Module, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(3, 3, SIZE, SIZE)
    model = randomise(NETS[style](), x).eval()
    if method == "fbs":
        return randomly_gated(model, x), model, x
    return convert(model, AntiDote(channels=0.4, columns=0.6), x), model, x


@pytest.mark.parametrize("method", ["antidote", "fbs"])
@pytest.mark.parametrize("style", STYLES)
def test_numbers_are_those_of_the_model(style: str, method: str) -> None:
    dynamic, model, x = gated(style, method)
    counted, dense = count_macs(dynamic, x), count_macs(model, x)
    decided = decisions(dynamic, x)
    for n in range(len(x)):
        found = explain(dynamic, x[n : n + 1])
        assert found.executed == {name: int(macs[n]) for name, macs in counted.layers.items()}
        assert found.gates == {name: int(macs[n]) for name, macs in counted.gates.items()}
        assert found.macs == int(counted.total[n])
        assert found.dense == {name: int(macs[n]) for name, macs in dense.layers.items()}
        assert found.dense_total == int(dense.total[n])
        np.testing.assert_allclose(found.probabilities, dynamic(x[n : n + 1]).softmax(1)[0].detach(), rtol=1e-5)
        assert found.decisions.keys() == decided.keys() == dynamic.gates().keys()
        for name, decision in found.decisions.items():
            np.testing.assert_array_equal(decision.channels[0], decided[name].channels[n].numpy())
        assert not found.skipped


def maps_read(dynamic: Dynamic, kind: type[nn.Module]) -> dict[str, NDArray[Any]]:
    """By layer, the map that each module of that kind reads in the passes to come."""
    read: dict[str, NDArray[Any]] = {}
    names = layer_names(dynamic)
    for path, module in dynamic.named_modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(
                lambda _, inputs, n=names[path]: read.update({n: inputs[0].numpy().copy()})
            )
    return read


@pytest.mark.parametrize("style", STYLES)
def test_attention_and_saliencies_equal_a_recomputation(style: str) -> None:
    dynamic, _, x = gated(style, "antidote")
    read = maps_read(dynamic, MaskedConv)
    found = explain(dynamic, x[:1])
    assert found.attention.keys() == read.keys() == dynamic.gates().keys()
    for name, attention in found.attention.items():
        expected = np.abs(read[name][0].astype(np.float64)).sum(0) / read[name].shape[1]
        np.testing.assert_allclose(attention, expected, rtol=1e-5, atol=1e-7)
    assert not found.saliencies

    dynamic, _, x = gated(style, "fbs")
    read = maps_read(dynamic, GatedConv)
    found = explain(dynamic, x[:1])
    assert not found.attention
    for name, gate in dynamic.gates().items():
        weight, bias = (p.detach().double().numpy() for p in (gate.predictor.weight, gate.predictor.bias))
        scores = np.maximum(0, weight @ np.abs(read[name][0].astype(np.float64)).mean((1, 2)) + bias)
        kept = found.decisions[name].channels[0]
        np.testing.assert_allclose(found.saliencies[name], scores * kept, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_is() -> None:
    dynamic, _, x = gated("Residual", "fbs")
    dynamic.train()
    before = {name: tensor.clone() for name, tensor in dynamic.state_dict().items()}
    explain(dynamic, x[:1])
    assert dynamic.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in dynamic.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dynamic.modules())


class Never(LayerGate):
    """Skips its block whatever it sees."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bool)

    def overhead(self, shape: torch.Size) -> int:
        return shape[1]

    def lower(self, shape: tuple[int, int, int]) -> Any:
        raise NotImplementedError


def with_a_skipped_block() -> tuple[Dynamic, Tensor]:
    """ResNet-20 whose second block is skipped, and whose other blocks have channel gates."""
    torch.manual_seed(1)
    x = torch.randn(1, 3, 32, 32)
    dynamic = randomly_gated(build("resnet20").eval(), x)
    members = ("layer1.1.conv1", "layer1.1.conv2")
    link = Link()
    first, last = (dynamic.get_submodule(name) for name in members)
    replace_module(dynamic, members[0], LayerEntry(first, Never("layer1.1", members), link))
    replace_module(dynamic, members[1], LayerExit(last, link))
    return dynamic.eval(), x


def test_skipped_blocks_are_told_and_drawn(tmp_path: Path) -> None:
    dynamic, x = with_a_skipped_block()
    found = explain(dynamic, x)
    assert found.skipped == {"layer1.1.conv1", "layer1.1.conv2"}
    assert all(found.executed[name] == 0 < found.dense[name] for name in found.skipped)
    assert not found.decisions["layer1.1"].layer[0]
    assert found.saliencies["layer1.1"].tolist() == [0]
    draw(found, IMAGE, tmp_path / "a.png", "title")
    assert size_of(tmp_path / "a.png")[0] > 600


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file, from its header."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content[12:16] == b"IHDR"
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize("method", ["antidote", "fbs"])
@pytest.mark.parametrize("style", ["Concat", "Residual"])
def test_pictures_are_written(style: str, method: str, tmp_path: Path) -> None:
    dynamic, _, x = gated(style, method)
    explanation = explain(dynamic, x[:1])
    draw(explanation, IMAGE, tmp_path / "all.png", "a $\\no such^ formula$ of 100 %")
    width, height = size_of(tmp_path / "all.png")
    assert 600 < width < 3000
    assert 300 < height < 3000
    name = next(iter(dynamic.gates()))
    draw(explanation, IMAGE, tmp_path / "one.png", "title", name)
    assert size_of(tmp_path / "one.png")[1] <= height
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "one.png"]
    assert "matplotlib.pyplot" not in sys.modules


def test_a_deep_network_has_a_picture_of_bounded_size(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 32, 32)
    dynamic = convert(build("resnet56").eval(), AntiDote(channels=0.3, columns=0.6), x)
    explanation = explain(dynamic, x)
    assert len(explanation.attention) == 27 > MAPS
    draw(explanation, IMAGE, tmp_path / "a.png", "title")
    width, height = size_of(tmp_path / "a.png")
    assert height < 1.5 * width
    assert picked_layers(explanation, "layer3.*.conv2") == [f"layer3.{i}.conv2" for i in range(9)]
    with pytest.raises(ThriftyError, match=r"no layer fits conv9, x\*"):
        picked_layers(explanation, ("conv9", "x*"))


def test_extreme_values_can_be_drawn(tmp_path: Path) -> None:
    """All channels with the saliency 0, attention the same everywhere, one layer, no MACs."""
    explanation = Explanation(
        method="none",
        probabilities=np.ones(1, np.float32),
        decisions={
            "a": Decision(channels=np.zeros((1, 300), bool)),
            "b": Decision(columns=np.ones((1, 1, 5), bool)),
        },
        dense={"a": 0, "b": 0},
        executed={"a": 0, "b": 0},
        gates={},
        attention={"b": np.zeros((1, 5), np.float32)},
        saliencies={"a": np.zeros(300, np.float32)},
        members={},
        dense_total=0,
    )
    draw(explanation, IMAGE[:1, :1], tmp_path / "a.png", "")
    assert size_of(tmp_path / "a.png")


def test_a_full_disk_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    dynamic, _, x = gated("Functional", "antidote")
    explanation = explain(dynamic, x[:1])
    path = tmp_path / "a.png"
    draw(explanation, IMAGE, path, "title")
    before = path.read_bytes()

    def full(_figure: Figure, temporary: Path, **_options: Any) -> None:
        temporary.write_bytes(before[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(ThriftyError, match="No space left"):
        draw(explanation, IMAGE, path, "title")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == before


def test_hostile_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic, model, x = gated("Functional", "antidote")
    with pytest.raises(ThriftyError, match="is a dense model"):
        explain(model, x[:1])
    for wrong in (x, x[:0], x[0]):
        with pytest.raises(ThriftyError, match="one input"):
            explain(dynamic, wrong)
    explanation = explain(dynamic, x[:1])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'thrifty\[report\]'"):
        draw(explanation, IMAGE, tmp_path / "a.png", "title")
    assert list(tmp_path.iterdir()) == []
    assert isinstance(next(iter(dynamic.gates().values())), Gate)


def test_linear_layers_of_blocks_are_counted_once() -> None:
    x = torch.randn(1, 3, 32, 32)
    model = randomise(torchvision_cnn("convnext_tiny"), x)
    found = explain(convert(model, LCNet(channels=False), x), x)
    assert found.dense == {name: int(macs[0]) for name, macs in count_macs(model, x).layers.items()}
    assert sum(found.dense.values()) == found.dense_total
