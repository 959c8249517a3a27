"""The reference executor: slow, obvious NumPy that says what a program computes. The others are tested against it.

What a gate skips is not computed: it stays exactly zero, and nothing that reads it multiplies by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from thrifty.decision import Decision
from thrifty.errors import ProgramError
from thrifty.program import FILL_ZEROS, Operator, Program

Array = NDArray[Any]


@dataclass(frozen=True)
class Result:
    """What a program made of N inputs.

    Attributes:
        output: [N, C, H, W], or [N, C] where the program's output is flat.
        decisions: of each gate, by name, on the axes that it decides on.
        saliencies: what they follow from: name -> axis -> [N, ...] like the decision; zero where a guard said no.
        macs: int64 [N] for each convolution and linear layer by name, as executed, gates not included.
        gate_macs: int64 [N] for each gate by name.
    """

    output: Array
    decisions: dict[str, Decision]
    saliencies: dict[str, dict[str, Array]]
    macs: dict[str, Array]
    gate_macs: dict[str, Array]


@dataclass
class _Map:
    """One image's buffer: values [C, H, W], zero in the channels that are not active."""

    values: Array
    active: Array

    @property
    def channels(self) -> Array:
        return np.flatnonzero(self.active)


def run_reference(
    program: Program, x: Array, decisions: Mapping[str, Decision] | None = None, dtype: DTypeLike = np.float64
) -> Result:
    """Run a program on inputs x, image by image.

    Args:
        program: what to run.
        x: float [N, C, H, W], normalised, or uint8 where the program has preprocessing.
        decisions: by name of the gate: they replace the gate's own on the axes that are given.
        dtype: in which everything is computed.

    Raises:
        ProgramError: x is not what the program takes, or a decision is for no gate.
        ThriftyError: a decision does not fit.
    """
    x = _inputs(program, x, dtype)
    forced = _forced(program, decisions or {}, len(x))
    runs = [
        _Run(program, image, {name: {axis: rows[i] for axis, rows in axes.items()} for name, axes in forced.items()})
        for i, image in enumerate(x)
    ]
    outputs = [run.output() for run in runs]
    output = np.stack(outputs)
    if program.flat:
        output = output.reshape(len(x), program.buffers[program.output][0])

    def by_axis(part: str, name: str) -> dict[str, Array]:
        return {axis: np.array([getattr(run, part)[name][axis] for run in runs]) for axis in program.axes(name)}

    def gathered(part: str, names: Any) -> dict[str, Array]:
        return {name: np.array([getattr(run, part)[name] for run in runs]) for name in names}

    return Result(
        output,
        {name: Decision(**by_axis("decisions", name)) for name in program.gated},
        {name: by_axis("saliencies", name) for name in program.gated},
        gathered("macs", program.macs()),
        gathered("gate_macs", program.gated),
    )


def _inputs(program: Program, x: Array, dtype: DTypeLike) -> Array:
    shape = program.buffers[0]
    if x.ndim != 4 or x.shape[1:] != shape or not len(x):
        raise ProgramError(f"the program takes inputs of shape {['N', *shape]}, not {list(x.shape)}.")
    if x.dtype != np.uint8:
        return x.astype(dtype)
    if program.preprocessing is None:
        raise ProgramError("the program takes float inputs: it has no preprocessing for uint8.")
    mean, std = (
        np.array(values, dtype).reshape(-1, 1, 1) for values in (program.preprocessing.mean, program.preprocessing.std)
    )
    return (x.astype(dtype) / 255 - mean) / std


def _forced(program: Program, decisions: Mapping[str, Decision], count: int) -> dict[str, dict[str, Array]]:
    forced: dict[str, dict[str, Array]] = {}
    for name, decision in decisions.items():
        if name not in program.gated:
            raise ProgramError(f"no gated layer is named {name!r}. They are: {', '.join(program.gated)}.")
        forced[name] = decision.checked(name, program.axes(name), count)
    return forced


