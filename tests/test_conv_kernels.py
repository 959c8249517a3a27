"""All forms of convolution against the reference executor in double precision, over chosen channels.

Two gated convolutions in a row, whose decisions are forced: the first fixes which channels the second reads, the second
which ones it computes. Sizes lie around tiles and vectors; kernels are told apart by what the engine's trace says.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thrifty.decision import Decision
from thrifty.engine import Engine
from thrifty.program import Operator, Program
from thrifty.reference import run_reference

SETTINGS = settings(max_examples=250, deadline=None, derandomize=True)
seen: Counter[str] = Counter()


@dataclass(frozen=True)
class Case:
    inputs: int
    outputs: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    size: tuple[int, int]
    share_in: float
    share_out: float
    residual: bool
    activation: str
    seed: int

    @property
    def output(self) -> tuple[int, int]:
        top, bottom, left, right = self.padding
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        padded = (self.size[0] + top + bottom, self.size[1] + left + right)
        return tuple((p - s) // t + 1 for p, s, t in zip(padded, spans, self.stride, strict=True))  # type: ignore[return-value]


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    """The same number twice, mostly."""
    number = st.integers(low, high)
    return st.one_of(number.map(lambda n: (n, n)), st.tuples(number, number))


@st.composite
def cases(draw: Any) -> Case:
    kind = draw(st.integers(0, 7))
    if kind < 2:
        return draw(plain_cases())
    if kind == 2:
        return draw(wide_cases())
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    depthwise = groups == 8 and draw(st.booleans())
    inputs = groups * (1 if depthwise else draw(st.sampled_from([1, 2, 3, 5, 8, 13, 16, 17, 40])))
    outputs = groups * draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 32]))
    kernel = draw(st.one_of(st.just((3, 3)), st.just((1, 1)), pairs(1, 5)))
    stride = draw(st.one_of(st.just((1, 1)), pairs(1, 3)))
    dilation = draw(st.one_of(st.just((1, 1)), pairs(1, 3)))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = draw(pairs(1, 37))
    padding = (
        [draw(st.integers(0, 3)) for _ in range(4)]
        if draw(st.booleans())
        else [kernel[0] // 2] * 2 + [kernel[1] // 2] * 2
    )
    for axis in (0, 1):  # the filter must fit
        missing = spans[axis] - size[axis] - padding[2 * axis] - padding[2 * axis + 1]
        padding[2 * axis + 1] += max(0, missing)
    return Case(
        inputs, outputs, groups, kernel, stride, dilation, tuple(padding), size,  # type: ignore[arg-type]
        draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])), draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])),
        draw(st.booleans()), draw(st.sampled_from(["none", "relu", "relu6", "silu"])), draw(st.integers(0, 999)),
    )  # fmt: skip


@st.composite
def plain_cases(draw: Any) -> Case:
    """3x3 filters with enough channels for Winograd's transforms."""
    channels = st.sampled_from([8, 9, 13, 16, 17, 40])
    padding = draw(st.sampled_from([(1, 1, 1, 1), (0, 0, 0, 0), (0, 2, 2, 1)]))
    size = draw(st.tuples(st.integers(7, 70), st.one_of(st.integers(7, 40), st.integers(3, 18))))
    shares = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
    return Case(
        draw(channels), draw(channels), 1, (3, 3), (1, 1), (1, 1), padding, size, draw(shares), draw(shares),
        draw(st.booleans()), draw(st.sampled_from(["none", "relu", "gelu"])), draw(st.integers(0, 999)),
    )  # fmt: skip


