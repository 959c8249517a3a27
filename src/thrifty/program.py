"""Programs: the lowered, immutable, serialisable form of a network, which executors run.

A program is a list of operators in the order of execution. Each reads buffers that are written already and writes one
new buffer; buffer 0 is the input. All shapes are per image, [C, H, W]; a vector of F features is [F, 1, 1].

| kind | reads | attributes | tensors |
|---|---|---|---|
| conv | x, maybe a residual | stride, padding, dilation, groups; scaled; gate and its | weight, bias; gate_weight, |
| | | settings | gate_bias |
| linear | x [F, 1, 1] | | weight [O, F], bias [O] |
| affine | x | | scale [C], maybe shift [C]: x * scale + shift |
| activation | x | | |
| add | a, b; b may be [C, 1, 1] | | |
| mul | a, b; b may be [C, 1, 1], [1, H, W] or [1, 1, 1] | | |
| concat | one or more, along the channels | | |
| gather | x | | index [C_out] int32: y[c] = x[index[c]], and zero where index[c] is -1 |
| max_pool | x | kernel, stride, padding, dilation | |
| avg_pool | x | kernel, stride, padding, count_include_pad, divisor (0: torch's rule) | |
| adaptive_avg_pool, adaptive_max_pool | x | the output's shape says it | |
| pad | x | padding, value | |
| layer_norm | x | epsilon | weight [C], bias [C]: over the channels of each position |
| flatten | x [C, H, W] -> [C * H * W, 1, 1] | | |
| layer_gate | x -> [1, 1, 1]: whether operators that it guards run | threshold | weight [1, C], bias [1] |

`stride`, `kernel` and `dilation` are (vertical, horizontal), `padding` is (top, bottom, left, right). conv, linear,
affine, activation, add and mul end in an `activation`, one of ACTIVATIONS; `slope` is that of leaky_relu. A convolution
computes act(g * s[o] * (sum of W x + bias[o]) + residual[o]); g and s are 1 but for what follows.

A `gate` on a convolution decides, for each image, what is computed; ties go to the lowest index and NaN comes last:

- 'topk' (FBS, arXiv 1810.05331): s[o] is the saliency of output channel o if it is among the `winners` highest ones and
  0 otherwise; saliency[o] = relu(sum over c of gate_weight[o, c] * mean |x[c]| + gate_bias[o]).
- 'clip' (C-Net of LC-Net, arXiv 2007.15151): s[o] is the saliency of output channel o if it exceeds `threshold` and 0
  otherwise; saliency[o] = min(relu(sum over c of gate_weight[o, c] * mean x[c] + gate_bias[o]), 1).
- 'attention' (AntiDote, arXiv 2008.06543): x counts as zero outside the `kept_channels` channels with the highest mean
  |x| over positions and the `kept_columns` positions with the highest mean |x| over all channels. Where all of an axis
  are kept, the gate does not decide on it.

Output channels with s = 0 are not computed, nor is what reads zeros. A layer_gate (L-Net of LC-Net) decides on the
operators whose `guard` its output is: they run where the score clip(weight . mean x + bias, 0, 1) exceeds `threshold`.
Its output is the score where they run, else zero. An operator that does not run leaves zeros, whatever its activation;
a convolution with a residual leaves act(residual). With `scaled` = 1, g is the guard's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty import _native
from thrifty.errors import ProgramError

Shape = tuple[int, int, int]
Attribute = int | float | str | tuple[int, ...]

ACTIVATIONS = (
    "none", "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid", "hardsigmoid", "tanh",
)  # fmt: skip
FILL_ZEROS = frozenset({"sigmoid", "hardsigmoid"})
"""Activations that make something else of zero: after them every channel is active."""

KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "conv": (
        (
            "stride",
            "padding",
            "dilation",
            "groups",
            "activation",
            "slope",
            "gate",
            "winners",
            "threshold",
            "kept_channels",
            "kept_columns",
            "scaled",
        ),
        ("weight", "bias"),
        ("gate_weight", "gate_bias"),
    ),
    "linear": (("activation", "slope"), ("weight", "bias"), ()),
    "affine": (("activation", "slope"), ("scale",), ("shift",)),
    "activation": (("activation", "slope"), (), ()),
    "add": (("activation", "slope"), (), ()),
    "mul": (("activation", "slope"), (), ()),
    "concat": ((), (), ()),
    "gather": ((), ("index",), ()),
    "max_pool": (("kernel", "stride", "padding", "dilation"), (), ()),
    "avg_pool": (("kernel", "stride", "padding", "count_include_pad", "divisor"), (), ()),
    "adaptive_avg_pool": ((), (), ()),
    "adaptive_max_pool": ((), (), ()),
    "pad": (("padding", "value"), (), ()),
    "layer_norm": (("epsilon",), ("weight", "bias"), ()),
    "flatten": ((), (), ()),
    "layer_gate": (("threshold",), ("weight", "bias"), ()),
}
"""Kind -> attributes it may have, tensors it needs, tensors it may have."""

GATE_ATTRIBUTES = frozenset({"gate", "winners", "threshold", "kept_channels", "kept_columns", "scaled"})
"""Attributes that an operator of a dense network does not have."""

SETTINGS = {
    "topk": ("winners",),
    "clip": ("threshold",),
    "attention": ("kept_channels", "kept_columns"),
    "layer_gate": ("threshold",),
}
"""Kind of gate -> its settings, which may change without anything else of a program."""

LARGEST = 3e38
"""Of the numbers in a program; beyond it float32 has infinity only."""

ACTIVATED = frozenset(kind for kind, (attributes, _, _) in KINDS.items() if "activation" in attributes)
"""Kinds whose last step is an activation."""


@dataclass(frozen=True)
class Preprocessing:
    """How uint8 photographs become a network's inputs: (pixels / 255 - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
                raise ProgramError(f"preprocessing {name} is {values!r}, but must be one number for each channel.")
            numbers = tuple(values)
            if not numbers or not all(_is_number(number) and abs(number) <= LARGEST for number in numbers):
                raise ProgramError(f"preprocessing {name} is {numbers!r}, but must be one number for each channel.")
            object.__setattr__(self, name, tuple(float(number) for number in numbers))
        if len(self.mean) != len(self.std):
            raise ProgramError(f"preprocessing has {len(self.mean)} means, but {len(self.std)} deviations.")
        if min(self.std) <= 0:
            raise ProgramError(f"preprocessing std is {self.std}, but must be positive.")


