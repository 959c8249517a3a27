"""From a program to an ONNX model, for other engines. Needs the package `onnx`, and no torch.

The exported model takes float32 [N, C, H, W], normalised already, under the name `input`, and returns `output`. A gated
convolution computes everything there and what is skipped is multiplied by zero: what it answers is what the engine
answers, what it costs is the dense network and the gates.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.errors import ProgramError, require
from thrifty.files import replacing
from thrifty.program import Operator, Program

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
IR_VERSION = 10
"""Of the file, as old as the operator set allows, so that older readers take it."""

LIMIT = (1 << 31) - (1 << 20)
"""Bytes that a protobuf message can hold, less what the graph itself may take."""

PURPOSE = "exporting to ONNX"


def to_onnx(program: Program, batch: int | None = None) -> ModelProto:
    """The program as an ONNX model, checked by onnx.checker.

    Args:
        program: dense or dynamic.
        batch: number of images that the model takes; None leaves it open.

    Raises:
        ProgramError: the weights are larger than an ONNX file without external data can be.
        MissingExtraError: the package onnx is not installed.
    """
    onnx = require("onnx", PURPOSE)
    size = sum(tensor.nbytes for tensor in program.tensors.values())
    if size > LIMIT:
        raise ProgramError(f"the program has {size / 2**30:.1f} GiB of weights; an ONNX file holds 2 GiB at most.")
    graph = _Graph(program)
    for operator in program.operators:
        _RULES[operator.kind](graph, operator)
        graph.skip(operator)
    shape = program.buffers[program.output]
    rank = 2 if program.flat else 4
    helper = onnx.helper
    graph.nodes.append(helper.make_node("Identity", [graph.value(program.output, rank)], ["output"]))
    images = "batch" if batch is None else batch
    made = helper.make_graph(
        graph.nodes,
        "thrifty",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [images, *program.buffers[0]])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [images, *shape][:rank])],
        graph.initializers,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model: ModelProto = helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="thrifty")
    onnx.checker.check_model(model, full_check=True)
    return model


def save_onnx(program: Program, path: str | Path) -> None:
    """Write `to_onnx(program)` to a file, in one step."""
    model = to_onnx(program)
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


class _Graph:
    """Nodes and weights as they come together, and which ONNX value stands for each buffer."""

    def __init__(self, program: Program) -> None:
        self.onnx = require("onnx", PURPOSE)
        self.program = program
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.values: dict[tuple[int, int], str] = {(0, 4): "input"}
        self.used = {"input", "output"}

    def unique(self, name: str) -> str:
        found, number = name, 1
        while found in self.used:
            number += 1
            found = f"{name}_{number}"
        self.used.add(found)
        return found

    def node(self, kind: str, inputs: list[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; returns the name of its (last) output."""
        names = [self.unique(name) for _ in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, names, name=names[-1], **attributes))
        return names[-1]

    def constant(self, value: np.ndarray, name: str) -> str:
        name = self.unique(name)
        self.initializers.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def tensor(self, operator: Operator, role: str, shape: tuple[int, ...] | None = None) -> str:
        value = self.program.tensor(operator, role)
        return self.constant(value if shape is None else value.reshape(shape), f"{operator.name}.{role}")

    def rank(self, buffer: int) -> int:
        """2 where a buffer stands as [N, F] only, else 4."""
        return 4 if (buffer, 4) in self.values else 2

    def value(self, buffer: int, rank: int) -> str:
        """The value of a buffer as [N, C, H, W] or as [N, F]."""
        if (buffer, rank) not in self.values:
            shape = np.array([0, -1] if rank == 2 else [0, *self.program.buffers[buffer]], np.int64)
            other = self.values[buffer, 6 - rank]
            self.values[buffer, rank] = self.node("Reshape", [other, self.constant(shape, "shape")], f"{other}.rank")
        return self.values[buffer, rank]

    def write(self, operator: Operator, value: str, rank: int = 4) -> None:
        self.values[operator.output, rank] = value

    def guarded(self, operator: Operator, value: str, rank: int = 4) -> str:
        """A value, or zeros where the operator's guard did not let it run."""
        if operator.guard is None:
            return value
        sign = self.node("Sign", [self.value(operator.guard, rank)], f"{operator.name}.runs")
        return self.node("Mul", [value, sign], f"{operator.name}.guarded")

    def skip(self, operator: Operator) -> None:
        """Zero what a guarded operator has written where it did not run; a convolution passes its residual on."""
        if operator.guard is None or (operator.kind == "conv" and len(operator.inputs) > 1):
            return
        rank = self.rank(operator.output)
        self.write(operator, self.guarded(operator, self.value(operator.output, rank), rank), rank)

    def activate(self, operator: Operator, value: str) -> str:
        kind = operator.activation
        name = f"{operator.name}.{kind}"
        if kind == "none":
            return value
        if kind == "relu6":
            limits = [self.constant(np.array(limit, np.float32), f"{name}.limit") for limit in (0, 6)]
            return self.node("Clip", [value, *limits], name)
        if kind == "silu":
            return self.node("Mul", [value, self.node("Sigmoid", [value], f"{name}.sigmoid")], name)
        if kind == "leaky_relu":
            return self.node("LeakyRelu", [value], name, alpha=_number(operator, "slope", 0.01))
        if kind == "hardsigmoid":
            return self.node("HardSigmoid", [value], name, alpha=1 / 6, beta=0.5)
        if kind in {"gelu", "gelu_tanh"}:
            return self.node("Gelu", [value], name, approximate="none" if kind == "gelu" else "tanh")
        return self.node(_ACTIVATIONS[kind], [value], name)