@st.composite
def wide_cases(draw: Any) -> Case:
    """1x1 filters with so many channels that their inputs are packed, all at once or block after block; 3x3 filters on
    small maps with so many that the form depends on how many are active."""
    shares = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
    if draw(st.integers(0, 2)) == 0:
        size = draw(st.sampled_from([7, 8]))
        return Case(
            160, 160, 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (size, size), draw(shares), draw(shares),
            draw(st.booleans()), "relu", draw(st.integers(0, 999)),
        )  # fmt: skip
    stride = draw(st.sampled_from([1, 1, 2, 3]))
    padding = draw(st.sampled_from([(0, 0, 0, 0), (0, 0, 0, 0), (1, 0, 0, 2)]))
    return Case(
        draw(st.sampled_from([128, 131, 700])), draw(st.sampled_from([32, 37])), 1, (1, 1), (stride, stride), (1, 1),
        padding, draw(st.tuples(st.integers(1, 19), st.integers(1, 19))), draw(shares), draw(shares),
        draw(st.booleans()), draw(st.sampled_from(["none", "relu"])), draw(st.integers(0, 999)),
    )  # fmt: skip


def some(rng: np.random.Generator, count: int, share: float) -> np.ndarray:
    """bool [1, count]: none for 0, all for 1, all but one for 0.9, else about that share."""
    if share == 0.9:
        mask = np.ones(count, bool)
        mask[rng.integers(count)] = False
    else:
        mask = rng.random(count) < share
    return mask[None]


