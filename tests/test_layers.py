"""The shape of the package: who may import whom, what is public, what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import thrifty
from thrifty.errors import EXTRAS

ROOT = Path(thrifty.__file__).parent

LEVELS = (
    {"errors"},
    {"density", "strength", "data.files"},
    {"files", "decision", "conversion", "machine", "program", "mac_rules"},
    {"gates"},
    {"dynamic", "program_file", "reference", "onnx_export", "zoo.records"},
    {"macs", "graph", "methods.base", "zoo.programs"},
    {"engine", "blocks", "budgets"},
    {"methods.budget"},
    {"methods.antidote", "methods.fbs", "methods.gumbel", "methods.lcnet"},
    {"methods"},
    {"converter", "evaluation", "lowering.nodes"},
    {"tuning", "report"},
    {"lowering.values", "lowering.fusion"},
    {"lowering.call"},
    {"lowering.gating"},
    {"lowering.pointwise"},
    {"lowering.pooling", "lowering.weighted", "lowering.moving"},
    {"lowering.rules"},
    {"lowering.recorder"},
    {"lowering"},
    {"compiler"},
    {"zoo.nets"},
    {"zoo.resolve"},
    {"zoo.store"},
    {"zoo.compilation"},
    {"zoo"},
    {"benchmarking", "benchmarking.peers", "benchmarking.subjects"},
    {"benchmarking.timing"},
    {"benchmarking.bench"},
    {"benchmarking.diagnosis"},
    {"data.images", "data.augment"},
    {"data.sources"},
    {"data.loader", "data"},
    {"train.recipe", "train.schedule", "train.checkpoint", "train.log", "train.sync"},
    {"train.losses", "train.finite", "train.interrupt"},
    {"train.optimiser", "train.build", "train.resume"},
    {"train.trainer", "train"},
    {""},
    {"cli.output", "cli.options"},
    {"cli.sheet"},
    {
        "cli.demo",
        "cli.train",
        "cli.tune",
        "cli.evaluate",
        "cli.convert",
        "cli.picture",
        "cli.predict",
        "cli.zoo",
        "cli.doctor",
        "cli.bench",
        "cli.compile_model",
    },
    {"cli"},
    {"__main__"},
)
"""Modules by level, the lowest first; '' is the package itself. A module imports from levels below its own only."""


NATIVE = "thrifty._native"
"""The compiled part: below every level, for it imports nothing."""


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(path): path for path in sorted(ROOT.rglob("*.py")) if "sample" not in path.parts}


def _level(name: str) -> int:
    found = [level for level, names in enumerate(LEVELS) if name in names]
    assert found, f"{name or 'thrifty'} has no level: add it to LEVELS in {Path(__file__).name}"
    return found[0]


def _imports(path: Path) -> set[str]:
    """Modules of thrifty that a file imports, wherever in the file, but not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "thrifty"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "thrifty":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if NATIVE in {inner, node.module}:
                    continue
                found.add(inner if inner.removeprefix("thrifty.") in FILES else str(node.module))
    return {name.removeprefix("thrifty").removeprefix(".") for name in found}


@pytest.mark.parametrize("name", [name for name in FILES if name != "recipes"])
def test_a_file_imports_from_lower_levels_only(name: str) -> None:
    level = _level(name)
    for imported in _imports(FILES[name]):
        assert _level(imported) < level, f"thrifty.{name} imports thrifty.{imported}, which is not below it"


def test_levels_name_only_what_exists() -> None:
    assert set().union(*LEVELS) <= set(FILES)


def test_importing_thrifty_brings_no_extra() -> None:
    extras = {module for modules in EXTRAS.values() for module in modules}
    code = f"import sys, thrifty; thrifty.zoo.records(); print([m for m in {extras!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented() -> None:
    for name in thrifty.__all__:
        found = getattr(thrifty, name)
        doc = found.__doc__ or ""
        assert doc, name
        assert not doc.startswith(f"{name}("), f"{name} has only what dataclasses write by themselves"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = thrifty.nothing


def test_a_missing_extra_is_named_with_the_line_that_installs_it() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import thrifty\n"
        "for use in (lambda: thrifty.convert, lambda: thrifty.zoo.load('resnet20-cifar10')):\n"
        "    try: use()\n"
        "    except thrifty.ThriftyError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'thrifty[torch]'") == 2, done.stdout


def test_no_public_name_is_also_a_modules() -> None:
    """Importing `thrifty.x` sets `thrifty.x`, whatever it was before: a function of that name would be lost."""
    modules = {name for name in FILES if "." not in name}
    assert modules & set(thrifty.__all__) == {"zoo"}
    code = "import thrifty as t; t.zoo.load('resnet20-cifar10'); print(*map(callable, (t.convert, t.evaluate)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True True"
