"""Convolutions that read chosen columns of chosen channels, against the reference executor in double precision.

The gate's decisions are forced. Sizes are those of the other kernels' cases; their share of outputs is the share of
columns here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from test_conv_kernels import Case, cases, some

from thrifty.decision import Decision
from thrifty.engine import Engine
from thrifty.program import Operator, Program
from thrifty.reference import run_reference

SETTINGS = settings(max_examples=250, deadline=None, derandomize=True)


def program_of(case: Case, rng: np.random.Generator, by_column: bool = True) -> Program:
    """One convolution with a gate on all that it may decide on, and where asked for a residual made from the input."""

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    taps = case.inputs // case.groups * case.kernel[0] * case.kernel[1]
    tensors = {
        "conv.weight": normal(case.outputs, case.inputs // case.groups, *case.kernel) / np.float32(taps**0.5),
        "conv.bias": normal(case.outputs),
    }
    buffers = [(case.inputs, *case.size)]
    operators = []
    if case.residual:
        tensors |= {"side.weight": normal(case.outputs, case.inputs, 1, 1), "side.bias": normal(case.outputs)}
        buffers += [(case.inputs, *case.output), (case.outputs, *case.output)]
        operators += [
            Operator("adaptive_avg_pool", "pool", (0,), 1),
            Operator("conv", "side", (1,), 2, {}, {"weight": "side.weight", "bias": "side.bias"}),
        ]
    attributes = {
        "stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups,
        "activation": case.activation, "gate": "attention",
        "kept_channels": max(1, case.inputs - 1), "kept_columns": max(1, case.size[0] * case.size[1] - by_column),
    }  # fmt: skip
    inputs = (0, 2) if case.residual else (0,)
    buffers.append((case.outputs, *case.output))
    roles = {"weight": "conv.weight", "bias": "conv.bias"}
    operators.append(Operator("conv", "conv", inputs, len(buffers) - 1, attributes, roles))
    return Program(tuple(buffers), tuple(operators), len(buffers) - 1, False, tensors)


def decision_of(case: Case, rng: np.random.Generator, images: int = 1) -> Decision:
    def masks(count: int, share: float) -> np.ndarray:
        return np.concatenate([some(rng, count, share) for _ in range(images)])

    columns = masks(case.size[0] * case.size[1], case.share_out).reshape(images, *case.size)
    return Decision(channels=masks(case.inputs, case.share_in) if case.inputs > 1 else None, columns=columns)


def input_of(case: Case, rng: np.random.Generator, images: int = 1) -> np.ndarray:
    if case.size == (1, 1):  # a single column is always kept: nothing to decide
        assume(False)
    return rng.normal(size=(images, case.inputs, *case.size)).astype(np.float32)


@SETTINGS
@given(case=cases())
def test_convolution_over_chosen_columns(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    x, program = input_of(case, rng), program_of(case, rng)
    decisions = {"conv": decision_of(case, rng)}
    wanted = run_reference(program, x, decisions)
    trace = Engine(program).trace(x, decisions)
    scale = max(np.abs(wanted.output).max(), 1e-3)
    assert np.abs(trace.output - wanted.output).max() / scale <= 1e-5
    layer: Any = {layer.name: layer for layer in trace.layers}["conv"]
    assert layer.macs[0] == wanted.macs["conv"][0]
    assert layer.kernel == "columns"


@SETTINGS
@given(case=cases())
def test_what_is_skipped_is_not_read(case: Case) -> None:
    """NaN in every weight of a skipped channel, and in every value that is pruned, changes no bit."""
    case = replace(case, residual=False)  # it would be made from values that are pruned
    rng = np.random.default_rng(case.seed)
    x, program = input_of(case, rng), program_of(case, rng)
    decision = decision_of(case, rng)
    kept = decision.channels[0] if decision.channels is not None else np.ones(1, bool)
    weight = program.tensors["conv.weight"].copy()
    per_group, per_group_out = case.inputs // case.groups, case.outputs // case.groups
    for o in range(case.outputs):
        first = o // per_group_out * per_group
        weight[o][~kept[first : first + per_group]] = np.nan
    dirty_x = np.where(kept[None, :, None, None] & decision.columns[:, None], x, np.float32(np.nan))
    tensors = {**program.tensors, "conv.weight": weight}
    bad = Program(program.buffers, program.operators, program.output, program.flat, tensors)
    clean = Engine(program).trace(x, {"conv": decision}).output
    dirty = Engine(bad).trace(dirty_x, {"conv": decision}).output
    assert np.isfinite(clean).all()
    assert clean.tobytes() == dirty.tobytes()


@pytest.mark.parametrize("size", [7, 8, 14, 15, 16, 31, 56])
@pytest.mark.parametrize("channels", [8, 24, 64])
def test_same_bits_for_any_number_of_threads(size: int, channels: int) -> None:
    case = Case(channels, channels, 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (size, size), 0.5, 0.5, True, "relu", size)
    rng = np.random.default_rng(size)
    x, program = input_of(case, rng, 3), program_of(case, rng)
    decisions = {"conv": decision_of(case, rng, 3)}
    answers = {Engine(program, threads=threads).trace(x, decisions).output.tobytes() for threads in (1, 2, 7)}
    assert len(answers) == 1
