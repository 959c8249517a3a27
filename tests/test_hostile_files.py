"""Program files that someone has tampered with: each is refused with a ThriftyError or runs; none crashes, hangs or
takes more memory than it may.

Thousands of files are made by seed from a few valid ones, and read in child processes, a range of seeds each:
`python tests/test_hostile_files.py DIRECTORY range FIRST COUNT` reads those of the seeds from FIRST on.
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_programs import Builder

from thrifty import _native
from thrifty.engine import Engine
from thrifty.errors import ThriftyError
from thrifty.program import KINDS, Operator, Preprocessing, Program, operator_tuples
from thrifty.program_file import FORMAT, KEY, load_program, save_program

FILES, CHUNKS = 12_000, 6
MEMORY = 1 << 30
"""Bytes of address space that reading and running files may take beyond what the process has after importing."""

SECONDS = 5
"""Of CPU time for one file; ten times as many by the clock."""

SANE = {"memory": 1 << 24, "macs": 10**7}
"""Programs beyond these are only loaded, not run."""


# ------------------------------------------------------------------------------------------------ the valid programs


def gated() -> Program:
    """Gates, residuals, most forms of convolution, photographs as input."""
    b = Builder((3, 6, 6), 1)
    x = b.conv(0, 8, kernel=3, activation="relu")
    y = b.conv(x, 8, kernel=3, winners=4, activation="relu")
    y = b.conv(y, 8, kernel=3, winners=6, residual=x, activation="relu6")
    weight, bias = b.weights(8, 1, 3, 3), b.weights(8)
    deep = {"padding": (1, 1, 1, 1), "groups": 8, "stride": (2, 2), "activation": "hardswish"}
    y = b.add("conv", (y,), (8, 3, 3), deep, weight=weight, bias=bias)
    y = b.conv(y, 5, winners=2, activation="silu")
    y = b.add("adaptive_avg_pool", (y,), (5, 1, 1))
    b.linear(y, 4)
    program = b.build(preprocessing=Preprocessing((0.5, 0.4, 0.3), (0.2, 0.2, 0.3)))
    method = {"name": "fbs", "density": 0.5, "where": ["a", "b"]}
    return Program(
        program.buffers, program.operators, program.output, True, program.tensors, program.preprocessing,
        ("ant", "bee", "cat", "dog"), method,
    )  # fmt: skip


def varied() -> Program:
    """Every other kind of operator."""
    b = Builder((4, 5, 6), 2)
    x = b.conv(0, 4, winners=2)
    pool = {"kernel": (2, 2), "stride": (1, 2), "padding": (0, 1, 0, 0), "dilation": (1, 1)}
    y = b.add("max_pool", (x,), (4, 5, 3), pool)
    y = b.add("gather", (y,), (6, 5, 3), index=np.array([3, -1, 0, 1, 1, 2], np.int32))
    y = b.add("concat", (y, y), (12, 5, 3))
    y = b.add("affine", (y,), (12, 5, 3), {"activation": "leaky_relu", "slope": 0.2}, scale=b.weights(12))
    y = b.add("pad", (y,), (12, 6, 5), {"padding": (0, 1, 1, 1), "value": 0.5})
    average = {"kernel": (3, 2), "stride": (1, 1), "padding": (1, 1, 0, 0), "count_include_pad": 0, "divisor": 0}
    y = b.add("avg_pool", (y,), (12, 6, 4), average)
    y = b.add("layer_norm", (y,), (12, 6, 4), {"epsilon": 1e-3}, weight=b.weights(12), bias=b.weights(12))
    z = b.add("activation", (y,), (12, 6, 4), {"activation": "gelu"})
    y = b.add("add", (y, z), (12, 6, 4), {"activation": "tanh"})
    z = b.add("adaptive_max_pool", (y,), (12, 1, 1))
    y = b.add("mul", (y, z), (12, 6, 4), {"activation": "sigmoid"})
    y = b.flatten(y)
    b.linear(y, 3, activation="hardsigmoid")
    return b.build()


def scalable() -> Program:
    """Valid at any height and width, if they are the same for all buffers."""
    b = Builder((2, 4, 4), 3)
    x = b.conv(0, 9, kernel=3, winners=3)
    y = b.conv(x, 9, kernel=3, winners=5, activation="relu")
    y = b.add("concat", (x, y), (18, 4, 4))
    y = b.add("activation", (y,), (18, 4, 4), {"activation": "silu"})
    weight, bias = b.weights(4, 9, 2, 2), b.weights(4)
    attributes = {"padding": (2, 0, 1, 1), "dilation": (2, 2), "groups": 2}
    y = b.add("conv", (y,), (4, 4, 4), attributes, weight=weight, bias=bias)
    b.add("max_pool", (y,), (4, 4, 4), {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1)})
    return b.build()


def deciding() -> Program:
    """Every gate, guards, and operators of many kinds that do not run."""
    b = Builder((3, 5, 6), 4)
    x = b.conv(0, 6, kernel=3, activation="relu")
    for threshold in (0.2, 0.9):
        with b.guarded(b.layer_gate(x, threshold)):
            y = b.conv(x, 8, kernel=3, threshold=0.4, activation="relu")
            y = b.conv(y, 6, kernel=3, kept=(5, 30), scaled=1, activation="sigmoid")
            y = b.add("pad", (y,), (6, 7, 8), {"padding": (1, 1, 1, 1)})
            y = b.conv(y, 6, kernel=3, kept=(4, 9), residual=x, scaled=1, padding=(0, 0, 0, 0))
        x = b.conv(y, 6, kernel=3, kept=(6, 11), groups=2, activation="relu")
    gate = b.layer_gate(x)
    with b.guarded(gate):
        y = b.add("mul", (x, gate), b.buffers[x])
        y = b.add("concat", (x, y), (12, 5, 6))
    y = b.add("adaptive_avg_pool", (y,), (12, 1, 1))
    b.linear(y, 4)
    return b.build()


PROGRAMS: tuple[Callable[[], Program], ...] = (gated, varied, scalable, deciding)


# ----------------------------------------------------------------------------------- files, taken apart to be changed


class Pairs(list[Any]):
    """A JSON object as [key, value] lists, in which a key may come twice."""


class Raw(str):
    """Text that stands in the JSON as it is."""

    __slots__ = ()


def dumped(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumped(found)}" for key, found in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumped, value)) + "]"
    return value if isinstance(value, Raw) else json.dumps(value)


def parsed(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


@cache
def content(which: int) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "p.thrifty"
        save_program(PROGRAMS[which](), path)
        return path.read_bytes()


class File:
    """A program file in its parts: `header` as safetensors has it, `program` out of its metadata, `data`."""

    def __init__(self, which: int) -> None:
        raw = content(which)
        (length,) = struct.unpack("<Q", raw[:8])
        self.header: Pairs = parsed(raw[8 : 8 + length])
        self.data = bytearray(raw[8 + length :])
        (self.metadata,) = (value for key, value in self.header if key == "__metadata__")
        self.program: Any = parsed(self.metadata[0][1])

    def value(self, *path: Any) -> Any:
        """Part of the program: keys of objects, indices of lists."""
        found = self.program
        for step in path:
            found = found[step] if isinstance(step, int) else next(v for key, v in found if key == step)
        return found

    def bytes(self) -> bytearray:
        self.metadata[0][1] = dumped(self.program)
        return self.with_header()

    def with_header(self) -> bytearray:
        """The file with its header as it is, the program in it or not."""
        header = dumped(self.header).encode("utf-8", "surrogatepass")
        header += b" " * (-len(header) % 8)
        return bytearray(struct.pack("<Q", len(header))) + header + self.data


NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 255, 256, 1000, 4096, 1 << 14, 1 << 15, 1 << 16, 1 << 24, (1 << 24) + 1,
    (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 32, 1 << 53, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 64,
    10**40, Raw("9" * 400), Raw("9" * 5000), 0.5, -0.0, 1e-300, 1e300, 1.5e308, float("nan"), float("inf"),
    Raw("1e999"), Raw("-Infinity"),
)  # fmt: skip


def junk(rng: random.Random) -> Any:
    """A value of any type, and some that are none."""
    what = rng.randrange(10)
    if what < 5:
        return rng.choice(NUMBERS)
    if what == 5:
        depth = rng.choice([5, 90, 130, 500, 2000, 100_000])
        return Raw("[" * depth + "]" * depth) if rng.random() < 0.5 else Raw('{"a":' * depth + "1" + "}" * depth)
    if what == 6:
        return [rng.choice(NUMBERS) for _ in range(rng.choice([0, 1, 2, 3, 4, 5, 1000]))]
    texts = [
        "",
        "conv",
        "relu",
        "topk",
        "attention",
        "\0",
        "\x1b[2J",
        "\ud800",
        "é",
        "x" * 10_000,
        "%s%n",
        "../../etc",
        "nan",
    ]
    return rng.choice([None, True, False, Pairs(), Pairs([["a", 1]]), [[]], Raw("{]"), Raw(""), *texts, *texts])


def nodes(value: Any, found: list[tuple[list[Any], int]] | None = None) -> list[tuple[list[Any], int]]:
    """All places of values in a JSON document, as (list, index)."""
    found = [] if found is None else found
    if isinstance(value, Pairs):
        for pair in value:
            found.append((pair, 1))
            nodes(pair[1], found)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            found.append((value, i))
            nodes(item, found)
    return found


def containers(value: Any, kind: type) -> list[Any]:
    below = [place[i] for place, i in nodes(value)]
    return [part for part in (value, *below) if type(part) is kind and part]


# --------------------------------------------------------------------------------------------------------- mutations


def flip_header_bits(file: File, rng: random.Random) -> bytearray:
    raw = file.bytes()
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        raw[rng.randrange(len(raw) - len(file.data))] ^= 1 << rng.randrange(8)
    return raw


def flip_data_bits(file: File, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 3, 50))):
        file.data[rng.randrange(len(file.data))] ^= 1 << rng.randrange(8)
    return file.bytes()


def damage_data(file: File, rng: random.Random) -> bytearray:
    """NaN, infinity, denormals, huge numbers or noise as weights and indices."""
    words = len(file.data) // 4
    special = (
        0x7FC00000,
        0x7F800000,
        0xFF800000,
        1,
        0x80000001,
        0x7F7FFFFF,
        0xFF7FFFFF,
        0x80000000,
        0xFFFFFFFF,
        1 << 24,
    )
    for _ in range(rng.choice((1, 2, words))):
        place = 4 * rng.randrange(words)
        word = rng.choice(special) if rng.random() < 0.7 else rng.getrandbits(32)
        file.data[place : place + 4] = struct.pack("<I", word)
    return file.bytes()


def truncate(file: File, rng: random.Random) -> bytearray:
    raw = file.bytes()
    return raw[: rng.choice([rng.randrange(len(raw)), len(raw) - rng.randrange(1, 9), rng.randrange(12)])]


def splice(file: File, rng: random.Random) -> bytearray:
    """A range of bytes removed, doubled, overwritten or added."""
    raw = file.bytes()
    start = rng.randrange(len(raw))
    part = raw[start : start + rng.choice((1, 2, 8, 64, 1000))]
    end = start + len(part)
    raw[start:end] = rng.choice([b"", part + part, rng.randbytes(len(part)), b"\0" * len(part), part[::-1]])
    return raw + rng.choice([b"", b"", b"\0", rng.randbytes(100)])


def set_header_length(file: File, rng: random.Random) -> bytearray:
    raw = file.bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    near = length + rng.choice((-8, -1, 1, 8, len(file.data)))
    far = rng.choice(
        (0, 1, 2, 99_999_999, 100_000_000, (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1)
    )
    raw[:8] = struct.pack("<Q", max(0, rng.choice((near, far))))
    return raw


def change_tensor_record(file: File, rng: random.Random) -> bytearray:
    """Types, shapes and offsets in the header of the safetensors file."""
    records = [pair for pair in file.header if pair[0] != "__metadata__"]
    record = rng.choice(records)
    key = rng.choice(("dtype", "shape", "data_offsets"))
    pair = next(pair for pair in record[1] if pair[0] == key)
    if key == "dtype":
        pair[1] = rng.choice(
            ["F64", "I32", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "", 32]
        )
    elif rng.random() < 0.5 and pair[1]:
        pair[1][rng.randrange(len(pair[1]))] = rng.choice(NUMBERS)
    else:
        other = next(found for found in rng.choice(records)[1] if found[0] == key)
        shapes = ([], [0], [1, *pair[1]], pair[1][::-1], [1] * 70, other[1])
        pair[1] = list(rng.choice(shapes))
    return file.bytes()


def change_header(file: File, rng: random.Random) -> bytearray:
    _restructure(file.header, rng)
    return file.with_header()


def replace_value(file: File, rng: random.Random) -> bytearray:
    places = nodes(file.program)
    for _ in range(rng.choice((1, 1, 2))):
        place, i = rng.choice(places)
        place[i] = junk(rng)
    return file.bytes()


def replace_number(file: File, rng: random.Random) -> bytearray:
    """A number by another: sizes, strides, groups, winners, references."""
    places = [(place, i) for place, i in nodes(file.program) if type(place[i]) in {int, float}]
    for place, i in rng.sample(places, rng.choice((1, 1, 1, 2, 4))):
        old = place[i]
        near = (old + 1, old - 1, old * 2, -old, old + 8)
        place[i] = rng.choice(NUMBERS if rng.random() < 0.5 else near)
    return file.bytes()


def swap_values(file: File, rng: random.Random) -> bytearray:
    """Two values of one type changed places: shapes, names of tensors, activations, attributes, operators."""
    places = nodes(file.program)
    place, i = rng.choice(places)
    same = [other for other in places if type(other[0][other[1]]) is type(place[i])]
    other, j = rng.choice(same)
    place[i], other[j] = json_copy(other[j]), json_copy(place[i])
    return file.bytes()


def json_copy(value: Any) -> Any:
    return parsed(dumped(value)) if isinstance(value, list) else value


def restructure(file: File, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 2))):
        _restructure(file.program, rng)
    return file.bytes()


def _restructure(document: Any, rng: random.Random) -> None:
    """Keys deleted, doubled, renamed or added; items of lists deleted, doubled or shuffled."""
    if rng.random() < 0.6:
        pairs = rng.choice(containers(document, Pairs))
        pair = rng.choice(pairs)
        what = rng.randrange(5)
        if what == 0:
            pairs.remove(pair)
        elif what == 1:
            pairs.append([pair[0], pair[1] if rng.random() < 0.3 else junk(rng)])
        elif what == 2:
            pair[0] = rng.choice(
                ["", "weight", "kind", "gate", "winners", "guard", "__proto__", "x" * 1000, rng.choice(pairs)[0]]
            )
        elif what == 3:
            pairs.append([rng.choice(["extra", "gate_weight", "stride", "guard", "scaled", "\ud800", "\0"]), junk(rng)])
        else:
            rng.shuffle(pairs)
        return
    items = rng.choice(containers(document, list) or [[None]])
    what = rng.randrange(4)
    place = rng.randrange(len(items))
    if what == 0:
        del items[place]
    elif what == 1:
        items.insert(rng.randrange(len(items) + 1), json_copy(items[place]))
    elif what == 2:
        rng.shuffle(items)
    else:
        items.extend([items[place]] * rng.choice((1, 10, 3000)))


def redirect(file: File, rng: random.Random) -> bytearray:
    """References: operators that read themselves, what comes later, what does not exist; outputs written twice."""
    operators, buffers = file.value("operators"), len(file.value("buffers"))
    for _ in range(rng.choice((1, 1, 2))):
        i = rng.randrange(len(operators))
        inputs, output = file.value("operators", i, "inputs"), i + 1
        target = rng.choice(
            [output, output + 1, buffers - 1, buffers, -1, 0, rng.randrange(buffers), rng.choice(NUMBERS)]
        )
        what = rng.randrange(5)
        if what == 0:
            inputs[rng.randrange(len(inputs))] = target
        elif what == 4:
            operators[i][:] = [pair for pair in operators[i] if pair[0] != "guard"] + [["guard", target]]
        elif what == 1:
            inputs.append(target)
        elif what == 2:
            next(pair for pair in operators[i] if pair[0] == "output")[1] = target
        else:
            next(pair for pair in file.program if pair[0] == "output")[1] = target
    return file.bytes()


def scale(file: File, rng: random.Random) -> bytearray:
    """All maps, or all of those of one size, become larger or smaller, and stay consistent with one another."""
    shapes = file.value("buffers")
    which = rng.choice(shapes)[1:]
    height, width = (rng.choice([1, 2, 3, 5, 64, 511, 4096, 1 << 14, 1 << 20, 1 << 24, 1 << 31, 1 << 40]) for _ in "hw")
    for shape in shapes:
        if shape[1:] == which:
            shape[1:] = [height, width]
    return file.bytes()


MUTATIONS: tuple[Callable[[File, random.Random], bytearray], ...] = (
    flip_header_bits, flip_data_bits, damage_data, truncate, splice, set_header_length, change_tensor_record,
    change_header, replace_value, replace_value, replace_number, replace_number, replace_number, swap_values,
    restructure, restructure, redirect, redirect, scale,
)  # fmt: skip


def mutant(seed: int) -> tuple[str, bytes]:
    """The file of this seed, and what was done to it."""
    rng = random.Random(seed)
    file = File(rng.randrange(len(PROGRAMS)))
    mutate = rng.choice(MUTATIONS)
    return mutate.__name__, bytes(mutate(file, rng))


# -------------------------------------------------------------------------------- small files that ask for very much


def _chain(b: Builder, x: int, count: int) -> None:
    for _ in range(count):
        x = b.add("activation", (x,), b.buffers[x])


def _repeat(b: Builder, count: int) -> None:
    """The last operator again and again, with the same input and the same tensors."""
    last = b.operators[-1]
    for i in range(count):
        b.buffers.append(b.buffers[last.output])
        name, output = f"again{i}", len(b.buffers) - 1
        b.operators.append(Operator(last.kind, name, last.inputs, output, last.attributes, last.tensors))


def doubled() -> bytes:
    """A gated map's channels doubled again and again, then passed on many times: lists of channels add up."""
    b = Builder((1, 1, 1))
    x = b.conv(0, 2, winners=1)
    for i in range(22):
        x = b.add("concat", (x, x), (4 << i, 1, 1))
    _chain(b, x, 100)
    return _file(b)


