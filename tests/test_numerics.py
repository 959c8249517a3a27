"""What must hold on whole networks: the shipped dynamic models, on the shipped photographs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

import thrifty
from thrifty.data.files import SAMPLE, listing, normalised, read_files
from thrifty.decision import Decision
from thrifty.engine import Engine, Trace
from thrifty.program import FILL_ZEROS, Operator, Program
from thrifty.reference import run_reference
from thrifty.zoo.programs import read_program

NAMES = ("resnet20-cifar10-fbs", "mcifarnet-cifar10-fbs")
TINY = np.finfo(np.float32).tiny

both = pytest.mark.parametrize("name", NAMES)


@cache
def program_of(name: str) -> Program:
    return read_program(name)


@cache
def pixels(count: int) -> Any:
    """uint8 [count, 32, 32, 3], of all classes."""
    paths = listing(SAMPLE)[0]
    return read_files(paths[:: len(paths) // count][:count], 32)


def photographs(program: Program, count: int) -> Any:
    """Normalised, float32 [count, 3, 32, 32]."""
    assert program.preprocessing is not None
    return normalised(pixels(count), program.preprocessing.mean, program.preprocessing.std)


def engine_of(name: str, density: float | None, threads: int = 1) -> Engine:
    """At this density, or at the one it was trained with."""
    engine = Engine(program_of(name), threads)
    if density is not None:
        engine.set_density(density)
    return engine


def with_tensors(program: Program, change: Callable[[str, Any], Any]) -> Program:
    """The program with `change(name, copy)` in place of each tensor."""
    return dataclasses.replace(program, tensors={name: change(name, t.copy()) for name, t in program.tensors.items()})


def error(found: Any, wanted: Any) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def activities(program: Program, decisions: Mapping[str, Decision], image: int) -> list[Any]:
    """For each buffer, which of its channels one image leaves other than zero."""
    active = [np.ones(shape[0], bool) for shape in program.buffers]
    for operator in program.operators:
        read = [active[i] for i in operator.inputs]
        assert operator.activation not in FILL_ZEROS
        if operator.kind == "conv":
            if operator.gated:
                computed = np.asarray(decisions[operator.name].channels[image])
                active[operator.output] = computed | read[1] if len(read) > 1 else computed
        elif operator.kind == "gather":
            index = program.tensor(operator, "index")
            active[operator.output] = (index >= 0) & read[0][index]
        elif operator.kind in {"max_pool", "adaptive_avg_pool"}:
            active[operator.output] = read[0]
        else:
            assert operator.kind == "linear", "this network has a kind that is not thought of here"
    return active


# ------------------------------------------------------------------------------------------------- what is skipped


@both
@pytest.mark.parametrize("density", [None, 0.25])
def test_poison_in_what_is_skipped_changes_no_bit(name: str, density: float | None) -> None:
    engine = engine_of(name, density)
    program, x = engine.program, photographs(engine.program, 4)
    clean = engine.trace(x)
    shares = []
    for image in range(len(x)):
        active = activities(program, clean.decisions, image)
        places: dict[str, Any] = {}  # what may be read of each tensor that is poisoned
        for operator in program.operators:
            if operator.kind not in {"conv", "linear"}:
                continue
            assert operator.attributes.get("groups", 1) == 1
            read = active[operator.inputs[0]]
            made = np.ones(program.buffers[operator.output][0], bool)
            if operator.gated:
                made = np.asarray(clean.decisions[operator.name].channels[image])
                places[operator.tensors["gate_weight"]] = np.broadcast_to(read, (len(made), len(read)))
            places[operator.tensors["bias"]] = made
            places[operator.tensors["weight"]] = np.outer(made, read)

        def poison(tensor: str, value: Any, places: Mapping[str, Any] = places) -> Any:
            if tensor in places:
                value[~places[tensor]] = np.nan
            return value

        poisoned = with_tensors(program, poison)
        other = Engine(poisoned)
        other(x[image - 1][None])  # takes memory, which then holds nothing but poison
        other._native.fill_memory(float("nan"))
        found = other.trace(x[image : image + 1])
        assert found.output.tobytes() == clean.output[image].tobytes()
        for layer, decision in found.decisions.items():
            np.testing.assert_array_equal(decision.channels[0], clean.decisions[layer].channels[image])
        for layer in found.layers:  # and what is left is what was executed
            if layer.macs[0]:
                operator = next(o for o in program.operators if o.name == layer.name)
                left = int(np.isfinite(poisoned.tensor(operator, "weight")).sum())
                _, height, width = program.buffers[operator.output]
                assert layer.macs[0] == left * height * width, layer.name
        weights = [value for key, value in poisoned.tensors.items() if key.endswith(".weight")]
        shares.append(sum(np.isnan(value).sum() for value in weights) / sum(value.size for value in weights))
    assert min(shares) > 0.3


@both
def test_skipped_channels_are_exactly_zero(name: str) -> None:
    program = program_of(name)
    x = photographs(program, 3)
    seen = 0
    for layer, place in program.gated.items():
        operator = program.operators[place]
        cut = dataclasses.replace(program, output=operator.output, flat=False, classes=())
        trace = Engine(cut).trace(x)
        for image in range(len(x)):
            active = activities(program, trace.decisions, image)[operator.output]
            assert not trace.output[image][~active].any(), layer
            assert trace.output[image][active].any(), layer
            seen += int((~active).sum())
    assert seen > 0


# --------------------------------------------------------------------------------------------------------- counting


@both
@pytest.mark.parametrize("density", [None, 0.5, 0.3])
def test_executed_are_the_macs_that_are_counted(name: str, density: float | None) -> None:
    torch = pytest.importorskip("torch")
    model = thrifty.zoo.load(name)
    if density is not None:
        model.set_density(density)
    program = program_of(name)
    x = photographs(program, 6)
    counted = thrifty.count_macs(model, torch.from_numpy(x))
    trace = Engine(program).trace(x, thrifty.decisions(model, torch.from_numpy(x)))
    executed = {layer.name: layer for layer in trace.layers}
    assert set(counted.layers) == set(program.macs())
    assert set(counted.gates) == set(program.gated)
    for layer, macs in counted.layers.items():
        assert executed[layer].macs.tolist() == macs.tolist(), layer
    for layer, macs in counted.gates.items():
        assert executed[layer].gate_macs.tolist() == macs.tolist(), layer
    assert trace.macs.tolist() == counted.total.tolist()
    dense = sum(program.macs().values()) + sum(program.gate_macs().values())
    assert trace.macs.max() < dense


# ---------------------------------------------------------------------------------------------------------- batches


@both
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_batch_is_its_photographs_in_any_order(name: str, threads: int) -> None:
    single = Engine(program_of(name))
    x = pixels(9)
    each = [single(image[None]) for image in x]
    wanted = np.concatenate(each)
    assert len({answer.tobytes() for answer in each}) == len(x)
    engine = Engine(program_of(name), threads)
    random = np.random.default_rng(threads)
    for count in (1, 2, 5, 8, 9):
        for order in (np.arange(9), random.permutation(9), random.integers(0, 9, 9)):
            assert engine(x[order[:count]]).tobytes() == wanted[order[:count]].tobytes(), (count, order)
    assert engine.trace(x).output.tobytes() == wanted.tobytes()


# ----------------------------------------------------------------------------------------------------------- parity


@both
def test_forced_to_the_same_decisions_the_reference_answers_the_same(name: str) -> None:
    engine = engine_of(name, None)
    program, x = engine.program, photographs(engine.program, 3)
    free = engine.trace(x)
    wanted = run_reference(program, x, free.decisions)
    assert error(free.output, wanted.output) <= 1e-5
    random = np.random.default_rng(0)
    other = {  # decisions that no gate would make, among them none and all
        layer: Decision(channels=random.random(decision.channels.shape) < [[0.0], [0.5], [1.0]])
        for layer, decision in free.decisions.items()
    }
    wanted = run_reference(program, x, other)
    trace = engine.trace(x, other)
    assert error(trace.output[1:], wanted.output[1:]) <= 1e-5
    assert error(trace.output[0], wanted.output[0]) <= 1e-5
    assert_same_macs(trace, wanted.macs)


def assert_same_macs(trace: Trace, wanted: Mapping[str, Any]) -> None:
    for layer in trace.layers:
        if layer.name in wanted:
            assert layer.macs.tolist() == wanted[layer.name].tolist(), layer.name


@both
def test_running_free_torch_decides_the_same(name: str, report_parity: Callable[[str, str], None]) -> None:
    torch = pytest.importorskip("torch")
    program = program_of(name)
    x = photographs(program, 100)
    model = thrifty.zoo.load(name)
    decided = thrifty.decisions(model, torch.from_numpy(x))
    trace = Engine(program).trace(x)
    assert set(decided) == set(trace.decisions)
    same = np.concatenate(
        [(decided[layer].channels.numpy() == trace.decisions[layer].channels).ravel() for layer in decided]
    )
    report_parity(f"{name}, running free", f"{same.mean():.4%} of {same.size:,} decisions are torch's")
    assert same.mean() >= 0.99
    with torch.no_grad():
        wanted = model(torch.from_numpy(x)).numpy()
    assert (wanted.argmax(1) == trace.output.argmax(1)).mean() >= 0.99


# ------------------------------------------------------------------------------------------------------------- ties


@both
@pytest.mark.parametrize("density", [None, 0.3])
def test_ties_go_to_the_lowest_index_everywhere(name: str, density: float | None) -> None:
    """Saliencies of a few values only, the same for every photograph: nearly every gate has a tie at its bar."""
    torch = pytest.importorskip("torch")
    onnxruntime = pytest.importorskip("onnxruntime")
    from thrifty.onnx_export import to_onnx

    model = thrifty.zoo.load(name)
    if density is not None:
        model.set_density(density)
    with torch.no_grad():
        for gate in model.gates().values():
            gate.predictor.weight.zero_()
            gate.predictor.bias.copy_((gate.predictor.bias * 2).round().clamp(min=0) / 2)
    x = photographs(program_of(name), 2)
    program = thrifty.lower(model, torch.from_numpy(x))
    deciders = {
        "torch": thrifty.decisions(model, torch.from_numpy(x)),
        "engine": Engine(program).trace(x).decisions,
        "reference": run_reference(program, x[:1]).decisions,
    }
    ties = 0
    for layer, place in program.gated.items():
        operator = program.operators[place]
        rho, k = program.tensor(operator, "gate_bias"), operator.attributes["winners"]
        ranked = sorted(range(len(rho)), key=lambda c: (-rho[c], c))
        wanted = sorted(ranked[:k])
        ties += int(k < len(rho) and rho[ranked[k - 1]] == rho[ranked[k]])
        for who, decisions in deciders.items():
            for row in np.asarray(decisions[layer].channels):
                assert np.flatnonzero(row).tolist() == wanted, (who, layer)
    assert ties >= len(program.gated) // 2
    session = onnxruntime.InferenceSession(to_onnx(program).SerializeToString(), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"input": x})
    assert error(answer, Engine(program)(x)) <= 1e-4
    reverse = {  # the highest indices instead: an answer that could be told from the right one
        layer: Decision(channels=np.tile(_highest(program, program.operators[place]), (2, 1)))
        for layer, place in program.gated.items()
    }
    assert error(answer, Engine(program).trace(x, reverse).output) > 1e-2


def _highest(program: Program, operator: Operator) -> Any:
    """bool [O]: the winners if ties went to the highest index."""
    rho, k = program.tensor(operator, "gate_bias"), operator.attributes["winners"]
    row = np.zeros(len(rho), bool)
    row[sorted(range(len(rho)), key=lambda c: (-rho[c], -c))[:k]] = True
    return row


# -------------------------------------------------------------------------------------------------------- denormals


def _weights(program: Program, kind: str = "weight") -> list[str]:
    """Names of the weights of convolutions after the first, in the order of execution."""
    return [o.tensors[kind] for o in program.operators if o.kind == "conv" and kind in o.tensors][1:]


@both
def test_denormal_weights_count_as_zero(name: str) -> None:
    program = program_of(name)
    x = photographs(program, 2)
    denormal = set(_weights(program)[::3])

    def tiny(tensor: str, value: Any) -> Any:
        # The sum of a whole filter stays denormal, for transforms of weights.
        return value / np.abs(value).max() * (TINY / 64) if tensor in denormal else value

    def zero(tensor: str, value: Any) -> Any:
        return value * 0 if tensor in denormal else value

    small, none = with_tensors(program, tiny), with_tensors(program, zero)
    assert all((np.abs(small.tensors[tensor]) < TINY).all() and small.tensors[tensor].any() for tensor in denormal)
    found, wanted = Engine(small).trace(x), Engine(none).trace(x)
    np.testing.assert_array_equal(found.output, wanted.output)
    assert {layer: d.channels.tolist() for layer, d in found.decisions.items()} == {
        layer: d.channels.tolist() for layer, d in wanted.decisions.items()
    }


@both
def test_denormal_values_take_no_longer(name: str) -> None:
    """Each layer's values are its input's times 1e-20: they fade into the denormal range, where zero remains."""
    program = program_of(name)
    x = photographs(program, 1)
    weights, biases = set(_weights(program)), set(_weights(program, "bias"))

    def fade(tensor: str, value: Any) -> Any:
        if tensor in weights:
            return value * np.float32(1e-20)
        return value * 0 if tensor in biases else value

    normal, fading = Engine(program), Engine(with_tensors(program, fade))
    times: dict[Engine, list[float]] = {normal: [], fading: []}
    for _ in range(15):
        for engine, found in times.items():
            start = time.perf_counter()
            engine(x)
            found.append(time.perf_counter() - start)
    assert min(times[fading]) <= 3 * min(times[normal])
    trace = fading.trace(x)
    assert np.isfinite(trace.output).all()
    assert not (np.abs(trace.output[trace.output != 0]) < TINY).any()
