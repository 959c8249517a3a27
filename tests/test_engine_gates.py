"""Gates in the engine: what they decide when left free, at ties, and that nothing is read of what they skip."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from random_programs import Builder, random_decisions, random_program
from test_engine_operators import assert_agrees, assert_same_decisions

from thrifty.decision import Decision
from thrifty.density import kept
from thrifty.engine import Engine, load
from thrifty.errors import ThriftyError
from thrifty.program import Program
from thrifty.reference import run_reference

NAN = float("nan")
GEOMETRIES: tuple[dict[str, Any], ...] = (
    {},
    {"stride": (2, 2)},
    {"stride": (3, 1), "padding": (0, 2, 1, 0)},
    {"dilation": (2, 1), "padding": (2, 2, 0, 3)},
    {"groups": 3},
    {"groups": 6, "stride": (2, 1)},
    {"padding": (0, 0, 0, 0)},
)


def random_images(program: Program, count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, *program.buffers[0])).astype(np.float32)


def network(size: int = 20) -> Program:
    """All gates, large enough that every thread gets tasks of most operators."""
    b = Builder((3, size, size), 1)
    pixels = size * size
    x = b.conv(0, 32, kernel=3, activation="relu")
    y = b.conv(x, 32, kernel=3, threshold=0.3, activation="relu")
    y = b.conv(y, 32, kernel=3, kept=(20, pixels // 2), residual=x, activation="relu")
    for _ in range(3):
        gate = b.layer_gate(y, 0.2)
        with b.guarded(gate):
            z = b.conv(y, 32, kernel=3, threshold=0.4, activation="relu")
            y = b.conv(z, 32, kernel=3, kept=(16, pixels), residual=y, scaled=1, activation="relu")
    y = b.conv(y, 48, kernel=3, kept=(32, pixels // 3), stride=(2, 2), activation="silu")
    y = b.conv(y, 40, kept=(30, pixels // 8))
    y = b.add("adaptive_avg_pool", (y,), (40, 1, 1))
    b.linear(y, 10)
    return b.build()


def poisoned(program: Program, places: dict[str, Any]) -> Program:
    """NaN where `places` [name of a tensor] is True."""
    tensors = {name: value.copy() for name, value in program.tensors.items()}
    for name, place in places.items():
        tensors[name][place] = np.nan
    return dataclasses.replace(program, tensors=tensors)


# --------------------------------------------------------------------------------------------------------- left free


def _clear(saliency: Any, chosen: Any, threshold: float | None) -> bool:
    """Whether rounding cannot change what is chosen of one image."""
    saliency, chosen = saliency.ravel(), chosen.ravel()
    if threshold is not None:
        return bool(np.abs(saliency - threshold).min() > 1e-5)
    return bool(chosen.all() or saliency[chosen].min() - saliency[~chosen].max() > 1e-5 * saliency.max())


@pytest.mark.parametrize("gate", ["topk", "clip", "attention", "layer_gate"])
def test_left_free_a_gate_chooses_as_the_reference_does(gate: str) -> None:
    clear = total = 0
    for seed in range(25):
        b = Builder((0, 0, 0), seed)
        integers = b.random.integers
        b.buffers[0] = (int(integers(1, 20)), int(integers(1, 16)), int(integers(1, 16)))
        channels, height, width = b.buffers[0]
        outputs = int(integers(1, 20))
        if gate == "topk":
            b.conv(0, outputs, 3, winners=int(integers(1, outputs + 1)))
        elif gate == "clip":
            b.conv(0, outputs, 3, threshold=float(b.random.random()))
        elif gate == "attention":
            b.conv(0, outputs, 3, kept=(int(integers(1, channels + 1)), int(integers(1, height * width + 1))))
        else:
            with b.guarded(b.layer_gate(0, float(b.random.random()))):
                b.conv(0, outputs, 3)
        program = b.build()
        x = random_images(program, 3, seed)
        wanted, found = run_reference(program, x), Engine(program).trace(x)
        (name,) = program.gated
        for axis, saliency in wanted.saliencies[name].items():
            decided, chosen = getattr(found.decisions[name], axis), getattr(wanted.decisions[name], axis)
            threshold = program.operators[0].attributes.get("threshold")
            for image in range(3):
                total += 1
                if _clear(saliency[image], chosen[image], threshold):  # type: ignore[arg-type]
                    np.testing.assert_array_equal(decided[image], chosen[image])
                    clear += 1
        if clear == total:
            assert np.abs(found.output - wanted.output).max() <= 1e-5 * max(1e-3, np.abs(wanted.output).max())
    assert clear >= 0.9 * total > 0


def test_what_a_threshold_says_at_its_value_and_at_the_ends() -> None:
    b = Builder((1, 1, 1))
    b.conv(0, 6, threshold=0.25)
    b.layer_gate(0, 0.25)
    b.add("affine", (0,), (1, 1, 1), scale=np.ones(1, np.float32))
    b.operators[-1] = dataclasses.replace(b.operators[-1], guard=2)
    ones = np.ones((1, 1, 1, 1), np.float32)

    def decided(scores: list[float], layer: float) -> tuple[list[int], bool]:
        tensors = dict(b.build().tensors)
        tensors["conv0.gate_weight"] = np.zeros((6, 1), np.float32)
        tensors["conv0.gate_bias"] = np.array(scores, np.float32)
        tensors["layer_gate1.weight"] = np.zeros((1, 1), np.float32)
        tensors["layer_gate1.bias"] = np.array([layer], np.float32)
        program = dataclasses.replace(b.build(), tensors=tensors)
        trace = Engine(program).trace(ones)
        assert_same_decisions(trace.decisions, run_reference(program, ones).decisions)
        assert trace.output.ravel().tolist() == [1.0 if trace.decisions["layer_gate1"].layer[0] else 0.0]
        return np.flatnonzero(trace.decisions["conv0"].channels).tolist(), bool(trace.decisions["layer_gate1"].layer[0])

    assert decided([0.25, 0.2500001, 0, -3, 7, NAN], 0.25) == ([1, 4], False)
    assert decided([0.3, np.inf, -np.inf, 1, 0.2, 0.24], 0.3) == ([0, 1, 3], True)
    assert decided([0] * 6, NAN) == ([], False)
    assert decided([1] * 6, 5) == ([0, 1, 2, 3, 4, 5], True)


def test_attention_gives_ties_to_the_lowest_index_and_nan_comes_last() -> None:
    b = Builder((6, 3, 4))
    b.conv(0, 2, kernel=3, kept=(3, 5))
    program = b.build()

    def decided(x: Any) -> tuple[list[int], list[int]]:
        (decision,) = Engine(program).trace(x).decisions.values()
        assert_same_decisions({"conv0": decision}, run_reference(program, x).decisions)
        return np.flatnonzero(decision.channels).tolist(), np.flatnonzero(decision.columns).tolist()

    x = np.ones((1, 6, 3, 4), np.float32)
    x[:, ::2] = -1  # the magnitude counts
    assert decided(x) == ([0, 1, 2], [0, 1, 2, 3, 4])
    assert decided(x * 0) == ([0, 1, 2], [0, 1, 2, 3, 4])
    x[:, 4:] = 2
    assert decided(x)[0] == [0, 4, 5]
    x[:, :, 2, 3] *= 2
    assert decided(x)[1] == [0, 1, 2, 3, 11]
    x[0, 4, 0, 0] = NAN
    assert decided(x) == ([0, 1, 5], [1, 2, 3, 4, 11])
    assert decided(x * NAN) == ([0, 1, 2], [0, 1, 2, 3, 4])


def test_what_a_producer_skipped_is_least_attended_and_never_read() -> None:
    for seed in range(10):
        b = Builder((4, 6, 6), seed)
        y = b.conv(0, 12, winners=3)
        b.conv(y, 5, kernel=3, kept=(8, 20 if seed % 2 else 36))
        program = b.build()
        x = random_images(program, 2, seed)
        trace = Engine(program).trace(x)
        made, read = (trace.decisions[f"conv{i}"].channels for i in (0, 1))
        assert (read.sum(1) == 8).all()
        assert (read & made == made).all()
        wanted = run_reference(program, x, trace.decisions)
        assert trace.layers[1].macs.tolist() == wanted.macs["conv1"].tolist()
        if seed % 2 == 0:
            assert trace.layers[1].macs.tolist() == [3 * 5 * 9 * 36] * 2
        for image in range(2):
            both = (made & read)[image]
            bad = Engine(poisoned(program, {"conv1.weight": np.broadcast_to(~both[:, None, None], (5, 12, 3, 3))}))
            assert bad.trace(x[image : image + 1]).output.tobytes() == trace.output[image].tobytes()


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: "-".join(geometry) or "plain")
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_attention_over_geometries(geometry: dict[str, Any], kernel: int) -> None:
    for seed, size in enumerate(((7, 9), (16, 5), (4, 33))):
        for residual in (False, True):
            b = Builder((6, *size), seed)
            pixels = size[0] * size[1]
            gate = b.layer_gate(0)
            x = b.conv(0, 6, winners=4) if seed else 0
            same = b.conv(x, 12, kernel, **geometry)
            with b.guarded(gate):
                kept_columns = (1, pixels, pixels // 2)[seed]
                b.conv(
                    x, 12, kernel, kept=((6, 3, 1)[seed], kept_columns), activation="relu", scaled=1,
                    residual=same if residual else None, **geometry,
                )  # fmt: skip
            program = b.build()
            x_ = random_images(program, 2, seed)
            decisions = random_decisions(program, 2, seed)
            decisions["layer_gate0"] = Decision(layer=np.array([True, bool(seed)]))
            assert_agrees(program, x_, decisions)


@pytest.mark.parametrize("axes", ["channels", "columns", "both"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: "-".join(geometry) or "plain")
def test_values_that_are_pruned_are_not_read(geometry: dict[str, Any], axes: str) -> None:
    for seed, kernel in enumerate((1, 3, 3)):
        b = Builder((6, 9, 10), seed)
        b.conv(0, 12, kernel, kept=(6 if axes == "columns" else 3, 90 if axes == "channels" else 30), **geometry)
        program = b.build()
        x = random_images(program, 2, seed)
        decisions = random_decisions(program, 2, seed)
        decision = decisions["conv0"]
        clean = Engine(program).trace(x, decisions).output
        for wrong in (NAN, np.inf, -1e30):
            bad = x.copy()
            if decision.channels is not None:
                bad[~decision.channels] = wrong
            if decision.columns is not None:
                bad[np.broadcast_to(~decision.columns[:, None], bad.shape)] = wrong
            with np.errstate(all="ignore"):
                found = Engine(program, 1 + seed).trace(bad, decisions).output
            assert np.isfinite(found).all()
            assert found.tobytes() == clean.tobytes()


def test_an_axis_that_is_kept_whole_is_not_decided() -> None:
    b = Builder((4, 5, 5))
    b.conv(0, 3, kept=(4, 25))
    engine = Engine(b.build())
    x = random_images(b.build(), 2)
    whole = engine.trace(x)
    assert whole.decisions == {"conv0": Decision()}
    assert whole.layers[0].gate_macs.tolist() == [0, 0]
    assert engine.trace(x, whole.decisions).output.tobytes() == whole.output.tobytes()
    for decision, message in (
        (Decision(columns=np.ones((2, 5, 5), bool)), "says columns, but its gate decides on nothing"),
        (Decision(layer=np.ones(2, bool)), "says layer"),
    ):
        with pytest.raises(ThriftyError, match=message):
            engine.trace(x, {"conv0": decision})
        with pytest.raises(ThriftyError, match=message):
            run_reference(b.build(), x, {"conv0": decision})
    engine.set_density(columns=0.5)
    trace = engine.trace(x)
    assert trace.decisions["conv0"].columns.sum((1, 2)).tolist() == [13, 13]
    assert trace.decisions["conv0"].channels is None
    assert trace.layers[0].gate_macs.tolist() == [100, 100]
    channels = Decision(channels=np.ones((2, 4), bool))
    with pytest.raises(ThriftyError, match="decides on columns"):
        engine.trace(x, {"conv0": channels})
    engine.set_density(0.5, 1.0)
    assert engine.trace(x, {"conv0": channels}).output.tobytes() == whole.output.tobytes()


def test_one_axis_may_be_forced() -> None:
    b = Builder((4, 5, 5))
    b.conv(0, 3, kept=(2, 9))
    program = b.build()
    x = random_images(program, 2)
    own = Engine(program).trace(x).decisions["conv0"]
    forced = Decision(channels=~own.channels)
    trace = Engine(program).trace(x, {"conv0": forced})
    assert (trace.decisions["conv0"].channels == ~own.channels).all()
    assert (trace.decisions["conv0"].columns == own.columns).all()
    wanted = run_reference(program, x, {"conv0": forced})
    assert_same_decisions(trace.decisions, wanted.decisions)


# -------------------------------------------------------------------------------------------------------------- guards


def test_weights_that_are_skipped_are_not_touched() -> None:
    counted: Counter[str] = Counter()
    for seed in range(40):
        program = random_program(seed, 10)
        x = random_images(program, 1, seed)
        decisions = random_decisions(program, 1, seed)
        trace = Engine(program).trace(x, decisions)
        runs = dict.fromkeys(range(len(program.buffers)), True)
        places: dict[str, Any] = {}
        for operator in program.operators:
            if operator.kind == "layer_gate":
                runs[operator.output] = bool(trace.decisions[operator.name].layer[0])
            if operator.guard is not None and not runs[operator.guard]:
                skipped = {name for role, name in operator.tensors.items() if role != "index"}
                places |= {name: np.ones(program.tensors[name].shape, bool) for name in skipped}
                counted["layer"] += len(skipped)
            elif operator.gate in {"topk", "clip"}:
                off = ~trace.decisions[operator.name].channels[0]
                places[operator.tensors["weight"]] = np.broadcast_to(
                    off[:, None, None, None], program.tensor(operator, "weight").shape
                )
                places[operator.tensors["bias"]] = off
                counted[operator.gate] += int(off.sum())
            elif operator.gate == "attention" and trace.decisions[operator.name].channels is not None:
                off = ~trace.decisions[operator.name].channels[0]
                weight = program.tensor(operator, "weight")
                groups = int(operator.attributes.get("groups", 1))  # type: ignore[arg-type]
                per_group = np.repeat(off.reshape(groups, -1), len(weight) // groups, axis=0)
                places[operator.tensors["weight"]] = np.broadcast_to(per_group[:, :, None, None], weight.shape)
                counted["attention"] += int(off.sum())
        engine = Engine(poisoned(program, places))
        engine.trace(x, decisions)
        engine._native.fill_memory(NAN)
        assert engine.trace(x, decisions).output.tobytes() == trace.output.tobytes(), seed
    assert min(counted[what] for what in ("layer", "topk", "clip", "attention")) > 5


@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_block_that_does_not_run_leaves_its_shortcut(activation: str, sparse: bool) -> None:
    b = Builder((4, 5, 5), 3)
    x = b.conv(0, 4, winners=2) if sparse else b.conv(0, 4)
    gate = b.layer_gate(x)
    with b.guarded(gate):
        y = b.conv(x, 8, kernel=3, threshold=0.2, activation="sigmoid")
        z = b.conv(y, 4, kernel=3, residual=x, scaled=1, activation=activation)
        b.conv(y, 4, kernel=3, activation="sigmoid")
    b.conv(z, 3, kernel=3)
    program = b.build()
    images = random_images(program, 2)
    decisions = {f"layer_gate{gate - 1}": Decision(layer=np.array([False, True]))}
    for output in range(1, len(program.buffers)):
        cut = dataclasses.replace(program, output=output, flat=False)
        free = Engine(cut).trace(images, decisions)
        assert_agrees(cut, images, free.decisions)
    skipped = {operator.name for operator in program.operators if operator.guard is not None}
    for layer in free.layers:
        if layer.name in skipped:
            assert (layer.macs[0], layer.gate_macs[0]) == (0, 0)
            assert layer.macs[1] > 0
    assert not free.decisions["conv2"].channels[0].any()
    hidden = dataclasses.replace(program, output=y, flat=False)
    assert not Engine(hidden).trace(images, decisions).output[0].any()


# --------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_batch_is_its_images_bit_for_bit(threads: int) -> None:
    for program in (network(), random_program(5), random_program(17), random_program(23)):
        x = random_images(program, 9)
        single = Engine(program)
        wanted = np.concatenate([single(image[None]) for image in x])
        engine = Engine(program, threads)
        for count in (1, 2, 7, 9):
            assert engine(x[:count]).tobytes() == wanted[:count].tobytes()
        assert engine(x[::-1]).tobytes() == wanted[::-1].tobytes()
        assert engine.trace(x).output.tobytes() == wanted.tobytes()
        engine._native.fill_memory(NAN)
        assert engine(x).tobytes() == wanted.tobytes()


def test_the_network_agrees_and_its_gates_do_decide() -> None:
    program = network()
    x = random_images(program, 6)
    free = Engine(program).trace(x)
    assert_agrees(program, x, free.decisions)
    layers = np.array([free.decisions[name].layer for name in program.gated if name.startswith("layer_gate")])
    assert 0 < layers.mean() < 1
    assert "x" in str(free)


def test_densities_and_thresholds_are_set_at_run_time(tmp_path: Any) -> None:
    program = network()
    engine = Engine(program, 2)
    x = random_images(program, 3)
    engine.set_density(0.25, columns=0.5)
    for name, decision in engine.trace(x).decisions.items():
        operator = program.operators[program.gated[name]]
        if operator.gate == "attention":
            channels, height, width = program.buffers[operator.inputs[0]]
            ran = np.ones(3, bool) if operator.guard is None else decision.channels.any(1)
            assert (decision.channels.sum(1)[ran] == kept(0.25, channels)).all()
            assert (decision.columns.sum((1, 2))[ran] == kept(0.5, height * width)).all()
    assert engine.density == pytest.approx(0.25, abs=0.02)
    engine.set_threshold({"layer_gate3": 0.99, "conv*": 0.7})
    changed = engine.program
    thresholds = {o.name: o.attributes["threshold"] for o in changed.operators if "threshold" in o.attributes}
    assert thresholds["layer_gate3"] == 0.99
    assert {value for name, value in thresholds.items() if name.startswith("conv")} == {0.7}
    assert {value for name, value in thresholds.items() if name.startswith("layer_gate")} == {0.99, 0.2}
    engine.save(tmp_path / "m.thrifty")
    answer = engine(x).tobytes()
    assert load(tmp_path / "m.thrifty")(x).tobytes() == answer == Engine(changed)(x).tobytes()
    assert answer != Engine(program)(x).tobytes()
    engine.set_threshold(0)
    engine.set_density(columns=1.0)
    assert all(d.columns is None for d in engine.trace(x).decisions.values())
    for call, message in (
        (lambda: engine.set_threshold(1.0), r"threshold is 1.0, but must be a number in \[0, 1\)"),
        (lambda: engine.set_threshold(NAN), "threshold is nan"),
        (lambda: engine.set_threshold({"nothing*": 0.5}), "threshold names 'nothing"),
        (lambda: engine.set_density(columns=0), "must be a number"),
        (lambda: engine.set_density({"layer_gate*": 0.5}), "fits the name of no gated layer"),
        (lambda: engine.set_density(0.5, {"nothing": 0.5}), "fits the name of no gated layer"),
    ):
        before = engine(x).tobytes()
        with pytest.raises(ThriftyError, match=message):
            call()
        assert engine(x).tobytes() == before
    dense, fbs = Builder((1, 2, 2)), Builder((1, 2, 2))
    dense.conv(0, 2)
    fbs.conv(0, 2, winners=1)
    with pytest.raises(ThriftyError, match="no gated layer whose threshold"):
        Engine(fbs.build()).set_threshold(0.5)
    with pytest.raises(ThriftyError, match="no gated layer whose density of columns"):
        Engine(fbs.build()).set_density(0.5, 0.5)
    with pytest.raises(ThriftyError, match="no gated layer whose density"):
        Engine(dense.build()).set_density(0.5)


def test_the_native_setter_checks_what_it_is_given() -> None:
    program = network()
    native = Engine(program)._native
    clip, attention = program.gated["conv1"], program.gated["conv2"]
    assert native.settings()[attention] == {"kept_channels": 20, "kept_columns": 200}
    for place, name, value in (
        (attention, "winners", 3), (attention, "kept_channels", 0), (attention, "kept_channels", 33),
        (attention, "kept_columns", 1.5), (attention, "kept_columns", 401), (attention, "kept_columns", NAN),
        (clip, "threshold", 1), (clip, "threshold", -0.1), (clip, "threshold", NAN), (clip, "kept_columns", 1),
        (0, "winners", 1), (-1, "winners", 1), (99, "winners", 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"\.$"):
            native.set([(clip, "threshold", 0.5), (place, name, value)])  # neither is made
    for wrong in (3, [3], [(attention, "kept_channels")], [(True, "kept_channels", 3)], [(attention, 3, 3)]):
        with pytest.raises(ValueError, match=r"\.$"):
            native.set(wrong)
    assert native.settings()[attention] == {"kept_channels": 20, "kept_columns": 200}
    assert native.settings()[clip] == {"threshold": 0.3}


def test_calls_see_all_of_a_change_or_nothing() -> None:
    """What is set while others call: every answer is that of one whole setting, also while a budget is looked for."""
    program = network()
    engine, x = Engine(program), random_images(program, 1)
    engine.set_density(0.25, columns=0.25)
    low = engine(x).tobytes()
    engine.set_density(1.0, columns=1.0)
    high = engine(x).tobytes()
    assert low != high
    answers: set[bytes] = set()
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            answers.add(engine(x).tobytes())

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        for _ in range(200):
            engine.set_density(0.25, columns=0.25)
            engine.set_density(1.0, columns=1.0)
        for _ in range(5):
            with pytest.raises(ThriftyError, match="at least"):
                engine.set_budget(1e-4, x)
    finally:
        done.set()
        for caller in callers:
            caller.join()
    assert answers <= {low, high}