def rejoined() -> bytes:
    """Many operators of many channels each."""
    b = Builder((1, 1, 1))
    x = 0
    for i in range(21):
        x = b.add("concat", (x, x), (2 << i, 1, 1))
    for _ in range(60):
        b.add("concat", (x,), (1 << 21, 1, 1))
    return _file(b)


def shared() -> bytes:
    """Many operators that name the same weights, of which each keeps a copy in its own order."""
    b = Builder((1, 1, 1))
    x = b.conv(0, 500, winners=5)
    b.linear(x, 500)
    _repeat(b, 2000)
    return _file(b)


def padded() -> bytes:
    """Gates of one output each, whose weights are kept for sixty-four, and all share."""
    b = Builder((1 << 19, 1, 1))
    b.conv(0, 1, winners=1)
    _repeat(b, 200)
    return _file(b)


def wide() -> bytes:
    """A small filter whose reach over a wide map would be a table of gigabytes."""
    b = Builder((1, 1, 1 << 16))
    attributes = {"padding": (0, 0, (1 << 14) - 1, 1 << 14), "gate": "attention", "kept_channels": 1, "kept_columns": 5}
    b.add("conv", (0,), (1, 1, 1 << 16), attributes, weight=b.weights(1, 1, 1, 1 << 15), bias=b.weights(1))
    return _file(b)


