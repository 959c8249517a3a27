"""Every operator of the engine against the reference executor in double precision, on sparse maps and full ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from random_programs import GROWN, Builder, grow, random_decisions, random_program

from thrifty.decision import Decision
from thrifty.engine import Engine
from thrifty.program import ACTIVATIONS, KINDS, Program
from thrifty.reference import run_reference

SIZES = ((1, 1), (1, 7), (3, 2), (7, 7), (8, 9), (15, 16), (17, 31), (33, 20))
SEEDS = range(8)


def assert_agrees(program: Program, x: Any, decisions: dict[str, Decision], tolerance: float = 1e-5) -> Engine:
    """Values, decisions and MACs equal the reference's, and nothing is read that the call has not written."""
    wanted = run_reference(program, x, decisions)
    engine = Engine(program)
    trace = engine.trace(x, decisions)
    scale = max(1e-3, np.abs(wanted.output).max(initial=0))
    assert np.abs(trace.output - wanted.output).max(initial=0) / scale <= tolerance
    for layer in trace.layers:
        if layer.name in wanted.macs:
            np.testing.assert_array_equal(layer.macs, wanted.macs[layer.name], layer.name)
        if layer.name in wanted.gate_macs:
            np.testing.assert_array_equal(layer.gate_macs, wanted.gate_macs[layer.name], layer.name)
    assert_same_decisions(trace.decisions, wanted.decisions)
    engine._native.fill_memory(float("nan"))
    assert engine.trace(x, decisions).output.tobytes() == trace.output.tobytes()
    return engine


def assert_same_decisions(found: dict[str, Decision], wanted: dict[str, Decision]) -> None:
    assert list(found) == list(wanted)
    for name, decision in found.items():
        for axis in ("channels", "columns", "layer"):
            np.testing.assert_equal(getattr(decision, axis), getattr(wanted[name], axis), f"{name}: {axis}")


def test_all_kinds_are_grown() -> None:
    assert set(GROWN) == set(KINDS)


@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
@pytest.mark.parametrize("kind", GROWN)
def test_operator_alone_and_before_a_padded_convolution(kind: str, sparse: bool) -> None:
    for seed in SEEDS:
        b = Builder((5, *SIZES[seed % len(SIZES)]), seed)
        other = b.conv(0, 5)
        first = b.conv(other, 5, winners=3) if sparse else other
        out = grow(b, kind, first)
        x = b.random.standard_normal((2, *b.buffers[0])).astype(np.float32)
        for program in (b.build(), (b.conv(out, 3, kernel=3), b.build())[1]):
            assert_agrees(program, x, random_decisions(program, 2, seed))


@pytest.mark.parametrize("seed", range(50))
def test_random_programs(seed: int) -> None:
    program = random_program(seed)
    x = np.random.default_rng(seed).standard_normal((2, *program.buffers[0])).astype(np.float32)
    assert_agrees(program, x, random_decisions(program, 2, seed), tolerance=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_over_its_whole_range(activation: str) -> None:
    values = np.concatenate(
        [
            np.linspace(-12, 12, 4001),
            np.logspace(-9, 38, 400),
            -np.logspace(-9, 38, 400),
            [0.0, np.inf, -np.inf, np.nan],
        ]
    ).astype(np.float32)
    b = Builder((1, 1, len(values)))
    b.add("activation", (0,), b.buffers[0], {"activation": activation, "slope": 0.1})
    program = b.build()
    with np.errstate(all="ignore"):
        wanted = run_reference(program, values[None, None, None].astype(np.float64)).output.ravel()
    found = Engine(program)(values[None, None, None]).ravel()
    assert np.isnan(found[-1])
    finite = np.isfinite(values)
    values, wanted, found = values[finite], wanted[finite], found[finite]
    error = np.abs(found - wanted)
    worst = (error / np.maximum(1, np.abs(wanted))).argmax()
    assert error[worst] <= 1e-6 * max(1, abs(wanted[worst])), (values[worst], found[worst], wanted[worst])
    near = np.abs(values) < 1e-3  # near zero a small error may still be a large share
    assert (error[near] <= 1e-6 * np.maximum(np.abs(wanted[near]), np.abs(values[near]))).all()


@pytest.mark.parametrize("size", [1, 5, 8, 17, 33, 64])
@pytest.mark.parametrize("stride", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (2, 5)])
def test_pooling_of_single_values_subsamples(size: int, stride: tuple[int, int]) -> None:
    down, along = stride
    b = Builder((3, size, 2 * size), size)
    shape = (3, -(-size // down), -(-2 * size // along))
    b.add("max_pool", (0,), shape, {"kernel": (1, 1), "stride": stride})
    x = b.random.standard_normal((2, 3, size, 2 * size)).astype(np.float32)
    x[0, 0, 0, 0] = np.nan
    np.testing.assert_array_equal(Engine(b.build())(x).reshape(2, *shape), x[:, :, ::down, ::along])


@pytest.mark.parametrize("features", [1, 7, 8, 17, 63, 130])
@pytest.mark.parametrize("outputs", [1, 3, 4, 5, 64, 65])
def test_linear_over_sizes_and_active_features(features: int, outputs: int) -> None:
    for pixels in (1, 20):  # short runs of active features, long ones
        b = Builder((3, 1, pixels), features)
        gated = b.conv(0, features, winners=1)
        b.linear(b.flatten(gated), outputs)
        program = b.build()
        x = b.random.standard_normal((2, 3, 1, pixels)).astype(np.float32)
        for decisions in (random_decisions(program, 2, outputs), {}):
            if decisions or features == 1:
                assert_agrees(program, x, decisions)
        engine = Engine(program)
        kernels = {layer.kind: layer.kernel for layer in engine.trace(x).layers}
        assert kernels["linear"] == ("runs" if pixels == 20 else "panels")


def test_weights_of_skipped_channels_are_not_touched() -> None:
    counted: Counter[str] = Counter()
    for seed in range(30):
        b = Builder((4, 6, 6), seed)
        gated = b.conv(0, 12, kernel=3, winners=5)
        second = b.conv(gated, 12, kernel=3, winners=4, residual=gated, activation="relu")
        b.linear(b.flatten(second) if seed % 2 else b.add("adaptive_avg_pool", (second,), (12, 1, 1)), 9)
        program = b.build()
        x = b.random.standard_normal((1, 4, 6, 6)).astype(np.float32)
        trace = Engine(program).trace(x)
        first, then = (trace.decisions[f"conv{i}"].channels[0] for i in (0, 1))
        tensors = {name: value.copy() for name, value in program.tensors.items()}
        tensors["conv0.weight"][~first] = np.nan
        tensors["conv0.bias"][~first] = np.nan
        tensors["conv1.weight"][~then] = np.nan
        tensors["conv1.weight"][:, ~first] = np.nan
        tensors["conv1.bias"][~then] = np.nan
        linear = next(name for name in tensors if name.startswith("linear") and name.endswith("weight"))
        tensors[linear][:, np.repeat(~(first | then), tensors[linear].shape[1] // 12)] = np.nan
        poisoned = Program(program.buffers, program.operators, program.output, program.flat, tensors)
        assert Engine(poisoned)(x).tobytes() == trace.output.tobytes()
        counted[linear] += int(np.isnan(tensors[linear]).sum())
    assert min(counted.values()) > 0
