"""Programs for tests: a builder, and random ones out of all kinds of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from thrifty.decision import Decision
from thrifty.program import ACTIVATIONS, Operator, Preprocessing, Program

Shape = tuple[int, int, int]


class Builder:
    """Grows a program operator by operator, with random weights."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.buffers: list[Shape] = [shape]
        self.operators: list[Operator] = []
        self.tensors: dict[str, Any] = {}
        self.guard: int | None = None

    @contextmanager
    def guarded(self, gate: int) -> Iterator[None]:
        """What is added meanwhile has the layer_gate that writes this buffer as its guard."""
        outer, self.guard = self.guard, gate
        yield
        self.guard = outer

    def add(self, kind: str, inputs: tuple[int, ...], shape: Shape, attributes: Any = None, **tensors: Any) -> int:
        name = f"{kind}{len(self.operators)}"
        self.tensors.update({f"{name}.{role}": value for role, value in tensors.items()})
        roles = {role: f"{name}.{role}" for role in tensors}
        self.buffers.append(shape)
        guard = None if kind == "layer_gate" else self.guard
        self.operators.append(Operator(kind, name, inputs, len(self.buffers) - 1, attributes or {}, roles, guard))
        return len(self.buffers) - 1

    def weights(self, *shape: int, scale: float = 1) -> Any:
        return (self.random.standard_normal(shape) * scale).astype(np.float32)

    def conv(
        self,
        x: int,
        outputs: int,
        kernel: int = 1,
        winners: int = 0,
        residual: int | None = None,
        threshold: float | None = None,
        kept: tuple[int, int] | None = None,
        **attributes: Any,
    ) -> int:
        """A convolution, gated with `winners` (topk), `threshold` (clip) or `kept` channels and columns (attention).

        It keeps the size, unless attributes say otherwise.
        """
        channels, height, width = self.buffers[x]
        per_group = channels // attributes.get("groups", 1)
        fan = per_group * kernel * kernel
        tensors = {"weight": self.weights(outputs, per_group, kernel, kernel, scale=fan**-0.5)}
        tensors["bias"] = self.weights(outputs, scale=0.5)
        attributes = {"padding": ((kernel - 1) // 2, kernel // 2) * 2} | attributes
        if winners or threshold is not None:
            attributes |= {"gate": "topk", "winners": winners} if winners else {"gate": "clip", "threshold": threshold}
            tensors["gate_weight"] = self.weights(outputs, channels, scale=channels**-0.5)
            tensors["gate_bias"] = np.abs(self.weights(outputs)) + 0.5
        if kept:
            attributes |= {"gate": "attention", "kept_channels": kept[0], "kept_columns": kept[1]}
        top, bottom, left, right = attributes["padding"]
        size = [
            (extent - (kernel - 1) * dilation - 1) // stride + 1
            for extent, dilation, stride in zip(
                (height + top + bottom, width + left + right), attributes.get("dilation", (1, 1)),
                attributes.get("stride", (1, 1)), strict=True,
            )
        ]  # fmt: skip
        inputs = (x,) if residual is None else (x, residual)
        return self.add("conv", inputs, (outputs, *size), attributes, **tensors)

    def layer_gate(self, x: int, threshold: float = 0) -> int:
        """Its score is mostly between 0 and 1."""
        channels = self.buffers[x][0]
        weight = self.weights(1, channels, scale=channels**-0.5)
        bias = np.float32(0.5) + self.weights(1, scale=0.3)
        return self.add("layer_gate", (x,), (1, 1, 1), {"threshold": threshold}, weight=weight, bias=bias)

    def linear(self, x: int, outputs: int, **attributes: Any) -> int:
        features = self.buffers[x][0]
        weight = self.weights(outputs, features, scale=features**-0.5)
        return self.add("linear", (x,), (outputs, 1, 1), attributes, weight=weight, bias=self.weights(outputs))

    def flatten(self, x: int) -> int:
        channels, height, width = self.buffers[x]
        return self.add("flatten", (x,), (channels * height * width, 1, 1))

    def build(self, output: int | None = None, preprocessing: Preprocessing | None = None) -> Program:
        output = len(self.buffers) - 1 if output is None else output
        flat = self.buffers[output][1:] == (1, 1)
        return Program(tuple(self.buffers), tuple(self.operators), output, flat, dict(self.tensors), preprocessing)


def grow(builder: Builder, kind: str, x: int) -> int:
    """Adds an operator of this kind, with random settings, that reads buffer x; or none, where none fits."""
    return _GROWERS[kind](builder, x)


def _integer(b: Builder, low: int, high: int) -> int:
    return int(b.random.integers(low, high + 1))


def _activation(b: Builder) -> dict[str, Any]:
    return {"activation": str(b.random.choice(ACTIVATIONS)), "slope": 0.1}


def _some(b: Builder, most: int) -> int:
    """One, all or any number in between."""
    return int(b.random.choice([1, most, _integer(b, 1, most)]))


def _gate(b: Builder, x: int, outputs: int) -> dict[str, Any]:
    """A gate of any kind for a convolution, or none."""
    channels, height, width = b.buffers[x]
    gates: list[dict[str, Any]] = [
        {},
        {"winners": _some(b, outputs)},
        {"winners": _some(b, outputs)},
        {"threshold": float(b.random.choice([0, 0.5, 0.99]))},
        {"kept": (_some(b, channels), _some(b, height * width))},
        {"kept": (_some(b, channels), _some(b, height * width))},
    ]
    return gates[_integer(b, 0, len(gates) - 1)]


def _geometry(b: Builder, x: int, kernel: int) -> dict[str, Any]:
    """Strides, padding, dilation and groups that fit."""
    channels, *size = b.buffers[x]
    padding = tuple(_integer(b, 0, kernel) for _ in range(4))
    dilation = [1, 1]
    for axis, extent in enumerate(size):
        room = extent + padding[2 * axis] + padding[2 * axis + 1]
        if room < kernel:
            return {}
        dilation[axis] = _integer(b, 1, min(3, (room - 1) // max(kernel - 1, 1)))
    groups = [g for g in range(1, channels + 1) if channels % g == 0]
    return {
        "stride": (_integer(b, 1, 3), _integer(b, 1, 3)), "padding": padding, "dilation": tuple(dilation),
        "groups": groups[_integer(b, 0, len(groups) - 1)],
    }  # fmt: skip


def _conv(b: Builder, x: int) -> int:
    kernel = _integer(b, 1, 3)
    geometry = _geometry(b, x, kernel) if b.random.random() < 0.4 else {}
    groups = geometry.get("groups", 1)
    outputs = groups * _integer(b, 1, max(1, 20 // groups))
    residual = None
    if not geometry:
        same = [i for i, other in enumerate(b.buffers) if other == (outputs, *b.buffers[x][1:])]
        residual = same[_integer(b, 0, len(same) - 1)] if same and b.random.random() < 0.7 else None
    attributes = {**geometry, **_activation(b)}
    if b.guard is not None:
        attributes["scaled"] = _integer(b, 0, 1)
    return b.conv(x, outputs, kernel, residual=residual, **_gate(b, x, outputs), **attributes)


def _linear(b: Builder, x: int) -> int:
    return b.linear(b.flatten(x), _integer(b, 1, 70), **_activation(b))


def _affine(b: Builder, x: int) -> int:
    shape = b.buffers[x]
    tensors = {"scale": b.weights(shape[0])}
    if b.random.random() < 0.5:
        tensors["shift"] = b.weights(shape[0])
    return b.add("affine", (x,), shape, _activation(b), **tensors)


def _binary(kind: str) -> Callable[[Builder, int], int]:
    def grower(b: Builder, x: int) -> int:
        channels, height, width = shape = b.buffers[x]
        fitting = {shape, (channels, 1, 1)} | ({(1, height, width), (1, 1, 1)} if kind == "mul" else set())
        others = [i for i, other in enumerate(b.buffers) if other in fitting]
        return b.add(kind, (x, others[_integer(b, 0, len(others) - 1)]), shape, _activation(b))

    return grower


def _concat(b: Builder, x: int) -> int:
    _, height, width = b.buffers[x]
    others = [i for i, other in enumerate(b.buffers) if other[1:] == (height, width)]
    inputs = (x, *(others[_integer(b, 0, len(others) - 1)] for _ in range(_integer(b, 0, 2))))
    return b.add("concat", inputs, (sum(b.buffers[i][0] for i in inputs), height, width))


def _gather(b: Builder, x: int) -> int:
    channels, height, width = b.buffers[x]
    index = b.random.integers(-1, channels, _integer(b, 1, 20)).astype(np.int32)
    return b.add("gather", (x,), (len(index), height, width), index=index)


def _extent(b: Builder, size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> int:
    room = size + before + after - dilation * (kernel - 1) - 1
    up = -(-room // stride) + 1
    return up if b.random.random() < 0.5 and (up - 1) * stride < size + before else room // stride + 1


def _pool(kind: str) -> Callable[[Builder, int], int]:
    def grower(b: Builder, x: int) -> int:
        shape = b.buffers[x]
        kernel, stride, dilation, padding, size = [], [], [], [], []
        for extent in shape[1:]:
            k, s = _integer(b, 1, min(5, extent)), _integer(b, 1, 4)
            before, after = _integer(b, 0, k // 2), _integer(b, 0, k // 2)
            d = 2 if kind == "max_pool" and b.random.random() < 0.3 and extent >= 2 * k - 1 else 1
            kernel.append(k), stride.append(s), dilation.append(d), padding.extend((before, after))
            size.append(_extent(b, extent, k, s, d, before, after))
        attributes = {"kernel": tuple(kernel), "stride": tuple(stride), "padding": tuple(padding)}
        if kind == "max_pool":
            attributes["dilation"] = tuple(dilation)
        else:
            attributes |= {"count_include_pad": _integer(b, 0, 1), "divisor": _integer(b, 0, 1) * 5}
        return b.add(kind, (x,), (shape[0], *size), attributes)

    return grower


def _adaptive(kind: str) -> Callable[[Builder, int], int]:
    def grower(b: Builder, x: int) -> int:
        shape = b.buffers[x]
        size = (1, 1) if b.random.random() < 0.5 else (_integer(b, 1, 6), _integer(b, 1, 6))
        return b.add(kind, (x,), (shape[0], *size))

    return grower


def _pad(b: Builder, x: int) -> int:
    channels, height, width = b.buffers[x]
    t, bottom, left, right = (_integer(b, 0, 2) for _ in range(4))
    value = float(b.random.choice([0, 0, 1.5]))
    shape = (channels, height + t + bottom, width + left + right)
    return b.add("pad", (x,), shape, {"padding": (t, bottom, left, right), "value": value})


def _layer_norm(b: Builder, x: int) -> int:
    shape = b.buffers[x]
    tensors = {"weight": b.weights(shape[0]), "bias": b.weights(shape[0])}
    return b.add("layer_norm", (x,), shape, {"epsilon": 0.1}, **tensors)


def _guarded(b: Builder, x: int) -> int:
    """A block that a layer_gate guards, of any operators; at its end mostly a convolution with a residual."""
    gate = b.layer_gate(x, float(b.random.choice([0, 0.3, 0.6, 0.99])))
    y = x
    with b.guarded(gate):
        for kind in b.random.choice([kind for kind in GROWN if kind != "layer_gate"], _integer(b, 1, 3)):
            y = grow(b, str(kind), y)
        if b.random.random() < 0.3:
            y = b.add("mul", (y, gate), b.buffers[y])
        if b.buffers[y][1:] == b.buffers[x][1:] and b.random.random() < 0.7:
            gates = _gate(b, y, b.buffers[x][0])
            y = b.conv(y, b.buffers[x][0], 3, residual=x, scaled=_integer(b, 0, 1), **gates, **_activation(b))
    return y


_GROWERS: dict[str, Callable[[Builder, int], int]] = {
    "conv": _conv,
    "linear": _linear,
    "affine": _affine,
    "activation": lambda b, x: b.add("activation", (x,), b.buffers[x], _activation(b)),
    "add": _binary("add"),
    "mul": _binary("mul"),
    "concat": _concat,
    "gather": _gather,
    "max_pool": _pool("max_pool"),
    "avg_pool": _pool("avg_pool"),
    "adaptive_avg_pool": _adaptive("adaptive_avg_pool"),
    "adaptive_max_pool": _adaptive("adaptive_max_pool"),
    "pad": _pad,
    "layer_norm": _layer_norm,
    "flatten": lambda b, x: b.flatten(x),
    "layer_gate": _guarded,
}

GROWN = tuple(_GROWERS)
"""Kinds that `grow` knows."""


def random_program(seed: int, length: int = 8) -> Program:
    """A random program on small maps; about half of its buffers are sparse."""
    b = Builder((0, 0, 0), seed)
    b.buffers[0] = (_integer(b, 1, 12), _integer(b, 1, 14), _integer(b, 1, 14))
    b.conv(0, _integer(b, 2, 16), 1, winners=_integer(b, 1, 2))
    for _ in range(length):
        grow(b, str(b.random.choice(GROWN)), _integer(b, max(0, len(b.buffers) - 4), len(b.buffers) - 1))
    return b.build()


def random_decisions(program: Program, count: int, seed: int = 0) -> dict[str, Decision]:
    """Any set on every axis of every gate, the empty and the full one too; layers mostly run."""
    random = np.random.default_rng(seed)

    def marks(axis: str, shape: tuple[int, ...]) -> Any:
        shares = [0.8] if axis == "layer" else [0.0, 0.5, 0.5, 0.9, 1.0]
        return random.random((count, *shape)) < random.choice(shares, size=(count, *(1 for _ in shape)))

    return {
        name: Decision(**{axis: marks(axis, shape) for axis, shape in program.axes(name).items()})
        for name in program.gated
    }