@dataclass(frozen=True)
class Operator:
    """One step of a program (the module's text lists the kinds).

    Attributes:
        kind: what it computes.
        name: the layer's name in the user's model, as `count_macs` names it; unique in a program.
        inputs: numbers of the buffers that it reads.
        output: number of the buffer that it writes.
        attributes: its settings.
        tensors: its weights: role -> name in the program's tensors.
        guard: number of the buffer of a layer_gate, which decides whether the operator runs; None: it always does.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    guard: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ProgramError(f"{self.name!r} is a {self.kind!r}, but operators are: {', '.join(KINDS)}.")
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable():
            raise ProgramError(
                f"an operator's name is {self.name!r}, but must be text that is not empty and can be printed."
            )
        object.__setattr__(self, "inputs", _integers(self.inputs, f"{self.name}: inputs"))
        if not _is_integer(self.output):
            raise ProgramError(f"{self.name}: output is {self.output!r}, but must be the number of a buffer.")
        if self.guard is not None and not _is_integer(self.guard):
            raise ProgramError(f"{self.name}: guard is {self.guard!r}, but must be the number of a buffer, or None.")
        known, needed, optional = KINDS[self.kind]
        attributes = {key: _attribute(value, f"{self.name}: {key}") for key, value in self.attributes.items()}
        if set(attributes) - set(known):
            unknown = ", ".join(sorted(set(attributes) - set(known)))
            raise ProgramError(f"{self.name}: {self.kind} has no attribute {unknown}. It has: {', '.join(known)}.")
        if attributes.get("activation", "none") not in ACTIVATIONS:
            raise ProgramError(
                f"{self.name}: activation is {attributes['activation']!r}, but must be one of: "
                f"{', '.join(ACTIVATIONS)}."
            )
        roles = set(self.tensors)
        if not set(needed) <= roles <= {*needed, *optional}:
            raise ProgramError(
                f"{self.name}: a {self.kind} has the tensors {', '.join((*needed, *optional)) or 'none'}, "
                f"not {', '.join(sorted(roles)) or 'none'}."
            )
        object.__setattr__(self, "attributes", MappingProxyType(attributes))
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Operator, (
            self.kind, self.name, self.inputs, self.output, dict(self.attributes), dict(self.tensors), self.guard
        )  # fmt: skip

    @property
    def activation(self) -> str:
        """The activation that ends it, 'none' where there is none."""
        return str(self.attributes.get("activation", "none"))

    @property
    def gate(self) -> str | None:
        """Kind of the gate that it has or is, one of SETTINGS; None where it decides nothing."""
        if self.kind == "layer_gate":
            return self.kind
        gate = self.attributes.get("gate")
        return None if gate is None else str(gate)

    @property
    def gated(self) -> bool:
        """Whether it decides, for each image, what is computed."""
        return self.gate is not None

    def setting(self, name: str) -> Any:
        """The gate's setting of this name, a number."""
        return self.attributes.get(name, 0)

    def pair(self, name: str, default: int = 1) -> tuple[int, int]:
        """The attribute (vertical, horizontal) of this name."""
        value: Any = self.attributes.get(name, (default, default))
        return int(value[0]), int(value[1])

    def sides(self) -> tuple[int, int, int, int]:
        """Its padding (top, bottom, left, right)."""
        value: Any = self.attributes.get("padding", (0, 0, 0, 0))
        return int(value[0]), int(value[1]), int(value[2]), int(value[3])