class _Run:
    """One image on its way through a program."""

    def __init__(self, program: Program, image: Array, forced: Mapping[str, Mapping[str, Array]]) -> None:
        self.program = program
        self.forced = forced
        self.maps: dict[int, _Map] = {0: _Map(image, np.ones(len(image), bool))}
        self.dtype = image.dtype
        self.decisions: dict[str, dict[str, Array]] = {}
        self.saliencies: dict[str, dict[str, Array]] = {}
        self.macs: dict[str, int] = {}
        self.gate_macs: dict[str, int] = {}

    def output(self) -> Array:
        for operator in self.program.operators:
            inputs = [self.maps[i] for i in operator.inputs]
            if operator.guard is None or self.maps[operator.guard].active[0]:
                result = getattr(self, f"_{operator.kind}")(operator, *inputs)
            else:
                result = self._skipped(operator, *inputs)
            shape = self.program.buffers[operator.output]
            if result.values.shape != shape:
                raise ProgramError(
                    f"{operator.name} makes {list(result.values.shape)}, but its buffer is {list(shape)}."
                )
            self.maps[operator.output] = result
        return self.maps[self.program.output].values

    def _skipped(self, operator: Operator, *inputs: _Map) -> _Map:
        """What an operator leaves whose guard says no: nothing is computed, and its gate decides nothing."""
        self.macs[operator.name] = self.gate_macs[operator.name] = 0
        if operator.gated:
            axes = self.program.axes(operator.name)
            self.decisions[operator.name] = {axis: np.zeros(shape, bool) for axis, shape in axes.items()}
            self.saliencies[operator.name] = {axis: np.zeros(shape, self.dtype) for axis, shape in axes.items()}
        if operator.kind == "conv" and len(inputs) > 1:
            return _activated(operator, inputs[1])
        shape = self.program.buffers[operator.output]
        return _Map(np.zeros(shape, self.dtype), np.zeros(shape[0], bool))

    def tensor(self, operator: Operator, role: str) -> Array:
        return self.program.tensor(operator, role).astype(self.dtype)

    # ------------------------------------------------------------------------------------------ layers with weights

    def _conv(self, operator: Operator, x: _Map, residual: _Map | None = None) -> _Map:
        weight, bias = self.tensor(operator, "weight"), self.tensor(operator, "bias")
        outputs = len(weight)
        scale, computed, columns = np.ones(outputs, self.dtype), np.ones(outputs, bool), None
        if operator.gate == "attention":
            x, columns = self._attend(operator, x)
        elif operator.gated:
            scale, computed = self._choose(operator, x)
        if operator.setting("scaled") and operator.guard is not None:
            scale = scale * self.maps[operator.guard].values[0, 0, 0]
        groups = int(operator.attributes.get("groups", 1))  # type: ignore[arg-type]
        windows = _windows(_padded(x.values, operator.sides(), 0), weight.shape[2:], operator)
        height, width = windows.shape[1:3]
        products = weight[0, 0].size * height * width  # of one channel with one filter
        if columns is not None:
            products = int(_windows(_padded(columns[None], operator.sides(), 0), weight.shape[2:], operator).sum())
        values = np.zeros((outputs, height, width), self.dtype)
        macs = 0
        per_in, per_out = weight.shape[1], outputs // groups
        for group in range(groups):
            read = np.flatnonzero(x.active[group * per_in : (group + 1) * per_in])
            made = group * per_out + np.flatnonzero(computed[group * per_out : (group + 1) * per_out])
            sums = np.tensordot(
                weight[made][:, read], windows[group * per_in + read], axes=((1, 2, 3), (0, 3, 4))
            )  # fmt: skip
            values[made] = scale[made, None, None] * (sums + bias[made, None, None])
            macs += products * len(read) * len(made)
        self.macs[operator.name] = macs
        active = computed
        if residual is not None:
            values = values + residual.values
            active = computed | residual.active
        return _activated(operator, _Map(values, active))

    def _choose(self, operator: Operator, x: _Map) -> tuple[Array, Array]:
        """Scale and decision of a gate on output channels."""
        weight, bias = self.tensor(operator, "gate_weight"), self.tensor(operator, "gate_bias")
        self.gate_macs[operator.name] = x.values.size + weight.size
        if operator.gate == "topk":
            saliency = np.maximum(weight @ np.abs(x.values).mean((1, 2)) + bias, 0)
            chosen = _highest(saliency, operator.setting("winners"))
        else:
            saliency = np.clip(weight @ x.values.mean((1, 2)) + bias, 0, 1)
            chosen = saliency > operator.setting("threshold")
        chosen = self._decided(operator, "channels", saliency, chosen)
        return np.where(chosen, saliency, 0), chosen

    def _attend(self, operator: Operator, x: _Map) -> tuple[_Map, Array | None]:
        """What is read of x, and its columns where the gate decides on them."""
        axes = self.program.axes(operator.name)
        self.decisions[operator.name], self.saliencies[operator.name] = {}, {}
        self.gate_macs[operator.name] = x.values.size * len(axes)
        values, read, columns = x.values, x.active, None
        magnitude = np.abs(values)
        if "channels" in axes:
            attention = magnitude.mean((1, 2))
            kept = _highest(attention, operator.setting("kept_channels"))
            read = read & self._decided(operator, "channels", attention, kept)
            values = np.where(read[:, None, None], values, 0)
        if "columns" in axes:
            attention = magnitude.mean(0)
            kept = _highest(attention.ravel(), operator.setting("kept_columns")).reshape(attention.shape)
            columns = self._decided(operator, "columns", attention, kept)
            values = np.where(columns, values, 0)
        return _Map(values, read), columns

    def _layer_gate(self, operator: Operator, x: _Map) -> _Map:
        weight, bias = self.tensor(operator, "weight"), self.tensor(operator, "bias")
        self.gate_macs[operator.name] = x.values.size + weight.size
        score = np.clip(weight @ x.values.mean((1, 2)) + bias, 0, 1)[0]
        runs = self._decided(operator, "layer", score, score > operator.setting("threshold"))
        return _Map(np.where(runs, score, np.zeros_like(score)).reshape(1, 1, 1), runs.reshape(1))

    def _decided(self, operator: Operator, axis: str, saliency: Array, own: Array) -> Array:
        """The decision that counts, the gate's own or the forced one, written down."""
        decision = np.asarray(self.forced.get(operator.name, {}).get(axis, own))
        self.decisions.setdefault(operator.name, {})[axis] = decision
        self.saliencies.setdefault(operator.name, {})[axis] = saliency
        return decision

    def _linear(self, operator: Operator, x: _Map) -> _Map:
        weight, bias = self.tensor(operator, "weight"), self.tensor(operator, "bias")
        read = x.channels
        values = weight[:, read] @ x.values[read, 0, 0] + bias
        self.macs[operator.name] = len(read) * len(weight)
        return _activated(operator, _full(values[:, None, None]))

    def _layer_norm(self, operator: Operator, x: _Map) -> _Map:
        weight, bias = (self.tensor(operator, role)[:, None, None] for role in ("weight", "bias"))
        centred = x.values - x.values.mean(0)
        deviation = np.sqrt((centred**2).mean(0) + operator.attributes["epsilon"])
        return _full(centred / deviation * weight + bias)

    # ---------------------------------------------------------------------------------------------------- elementwise

    def _affine(self, operator: Operator, x: _Map) -> _Map:
        values = x.values * self.tensor(operator, "scale")[:, None, None]
        if "shift" not in operator.tensors:
            return _activated(operator, _Map(values, x.active))
        return _activated(operator, _full(values + self.tensor(operator, "shift")[:, None, None]))

    def _activation(self, operator: Operator, x: _Map) -> _Map:
        return _activated(operator, x)

    def _add(self, operator: Operator, a: _Map, b: _Map) -> _Map:
        return _activated(operator, _Map(a.values + b.values, a.active | b.active))

    def _mul(self, operator: Operator, a: _Map, b: _Map) -> _Map:
        return _activated(operator, _Map(a.values * b.values, a.active & b.active))

    # --------------------------------------------------------------------------------------------------------- movement

    def _concat(self, _operator: Operator, *parts: _Map) -> _Map:
        return _Map(np.concatenate([part.values for part in parts]), np.concatenate([part.active for part in parts]))

    def _gather(self, operator: Operator, x: _Map) -> _Map:
        index = self.program.tensor(operator, "index")
        inside = index >= 0
        values = np.where(inside[:, None, None], x.values[index], 0)
        return _Map(values, inside & x.active[index])

    def _pad(self, operator: Operator, x: _Map) -> _Map:
        value = float(operator.attributes.get("value", 0))  # type: ignore[arg-type]
        values = _padded(x.values, operator.sides(), value)
        return _Map(values, x.active) if value == 0 else _full(values)

    def _flatten(self, _operator: Operator, x: _Map) -> _Map:
        return _Map(x.values.reshape(-1, 1, 1), np.repeat(x.active, x.values[0].size))

    # ---------------------------------------------------------------------------------------------------------- pooling

    def _max_pool(self, operator: Operator, x: _Map) -> _Map:
        height, width = self.program.buffers[operator.output][1:]
        return _Map(_pool_windows(operator, x, -math.inf, height, width).max((3, 4)), x.active)

    def _avg_pool(self, operator: Operator, x: _Map) -> _Map:
        """As torch does: a window counts what it covers of the padded map, or of the map alone."""
        height, width = self.program.buffers[operator.output][1:]
        sums = _pool_windows(operator, x, 0, height, width).sum((3, 4))
        divisor = int(operator.attributes.get("divisor", 0))  # type: ignore[arg-type]
        if divisor:
            return _Map(sums / divisor, x.active)
        include = bool(operator.attributes.get("count_include_pad", 1))
        top, bottom, left, right = operator.sides()
        inside = np.ones((1, *x.values.shape[1:]))
        inside = np.pad(inside, ((0, 0), (top, bottom), (left, right)), constant_values=float(include))
        counts = _beyond(operator, inside, 0, height, width).sum((3, 4))
        return _Map((sums / counts).astype(self.dtype), x.active)

    def _adaptive_avg_pool(self, operator: Operator, x: _Map) -> _Map:
        return self._adaptive(operator, x, lambda window: window.mean((1, 2)))

    def _adaptive_max_pool(self, operator: Operator, x: _Map) -> _Map:
        return self._adaptive(operator, x, lambda window: window.max((1, 2)))

    def _adaptive(self, operator: Operator, x: _Map, reduce: Callable[[Array], Array]) -> _Map:
        shape = self.program.buffers[operator.output]
        values = np.zeros(shape, self.dtype)
        (_, rows, columns), (_, height, width) = shape, x.values.shape
        for row in range(rows):
            for column in range(columns):
                top, bottom = row * height // rows, -((row + 1) * height // -rows)
                left, right = column * width // columns, -((column + 1) * width // -columns)
                values[:, row, column] = reduce(x.values[:, top:bottom, left:right])
        return _Map(values, x.active)