def striding() -> bytes:
    """A stride beyond the map, whose product with the other one is more than an int holds."""
    b = Builder((2, 1, 1 << 20))
    attributes = {"stride": (1 << 24, 1 << 8)}
    b.add("conv", (0,), (1, 1, 1 << 12), attributes, weight=b.weights(1, 2, 1, 1), bias=b.weights(1))
    return _file(b)


def chosen() -> bytes:
    """Many operators that name the same index."""
    b = Builder((1, 1, 1))
    b.add("gather", (0,), (1 << 16, 1, 1), index=np.zeros(1 << 16, np.int32))
    _repeat(b, 5000)
    return _file(b)


def nested() -> bytes:
    """A description that takes many times its size once it is read."""
    b = Builder((1, 1, 1))
    _chain(b, 0, 1)
    return _file(b, {"a": [[]] * 20_000_000})


def _file(b: Builder, method: Any = None) -> bytes:
    """The file of a program that no `Program` could be made of."""
    fields = ("kind", "name", "inputs", "output")
    operators = [
        {key: getattr(o, key) for key in fields} | {"attributes": dict(o.attributes), "tensors": dict(o.tensors)}
        for o in b.operators
    ]
    description = {
        "format": FORMAT, "buffers": b.buffers, "operators": operators, "output": len(b.buffers) - 1, "flat": False,
        "classes": [], "preprocessing": None, "method": method,
    }  # fmt: skip
    data, header = b"", {"__metadata__": {KEY: json.dumps(description)}}
    for name, array in b.tensors.items():
        place = [len(data), len(data) + array.nbytes]
        kind = "I32" if array.dtype == np.int32 else "F32"
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": place}  # type: ignore[dict-item]
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BOMBS = (doubled, rejoined, shared, padded, wide, striding, chosen, nested)