_ACTIVATIONS = {"relu": "Relu", "hardswish": "HardSwish", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def _conv(graph: _Graph, operator: Operator) -> None:
    x = graph.value(operator.inputs[0], 4)
    read = _attended(graph, operator, x) if operator.gate == "attention" else x
    top, bottom, left, right = operator.sides()
    y = graph.node(
        "Conv",
        [read, graph.tensor(operator, "weight"), graph.tensor(operator, "bias")],
        operator.name,
        strides=operator.pair("stride"),
        pads=[top, left, bottom, right],
        dilations=operator.pair("dilation"),
        group=operator.attributes.get("groups", 1),
    )
    if operator.gate in {"topk", "clip"}:
        y = graph.node("Mul", [y, _scale(graph, operator, x)], f"{operator.name}.scaled")
    if operator.setting("scaled"):
        y = graph.node("Mul", [y, graph.value(operator.guard or 0, 4)], f"{operator.name}.by_layer")
    if len(operator.inputs) > 1:
        y = graph.guarded(operator, y)
        y = graph.node("Add", [y, graph.value(operator.inputs[1], 4)], f"{operator.name}.sum")
    graph.write(operator, graph.activate(operator, y))


def _mean(graph: _Graph, x: str, name: str, *, axes: tuple[int, ...] = (2, 3), magnitude: bool = True) -> str:
    """Mean of x [N, C, H, W], or of |x|, over some of its axes."""
    along = graph.constant(np.array(axes, np.int64), f"{name}.axes")
    values = graph.node("Abs", [x], f"{name}.abs") if magnitude else x
    return graph.node("ReduceMean", [values, along], f"{name}.mean", keepdims=0)


def _highest(graph: _Graph, score: str, count: int, name: str, *, ones: bool) -> str:
    """score [N, F] in its `count` highest places, or 1 there, and 0 elsewhere; ties go to the lowest index."""
    kept = graph.constant(np.array([count], np.int64), f"{name}.count")
    index = graph.node("TopK", [score, kept], f"{name}.top", outputs=2, axis=1)
    top = graph.nodes[-1].output[0]
    zero = graph.node("ConstantOfShape", [graph.node("Shape", [score], f"{name}.shape")], f"{name}.zero")
    if ones:
        one = graph.constant(np.array(1, np.float32), f"{name}.one")
        top = graph.node("Expand", [one, graph.node("Shape", [index], f"{name}.kept")], f"{name}.ones")
    return graph.node("ScatterElements", [zero, index, top], f"{name}.scale", axis=1)


def _reshaped(graph: _Graph, value: str, shape: tuple[int, ...], name: str) -> str:
    return graph.node("Reshape", [value, graph.constant(np.array((0, *shape), np.int64), f"{name}.to")], f"{name}.map")


def _scale(graph: _Graph, operator: Operator, x: str) -> str:
    """Scale of the output channels that a gate leaves, zero elsewhere, [N, O, 1, 1]."""
    name = f"{operator.name}.gate"
    mean = _mean(graph, x, name, magnitude=operator.gate == "topk")
    weights = [graph.tensor(operator, "gate_weight"), graph.tensor(operator, "gate_bias")]
    score = graph.node("Gemm", [mean, *weights], f"{name}.score", transB=1)
    if operator.gate == "clip":
        scale = _clipped(graph, operator, score, name)
    else:
        score = graph.node("Relu", [score], f"{name}.saliency")
        scale = _highest(graph, score, operator.setting("winners"), name, ones=False)
    return _reshaped(graph, scale, (graph.program.buffers[operator.output][0], 1, 1), name)


def _clipped(graph: _Graph, operator: Operator, score: str, name: str) -> str:
    """Scores clipped to [0, 1] where they exceed the threshold, zero elsewhere."""
    zero, one, limit = (
        graph.constant(np.array(value, np.float32), f"{name}.limit") for value in (0, 1, operator.setting("threshold"))
    )
    score = graph.node("Clip", [score, zero, one], f"{name}.clipped")
    return graph.node("Where", [graph.node("Greater", [score, limit], f"{name}.open"), score, zero], f"{name}.scores")


def _attended(graph: _Graph, operator: Operator, x: str) -> str:
    """x with zeros outside the channels and columns of the highest attention."""
    name, kept = f"{operator.name}.attention", x
    channels, height, width = graph.program.buffers[operator.inputs[0]]
    axes = graph.program.axes(operator.name)
    if "channels" in axes:
        score = _mean(graph, x, f"{name}.channels")
        mask = _highest(graph, score, operator.setting("kept_channels"), f"{name}.channels", ones=True)
        kept = graph.node("Mul", [kept, _reshaped(graph, mask, (channels, 1, 1), name)], f"{name}.kept")
    if "columns" in axes:
        score = _reshaped(graph, _mean(graph, x, f"{name}.columns", axes=(1,)), (height * width,), name)
        mask = _highest(graph, score, operator.setting("kept_columns"), f"{name}.columns", ones=True)
        kept = graph.node("Mul", [kept, _reshaped(graph, mask, (1, height, width), name)], f"{name}.kept")
    return kept


def _layer_gate(graph: _Graph, operator: Operator) -> None:
    mean = _mean(graph, graph.value(operator.inputs[0], 4), operator.name, magnitude=False)
    weights = [graph.tensor(operator, "weight"), graph.tensor(operator, "bias")]
    score = graph.node("Gemm", [mean, *weights], f"{operator.name}.score", transB=1)
    graph.write(operator, _clipped(graph, operator, score, operator.name), 2)


def _linear(graph: _Graph, operator: Operator) -> None:
    weights = [graph.tensor(operator, "weight"), graph.tensor(operator, "bias")]
    y = graph.node("Gemm", [graph.value(operator.inputs[0], 2), *weights], operator.name, transB=1)
    graph.write(operator, graph.activate(operator, y), 2)


def _affine(graph: _Graph, operator: Operator) -> None:
    y = graph.value(operator.inputs[0], 4)
    y = graph.node("Mul", [y, graph.tensor(operator, "scale", (1, -1, 1, 1))], operator.name)
    if "shift" in operator.tensors:
        y = graph.node("Add", [y, graph.tensor(operator, "shift", (1, -1, 1, 1))], f"{operator.name}.shifted")
    graph.write(operator, graph.activate(operator, y))


def _activation(graph: _Graph, operator: Operator) -> None:
    rank = graph.rank(operator.inputs[0])
    graph.write(operator, graph.activate(operator, graph.value(operator.inputs[0], rank)), rank)


def _binary(kind: str) -> Callable[[_Graph, Operator], None]:
    def rule(graph: _Graph, operator: Operator) -> None:
        inputs = [graph.value(buffer, 4) for buffer in operator.inputs]
        graph.write(operator, graph.activate(operator, graph.node(kind, inputs, operator.name)))

    return rule


def _concat(graph: _Graph, operator: Operator) -> None:
    graph.write(operator, graph.node("Concat", [graph.value(b, 4) for b in operator.inputs], operator.name, axis=1))


def _gather(graph: _Graph, operator: Operator) -> None:
    x = graph.value(operator.inputs[0], 4)
    index = graph.program.tensor(operator, "index").astype(np.int64)
    channels = graph.program.buffers[operator.inputs[0]][0]
    kept = np.flatnonzero(index >= 0)
    first, last = (kept[0], kept[-1]) if len(kept) else (0, -1)
    if len(kept) and (np.diff(index[first : last + 1]) == 1).all():  # neighbours: slices and padding copy fastest
        if len(kept) < channels:
            numbers = (index[first], index[last] + 1, 1)
            ends = [graph.constant(np.array([number], np.int64), f"{operator.name}.range") for number in numbers]
            x = graph.node("Slice", [x, *ends], f"{operator.name}.part")
        if len(kept) < len(index):
            pads = np.array([0, first, 0, 0, 0, len(index) - 1 - last, 0, 0], np.int64)
            x = graph.node("Pad", [x, graph.constant(pads, f"{operator.name}.pads")], operator.name)
        graph.write(operator, x)
        return
    if len(kept) < len(index):  # -1 asks for zeros: they become one channel more
        one = graph.constant(np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int64), f"{operator.name}.pads")
        x = graph.node("Pad", [x, one], f"{operator.name}.zero")
        index = np.where(index < 0, channels, index)
    indices = graph.constant(index, f"{operator.name}.index")
    graph.write(operator, graph.node("Gather", [x, indices], operator.name, axis=1))


