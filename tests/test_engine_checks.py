"""The native checker: what a hostile program may say, and that it gets one clear sentence for it."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
from random_programs import Builder, random_program

from thrifty import _native
from thrifty.program import operator_tuples

Parts = tuple[list[Any], list[list[Any]], int]
SMALL = {"memory": 1 << 24, "macs": 10**8}


def parts(program: Any) -> Parts:
    """What the checker takes, as lists that can be changed."""
    operators = [list(fields) for fields in operator_tuples(program)]
    return [list(shape) for shape in program.buffers], operators, program.output


def example() -> Parts:
    b = Builder((4, 8, 8))
    x = b.conv(0, 6, kernel=3, winners=3)  # 0
    y = b.conv(x, 6, kernel=3, residual=x)  # 1
    y = b.add("max_pool", (y,), (6, 4, 4), {"kernel": (2, 2), "stride": (2, 2)})  # 2
    y = b.add("gather", (y,), (3, 4, 4), index=np.array([2, -1, 5], np.int32))  # 3
    y = b.add("concat", (y, y), (6, 4, 4))  # 4
    y = b.add("affine", (y,), (6, 4, 4), {"activation": "relu"}, scale=b.weights(6))  # 5
    y = b.add("pad", (y,), (6, 5, 6), {"padding": (0, 1, 1, 1)})  # 6
    y = b.add("avg_pool", (y,), (6, 2, 3), {"kernel": (2, 2), "stride": (2, 2)})  # 7
    y = b.add("layer_norm", (y,), (6, 2, 3), {"epsilon": 1e-3}, weight=b.weights(6), bias=b.weights(6))  # 8
    y = b.flatten(y)  # 9
    y = b.linear(y, 5)  # 10
    gate = b.layer_gate(y, 0.2)  # 11
    with b.guarded(gate):
        z = b.conv(y, 8, threshold=0.1, activation="relu")  # 12
        y = b.conv(z, 5, kept=(4, 1), residual=y, scaled=1)  # 13
    z = b.add("adaptive_avg_pool", (x,), (6, 3, 3))  # 14
    b.conv(z, 5, kernel=3, kept=(3, 4))  # 15
    return parts(b.build())


def test_the_example_is_good() -> None:
    _native.check(*example())


@pytest.mark.parametrize(
    ("place", "field", "value", "message"),
    [
        (0, 0, "convolution", "no such kind"),
        (0, 2, (), "0 inputs"),
        (0, 2, (0, 1, 1), "3 inputs"),
        (0, 2, (99,), "input buffer 99 does not exist"),
        (0, 2, (-1,), "does not exist"),
        (0, 2, (2**70,), "out of range"),
        (0, 2, (True,), "integer"),
        (0, 2, (5,), "read before any operator has written it"),
        (1, 3, 1, "written twice"),
        (1, 3, 0, "the program's input"),
        (1, 3, 77, "does not exist"),
        (0, 4, {"stride": (0, 1)}, "stride"),
        (0, 4, {"stride": (1,)}, "needs 2"),
        (0, 4, {"stride": 1}, "tuple of integers"),
        (0, 4, {"stride": (2, 2)}, "the window gives"),
        (0, 4, {"padding": (-1, 1, 1, 1)}, "padding"),
        (0, 4, {"padding": (1 << 40, 1, 1, 1)}, "padding"),
        (0, 4, {"dilation": (9, 9)}, "larger than the padded"),
        (0, 4, {"groups": 5}, "do not divide"),
        (0, 4, {"groups": 0}, "groups"),
        (0, 4, {"winners": 0}, "winners"),
        (0, 4, {"winners": 7}, r"\[1, 6\]"),
        (0, 4, {"winners": "all"}, "must be an integer"),
        (0, 4, {"gate": "random"}, "no gate 'random'"),
        (0, 4, {"activation": "swish"}, "no activation 'swish'"),
        (0, 4, {"slope": float("nan")}, "finite"),
        (0, 4, {"colour": 1}, "no attribute 'colour'"),
        (0, 5, {"weight": None}, "missing"),
        (0, 5, {"weight": np.zeros((6, 4, 3), np.float32)}, "tensor 'weight'"),
        (0, 5, {"weight": np.zeros((6, 5, 3, 3), np.float32)}, "tensor 'weight'"),
        (0, 5, {"weight": np.zeros((6, 4, 3, 3))}, "must be float32"),
        (0, 5, {"weight": np.zeros((6, 4, 3, 6), np.float32)[..., ::2]}, "contiguous"),
        (0, 5, {"weight": np.zeros((6, 4, 0, 3), np.float32)}, "tensor 'weight'"),
        (0, 5, {"bias": np.zeros(7, np.float32)}, r"\[7\], but must be \[6\]"),
        (0, 5, {"gate_weight": np.zeros((4, 6), np.float32)}, "gate_weight"),
        (0, 5, {"gate_bias": None}, "gate_bias"),
        (0, 5, {"spare": np.zeros(1, np.float32)}, "no tensor 'spare'"),
        (1, 2, (1, 0), "residual"),
        (2, 4, {"kernel": None}, "kernel"),
        (2, 4, {"kernel": (20, 2)}, "larger than the padded"),
        (2, 4, {"padding": (2, 2, 0, 0)}, "not smaller than its kernel"),
        (2, 4, {"stride": (3, 3)}, "the window gives"),
        (3, 5, {"index": np.array([0, 1, 6], np.int32)}, "index 6"),
        (3, 5, {"index": np.array([0, -2, 1], np.int32)}, "index -2"),
        (3, 5, {"index": np.zeros(3, np.float32)}, "int32"),
        (3, 5, {"index": np.zeros(3, np.int64)}, "int32"),
        (4, 2, (4,), "3 channels together"),
        (4, 2, (4, 0), "differ in height or width"),
        (5, 2, (0,), "must be"),
        (6, 4, {"padding": (0, 1, 1, 2)}, "padded input"),
        (6, 4, {"value": "zero"}, "a number"),
        (7, 4, {"divisor": -1}, "divisor"),
        (7, 4, {"count_include_pad": 2}, "count_include_pad"),
        (8, 4, {"epsilon": -1.0}, "negative"),
        (9, 2, (0,), "vector of all values"),
        (10, 2, (8,), "takes a vector"),
        (10, 5, {"weight": np.zeros((5, 35), np.float32)}, "weight"),
        (11, 3, 16, "written twice|must be|does not exist"),
        (11, 4, {"threshold": 1.0}, r"'threshold' must be in \[0, 1\)"),
        (11, 4, {"threshold": -0.1}, "threshold"),
        (11, 4, {"threshold": float("nan")}, "finite"),
        (11, 4, {"winners": 1}, "no attribute 'winners'"),
        (11, 5, {"weight": np.zeros((5, 1), np.float32)}, r"must be \[1, 5\]"),
        (11, 5, {"bias": np.zeros(2, np.float32)}, "bias"),
        (11, 6, 12, "a layer_gate before it"),
        (12, 4, {"threshold": "low"}, "a number"),
        (12, 4, {"threshold": 1}, "threshold"),
        (12, 4, {"winners": 3}, "'winners' does not belong"),
        (12, 4, {"gate": None}, "'threshold' does not belong"),
        (12, 5, {"gate_weight": None}, "gate_weight"),
        (12, 6, -2, "guard, buffer -2, does not exist"),
        (12, 6, 17, "guard, buffer 17, does not exist"),
        (12, 6, 1 << 62, "does not exist"),
        (12, 6, 14, "a layer_gate before it"),
        (12, 6, 11, "a layer_gate before it"),
        (12, 6, 0, "a layer_gate before it"),
        (12, 6, None, "must be an integer"),
        (12, 6, True, "must be an integer"),
        (13, 4, {"scaled": 2}, "scaled"),
        (13, 6, -1, "scaled by its guard, but has none"),
        (13, 5, {"gate_bias": np.zeros(5, np.float32)}, "tensors of a gate"),
        (15, 4, {"kept_channels": 0}, "kept_channels"),
        (15, 4, {"kept_channels": 7}, r"\[1, 6\]"),
        (15, 4, {"kept_columns": 10}, r"\[1, 9\]"),
        (15, 4, {"kept_columns": None}, "'kept_columns' is missing"),
        (15, 4, {"kept_columns": 2.0}, "must be an integer"),
        (15, 4, {"gate": "topk"}, "'winners' is missing|does not belong"),
        (15, 4, {"gate": "clip"}, "does not belong"),
        (15, 4, {"gate": 3}, "must be a string"),
        (15, 4, {"scaled": 1}, "scaled by its guard, but has none"),
    ],
)
def test_what_is_wrong_is_named(place: int, field: int, value: Any, message: str) -> None:
    buffers, operators, output = example()
    if isinstance(value, dict):
        changed = dict(operators[place][field]) | value
        value = {key: found for key, found in changed.items() if found is not None}
    operators[place][field] = value
    with pytest.raises(ValueError, match=message) as caught:
        _native.check(buffers, operators, output)
    if "must be an integer" not in str(caught.value) and "out of range" not in str(caught.value):
        assert f"operator {place} (" in str(caught.value)
    with pytest.raises(ValueError, match=message):
        _native.Engine(buffers, operators, output)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([0, 1, 1], "not in"),
        ([4, 8], "three sizes"),
        ([4, 8, -8], "not in"),
        ([1 << 40, 1, 1], "not in"),
        ([1 << 24, 1 << 24, 1 << 24], "positions"),
        ([1 << 20, 1 << 10, 1], "limit"),
        ([4, 8, 8.0], "integer"),
        ("abc", "tuple"),
    ],
)
def test_impossible_buffers(shape: Any, message: str) -> None:
    buffers, operators, output = example()
    buffers[0] = shape
    with pytest.raises(ValueError, match=message):
        _native.check(buffers, operators, output)


def test_limits_hold() -> None:
    buffers, operators, output = example()
    for limits, message in (
        ({"memory": 1000}, "limit of 1000"),
        ({"memory": 4000}, "what operators keep of their weights"),
        ({"macs": 100}, "limit of 100 MACs"),
        ({"time": 1}, "no limit 'time'"),
        ({"macs": 0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.check(buffers, operators, output, limits)
    with pytest.raises(ValueError, match="activations of one image"):
        _native.check([[4, 16, 16]] * 2, [("add", "a", (0, 0), 1, {}, {}, -1)], 1, {"memory": 6000})
    weight = np.zeros((1, 1, 1, 1), np.float32)  # everything is small but the padding
    with pytest.raises(ValueError, match="limit"):
        _native.check(
            [[1, 4, 4], [1, 4, 2]],
            [
                (
                    "conv",
                    "c",
                    (0,),
                    1,
                    {"padding": (0, 0, 1 << 23, 1 << 23), "stride": (1, 1 << 24)},
                    {"weight": weight, "bias": weight[0, 0, 0]},
                    -1,
                )
            ],
            1,
            {"memory": 1 << 20},
        )


def test_wrong_outer_forms() -> None:
    buffers, operators, output = example()
    for arguments, message in (
        ((buffers[:-1], operators, output), "each operator must write one buffer"),
        ((buffers, operators[:-1], output), "each operator must write one buffer"),
        ((buffers, operators, 99), "output is buffer 99"),
        ((buffers, operators, -1), "output is buffer -1"),
        ((buffers, operators, "1"), "integer"),
        ((7, operators, output), "tuple or a list"),
        ((buffers, [operators[0][:5], *operators[1:]], output), "seven fields"),
        (([], [], 0), "each operator must write"),
        ((buffers * 3000, operators * 3000, output), "at most"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.check(*arguments)


def test_a_program_without_operators_returns_its_input() -> None:
    engine = _native.Engine([[2, 3, 4]], [], 0)
    x = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)
    out = np.empty_like(x)
    engine.run(x, out)
    assert (out == x).all()


def _mutate(given: Parts, random_: random.Random) -> Parts:
    buffers, operators, output = copy.deepcopy(given)
    numbers = [0, 1, -1, 2, 3, 5, 7, 16, 255, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 62, -(1 << 63)]
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        operator = random_.choice(operators)
        what = random_.randrange(9)
        if what == 0:
            shape = random_.choice(buffers)
            shape[random_.randrange(len(shape))] = random_.choice(numbers)
        elif what == 1 and operator[2]:
            inputs = list(operator[2])
            inputs[random_.randrange(len(inputs))] = random_.choice([*range(len(buffers)), *numbers])
            operator[2] = tuple(inputs)
        elif what == 2:
            operator[3] = random_.choice([*range(len(buffers)), *numbers])
        elif what == 3 and operator[4]:
            key = random_.choice(list(operator[4]))
            value = operator[4][key]
            if isinstance(value, tuple) and value:
                changed = list(value)
                changed[random_.randrange(len(changed))] = random_.choice(numbers)
                operator[4][key] = tuple(changed)
            else:
                operator[4][key] = random_.choice([*numbers, 0.5, float("inf"), "relu", ()])
        elif what == 4 and operator[5]:
            role = random_.choice(list(operator[5]))
            tensor = operator[5][role]
            shape = [random_.choice([0, 1, 2, 3, size, size + 1, size * 2]) for size in tensor.shape]
            operator[5][role] = np.full(shape, random_.choice([0, 1, -1, 5]), tensor.dtype)
        elif what == 5:
            other = random_.choice(operators)
            operator[0] = other[0]
        elif what == 6:
            random_.shuffle(operators)
        elif what == 7:
            operator[6] = random_.choice([-1, *range(len(buffers)), *numbers])
        else:
            output = random_.choice([*range(len(buffers)), *numbers])
    return buffers, operators, output


@pytest.mark.parametrize("seed", range(10))
def test_mutated_programs_get_an_error_or_run(seed: int) -> None:
    random_ = random.Random(seed)
    ran = refused = 0
    for _ in range(300):
        base = parts(random_program(random_.randrange(60))) if random_.random() < 0.5 else example()
        buffers, operators, output = _mutate(base, random_)
        message = ""
        try:
            engine = _native.Engine(buffers, operators, output, threads=1, limits=SMALL)
        except ValueError as error:
            message = str(error)
        if message:
            refused += 1
            assert message.endswith(".")
            continue
        ran += 1
        x = np.ones((1, *buffers[0]), np.float32)
        engine.run(x, np.empty((1, *buffers[output]), np.float32))
    assert ran > 20
    assert refused > 100