# -------------------------------------------------------------------------------------------------- the child process


def read(path: Path, always_run: bool = False) -> str:
    """Loads and runs one file; what came of it. Whatever is raised but a ThriftyError is a failure."""
    try:
        program = load_program(path)
        str(program)
        engine = Engine(program)
    except ThriftyError as error:
        str(error).encode()
        return "refused"
    try:
        _native.check(program.buffers, operator_tuples(program), program.output, SANE)
    except ValueError:
        if not always_run:
            return "loaded"
    x = np.zeros((1, *program.buffers[0]), np.float32)
    out = engine(x)
    wanted = program.buffers[program.output]
    assert out.shape == (1, *wanted[: 1 if program.flat else 3])
    if program.preprocessing is not None:
        engine(x.astype(np.uint8))
    str(engine.trace(x))
    return "ran"


def _made(arguments: list[str]) -> Iterator[tuple[int, str, bytes]]:
    match arguments:
        case ["range", first, count]:
            for seed in range(int(first), int(first) + int(count)):
                yield seed, *mutant(seed)
        case ["bomb", name]:
            yield 0, name, next(bomb for bomb in BOMBS if bomb.__name__ == name)()
        case ["fault", name]:
            yield 0, name, b""


def _hang() -> str:
    while True:
        pass


