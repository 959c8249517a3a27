"""Residual blocks of networks of many styles."""

from __future__ import annotations

import pytest
import timm
import torch.nn.functional as F
from randomised import no_initialisation, torchvision_cnn
from small_nets import NETS, act, conv
from torch import Tensor, nn

from thrifty.blocks import residual_blocks
from thrifty.zoo.nets import build

NETWORKS = {
    "torchvision resnet18": (8, "layer1.0", ("conv1", "conv2")),
    "torchvision resnet50": (16, "layer1.0", ("conv1", "conv2", "conv3")),
    "torchvision resnext50_32x4d": (16, "layer1.0", ("conv1", "conv2", "conv3")),
    "torchvision regnet_y_400mf": (
        16, "trunk_output.block1.block1-0", ("f.a.0", "f.b.0", "f.se.fc1", "f.se.fc2", "f.c.0")
    ),
    "torchvision mobilenet_v2": (10, "features.3", ("conv.0.0", "conv.1.0", "conv.2")),
    "torchvision mobilenet_v3_small": (6, "features.3", ("block.0.0", "block.1.0", "block.2.0")),
    "torchvision efficientnet_b0": (
        9, "features.2.1", ("block.0.0", "block.1.0", "block.2.fc1", "block.2.fc2", "block.3.0")
    ),
    "torchvision convnext_tiny": (18, "features.1.0", ("block.0", "block.3", "block.5")),
    "timm resnetv2_50": (16, "stages.0.blocks.0", ("conv1", "conv2", "conv3")),
    "timm seresnet18": (8, "layer1.0", ("conv1", "conv2", "se.fc1", "se.fc2")),
    "timm convnextv2_atto": (12, "stages.0.blocks.0", ("conv_dw", "mlp.fc1", "mlp.fc2")),
    "timm res2net50_26w_4s": (
        16, "layer1.0", ("conv1", "convs.0", "convs.1", "convs.2", "conv3")
    ),
    "torchvision densenet121": (0, "", ()),
    "torchvision googlenet": (0, "", ()),
    "zoo resnet56": (27, "layer1.0", ("conv1", "conv2")),
    "zoo vgg16": (0, "", ()),
}  # fmt: skip


def network(name: str) -> nn.Module:
    library, name = name.split()
    if library == "torchvision":
        return torchvision_cnn(name)
    if library == "zoo":
        return build(name)
    with no_initialisation():
        return timm.create_model(name)


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_a_network(name: str) -> None:
    number, first, members = NETWORKS[name]
    blocks = residual_blocks(network(name))
    assert len(blocks) == number
    assert [block.refused for block in blocks] == [""] * number
    assert len({block.name for block in blocks}) == number
    assert len({member for block in blocks for member in block.members}) == sum(len(b.members) for b in blocks)
    if blocks:
        assert blocks[0].name == first
        assert blocks[0].members == tuple(f"{first}.{member}" for member in members)
    for block in blocks:
        assert all(member.startswith(f"{block.name}.") for member in (*block.members, block.entry, block.exit))


class Residual(nn.Module):
    """x + c2(act(c1(x))) behind c0, written as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.c0, self.c1, self.c2 = conv(3, 8), conv(8, 8), conv(8, 8)
        self.drop, self.scale = nn.Dropout(0.5), nn.Parameter(F.normalize(conv(1, 1).weight.sum((2, 3), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.c0(x)
        y = act(self.c1(act(x) if self.kind == "function first" else x))
        if self.kind == "shared":
            return x + self.c2(self.c2(y))
        if self.kind == "tapped":
            return x + self.c2(y) + y.mean()
        y = self.c2(y)
        if self.kind == "two readers":
            return x + y * x
        if self.kind == "function last":
            return x + act(y)
        if self.kind == "gated by itself":
            return x + y * y.mean((2, 3), keepdim=True).sigmoid()
        if self.kind == "scaled":
            return x + self.drop(0.5 * y * self.scale)
        return x.add(y) if self.kind == "method" else y + x


@pytest.mark.parametrize("kind", ["plain", "method", "scaled"])
def test_styles_that_can_take_a_gate(kind: str) -> None:
    (block,) = residual_blocks(Residual(kind))
    assert block.refused == ""
    assert (block.name, block.entry, block.exit, block.members) == ("c1-c2", "c1", "c2", ("c1", "c2"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("function first", "begins with leaky_relu"),
        ("function last", "ends with leaky_relu"),
        ("two readers", "2 operations of its branch read its input"),
        ("gated by itself", "ends with mul"),
        ("shared", "called at several places"),
        ("tapped", "something else reads a part"),
    ],
)
def test_styles_that_cannot(kind: str, reason: str) -> None:
    found = [block for block in residual_blocks(Residual(kind)) if block.refused]
    assert reason in found[0].refused


@pytest.mark.parametrize("name", ["Functional", "Concat", "NoNorm", "Shared", "Split"])
def test_networks_without_sums_have_no_blocks(name: str) -> None:
    assert residual_blocks(NETS[name]()) == ()
