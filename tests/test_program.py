"""Programs: what is valid, what is printed, how long buffers live."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from random_programs import Builder

from thrifty.errors import ProgramError
from thrifty.program import Operator, Preprocessing, Program


def small_program(**changes: Any) -> Program:
    """A gated convolution, a second one that adds the first's output, pooling and a linear layer."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {
        "a.weight": array(4, 3, 3, 3), "a.bias": array(4), "a.gate_weight": array(4, 3), "a.gate_bias": array(4),
        "b.weight": array(4, 4, 3, 3), "b.bias": array(4), "fc.weight": array(5, 4), "fc.bias": array(5),
    }  # fmt: skip
    conv = {"stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1, "activation": "relu"}
    roles = ("weight", "bias", "gate_weight", "gate_bias")
    parts: dict[str, Any] = {
        "buffers": ((3, 6, 6), (4, 6, 6), (4, 6, 6), (4, 1, 1), (5, 1, 1)),
        "operators": (
            Operator(
                "conv", "a", (0,), 1, {**conv, "gate": "topk", "winners": 2}, {role: f"a.{role}" for role in roles}
            ),
            Operator("conv", "b", (1, 1), 2, conv, {"weight": "b.weight", "bias": "b.bias"}),
            Operator("adaptive_avg_pool", "pool", (2,), 3),
            Operator("linear", "fc", (3,), 4, {}, {"weight": "fc.weight", "bias": "fc.bias"}),
        ),
        "output": 4,
        "flat": True,
        "tensors": tensors,
        "preprocessing": Preprocessing((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        "classes": ("ant", "bee", "cat", "dog", "elk"),
        "method": {"name": "fbs", "version": 1, "density": 0.5},
    }
    return Program(**(parts | changes))


def with_operator(place: int, **changes: Any) -> Program:
    operators = list(small_program().operators)
    operators[place] = dataclasses.replace(operators[place], **changes)
    return small_program(operators=tuple(operators))


def with_attributes(place: int, **changes: Any) -> Program:
    old = small_program().operators[place].attributes
    return with_operator(place, attributes={**old, **changes})


def test_numbers() -> None:
    program = small_program()
    assert program.macs() == {"a": 4 * 27 * 36, "b": 4 * 36 * 36, "fc": 20}
    assert program.gate_macs() == {"a": 3 * 36 + 12}
    assert program.gated == {"a": 0}
    assert program.lifetimes() == ((-1, 0), (0, 1), (1, 2), (2, 3), (3, 4))
    assert program.tensor(program.operators[3], "bias").shape == (5,)


def test_what_nobody_reads_lives_where_it_is_written() -> None:
    program = small_program(output=2, flat=False, classes=())
    assert program.lifetimes() == ((-1, 0), (0, 1), (1, 4), (2, 3), (3, 3))


def test_it_prints() -> None:
    text = str(small_program())
    lines = text.splitlines()
    assert len(lines) == 1 + 4 + 1
    assert "3x3, padding 1, relu, gate topk: 2 of 4" in lines[1]
    assert "+ residual" in lines[2]
    assert lines[-1].startswith("input 3 x 6 x 6 (0), output 5 (4): 4 operators, 0.01 M MACs dense, 1 gated layers")


def test_nothing_in_it_can_be_changed() -> None:
    tensors = dict(small_program().tensors)
    mine = np.ones_like(tensors["fc.bias"])
    program = small_program(tensors={**tensors, "fc.bias": mine})
    mine[:] = 7
    assert (program.tensors["fc.bias"] == 1).all()
    for change in (
        lambda: program.tensors["fc.bias"].__setitem__(0, 1),
        lambda: program.tensors.__setitem__("x", mine),  # type: ignore[attr-defined]
        lambda: program.operators[0].attributes.__setitem__("winners", 3),  # type: ignore[attr-defined]
        lambda: setattr(program, "output", 3),
    ):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            change()


def test_copies_are_whole() -> None:
    program = small_program()
    for copied in (pickle.loads(pickle.dumps(program)), copy.deepcopy(program)):  # noqa: S301 (our own)
        assert str(copied) == str(program)
        assert copied.operators == program.operators
        assert all((copied.tensors[name] == program.tensors[name]).all() for name in program.tensors)
        assert (copied.classes, copied.method, copied.preprocessing) == (
            program.classes, dict(program.method or {}), program.preprocessing,
        )  # fmt: skip


def deciding_program() -> Program:
    b = Builder((3, 6, 6))
    x = b.conv(0, 8, threshold=0.25)
    gate = b.layer_gate(x, 0.5)
    with b.guarded(gate):
        y = b.conv(x, 8, kernel=3, kept=(5, 12), residual=x, scaled=1)
    b.conv(y, 2, kept=(8, 36))
    return b.build()


def test_gates_tell_what_they_decide_and_cost() -> None:
    program = deciding_program()
    assert program.gated == {"conv0": 0, "layer_gate1": 1, "conv2": 2, "conv3": 3}
    assert {name: program.axes(name) for name in program.gated} == {
        "conv0": {"channels": (8,)},
        "layer_gate1": {"layer": ()},
        "conv2": {"channels": (8,), "columns": (6, 6)},
        "conv3": {},
    }
    assert program.gate_macs() == {
        "conv0": 3 * 36 + 24, "layer_gate1": 8 * 36 + 8, "conv2": 2 * 8 * 36, "conv3": 0,
    }  # fmt: skip
    assert set(program.macs()) == {"conv0", "conv2", "conv3"}
    assert small_program().axes("a") == {"channels": (4,)}


def test_a_guard_lives_until_what_it_guards_has_run() -> None:
    program = deciding_program()
    assert program.lifetimes()[2] == (1, 2)


def test_gates_print() -> None:
    lines = str(deciding_program()).splitlines()
    assert lines[1].endswith("gate clip: above 0.25")
    assert lines[2].endswith("runs above 0.5")
    assert lines[3].endswith("+ residual, gate attention: 5 of 8 channels, 12 of 36 columns, scaled by 2")


def test_settings_of_gates_change_by_name() -> None:
    program = deciding_program()
    changes: dict[str, dict[str, float]] = {
        "conv0": {"threshold": 0.5},
        "layer_gate1": {"threshold": 0},
        "conv2": {"kept_columns": 36},
        "conv3": {"kept_channels": 1, "kept_columns": 2},
    }
    changed = program.with_gates(changes)
    for name, settings in changes.items():
        attributes = changed.operators[program.gated[name]].attributes
        assert settings.items() <= attributes.items()
    assert changed.axes("conv2") == {"channels": (8,)}
    assert changed.operators[2].guard == program.operators[2].guard
    for wrong, message in (
        ({"conv0": {"winners": 1}}, "conv0: its gate has no setting winners. It has: threshold"),
        ({"conv2": {"kept_columns": 37}}, r"\[1, 36\]"),
        ({"layer_gate1": {"threshold": 1.0}}, r"\[0, 1\)"),
        ({"fc": {}}, "no gated layer is named fc"),
    ):
        with pytest.raises(ProgramError, match=message):
            program.with_gates(wrong)


def test_winners_change_by_name() -> None:
    changed = small_program().with_gates({"a": {"winners": 3}})
    assert changed.operators[0].attributes["winners"] == 3
    assert small_program().operators[0].attributes["winners"] == 2
    with pytest.raises(ProgramError, match=r"no gated layer is named fc\. They are: a"):
        changed.with_gates({"fc": {"winners": 1}})
    with pytest.raises(ProgramError):
        changed.with_gates({"a": {"winners": 5}})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Operator("conf", "a", (0,), 1), "'a' is a 'conf', but operators are: conv, linear"),
        (lambda: Operator("flatten", "", (0,), 1), "must be text that is not empty"),
        (lambda: Operator("flatten", "a", (0.5,), 1), r"inputs is \(0.5,\), but must be integers"),  # type: ignore[arg-type]
        (lambda: Operator("flatten", "a", (0,), True), "output is True"),
        (lambda: Operator("flatten", "a", (0,), 1, guard=0.5), "guard is 0.5, but must be the number of a buffer"),  # type: ignore[arg-type]
        (lambda: with_operator(1, guard=1), "guard, buffer 1, was not written by a layer_gate"),
        (lambda: with_attributes(1, scaled=1), "scaled by its guard, but has none"),
        (lambda: Operator("flatten", "a", (0,), 1, {"stride": 1}), "has no attribute stride"),
        (lambda: Operator("activation", "a", (0,), 1, {"activation": "mish"}), "activation is 'mish', but must be one"),
        (lambda: Operator("linear", "a", (0,), 1, {}, {"weight": "w"}), "has the tensors weight, bias, not weight"),
        (lambda: Operator("pad", "a", (0,), 1, {"value": None}), "value is None"),  # type: ignore[dict-item]
        (lambda: Preprocessing((0.5,), (0.1, 0.2)), "1 means, but 2 deviations"),
        (lambda: Preprocessing((0.5,), (0.0,)), "must be positive"),
        (lambda: Preprocessing((float("nan"),), (1.0,)), "one number for each channel"),
        (lambda: Preprocessing("abc", "abc"), "one number for each channel"),  # type: ignore[arg-type]
        (lambda: small_program(classes=("one",)), "1 classes, but 5 outputs"),
        (lambda: small_program(classes=(1, 2, 3, 4, 5)), "must be text"),
        (lambda: small_program(output=2), "a flat output must be"),
        (lambda: small_program(output=9), "9"),
        (lambda: small_program(output=None), "output is None"),
        (lambda: small_program(buffers=()), "buffer"),
        (lambda: small_program(buffers=((3, 6.0, 6),)), "must be integers"),
        (lambda: small_program(preprocessing=Preprocessing((0.5,), (1.0,))), "1 channels, but the input has 3"),
        (lambda: small_program(tensors={}), "'a.weight', is not among the tensors"),
        (lambda: small_program(tensors={"a": np.zeros(3)}), "'a' must be a float32 or int32 array, not float64"),
        (lambda: small_program(tensors={"a": [1.0]}), "not list"),
        (lambda: with_operator(2, name="fc"), "two operators are named 'fc'"),
        (lambda: with_operator(2, inputs=(3,)), "pool"),
        (lambda: with_operator(2, output=7), "pool"),
        (lambda: with_attributes(0, winners=0), "a"),
        (lambda: with_attributes(0, stride=(0, 1)), "stride"),
        (lambda: with_attributes(1, groups=3), "b"),
        (lambda: with_attributes(1, padding=(1, 1, 1)), "padding"),
        (lambda: with_attributes(1, padding=(9, 1, 1, 1)), "b"),
    ],
)
def test_invalid_programs_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        build()
