"""Calls of the engine: batches, threads, forks, denormals, kinds of input, densities, traces."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from random_programs import Builder, random_decisions, random_program

from thrifty._native import features
from thrifty.decision import Decision
from thrifty.density import kept
from thrifty.engine import Engine, load
from thrifty.errors import ThriftyError
from thrifty.program import Preprocessing, Program
from thrifty.reference import run_reference


def network(size: int = 20, preprocessing: Preprocessing | None = None) -> Program:
    """Large enough that every thread gets tasks of most operators."""
    b = Builder((3, size, size), 1)
    x = b.conv(0, 32, kernel=3, activation="relu")
    y = b.conv(x, 32, kernel=3, winners=20, activation="relu")
    y = b.conv(y, 32, kernel=3, winners=16, residual=x, activation="relu")
    y = b.add("max_pool", (y,), (32, size // 2, size // 2), {"kernel": (2, 2), "stride": (2, 2)})
    y = b.conv(y, 130, kernel=1, winners=40, activation="silu")
    y = b.add("layer_norm", (y,), b.buffers[y], {"epsilon": 1e-3}, weight=b.weights(130), bias=b.weights(130))
    y = b.conv(y, 64, kernel=3, winners=30, activation="hardswish")
    y = b.add("adaptive_avg_pool", (y,), (64, 1, 1))
    b.linear(y, 200)
    return b.build(preprocessing=preprocessing)


def images(program: Program, count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, *program.buffers[0])).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_batch_is_its_images_bit_for_bit(threads: int) -> None:
    for program in (network(), random_program(3), random_program(11)):
        x = images(program, 9)
        single = Engine(program)
        wanted = np.concatenate([single(image[None]) for image in x])
        engine = Engine(program, threads)
        for count in (1, 2, 6, 7, 8, 9):
            assert engine(x[:count]).tobytes() == wanted[:count].tobytes()
        order = np.random.default_rng(1).permutation(9)
        assert engine(x[order]).tobytes() == wanted[order].tobytes()
        assert engine.trace(x).output.tobytes() == wanted.tobytes()
        engine._native.fill_memory(float("nan"))
        assert engine(x).tobytes() == wanted.tobytes()


def test_copies_are_set_as_the_engine_is() -> None:
    program = network()
    engine, x = Engine(program, 2), images(program, 3)
    whole = engine.trace(x).macs
    engine.set_budget(0.9, x)
    twins = (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine)))  # noqa: S301 (our own bytes)
    for twin in twins:
        assert twin.threads == 2
        assert twin.density == engine.density
        assert twin(x).tobytes() == engine(x).tobytes()
        assert (twin.trace(x).macs > whole).all()
    for twin in (engine, *twins):
        twin.set_budget(0.95, x)  # the range is still the whole one
        assert twin(x).tobytes() == engine(x).tobytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_python_threads_may_share_an_engine(threads: int) -> None:
    program = network()
    engine = Engine(program, threads)
    batches = [images(program, 1 + i % 4, i) for i in range(6)]
    wanted = [Engine(program)(x).tobytes() for x in batches]
    wrong: list[int] = []

    def call(i: int) -> None:
        wrong.extend(i for _ in range(20) if engine(batches[i]).tobytes() != wanted[i])

    workers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_fork_has_threads_of_its_own() -> None:
    code = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
from test_engine_calls import network, images
from thrifty.engine import Engine
program = network()
engine, x = Engine(program, threads=3), images(program, 5)
wanted = engine(x).tobytes()
stop = threading.Event()
def busy():
    while not stop.is_set():
        engine(x)
other = threading.Thread(target=busy)
other.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        same = all(engine(x[:n]).tobytes() == wanted[:len(engine(x[:n]).tobytes())] for n in (1, 2, 5))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
other.join()
assert engine(x).tobytes() == wanted
print('good')
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, os.path.dirname(__file__)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "good"), done.stderr


@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_flushed_and_the_callers_setting_kept(threads: int) -> None:
    b = Builder((64, 16, 16))
    tiny = np.full(64, 1e-30, np.float32)
    first = b.add("affine", (0,), b.buffers[0], {}, scale=tiny)
    b.add("affine", (first,), b.buffers[0], {}, scale=np.full(64, 1e25, np.float32))
    engine = Engine(b.build(), threads)
    x = np.full((6, 64, 16, 16), 1e-10, np.float32)  # 1e-40 in between
    for count in (1, 6):
        assert not engine(x[:count]).any()
    assert engine(x[:1] * 1e10).all()
    denormal = np.full(100, 1e-40, np.float32)
    assert (denormal * np.float32(0.5) > 0).all()


def test_an_idle_engine_uses_no_time() -> None:
    engine = Engine(network(), threads=2)
    engine(images(engine.program, 4))
    threading.Event().wait(0.02)
    start = os.times()
    threading.Event().wait(0.3)
    stop = os.times()
    assert stop.user + stop.system - start.user - start.system <= 0.1


def test_an_empty_batch_gives_an_empty_answer() -> None:
    program = network()
    engine = Engine(program, 2)
    empty = images(program, 0)
    assert engine(empty).shape == (0, 200)
    trace = engine.trace(empty)
    assert trace.macs.shape == (0,)
    assert {d.channels.shape[0] for d in trace.decisions.values()} == {0}
    assert "kept" in str(trace)


def test_photographs_are_normalised_in_either_layout() -> None:
    preprocessing = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    program = network(10, preprocessing)
    engine = Engine(program, 2)
    first = np.random.default_rng(0).integers(0, 256, (4, 3, 10, 10), dtype=np.uint8)
    floats = (first / 255 - np.reshape(preprocessing.mean, (3, 1, 1))) / np.reshape(preprocessing.std, (3, 1, 1))
    decisions = engine.trace(first).decisions
    wanted = run_reference(program, floats, decisions).output
    last = np.ascontiguousarray(first.transpose(0, 2, 3, 1))
    assert np.abs(engine(first) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert engine(last).tobytes() == engine(first).tobytes()
    with pytest.raises(ThriftyError, match="no preprocessing"):
        Engine(network(10))(first)


def test_any_strides_are_read_in_place() -> None:
    program = network()
    engine = Engine(program)
    x = images(program, 4)
    wanted = engine(x)
    wide = np.zeros((8, 3, 25, 60), np.float32)
    wide[::2, :, 3:23, 1:41:2] = x
    bytes_ = np.zeros(x.nbytes + 1, np.uint8)
    odd = bytes_[1:].view(np.float32).reshape(x.shape)
    odd[:] = x
    for other in (
        wide[::2, :, 3:23, 1:41:2], x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2), x[::-1].copy()[::-1], odd,
        np.asfortranarray(x),
    ):  # fmt: skip
        assert engine(other).tobytes() == wanted.tobytes()
    x.flags.writeable = False
    assert engine(x).tobytes() == wanted.tobytes()


def test_tensors_come_back_as_tensors() -> None:
    torch = pytest.importorskip("torch")
    program = network()
    engine = Engine(program)
    x = torch.randn(2, 3, 20, 20, requires_grad=True)
    wanted = engine(x.detach().numpy())
    for given in (x, x.detach().contiguous(memory_format=torch.channels_last)):
        out = engine(given)
        assert isinstance(out, torch.Tensor)
        assert out.numpy().tobytes() == wanted.tobytes()
    with pytest.raises(ThriftyError, match=r"torch.float64, but must be float32"):
        engine(x.double())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((3, 20, 20), np.float32), r"\[3, 20, 20\], but the program takes \[N, 3, 20, 20\]"),
        (np.zeros((1, 3, 20, 21), np.float32), r"\[1, 3, 20, 21\]"),
        (np.zeros((1, 20, 20, 3), np.float32), r"\[1, 20, 20, 3\]"),
        (np.zeros((1, 3, 20, 20)), "float64, but must be float32"),
        (np.zeros((1, 3, 20, 20), ">f4"), "must be float32"),
        ([[1.0]], "list, but must be"),
        (None, "NoneType"),
        ("photograph.jpg", "str, but must be"),
        (b"\0" * 4800, "bytes, but must be"),
        ({"x": 1}, "dict, but must be"),
        (np.float32(1), "float32, but must be a NumPy array"),
        (np.array(1, np.float32), r"\[\], but the program takes"),
        (np.zeros((1, 3, 20, 20), np.complex64), "complex64, but must be"),
        (np.zeros((1, 3, 20, 20), bool), "bool, but must be"),
        (np.zeros((1, 3, 20, 20), "U1"), "U1, but must be"),
        (np.full((1, 3, 20, 20), None), "object, but must be"),
        (np.zeros((1, 3, 20, 20), [("a", "f4")]), "but must be float32"),
        (np.zeros((1, 3, 20, 20, 1), np.float32), r"\[1, 3, 20, 20, 1\]"),
        (np.zeros((0, 3, 20, 21), np.float32), r"\[0, 3, 20, 21\]"),
    ],
)
def test_wrong_inputs_are_named(x: Any, message: str) -> None:
    engine = Engine(network())
    for call in (engine, engine.trace):
        with pytest.raises(ThriftyError, match=message):
            call(x)


def test_tensors_that_are_not_in_memory_as_they_are_are_named() -> None:
    torch = pytest.importorskip("torch")
    engine = Engine(network())
    x = torch.zeros(1, 3, 20, 20)
    for wrong, message in (
        (x.to("meta"), "on meta"),
        (x.to_sparse(), "sparse"),
        (x.half(), "float16"),
        (x.bfloat16(), "bfloat16"),
        (x[0], r"\[3, 20, 20\]"),
    ):
        with pytest.raises(ThriftyError, match=message):
            engine(wrong)


def test_one_image_may_stand_for_a_batch() -> None:
    engine = Engine(network())
    x = images(engine.program, 1)
    assert engine(np.broadcast_to(x, (5, *x.shape[1:]))).tobytes() == engine(x).tobytes() * 5


def test_nan_and_infinity_in_the_input_do_not_break_a_call() -> None:
    program = network()
    engine = Engine(program, 2)
    x = images(program, 3)
    x[0, 0, 0, 0], x[2, 1, 3, 3] = np.nan, np.inf
    trace = engine.trace(x)
    assert np.isnan(trace.output[0]).any()
    assert np.isfinite(trace.output[1]).all()
    for name, place in program.gated.items():
        winners = program.operators[place].attributes["winners"]
        assert (trace.decisions[name].channels.sum(1) == winners).all()


def test_ties_go_to_the_lowest_index_and_nan_comes_last() -> None:
    b = Builder((1, 1, 1))
    b.conv(0, 8, winners=3)
    program = b.build()

    def chosen(bias: list[float]) -> list[int]:
        tensors = dict(program.tensors) | {
            "conv0.gate_weight": np.zeros((8, 1), np.float32),
            "conv0.gate_bias": np.array(bias, np.float32),
        }
        same = Program(program.buffers, program.operators, program.output, program.flat, tensors)
        trace = Engine(same).trace(np.ones((1, 1, 1, 1), np.float32))
        return np.flatnonzero(trace.decisions["conv0"].channels[0]).tolist()

    nan = float("nan")
    assert chosen([1] * 8) == [0, 1, 2]
    assert chosen([0, 2, 1, 2, 1, 1, 0, 3]) == [1, 3, 7]
    assert chosen([0, 2, 1, 1, 1, 1, 0, 3]) == [1, 2, 7]
    assert chosen([-5, -1, 0, -3, -2, 0, 0, 0]) == [0, 1, 2]  # relu makes them equal
    assert chosen([nan, 0, nan, 0, nan, 0, nan, nan]) == [1, 3, 5]
    assert chosen([nan, nan, nan, nan, nan, 1, nan, nan]) == [0, 1, 5]
    assert chosen([nan] * 8) == [0, 1, 2]
    assert chosen([float("inf"), nan, 1, 2, float("-inf"), 0, 0, 0]) == [0, 2, 3]


def test_density_is_set_without_building_anew(tmp_path: Any) -> None:
    program = network()
    engine = Engine(program, 2)
    x = images(program, 3)
    before = engine(x)
    engine.set_density(0.25)
    for name, decision in engine.trace(x).decisions.items():
        assert (decision.channels.sum(1) == kept(0.25, decision.channels.shape[1])).all(), name
    assert engine.density == pytest.approx(0.25, abs=0.02)
    winners = {name: {"winners": kept(0.25, program.axes(name)["channels"][0])} for name in program.gated}
    assert engine(x).tobytes() == Engine(program.with_gates(winners))(x).tobytes()
    engine.set_density({"conv1": 1.0, "conv*": 0.5})
    shares = {name: d.channels.mean() for name, d in engine.trace(x).decisions.items()}
    assert shares == {"conv1": 1.0, "conv2": 0.5, "conv4": 0.5, "conv6": 0.5}
    engine.save(tmp_path / "m.thrifty")
    assert load(tmp_path / "m.thrifty")(x).tobytes() == engine(x).tobytes()
    assert engine(x).tobytes() != before.tobytes()
    for density, message in (
        (0, "must be a number"),
        ({"nothing*": 0.5}, "fits the name of no gated layer"),
        (True, "True"),
    ):
        with pytest.raises(ThriftyError, match=message):
            engine.set_density(density)  # type: ignore[arg-type]
    dense = Builder((1, 2, 2))
    dense.conv(0, 2)
    with pytest.raises(ThriftyError, match="no gated layer"):
        Engine(dense.build()).set_density(0.5)


def test_trace_tells_each_layer() -> None:
    program = network()
    engine = Engine(program, 2)
    trace = engine.trace(images(program, 3))
    assert [layer.name for layer in trace.layers] == [operator.name for operator in program.operators]
    assert (trace.macs == sum(layer.macs + layer.gate_macs for layer in trace.layers)).all()
    assert trace.ms >= sum(layer.ms for layer in trace.layers) > 0
    assert all(layer.ms >= layer.gate_ms >= 0 for layer in trace.layers)
    assert {layer.name for layer in trace.layers if layer.gate_ms} == set(program.gated)
    text = str(trace)
    assert all(operator.name in text for operator in program.operators)
    assert "gates included" in text


def test_decisions_that_do_not_fit_are_named() -> None:
    program = network()
    engine = Engine(program)
    x = images(program, 2)
    good = random_decisions(program, 2)
    for decisions, message in (
        ({"conv0": good["conv1"]}, "no gated layer"),
        ({"conv1": Decision(channels=np.ones((3, 32), bool))}, r"\[3, 32\], but must be bool \[2, 32\]"),
        ({"conv1": Decision(layer=np.ones(2, bool))}, "says layer, but its gate decides on channels"),
        ({"conv1": 5}, "must be a mapping"),
        ([1], "must be a mapping"),
    ):
        with pytest.raises(ThriftyError, match=message):
            engine.trace(x, decisions)


@pytest.mark.parametrize("threads", [0, -1, 257, 1.5, True])
def test_numbers_of_threads_out_of_range(threads: Any) -> None:
    with pytest.raises(ThriftyError, match="threads is"):
        Engine(network(), threads)


def _with_isa(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=os.environ | {"THRIFTY_ISA": isa}, capture_output=True, text=True,
        timeout=1200, check=False, cwd=os.path.dirname(os.path.dirname(__file__)),
    )  # fmt: skip


@pytest.mark.skipif("THRIFTY_ISA" in os.environ, reason="one instruction set was chosen from outside")
@pytest.mark.parametrize("isa", [isa for isa in features()["available"] if isa != features()["isa"]])
def test_other_instruction_sets_pass_too(isa: str) -> None:
    here = os.path.dirname(__file__)
    parts = ("engine_operators", "engine_gates", "engine_calls", "conv_kernels", "column_kernels", "outer_kernel")
    files = [os.path.join(here, f"test_{part}.py") for part in parts]
    alone = ["--noconftest"] if features()["sanitized"] else []  # there is no torch
    done = _with_isa(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *alone, *files)
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_instruction_set_is_an_error() -> None:
    code = "from thrifty import _native\ntry: _native.features()\nexcept RuntimeError as e: print(e)"
    done = _with_isa("mmx", "-c", code)
    assert done.stdout.startswith("THRIFTY_ISA is 'mmx', but this CPU and this build of thrifty can run: generic"), done
    done = _with_isa("generic", "-c", "from thrifty import _native; print(_native.features()['isa'])")
    assert done.stdout.strip() == "generic"