def program_of(case: Case, rng: np.random.Generator) -> Program:
    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    taps = case.inputs // case.groups * case.kernel[0] * case.kernel[1]
    tensors = {
        "first.weight": normal(case.inputs, 2, 1, 1), "first.bias": normal(case.inputs),
        "first.gate_weight": np.abs(normal(case.inputs, 2)), "first.gate_bias": np.ones(case.inputs, np.float32),
        "second.weight": normal(case.outputs, case.inputs // case.groups, *case.kernel) / np.float32(taps**0.5),
        "second.bias": normal(case.outputs),
        "second.gate_weight": np.abs(normal(case.outputs, case.inputs)) / case.inputs,
        "second.gate_bias": np.ones(case.outputs, np.float32),
        "side.weight": normal(case.outputs, 2, 1, 1), "side.bias": normal(case.outputs),
    }  # fmt: skip

    def roles(name: str, *wanted: str) -> dict[str, str]:
        return {role: f"{name}.{role}" for role in wanted}

    gate = ("weight", "bias", "gate_weight", "gate_bias")
    buffers = [(2, *case.size), (case.inputs, *case.size)]
    operators = [Operator("conv", "first", (0,), 1, {"gate": "topk", "winners": 1}, roles("first", *gate))]
    attributes = {
        "stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups,
        "activation": case.activation, "gate": "topk", "winners": 1,
    }  # fmt: skip
    if case.residual:  # a map of the output's size, made from the input by pooling and a 1x1 convolution
        buffers += [(2, *case.output), (case.outputs, *case.output)]
        operators += [
            Operator("adaptive_avg_pool", "pool", (0,), 2),
            Operator("conv", "side", (2,), 3, {}, roles("side", "weight", "bias")),
        ]
    inputs = (1, 3) if case.residual else (1,)
    buffers.append((case.outputs, *case.output))
    operators.append(Operator("conv", "second", inputs, len(buffers) - 1, attributes, roles("second", *gate)))
    return Program(tuple(buffers), tuple(operators), len(buffers) - 1, False, tensors)


def one_column(stride: tuple[int, int], size: tuple[int, int]) -> Case:
    """A 1x1 filter whose stride is taken along one axis only, if along any."""
    return Case(16, 32, 1, (1, 1), stride, (1, 1), (0, 0, 0, 0), size, 1.0, 1.0, False, "none", 0)


def narrow(width: int) -> Case:
    """A map so narrow that a vector of Winograd's tiles holds two or four rows of them, and of several blocks."""
    return Case(9, 10, 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (101, width), 0.5, 1.0, True, "relu", 5)


@SETTINGS
@given(case=cases())
@example(case=one_column((1, 2), (16, 2)))
@example(case=one_column((1, 3), (40, 3)))
@example(case=one_column((2, 1), (2, 16)))
@example(case=narrow(4))
@example(case=narrow(7))
@example(case=narrow(15))
def test_convolution_over_chosen_channels(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    program = program_of(case, rng)
    x = rng.normal(size=(1, 2, *case.size)).astype(np.float32)
    decisions = {
        "first": Decision(channels=some(rng, case.inputs, case.share_in)),
        "second": Decision(channels=some(rng, case.outputs, case.share_out)),
    }
    wanted = run_reference(program, x, decisions)
    trace = Engine(program).trace(x, decisions)
    scale = max(np.abs(wanted.output).max(), 1e-3)
    assert np.abs(trace.output - wanted.output).max() / scale <= 1e-5
    layers = {layer.name: layer for layer in trace.layers}
    assert layers["second"].macs[0] == wanted.macs["second"][0]
    seen[layers["second"].kernel] += 1


def test_every_form_was_met() -> None:
    if not seen:
        pytest.skip("runs after the test above, in the same process")
    assert set(seen) == {"direct", "direct, strided", "packed", "winograd 2x2", "depthwise", "dot"}
    assert min(seen.values()) >= 3, seen


@pytest.mark.parametrize(
    ("share", "kernel"), [(0.0, "packed"), (0.3, "packed"), (0.9, "winograd 2x2"), (1.0, "winograd 2x2")]
)
def test_the_form_follows_the_active_inputs(share: float, kernel: str) -> None:
    case = Case(160, 160, 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (7, 7), share, 0.5, False, "none", 0)
    rng = np.random.default_rng(0)
    program, x = program_of(case, rng), rng.normal(size=(1, 2, 7, 7)).astype(np.float32)
    decisions = {"first": Decision(channels=some(rng, 160, share)), "second": Decision(channels=some(rng, 160, 0.5))}
    trace = Engine(program).trace(x, decisions)
    assert {layer.name: layer.kernel for layer in trace.layers}["second"] == kernel
    wanted = run_reference(program, x, decisions).output
    assert np.abs(trace.output - wanted).max() / np.abs(wanted).max() <= 1e-5


@SETTINGS
@given(case=cases())
def test_weights_that_are_skipped_are_not_read(case: Case) -> None:
    """NaN in every weight of a skipped channel changes no bit."""
    rng = np.random.default_rng(case.seed)
    program = program_of(case, rng)
    x = rng.normal(size=(1, 2, *case.size)).astype(np.float32)
    masks = {"first": some(rng, case.inputs, case.share_in), "second": some(rng, case.outputs, case.share_out)}
    decisions = {name: Decision(channels=mask) for name, mask in masks.items()}
    poisoned = {name: array.copy() for name, array in program.tensors.items()}
    skipped_in, skipped_out = ~masks["first"][0], ~masks["second"][0]
    for role in ("weight", "bias"):
        poisoned[f"first.{role}"][skipped_in] = np.nan
        poisoned[f"second.{role}"][skipped_out] = np.nan
    per_group = case.inputs // case.groups
    for o in range(case.outputs):
        group = o // (case.outputs // case.groups)
        poisoned["second.weight"][o][skipped_in[group * per_group : (group + 1) * per_group]] = np.nan
    bad = Program(program.buffers, program.operators, program.output, program.flat, poisoned)
    clean, dirty = (Engine(p).trace(x, decisions).output for p in (program, bad))
    assert np.isfinite(clean).all()
    assert clean.tobytes() == dirty.tobytes()


@pytest.mark.parametrize("size", [7, 8, 14, 15, 16, 31, 56])
@pytest.mark.parametrize("channels", [8, 24, 64])
def test_same_bits_for_any_number_of_threads(size: int, channels: int) -> None:
    case = Case(channels, channels, 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (size, size), 0.5, 0.5, True, "relu", size)
    rng = np.random.default_rng(size)
    program = program_of(case, rng)
    x = rng.normal(size=(3, 2, size, size)).astype(np.float32)
    decisions = {
        name: Decision(channels=np.concatenate([some(rng, channels, 0.5) for _ in x])) for name in ("first", "second")
    }
    answers = {Engine(program, threads=threads).trace(x, decisions).output.tobytes() for threads in (1, 2, 7)}
    assert len(answers) == 1
