"""Program files: what comes back, and what damaged ones lead to."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_programs import random_program
from safetensors import safe_open
from safetensors.numpy import save_file
from test_program import small_program

import thrifty
from thrifty import program_file
from thrifty.errors import ProgramError, ThriftyError
from thrifty.program import Program
from thrifty.program_file import FORMAT, KEY, load_program, save_program


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.thrifty"
    save_program(small_program(), path)
    return path


def assert_same(found: Program, expected: Program) -> None:
    for name in ("buffers", "operators", "output", "flat", "classes", "preprocessing"):
        assert getattr(found, name) == getattr(expected, name), name
    assert dict(found.method or {}) == dict(expected.method or {})
    assert set(found.tensors) == set(expected.tensors)
    for name, array in expected.tensors.items():
        assert found.tensors[name].dtype == array.dtype
        assert np.array_equal(found.tensors[name], array)


@pytest.mark.parametrize("changes", [{}, {"preprocessing": None, "classes": (), "method": None, "flat": False}])
def test_a_file_gives_back_the_program(tmp_path: Path, changes: dict[str, Any]) -> None:
    program = small_program(**changes)
    save_program(program, tmp_path / "sub" / "p.thrifty")
    assert_same(load_program(tmp_path / "sub" / "p.thrifty"), program)


def test_guards_and_gates_come_back(tmp_path: Path) -> None:
    for seed in range(20):
        program = random_program(seed, 10)
        save_program(program, tmp_path / "p.thrifty")
        assert_same(load_program(tmp_path / "p.thrifty"), program)
        with safe_open(tmp_path / "p.thrifty", "numpy") as file:
            operators = json.loads(file.metadata()[KEY])["operators"]
        guards = [operator.guard for operator in program.operators]
        assert [item.get("guard") for item in operators] == guards
        assert sum("guard" in item for item in operators) == sum(guard is not None for guard in guards)


def test_files_of_version_1_are_read(file: Path) -> None:
    assert_same(load_program(rewritten(file, lambda d, _: d.update(format=1))), small_program())


def rewritten(file: Path, change: Any) -> Path:
    """The file with another description."""
    with safe_open(file, "numpy") as old:
        description = json.loads(old.metadata()[KEY])
        tensors = {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118 (not a dict)
    text = change(description, tensors)
    text = text if isinstance(text, str) else None
    save_file(tensors, file, metadata={KEY: json.dumps(description) if text is None else text})
    return file


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The program in a file without weights that the other file has, and that other file."""
    monkeypatch.setattr(program_file, "SMALL", 50)
    program = small_program()
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 2, (4, 1, 1, 1)) * [[[[1]]], [[[-1]]], [[[0]]], [[[1]]]]
    given = rng.standard_normal((2, 4, 4, 3, 3)).astype(np.float32)
    tensors = dict(program.tensors) | {"b.weight": (given[1] * scale).astype(np.float32)}
    weights = {"other": given[0], "conv": given[1], "a": program.tensors["a.weight"]}
    save_file(weights, tmp_path / "weights.safetensors")
    save_program(replace(program, tensors=tensors), tmp_path / "p.thrifty", weights)
    return tmp_path / "p.thrifty", tmp_path / "weights.safetensors"


def test_weights_of_another_file_are_not_written_again(beside: tuple[Path, Path]) -> None:
    file, weights = beside
    with safe_open(file, "numpy") as held:
        shapes = {name: held.get_tensor(name).shape for name in held.keys()}  # noqa: SIM118 (not a dict)
    assert (shapes["a.weight"], shapes["b.weight"], shapes["fc.weight"]) == ((4,), (4,), (5, 4))
    found = load_program(file, weights)
    np.testing.assert_array_equal(found.tensors["a.weight"], small_program().tensors["a.weight"])
    assert not found.tensors["b.weight"][2].any()
    with safe_open(weights, "numpy") as held:
        given = held.get_tensor("conv")
    ratios = found.tensors["b.weight"][[0, 1, 3]] / given[[0, 1, 3]]
    np.testing.assert_allclose(ratios, np.broadcast_to(ratios[:, :1, :1, :1], ratios.shape), rtol=1e-6)
    save_program(found, file)
    assert_same(load_program(file), found)
    assert_same(load_program(file, weights), found)


def test_without_the_other_file_the_error_says_what_to_do(beside: tuple[Path, Path], tmp_path: Path) -> None:
    file, weights = beside
    with pytest.raises(ProgramError, match=r"no weights of its own.*Load the model by its name"):
        load_program(file)
    with pytest.raises(ProgramError, match=str(file)):
        load_program(file, tmp_path / "nothing")
    save_file({"conv": np.zeros((5, 4, 3, 3), np.float32), "a": np.zeros((4, 3, 3, 3), np.float32)}, weights)
    with pytest.raises(ProgramError, match=r"scales of b\.weight do not fit conv"):
        load_program(file, weights)
    save_file({"conv": np.full((4, 4, 3, 3), np.nan, np.float32), "a": np.zeros((4, 3, 3, 3), np.float32)}, weights)
    with pytest.raises(ProgramError, match=r"b\.weight in .* has NaN"):
        load_program(file, weights)


