"""What all tests share: threads, seeds, and the coverage that conversions reach, told at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from train_support import write_folder, write_teacher

COVERAGE = pytest.StashKey[dict[str, str]]()
PARITY = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    config.stash[COVERAGE] = {}
    config.stash[PARITY] = {}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state, and leaves threads as they were and denormals as they are."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)  # commands and other engines set it for good


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of three classes, in a directory of one directory a class."""
    return write_folder(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small trained network."""
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture
def report_coverage(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Tells a network's coverage at the end of the run."""
    return request.config.stash[COVERAGE].__setitem__


@pytest.fixture
def report_parity(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Tells at the end of the run how near the engine comes to torch on a network."""
    return request.config.stash[PARITY].__setitem__


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    titles = {COVERAGE: "share of MACs that convert gates", PARITY: "normalised error of the engine against torch"}
    for key, title in titles.items():
        lines = config.stash[key]
        if lines and config.get_verbosity() > -2:
            terminalreporter.section(title)
            for name, text in lines.items():
                terminalreporter.write_line(f"{name:36} {text}")