def _highest(scores: Array, count: int) -> Array:
    """bool like the scores [K]: the `count` highest, ties to the lowest index, NaN last."""
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen


def _full(values: Array) -> _Map:
    return _Map(values, np.ones(len(values), bool))


def _padded(values: Array, sides: tuple[int, int, int, int], value: float) -> Array:
    top, bottom, left, right = sides
    return np.pad(values, ((0, 0), (top, bottom), (left, right)), constant_values=value)


def _windows(values: Array, kernel: tuple[int, ...], operator: Operator) -> Array:
    """All windows of [C, H, W]: a view [C, H_out, W_out, kh, kw]."""
    (stride_y, stride_x), (step_y, step_x) = operator.pair("stride"), operator.pair("dilation")
    reach = ((kernel[0] - 1) * step_y + 1, (kernel[1] - 1) * step_x + 1)
    windows = np.lib.stride_tricks.sliding_window_view(values, reach, axis=(1, 2))  # type: ignore[call-overload]
    return windows[:, ::stride_y, ::stride_x, ::step_y, ::step_x]


def _pool_windows(operator: Operator, x: _Map, outside: float, height: int, width: int) -> Array:
    return _beyond(operator, _padded(x.values, operator.sides(), outside), outside, height, width)


def _beyond(operator: Operator, padded: Array, outside: float, height: int, width: int) -> Array:
    """Windows of a padded map; ceil_mode lets the last ones reach `outside` of it."""
    kernel, (stride_y, stride_x) = operator.pair("kernel"), operator.pair("stride")
    step_y, step_x = operator.pair("dilation")
    more_y = max(0, (height - 1) * stride_y + (kernel[0] - 1) * step_y + 1 - padded.shape[1])
    more_x = max(0, (width - 1) * stride_x + (kernel[1] - 1) * step_x + 1 - padded.shape[2])
    padded = np.pad(padded, ((0, 0), (0, more_y), (0, more_x)), constant_values=outside)
    return _windows(padded, kernel, operator)[:, :height, :width]