def _window(graph: _Graph, operator: Operator) -> tuple[dict[str, Any], list[int]]:
    """Attributes of a pool, and the padding under which rounding down gives the declared size."""
    shape, out = (graph.program.buffers[b][1:] for b in (operator.inputs[0], operator.output))
    kernel, stride, dilation = (operator.pair(name) for name in ("kernel", "stride", "dilation"))
    before, after = operator.sides()[0::2], []
    for axis in range(2):
        reach = (kernel[axis] - 1) * dilation[axis] + 1
        after.append(max(0, (out[axis] - 1) * stride[axis] + reach - shape[axis] - before[axis]))
    return {"kernel_shape": kernel, "strides": stride}, [*before, *after]


def _max_pool(graph: _Graph, operator: Operator) -> None:
    window, pads = _window(graph, operator)
    x = graph.value(operator.inputs[0], 4)
    y = graph.node("MaxPool", [x], operator.name, pads=pads, dilations=operator.pair("dilation"), **window)
    graph.write(operator, y)


def _avg_pool(graph: _Graph, operator: Operator) -> None:
    window, pads = _window(graph, operator)
    x = graph.value(operator.inputs[0], 4)
    divisor, padding = _number(operator, "divisor", 0), operator.sides()
    if divisor:  # a sum, which ONNX has as a convolution only
        channels = graph.program.buffers[operator.output][0]
        weight = np.full((channels, 1, *window["kernel_shape"]), 1 / divisor, np.float32)
        weights = graph.constant(weight, f"{operator.name}.weight")
        y = graph.node("Conv", [x, weights], operator.name, pads=pads, group=channels, strides=window["strides"])
        graph.write(operator, y)
        return
    if operator.attributes.get("count_include_pad", 1) and any(padding):
        x = _padded(graph, x, padding, 0.0, f"{operator.name}.padded")
        pads = [0, 0, *(max(0, after - given) for after, given in zip(pads[2:], padding[1::2], strict=True))]
    # What is padded from here on is not counted: windows that leave the map are cut.
    graph.write(operator, graph.node("AveragePool", [x], operator.name, pads=pads, count_include_pad=0, **window))


