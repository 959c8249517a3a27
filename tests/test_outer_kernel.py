"""Convolutions on small maps that read chosen channels and compute all outputs, against the reference executor.

The gate's decisions are forced. Layers are as large as the form takes them, around its blocks of outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_column_kernels import input_of, program_of
from test_conv_kernels import Case, some

from thrifty.decision import Decision
from thrifty.engine import Engine
from thrifty.program import Program
from thrifty.reference import run_reference

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def cases(draw: Any) -> Case:
    """Maps of 1 to 66 output pixels, and just so many channels that their weights are more than 2**18."""
    kernel = draw(st.sampled_from([(3, 3), (3, 3), (1, 1), (2, 5), (4, 1)]))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 1), (1, 2)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 3)]))
    out = draw(
        st.sampled_from([(1, 1), (2, 2), (4, 4), (3, 8), (1, 17), (24, 1), (5, 4), (2, 9), (7, 7), (8, 8), (3, 22)])
    )
    padding = draw(st.sampled_from([(1, 1, 1, 1), (0, 0, 0, 0), (0, 2, 1, 0)]))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [
        max((n - 1) * s + span - before - after, 1)
        for n, s, span, before, after in zip(out, stride, spans, padding[::2], padding[1::2], strict=True)
    ]
    for axis in (0, 1):  # the filter must fit
        size[axis] = max(size[axis], spans[axis] - padding[2 * axis] - padding[2 * axis + 1])
    if size == [1, 1]:  # else a single value would decide on its own
        size[1] = 2
    outputs = draw(st.sampled_from([64, 95, 97, 128, 130]))
    inputs = 2**18 // (outputs * kernel[0] * kernel[1]) + 1
    return Case(
        inputs, outputs, 1, kernel, stride, dilation, padding, tuple(size),  # type: ignore[arg-type]
        draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0])), 1.0, draw(st.booleans()),
        draw(st.sampled_from(["none", "relu", "silu"])), draw(st.integers(0, 999)),
    )  # fmt: skip


def made(case: Case, images: int = 1) -> tuple[np.ndarray, Program, dict[str, Decision]]:
    rng = np.random.default_rng(case.seed)
    x, program = input_of(case, rng, images), program_of(case, rng, by_column=False)
    kept = np.concatenate([some(rng, case.inputs, case.share_in) for _ in range(images)])
    return x, program, {"conv": Decision(channels=kept)}


@SETTINGS
@given(case=cases())
def test_convolution_over_chosen_inputs(case: Case) -> None:
    x, program, decisions = made(case)
    wanted = run_reference(program, x, decisions)
    trace = Engine(program).trace(x, decisions)
    assert np.abs(trace.output - wanted.output).max() / max(np.abs(wanted.output).max(), 1e-3) <= 1e-5
    layer: Any = {layer.name: layer for layer in trace.layers}["conv"]
    assert layer.macs[0] == wanted.macs["conv"][0]
    if layer.kernel != "winograd 2x2":
        pixels = case.output[0] * case.output[1]
        assert (layer.kernel == "outer") == (pixels <= 64 and (case.stride[1] <= 2 or case.output[1] == 1))


@pytest.mark.parametrize(
    ("share", "kernel"), [(0.0, "outer"), (0.3, "outer"), (0.9, "winograd 2x2"), (1.0, "winograd 2x2")]
)
def test_the_form_follows_the_active_inputs(share: float, kernel: str) -> None:
    case = Case(172, 172, 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (7, 7), share, 1.0, False, "none", 0)
    x, program, decisions = made(case)
    trace = Engine(program).trace(x, decisions)
    assert [layer.kernel for layer in trace.layers] == [kernel]


@SETTINGS
@given(case=cases())
def test_what_is_skipped_is_not_read(case: Case) -> None:
    """NaN in every weight and every value of a skipped channel changes no bit."""
    case = replace(case, residual=False)  # it would be made from values that are pruned
    x, program, decisions = made(case)
    kept = decisions["conv"].channels
    assert kept is not None
    weight = program.tensors["conv.weight"].copy()
    weight[:, ~kept[0]] = np.nan
    tensors = {**program.tensors, "conv.weight": weight}
    bad = Program(program.buffers, program.operators, program.output, program.flat, tensors)
    clean = Engine(program).trace(x, decisions).output
    dirty = Engine(bad).trace(np.where(kept[:, :, None, None], x, np.float32(np.nan)), decisions).output
    assert np.isfinite(clean).all()
    assert clean.tobytes() == dirty.tobytes()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_same_bits_for_any_number_of_threads(size: int) -> None:
    case = Case(240, 250, 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (size, size + 1), 0.3, 1.0, True, "relu", size)
    x, program, decisions = made(case, 3)
    answers = {Engine(program, threads=threads).trace(x, decisions).output.tobytes() for threads in (1, 2, 7)}
    assert len(answers) == 1
