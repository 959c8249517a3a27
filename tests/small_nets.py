"""Small networks, each written in a style of its own, for inputs [N, 3, 16, 16].

Activations are leaky: where a channel is not skipped it has values other than zero, so that what a gate did can be told
from the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

SIZE = 16


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


def act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.3)


def conv_bn(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, **options), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.3, inplace=True))


class Net(nn.Module):
    """Layers by keyword; subclasses say how they are called."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


class Functional(Net):
    def __init__(self) -> None:
        super().__init__(c1=conv(3, 8), b1=nn.BatchNorm2d(8), c2=conv(8, 12, stride=2), b2=nn.BatchNorm2d(12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(act(self.b1(self.c1(x))), 2)
        x = F.adaptive_avg_pool2d(act(self.b2(self.c2(x))), 1)
        return self.fc(torch.flatten(x, 1))


class FlattenedMap(Net):
    """A linear layer that reads every position of gated channels."""

    def __init__(self) -> None:
        super().__init__(c=conv_bn(3, 8), pool=nn.AvgPool2d(4), fc=nn.Linear(8 * 16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.c(x)).reshape(x.shape[0], -1))


class Residual(Net):
    """Sums, one of them with a shortcut that is strided and padded with zero channels."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), c1=conv(8, 8), b1=nn.BatchNorm2d(8), c2=conv(8, 8), b2=nn.BatchNorm2d(8))
        self.c3, self.b3 = conv(8, 14, stride=2), nn.BatchNorm2d(14)
        self.c4, self.fc = conv_bn(14, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c0(x)
        y = act(self.b1(self.c1(x)))
        y = self.b2(self.c2(y))
        y += x
        x = act(y)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        x = act(torch.add(self.b3(self.c3(x)), shortcut))
        return self.fc(self.c4(x).mean((2, 3)))


class PaddedOnly(Net):
    """A map with channels that are zero by padding, read by a convolution."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), c1=conv_bn(12, 8), fc=nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c1(F.pad(self.c0(x), (0, 0, 0, 0, 0, 4))).mean((2, 3)))


class Concat(Net):
    """Branches of several kinds side by side, dense connections, and one map that two convolutions read."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), left=conv_bn(8, 6, size=1), right=conv_bn(8, 5), after=conv_bn(19, 7))
        self.fc = nn.Linear(7 + 19, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c0(x)
        x = torch.cat([self.left(x), F.max_pool2d(x, 3, 1, 1), self.right(x)], 1)
        x = torch.cat((self.after(x), x), dim=1)
        return self.fc(x.mean([2, 3]))


class SqueezeExcite(Net):
    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), down=conv(8, 4, 1, bias=True), up=conv(4, 8, 1, bias=True))
        self.c1, self.fc = conv_bn(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c0(x)
        scale = torch.sigmoid(self.up(act(self.down(x.mean((2, 3), keepdim=True)))))
        return self.fc(self.c1(x * scale).mean((2, 3)))


class GroupedShuffle(Net):
    """Grouped and depthwise convolutions, and channels that are shuffled between them."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), c1=conv_bn(8, 12, groups=2), deep=conv_bn(12, 12, stride=2, groups=12))
        self.c2, self.wide = conv_bn(12, 16, groups=4), conv(16, 32, groups=16)
        self.norm, self.fc = nn.BatchNorm2d(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.c1(self.c0(x)))
        n, channels, height, width = x.size()
        x = x.view(n, 3, channels // 3, height, width).transpose(1, 2).contiguous().view(n, -1, height, width)
        x = self.norm(self.wide(F.channel_shuffle(self.c2(x), 4)))
        return self.fc(act(x).mean((2, 3)))


class Split(Net):
    """Half of the channels pass by, as in ShuffleNet v2."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 12), c1=conv_bn(6, 6), c2=conv_bn(12, 8), fc=nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.c0(x).chunk(2, dim=1)
        return self.fc(self.c2(torch.cat((first, self.c1(second)), dim=1)).mean((2, 3)))


class PreActivation(Net):
    """Normalisation before convolution: what a gate zeroed is a constant behind it."""

    def __init__(self) -> None:
        super().__init__(c0=conv(3, 8), b1=nn.BatchNorm2d(8), c1=conv(8, 8), b2=nn.BatchNorm2d(8), c2=conv(8, 8))
        self.b3, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c0(x)
        x = x + self.c2(act(self.b2(self.c1(act(self.b1(x))))))
        return self.fc(act(self.b3(x)).mean((2, 3)))


class NoNorm(Net):
    def __init__(self) -> None:
        super().__init__(c1=conv(3, 8, bias=True), c2=conv(8, 8), c3=conv(8, 6, bias=True), fc=nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(act(self.c3(act(self.c2(act(self.c1(x)))))).mean((2, 3)))


class OddNorms(Net):
    """Normalisations without scales, with frozen ones, over groups, over instances and over channels last."""

    def __init__(self) -> None:
        super().__init__(c1=conv(3, 8), b1=nn.BatchNorm2d(8, affine=False), c2=conv(8, 8), b2=FrozenBatchNorm2d(8))
        self.c3, self.b3 = conv(8, 8), nn.GroupNorm(2, 8)
        self.c4, self.b4 = conv(8, 8, bias=True), nn.InstanceNorm2d(8, affine=True)
        self.c5, self.b5 = conv(8, 8), nn.LayerNorm(8)
        self.c6, self.fc = conv(8, 8, bias=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in ((self.c1, self.b1), (self.c2, self.b2), (self.c3, self.b3), (self.c4, self.b4)):
            x = act(norm(layer(x)))
        x = self.b5(self.c5(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(self.c6(x).mean((2, 3)))


class TwoReaders(Net):
    """A convolution whose raw output is read by its normalisation and by another convolution."""

    def __init__(self) -> None:
        super().__init__(c0=conv(3, 8), b0=nn.BatchNorm2d(8), c1=conv_bn(8, 6), c2=conv_bn(8, 6), fc=nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.c0(x)
        return self.fc((self.c1(act(self.b0(x))) + self.c2(x)).mean((2, 3)))


class Shared(Net):
    """One convolution at two places."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), twice=conv(8, 8), c1=conv_bn(8, 6), fc=nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = act(self.twice(act(self.twice(self.c0(x)))))
        return self.fc(self.c1(x).mean((2, 3)))


class FunctionalConv(Net):
    """A convolution and a normalisation that are called as functions, beside modules."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), c1=conv_bn(8, 6), fc=nn.Linear(6, 5))
        self.kernel = nn.Parameter(torch.empty(8, 8, 3, 3))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.c0(x), self.kernel, padding=1)
        x = act(F.batch_norm(x, self.mean, self.variance))
        return self.fc(self.c1(x).mean((2, 3)))


class ConvHead(Net):
    """Logits made by a convolution, whose channels all belong to the output."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), drop=nn.Dropout(0.5), head=conv(8, 5, 1, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.head(self.drop(self.c0(x)))).mean((2, 3))
        return x.view(x.size(0), 5)


class Upsampled(Net):
    """Two resolutions that are exchanged, as in HRNet."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), low=conv_bn(8, 8, stride=2), high=conv_bn(8, 8), c1=conv_bn(8, 6))
        self.up, self.fc = nn.Upsample(scale_factor=2, mode="nearest"), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c0(x)
        low = self.low(x)
        size = low.shape[-2:]
        low = F.interpolate(F.avg_pool2d(low, 2), size=size, mode="nearest") + low
        return self.fc(self.c1(self.high(x) + self.up(low)).mean((2, 3)))


class Auxiliary(Net):
    """A second head in training, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), c1=conv_bn(8, 8), aux=conv_bn(8, 4), aux_fc=nn.Linear(4, 5))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.c0(x)
        aux = self.aux_fc(self.aux(x).mean((2, 3))) if self.training else None
        x = self.fc(self.c1(x).mean((2, 3)))
        return x if aux is None else (x, aux)


class Alias(Net):
    """Layers that are registered under two names and called once."""

    def __init__(self) -> None:
        super().__init__(c0=conv(3, 8), b0=nn.BatchNorm2d(8), c1=conv_bn(8, 6), fc=nn.Linear(6, 5))
        self.layers = nn.ModuleList([self.c0, self.b0, self.c1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class TiedNorms(Net):
    """Two normalisations that share one scale, which conversion must not rewrite for one of them."""

    def __init__(self) -> None:
        super().__init__(c0=conv(3, 8), b0=nn.BatchNorm2d(8), c1=conv(8, 8), b1=nn.BatchNorm2d(8), fc=nn.Linear(8, 5))
        self.b1.weight = self.b0.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(act(self.b1(self.c1(act(self.b0(self.c0(x)))))).mean((2, 3)))


class ReadsAttributes(Net):
    """A forward that looks at its convolution's weight and settings."""

    def __init__(self) -> None:
        super().__init__(c0=conv(3, 8, stride=2), b0=nn.BatchNorm2d(8), c1=conv_bn(8, 6), fc=nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = act(self.b0(self.c0(x.to(self.c0.weight.dtype)))) * self.c0.stride[0]
        return self.fc(self.c1(x).mean((2, 3)))


class Branching(Net):
    """A part whose forward asks for values, which torch.fx cannot follow, inside a network that it can."""

    class Part(Net):
        def __init__(self) -> None:
            super().__init__(c=conv_bn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(x)
            return x * 2 if x.abs().max() > 1e9 else x

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), part=self.Part(), c1=conv_bn(8, 6), fc=nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c1(self.part(self.c0(x))).mean((2, 3)))


class WrittenView(Net):
    """A view of a map is written to: channels that a gate zeroed have values again."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), c1=conv_bn(8, 6), fc=nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.c0(x).clone()
        y.narrow(1, 0, 6).add_(x.repeat(1, 2, 1, 1))
        return self.fc(self.c1(y).mean((2, 3)))


class Frames(Net):
    """Several frames of an input are folded into the batch."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(1, 8), c1=conv_bn(8, 6), fc=nn.Linear(18, 5))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        frames = self.c1(self.c0(x.reshape(n * 3, 1, SIZE, SIZE)))
        return self.fc(frames.mean((2, 3)).reshape(n, -1))


class Rearranged(Net):
    """Powers, channels that are picked by numbers, and a border that no maximum takes."""

    def __init__(self) -> None:
        super().__init__(c0=conv_bn(3, 8), c1=conv_bn(8, 8), c2=conv_bn(8, 6), fc=nn.Linear(6, 5))
        self.register_buffer("order", torch.tensor([6, 1, 3, 0, 7, 5, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.c1(self.c0(x) ** 2)[:, self.order]
        x = F.max_pool2d(F.pad(x, (0, 1, 1, 0), value=float("-inf")), 3, 2)
        return self.fc(self.c2(x).pow(2).mean((2, 3)))


def plain_sequential() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), conv_bn(8, 12, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (
        Functional, FlattenedMap, Residual, PaddedOnly, Concat, SqueezeExcite, GroupedShuffle, Split, PreActivation,
        NoNorm, OddNorms, TwoReaders, Shared, FunctionalConv, ConvHead, Upsampled, Auxiliary, Alias, TiedNorms,
        ReadsAttributes, Branching, WrittenView, Frames, Rearranged,
    )
} | {"Sequential": plain_sequential}  # fmt: skip