@dataclass(frozen=True, eq=False)
class Program:
    """A network as operators on buffers (see the module's text).

    Attributes:
        buffers: shape [C, H, W] of each buffer, per image; the first is the input.
        operators: in the order of execution.
        output: number of the buffer that is returned.
        flat: whether the output is [N, C] rather than [N, C, H, W].
        tensors: weights by name, float32 and indices int32; read-only.
        preprocessing: how photographs become inputs, or None where inputs come ready.
        classes: names of the classes in the order of the logits, or nothing.
        method: settings of the method that made the model dynamic, with its name and version, or None.

    Raises:
        ProgramError: it is not a valid program.
    """

    buffers: tuple[Shape, ...]
    operators: tuple[Operator, ...]
    output: int
    flat: bool
    tensors: Mapping[str, NDArray[Any]]
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] = ()
    method: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        shapes = tuple(_integers(shape, f"shape of buffer {i}") for i, shape in enumerate(self.buffers))
        object.__setattr__(self, "buffers", shapes)
        object.__setattr__(self, "operators", tuple(self.operators))
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "tensors", MappingProxyType(_frozen(self.tensors)))
        if self.method is not None:
            object.__setattr__(self, "method", MappingProxyType(dict(self.method)))
        if not _is_integer(self.output):
            raise ProgramError(f"output is {self.output!r}, but must be the number of a buffer.")
        _check_names(self)
        _check_with_native(self)
        channels = self.buffers[0][0]
        if self.preprocessing is not None and len(self.preprocessing.mean) != channels:
            raise ProgramError(
                f"preprocessing is for {len(self.preprocessing.mean)} channels, but the input has {channels}."
            )
        if self.flat and self.buffers[self.output][1:] != (1, 1):
            raise ProgramError(f"a flat output must be [C, 1, 1], not {list(self.buffers[self.output])}.")
        if self.classes and len(self.classes) != self.buffers[self.output][0]:
            raise ProgramError(f"there are {len(self.classes)} classes, but {self.buffers[self.output][0]} outputs.")

    def __reduce__(self) -> tuple[Any, ...]:
        method = None if self.method is None else dict(self.method)
        return Program, (
            self.buffers, self.operators, self.output, self.flat, dict(self.tensors), self.preprocessing,
            self.classes, method,
        )  # fmt: skip

    def tensor(self, operator: Operator, role: str) -> NDArray[Any]:
        """The operator's tensor of this role."""
        return self.tensors[operator.tensors[role]]

    @property
    def gated(self) -> dict[str, int]:
        """Gates: name of the operator -> its place among the operators."""
        return {operator.name: i for i, operator in enumerate(self.operators) if operator.gated}

    def axes(self, name: str) -> dict[str, tuple[int, ...]]:
        """What the gate of this name decides on: fields of `Decision` -> their shape for one image."""
        operator = self.operators[self.gated[name]]
        if operator.gate == "layer_gate":
            return {"layer": ()}
        if operator.gate != "attention":
            return {"channels": (self.buffers[operator.output][0],)}
        channels, height, width = self.buffers[operator.inputs[0]]
        axes: dict[str, tuple[int, ...]] = {}
        if operator.setting("kept_channels") < channels:
            axes["channels"] = (channels,)
        if operator.setting("kept_columns") < height * width:
            axes["columns"] = (height, width)
        return axes

    def lifetimes(self) -> tuple[tuple[int, int], ...]:
        """For each buffer, the operator that writes it (-1: the input) and the last one that reads it.

        The output is read once more after the last operator; what nobody reads is last needed where it is written.
        """
        written = [-1] * len(self.buffers)
        read = [-1] * len(self.buffers)
        for i, operator in enumerate(self.operators):
            written[operator.output] = read[operator.output] = i
            for buffer in operator.inputs if operator.guard is None else (*operator.inputs, operator.guard):
                read[buffer] = i
        read[self.output] = len(self.operators)
        return tuple(zip(written, read, strict=True))

    def macs(self) -> dict[str, int]:
        """Dense MACs per input of each convolution and linear layer, by name, gates not included."""
        found = {}
        for operator in self.operators:
            if operator.kind in {"conv", "linear"}:
                _, height, width = self.buffers[operator.output]
                found[operator.name] = self.tensor(operator, "weight").size * height * width
        return found

    def gate_macs(self) -> dict[str, int]:
        """MACs per input of each gate, by name: x is summed, once for each axis, and the predictor runs in full."""
        return {name: self._gate_macs(self.operators[place]) for name, place in self.gated.items()}

    def _gate_macs(self, operator: Operator) -> int:
        size = math.prod(self.buffers[operator.inputs[0]])
        if operator.gate == "attention":
            return size * len(self.axes(operator.name))
        return size + self.tensor(operator, "weight" if operator.gate == "layer_gate" else "gate_weight").size

    def with_gates(self, settings: Mapping[str, Mapping[str, int | float]]) -> Program:
        """The same program with other settings of gates: name -> settings that change (see SETTINGS).

        Raises:
            ProgramError: there is no such gate, or it has no such setting, or not of this value.
        """
        unknown = set(settings) - set(self.gated)
        if unknown:
            raise ProgramError(
                f"no gated layer is named {', '.join(sorted(unknown))}. They are: {', '.join(self.gated)}."
            )
        operators = list(self.operators)
        for name, changes in settings.items():
            operator = operators[self.gated[name]]
            known = SETTINGS[str(operator.gate)]
            if set(changes) - set(known):
                wrong = ", ".join(sorted(set(changes) - set(known)))
                raise ProgramError(f"{name}: its gate has no setting {wrong}. It has: {', '.join(known)}.")
            operators[self.gated[name]] = replace(operator, attributes={**operator.attributes, **changes})
        return replace(self, operators=tuple(operators))

    def __str__(self) -> str:
        return _table(self)