def _padded(graph: _Graph, x: str, padding: tuple[int, int, int, int], value: float, name: str) -> str:
    top, bottom, left, right = padding
    pads = graph.constant(np.array([0, 0, top, left, 0, 0, bottom, right], np.int64), f"{name}.pads")
    return graph.node("Pad", [x, pads, graph.constant(np.array(value, np.float32), f"{name}.value")], name)


def _pad(graph: _Graph, operator: Operator) -> None:
    x = graph.value(operator.inputs[0], 4)
    graph.write(operator, _padded(graph, x, operator.sides(), _number(operator, "value", 0), operator.name))


def _adaptive_avg_pool(graph: _Graph, operator: Operator) -> None:
    x = graph.value(operator.inputs[0], 4)
    shape, out = (graph.program.buffers[b][1:] for b in (operator.inputs[0], operator.output))
    if out == (1, 1):
        graph.write(operator, graph.node("GlobalAveragePool", [x], operator.name))
        return
    rows, columns = (_means(size, parts) for size, parts in zip(shape, out, strict=True))
    y = graph.node("MatMul", [graph.constant(rows, f"{operator.name}.rows"), x], f"{operator.name}.by_row")
    y = graph.node("MatMul", [y, graph.constant(columns.T, f"{operator.name}.columns")], operator.name)
    graph.write(operator, y)