@pytest.mark.parametrize("scaled", [["b.weight"], {"b.weight": 3}, {"b.weight": "gone"}, {"gone": "conv"}, 5])
def test_wrong_scales_are_refused(beside: tuple[Path, Path], scaled: Any) -> None:
    file, weights = beside
    with pytest.raises(ProgramError, match=str(file)):
        load_program(rewritten(file, lambda d, _: d.update(scaled=scaled)), weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, _: d.update(format=FORMAT + 1), "newer thrifty.*Upgrade"),
        (lambda d, _: d.update(format="1"), "format version is '1'"),
        (lambda d, _: d.pop("format"), "no format version"),
        (lambda d, _: d.pop("buffers"), "damaged"),
        (lambda d, _: d.update(operators=[{}]), "damaged"),
        (lambda d, _: d.update(operators=3), "damaged"),
        (lambda d, _: d.update(operators=[{}] * 100_001), "100001 operators"),
        (lambda d, _: d.update(flat="yes"), "flat"),
        (lambda d, _: d.update(classes="abcde"), "classes"),
        (lambda d, _: d.update(method=[1]), "method"),
        (lambda d, _: d.update(preprocessing={"mean": [1, 2, 3]}), "damaged"),
        (lambda d, _: d["operators"][0].update(inputs=[2]), "damaged"),
        (lambda d, _: d["operators"][0]["attributes"].update(winners=10**30), "damaged"),
        (lambda d, _: d["operators"][1].update(tensors=["a"]), "damaged"),
        (lambda d, _: d["operators"][1].update(guard=1), "layer_gate"),
        (lambda d, _: d["operators"][1].update(guard="yes"), "guard is 'yes'"),
        (lambda d, _: d["operators"][1].update(guard=10**30), "damaged"),
        (lambda d, _: d["buffers"].__setitem__(1, [4, 2**40, 2**40]), "damaged"),
        (lambda _d, t: t["fc.bias"].__setitem__(0, np.nan), "fc.bias in .* has NaN"),
        (lambda _d, t: t["fc.bias"].__setitem__(0, np.inf), "fc.bias in .* has NaN or inf"),
        (lambda _d, t: t.update({"fc.bias": t["fc.bias"].astype(np.float64)}), "float32 or int32 array, not float64"),
        (lambda _d, t: t.update({"fc.bias": t["fc.bias"][:3].copy()}), "fc"),
        (lambda _d, t: t.pop("fc.bias"), "not among the tensors"),
        (lambda _d, _t: "[" * 100_000, "damaged"),
        (lambda _d, _t: "[]", "no format version"),
        (lambda _d, _t: "{", "damaged"),
    ],
)
def test_wrong_descriptions_are_refused(file: Path, change: Any, message: str) -> None:
    with pytest.raises(ProgramError, match=message) as caught:
        load_program(rewritten(file, change))
    assert str(file) in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(ProgramError, match="not written by thrifty's engine"):
        load_program(path)
    with pytest.raises(ProgramError, match="there is no file"):
        load_program(tmp_path / "nothing.thrifty")
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(ProgramError, match="there is no file"):
            thrifty.load(name)
    with pytest.raises(ProgramError, match="is no file"):
        load_program(tmp_path)
    for content in (b"", b"x", b"\xff" * 100, b"\x08" + b"\0" * 7 + b"{}      "):
        path.write_bytes(content)
        with pytest.raises(ProgramError):
            load_program(path)


def test_truncated_files_are_refused(file: Path) -> None:
    content = file.read_bytes()
    for length in (*range(0, len(content), 97), len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ProgramError):
            load_program(file)


def test_flipped_bits_give_an_error_or_a_valid_program(file: Path) -> None:
    content, rng = file.read_bytes(), random.Random(0)
    header = int.from_bytes(content[:8], "little") + 8
    refused = 0
    for _ in range(1500):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(header)] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        try:
            assert isinstance(load_program(file), Program)
        except ProgramError:
            refused += 1
    assert 500 < refused < 1500


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = file.read_bytes()

    def fail(_tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(program_file, "save_file", fail)
    with pytest.raises(ThriftyError, match="No space left"):
        save_program(small_program(), file)
    assert file.read_bytes() == old
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    tensors = dict(small_program().tensors)
    tensors["b.bias"] = np.full(4, np.nan, np.float32)
    with pytest.raises(ProgramError, match=r"b\.bias in .* has NaN"):
        save_program(small_program(tensors=tensors), tmp_path / "p.thrifty")
    assert not list(tmp_path.iterdir())


def test_large_finite_weights_are_fine(tmp_path: Path) -> None:
    tensors = dict(small_program().tensors)
    tensors["b.bias"] = np.full(4, 3e38, np.float32)
    save_program(small_program(tensors=tensors), tmp_path / "p.thrifty")
    assert (load_program(tmp_path / "p.thrifty").tensors["b.bias"] == np.float32(3e38)).all()


def test_loading_is_quick_and_needs_no_torch(file: Path) -> None:
    code = f"import sys, thrifty; thrifty.load({str(file)!r}); print('torch' in sys.modules)"

    def seconds(code: str) -> tuple[float, str]:
        """Of the CPU: the machine may have other work."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout.strip()

    starts, alone = [], []
    for _ in range(5):
        spent, torch_loaded = seconds(code)
        assert torch_loaded == "False"
        starts.append(spent)
        alone.append(seconds("import numpy")[0])
    # A machine on which NumPy alone takes most of the time (its threads, a slow disk) says nothing of ours.
    bound = max(0.3, 1.7 * min(alone))
    assert min(starts) < bound, (
        f"the quickest start took {min(starts):.2f} s of CPU time, NumPy alone {min(alone):.2f} s"
    )


def test_an_engine_saves_the_densities_that_are_set(file: Path, tmp_path: Path) -> None:
    engine = thrifty.load(file)
    engine.set_density(1.0)
    engine.save(tmp_path / "full.thrifty")
    again = thrifty.load(tmp_path / "full.thrifty")
    assert again.program.operators[0].attributes["winners"] == 4
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32)
    assert np.array_equal(again(x), engine(x))