FAULTS: dict[str, Callable[[], Any]] = {
    "crash": lambda: ctypes.string_at(0),
    "hang": _hang,
    "memory": lambda: np.ones(MEMORY + 1, np.uint8),
    "raise": lambda: {}["key"],
}


def child(arguments: list[str]) -> None:
    directory = Path(arguments[0])
    path = directory / "hostile.thrifty"
    for i in range(len(PROGRAMS)):  # all that is allocated once
        path.write_bytes(content(i))
        assert read(path) == "ran"
    if not _native.features()["sanitized"]:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    bomb = arguments[1] == "bomb"
    for seed, what, made in _made(arguments[1:]):
        print("file", seed, what, flush=True)
        path.write_bytes(made)
        seconds = 1 if what in FAULTS else SECONDS
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles the signals: they end the process
        signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
        try:
            counts[what, read(path, bomb) if what not in FAULTS else FAULTS[what]()] += 1
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("done", json.dumps({"counts": [[*key, n] for key, n in counts.items()], "peak": peak}), flush=True)


def in_child(directory: Path, *arguments: str) -> dict[str, Any]:
    """What the child process says at its end; fails with the file that it was at where it has not come there."""
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(directory), *arguments], capture_output=True, text=True,
        timeout=600, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = done.stdout.splitlines() or ["nothing"]
    assert done.returncode == 0, f"{lines[-1]}: ended with {done.returncode}\n{done.stderr[-3000:]}"
    word, _, report = lines[-1].partition(" ")
    assert word == "done", lines[-1]
    return dict(json.loads(report))


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture
def directory() -> Any:
    """In memory, where there is such a place."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as found:
        yield Path(found)


def test_the_valid_programs_have_all_kinds() -> None:
    assert {o.kind for make in PROGRAMS for o in make().operators} == set(KINDS)
    assert sum(len(make().gated) for make in PROGRAMS) >= 4


def test_a_seed_always_makes_the_same_file() -> None:
    assert [mutant(seed) for seed in range(50)] == [mutant(seed) for seed in range(50)]
    assert len({made for _, made in map(mutant, range(50))}) > 45


COUNTS: collections.Counter[tuple[str, str]] = collections.Counter()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_hostile_files_are_refused_or_run(chunk: int, directory: Path) -> None:
    report = in_child(directory, "range", str(chunk * (FILES // CHUNKS)), str(FILES // CHUNKS))
    counts = {(what, outcome): n for what, outcome, n in report["counts"]}
    assert sum(counts.values()) == FILES // CHUNKS
    COUNTS.update(counts)


def test_every_mutation_was_met_and_some_files_ran() -> None:
    if sum(COUNTS.values()) != FILES:
        pytest.skip("runs after all of the tests above, in the same process")
    outcomes: collections.Counter[str] = collections.Counter()
    for (_, outcome), n in COUNTS.items():
        outcomes[outcome] += n
    assert {what for what, _ in COUNTS} == {mutate.__name__ for mutate in MUTATIONS}
    assert outcomes["refused"] > FILES // 3
    assert outcomes["ran"] > FILES // 10
    assert outcomes["loaded"] > 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("preprocessing", "mean", 0), Raw("9" * 400)),
        (("preprocessing", "std", 1), Raw("-" + "9" * 400)),
        (("operators", 0, "attributes", "slope"), Raw("9" * 400)),
        (("operators", 0, "name"), "\ud800"),
        (("operators", 1, "name"), "\x1b[2J"),
        (("operators", 1, "kind"), "\ud800"),
        (("classes", 0), "\x1b]0;title\x07"),
    ],
)
def test_numbers_beyond_floats_and_text_that_steers_terminals(path: Any, value: Any, directory: Path) -> None:
    file = File(0)
    *way, last = path
    parent = file.value(*way)
    if isinstance(last, int):
        parent[last] = value
    else:
        parent.append([last, value])  # the last of two counts
    hostile = directory / "p.thrifty"
    hostile.write_bytes(file.bytes())
    with pytest.raises(ThriftyError) as caught:
        load_program(hostile)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("bomb", [bomb.__name__ for bomb in BOMBS])
def test_small_files_cannot_ask_for_very_much_memory(bomb: str, directory: Path) -> None:
    in_child(directory, "bomb", bomb)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_must_not_happen_would_be_seen(fault: str, directory: Path) -> None:
    with pytest.raises(AssertionError, match=f"file 0 {fault}: ended with"):
        in_child(directory, "fault", fault)


if __name__ == "__main__":
    child(sys.argv[1:])