def _means(size: int, parts: int) -> np.ndarray:
    """float32 [parts, size]: row i takes the mean over window i of torch's adaptive pooling."""
    matrix = np.zeros((parts, size), np.float32)
    for row, (start, end) in zip(matrix, _windows(size, parts), strict=True):
        row[start:end] = 1 / (end - start)
    return matrix


def _windows(size: int, parts: int) -> list[tuple[int, int]]:
    return [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]


def _adaptive_max_pool(graph: _Graph, operator: Operator) -> None:
    y = graph.value(operator.inputs[0], 4)
    shape, out = (graph.program.buffers[b][1:] for b in (operator.inputs[0], operator.output))
    if out == (1, 1):
        graph.write(operator, graph.node("GlobalMaxPool", [y], operator.name))
        return
    for axis in (2, 3):
        parts = []
        axes = graph.constant(np.array([axis], np.int64), f"{operator.name}.axis")
        for window in _windows(shape[axis - 2], out[axis - 2]):
            ends = [graph.constant(np.array([end], np.int64), f"{operator.name}.end") for end in window]
            part = graph.node("Slice", [y, *ends, axes], f"{operator.name}.part")
            parts.append(graph.node("ReduceMax", [part, axes], f"{operator.name}.highest"))
        y = graph.node("Concat", parts, operator.name, axis=axis)
    graph.write(operator, y)


def _layer_norm(graph: _Graph, operator: Operator) -> None:
    name = operator.name
    x = graph.node("Transpose", [graph.value(operator.inputs[0], 4)], f"{name}.last", perm=[0, 2, 3, 1])
    weights = [graph.tensor(operator, "weight"), graph.tensor(operator, "bias")]
    epsilon = _number(operator, "epsilon", 1e-5)
    y = graph.node("LayerNormalization", [x, *weights], f"{name}.normalised", axis=-1, epsilon=epsilon)
    graph.write(operator, graph.node("Transpose", [y], name, perm=[0, 3, 1, 2]))


def _flatten(graph: _Graph, operator: Operator) -> None:
    x = graph.value(operator.inputs[0], graph.rank(operator.inputs[0]))
    graph.write(operator, graph.node("Flatten", [x], operator.name, axis=1), 2)


def _number(operator: Operator, name: str, default: float) -> float:
    value: Any = operator.attributes.get(name, default)
    return float(value)


_RULES: dict[str, Callable[[_Graph, Operator], None]] = {
    "conv": _conv,
    "layer_gate": _layer_gate,
    "linear": _linear,
    "affine": _affine,
    "activation": _activation,
    "add": _binary("Add"),
    "mul": _binary("Mul"),
    "concat": _concat,
    "gather": _gather,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "adaptive_max_pool": _adaptive_max_pool,
    "pad": _pad,
    "layer_norm": _layer_norm,
    "flatten": _flatten,
}
