"""Networks of the zoo, for 32 x 32 px photographs. Each takes float32 [N, 3, 32, 32] and returns logits [N, classes].

M-CifarNet: Zhao, Gao, Mullins, Xu, 'Mayo: A Framework for Auto-generating Hardware Friendly Deep Neural Networks',
    EMDL 2018; the network of the FBS paper (arXiv 1810.05331), 174.30 M MACs.
CIFAR ResNets: He, Zhang, Ren, Sun, 'Deep Residual Learning for Image Recognition', arXiv 1512.03385, section 4.2,
    with the parameter-free shortcut (option A).
VGG-16: Simonyan, Zisserman, arXiv 1409.1556, configuration D with batch normalisation and one linear layer, as is
    usual at this size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from thrifty.errors import ThriftyError


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _conv_bn_relu(inputs: int, outputs: int, stride: int = 1, padding: int = 1) -> nn.Sequential:
    parts = OrderedDict(
        conv=nn.Conv2d(inputs, outputs, 3, stride, padding, bias=False),
        bn=nn.BatchNorm2d(outputs),
        relu=nn.ReLU(inplace=True),
    )
    return nn.Sequential(parts)


class MCifarNet(nn.Module):
    """Eight 3x3 convolutions with batch normalisation and ReLU, two dropouts, average pool, linear."""

    def __init__(self, classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_bn_relu(3, 64, padding=0),
            _conv_bn_relu(64, 64),
            _conv_bn_relu(64, 128, stride=2),
            _conv_bn_relu(128, 128),
            nn.Dropout(dropout),
            _conv_bn_relu(128, 128),
            _conv_bn_relu(128, 192, stride=2),
            _conv_bn_relu(192, 192),
            nn.Dropout(dropout),
            _conv_bn_relu(192, 192),
        )
        self.fc = nn.Linear(192, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads channels with zeros where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = ((outputs - inputs) // 2, outputs - inputs - (outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or any(self.padding):
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet of 6 n + 2 layers for 32 px: `depth` is 8, 14, 20, 32, 44, 56, 110, …, `width` that of the first stage."""

    def __init__(self, depth: int, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ThriftyError(f"a CIFAR ResNet has 6 n + 2 layers, {depth} are not. Take 20, 32, 44, 56 or 110.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.fc = nn.Linear(4 * width, classes)
        _initialise(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions in five blocks with max pooling between them, and one linear layer."""

    WIDTHS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width, repeats in self.WIDTHS:
            for _ in range(repeats):
                layers.append(_conv_bn_relu(inputs, width))
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))


def resnet8(classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-8: 12.2 M MACs, 0.08 M parameters."""
    return CifarResNet(8, classes)


def resnet14(classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-14: 26.4 M MACs, 0.18 M parameters."""
    return CifarResNet(14, classes)


def resnet20(classes: int = 10, width: int = 16) -> CifarResNet:
    """CIFAR ResNet-20: 40.6 M MACs, 0.27 M parameters."""
    return CifarResNet(20, classes, width)


def resnet32(classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-32: 68.9 M MACs, 0.46 M parameters."""
    return CifarResNet(32, classes)


def resnet56(classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-56: 125.5 M MACs, 0.85 M parameters."""
    return CifarResNet(56, classes)


NETS: dict[str, Callable[..., nn.Module]] = {
    "mcifarnet": MCifarNet,
    "resnet8": resnet8,
    "resnet14": resnet14,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "vgg16": VGG16,
}
"""Definitions that recipes and zoo records name."""


def build(name: str, **arguments: object) -> nn.Module:
    """A fresh network of the zoo, with random weights.

    Raises:
        ThriftyError: there is no network of that name, or it does not take the arguments.
    """
    if name not in NETS:
        raise ThriftyError(f"there is no network {name!r} in the zoo. Choose one of: {', '.join(NETS)}.")
    try:
        return NETS[name](**arguments)
    except TypeError as error:
        raise ThriftyError(f"network {name!r} does not take these arguments: {error}") from error