def operator_tuples(program: Program) -> list[tuple[Any, ...]]:
    """The operators in the form in which the native part takes them."""
    return [
        (
            operator.kind,
            operator.name,
            operator.inputs,
            operator.output,
            dict(operator.attributes),
            {role: program.tensors[name] for role, name in operator.tensors.items()},
            -1 if operator.guard is None else operator.guard,
        )
        for operator in program.operators
    ]


def _check_names(program: Program) -> None:
    seen: set[str] = set()
    for operator in program.operators:
        if not isinstance(operator, Operator):
            raise ProgramError(f"operators must be of type Operator, not {type(operator).__name__}.")
        if operator.name in seen:
            raise ProgramError(f"two operators are named {operator.name!r}. Names must be unique.")
        seen.add(operator.name)
        for role, name in operator.tensors.items():
            if name not in program.tensors:
                raise ProgramError(f"{operator.name}: its {role}, {name!r}, is not among the tensors.")
    for text in program.classes:
        if not isinstance(text, str) or not text.isprintable():
            raise ProgramError(f"names of classes must be text that can be printed, not {text!r}.")


def _check_with_native(program: Program) -> None:
    """Everything that executors rely on is checked once, by the native part: shapes, references, sizes."""
    try:
        _native.check(program.buffers, operator_tuples(program), program.output)
    except (ValueError, TypeError, OverflowError) as error:
        raise ProgramError(str(error)) from error