# ---------------------------------------------------------------------------------------------------------- activations


def activate(values: Array, kind: str, slope: float = 0.01) -> Array:
    """The activation of this kind (see `program.ACTIVATIONS`), elementwise."""
    return _ACTIVATIONS[kind](values, slope)


def _activated(operator: Operator, x: _Map) -> _Map:
    """The operator's activation; channels that are not active stay zero, unless it fills them."""
    kind = operator.activation
    if kind == "none":
        return x
    values = activate(x.values, kind, float(operator.attributes.get("slope", 0.01)))  # type: ignore[arg-type]
    return _full(values) if kind in FILL_ZEROS else _Map(values, x.active)


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_erf = np.vectorize(math.erf, otypes=[np.float64])

_ACTIVATIONS: dict[str, Callable[[Array, float], Array]] = {
    "none": lambda x, _: x,
    "relu": lambda x, _: np.maximum(x, 0),
    "relu6": lambda x, _: np.clip(x, 0, 6),
    "leaky_relu": lambda x, slope: np.where(x >= 0, x, x * slope),
    "silu": lambda x, _: x * _sigmoid(x),
    "gelu": lambda x, _: (x * 0.5 * (1 + _erf(x / math.sqrt(2)))).astype(x.dtype),
    "gelu_tanh": lambda x, _: _gelu_tanh(x),
    "hardswish": lambda x, _: x * np.clip(x + 3, 0, 6) / 6,
    "sigmoid": lambda x, _: _sigmoid(x),
    "hardsigmoid": lambda x, _: np.clip(x + 3, 0, 6) / 6,
    "tanh": lambda x, _: np.tanh(x),
}