def _frozen(tensors: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The tensors as read-only C-contiguous arrays; arrays that can still be written to are copied."""
    frozen = {}
    for name, value in tensors.items():
        if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.int32):
            kind = f"{value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ProgramError(f"tensor {name!r} must be a float32 or int32 array, not {kind}.")
        array = value
        if array.flags.writeable or not array.flags.c_contiguous or array.base is not None:
            array = np.array(value, order="C")
            array.flags.writeable = False
        frozen[str(name)] = array
    return frozen


def _attribute(value: Any, what: str) -> Attribute:
    if isinstance(value, (list, tuple)):
        return _integers(value, what)
    if isinstance(value, str) or _is_number(value):
        return value
    raise ProgramError(f"{what} is {value!r}, but must be a number, a text or integers.")


def _integers(values: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(values, (list, tuple)) or not all(_is_integer(value) for value in values):
        raise ProgramError(f"{what} is {values!r}, but must be integers.")
    return tuple(values)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------------------ printing


def _table(program: Program) -> str:
    rows = [("", "kind", "name", "reads", "output", "M MACs", "")]
    macs = program.macs()
    for i, operator in enumerate(program.operators):
        rows.append(
            (
                str(operator.output),
                operator.kind,
                operator.name,
                ", ".join(map(str, operator.inputs)),
                " x ".join(map(str, program.buffers[operator.output])),
                f"{macs[operator.name] / 1e6:.2f}" if operator.name in macs else "",
                _details(program, i),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in {0, 5} else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    gates = program.gate_macs()
    weights = sum(array.nbytes for array in program.tensors.values())
    total = f"{sum(macs.values()) / 1e6:,.2f} M MACs dense"
    if gates:
        total += f", {len(gates)} gated layers, whose gates cost {sum(gates.values()) / 1e6:,.2f} M"
    shape = " x ".join(map(str, program.buffers[0]))
    output = " x ".join(map(str, program.buffers[program.output][: 1 if program.flat else 3]))
    lines.append(
        f"input {shape} (0), output {output} ({program.output}): {len(program.operators)} operators, {total}, "
        f"{weights / 1e6:,.1f} MB of weights, {_peak(program) / 1e6:,.2f} MB of activations at most"
    )
    return "\n".join(lines)


def _details(program: Program, place: int) -> str:
    operator = program.operators[place]
    values = operator.attributes
    parts = []
    if "kernel" in values:
        parts.append(f"{_by(operator.pair('kernel'))}")
    elif operator.kind == "conv":
        parts.append(f"{_by(program.tensor(operator, 'weight').shape[2:])}")
    pairs = {name: operator.pair(name) for name in ("stride", "dilation") if name in values}
    parts += [f"{name} {_by(pair)}" for name, pair in pairs.items() if pair != (1, 1)]
    if any(operator.sides()):
        sides = operator.sides()
        parts.append(f"padding {sides[0] if len(set(sides)) == 1 else ','.join(map(str, sides))}")
    if values.get("groups", 1) != 1:
        parts.append(f"groups {values['groups']}")
    if operator.activation != "none":
        parts.append(operator.activation)
    if operator.kind == "conv" and len(operator.inputs) > 1:
        parts.append("+ residual")
    if operator.gated:
        parts.append(_gate(program, operator))
    if operator.guard is not None:
        parts.append(f"{'scaled' if operator.setting('scaled') else 'guarded'} by {operator.guard}")
    return ", ".join(parts)


def _gate(program: Program, operator: Operator) -> str:
    if operator.gate == "layer_gate":
        return f"runs above {operator.setting('threshold')}"
    if operator.gate == "clip":
        return f"gate clip: above {operator.setting('threshold')}"
    if operator.gate == "topk":
        return f"gate topk: {operator.setting('winners')} of {program.buffers[operator.output][0]}"
    channels, height, width = program.buffers[operator.inputs[0]]
    return (
        f"gate attention: {operator.setting('kept_channels')} of {channels} channels, "
        f"{operator.setting('kept_columns')} of {height * width} columns"
    )


def _by(pair: Iterable[int]) -> str:
    return "x".join(map(str, pair))


def _peak(program: Program) -> int:
    """Most bytes of activations that are needed at once, per image."""
    change = [0] * (len(program.operators) + 2)
    for (first, last), shape in zip(program.lifetimes(), program.buffers, strict=True):
        size = 4 * math.prod(shape)
        change[max(first, 0)] += size
        change[min(last, len(program.operators)) + 1] -= size
    peak = live = 0
    for step in change:
        live += step
        peak = max(peak, live)
    return peak
